"""Settings of align/assess.py. Every field is a flag; values are checked when the object is created."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from align.common.checks import check, check_least
from align.common.hardware import Precision
from align.encoders.trust import check_trust, split_revision
from align.sources.config import SourceFlags


@dataclass(frozen=True, kw_only=True)
class AssessConfig(SourceFlags):
    """Rank vision encoders, their layers and text encoders on a few thousand pairs, before any long training."""

    REPLACES: ClassVar[dict[str, tuple[str, ...]]] = {"vision": ("random_weights",)}

    data: str
    """Image-caption pairs: a folder, a file or a quoted glob ('shards/*.tar'), as for align/encode.py."""
    output: str
    """Folder for features, scores, tables and figures. The same command resumes an interrupted run or adds further candidates."""
    vision: tuple[str, ...]
    """Vision encoders: hub ids, `id@COMMIT`, local folders or `embedded:` ids."""
    text: tuple[str, ...]
    """Text encoders: hub ids, `id@COMMIT`, local folders or `embedded:` ids."""
    captions: tuple[str, ...]
    """Caption columns. A column may hold a list. All captions of an image are used."""
    layers: tuple[str, ...] = ("last",)
    """Layers of each vision encoder: numbers (-1 is the last), `last` or `all`. Layers that an encoder does not have are skipped."""
    text_layers: tuple[str, ...] = ("last",)
    """Layers of each text encoder: numbers, `last` or `all`. Each layer needs its own forward pass."""
    features: tuple[Literal["auto", "cls", "mean", "cls_mean"], ...] = ("auto",)
    """Pooling, as in align/encode.py; auto is cls_mean. Encoders without a CLS token have only the mean."""
    random_weights: tuple[str, ...] | None = None
    """Add a baseline: these vision encoders (no names: all of them) with random weights, last layer. None: no baseline."""
    labelled: str | None = None
    """Images with classes, for weighted k-NN and the linear probe: a folder of folders, tars, parquet ... None: skip both scores."""
    label_column: str = "label"
    """Column with the class. `label` is the folder's name; CLIP_benchmark's tars have `cls`."""
    trained: tuple[str, ...] = ()
    """Finished runs of align/train.py on stores of this assessment. Their recall is added as a score for the others to predict."""
    worth: int = 1
    """Of how many of the best candidates to tell what their alignment is worth to an MLLM, in captioned images (about a minute each);
    by each matching run of --trained, too, on images that it has not seen. 0: of none."""
    rows: int = 5000
    """Pairs to sample from the data, in random pieces of up to 64 neighboring rows."""
    labelled_rows: int = 2000
    """Labelled images to sample, in the same way."""
    test_rows: int = 1000
    """Test images of the probes, at most a quarter of all. Half as many validation images decide when a probe has converged."""
    similarity_rows: int = 2000
    """Images compared by CKA and mutual k-NN. Memory grows with the square of this number."""
    patch_images: int = 1000
    """Images whose patches are kept (averaged to at most 7 x 7) and compared. 0: skip this score."""
    neighbors: int = 10
    """Neighbors of the mutual k-NN score."""
    class_neighbors: int = 20
    """Neighbors that vote in weighted k-NN."""
    probe_width: int = 2048
    """Aligned width E of the probe's linear heads."""
    probe_batch: int = 512
    """Pairs in a batch of the probe."""
    probe_lr: float = 1e-3
    """Constant learning rate of the probe (AdamW)."""
    probe_steps: int = 600
    """Maximum steps of a probe. It stops earlier when its validation recall converges."""
    probe_every: int = 20
    """Steps between two validations."""
    probe_patience: int = 4
    """Validations without a better recall before a probe counts as converged."""
    resamples: int = 1000
    """Bootstrap resamples for each interval."""
    precision: Precision = "auto"
    """Arithmetic of encoders and probes (auto: bf16 where the hardware has it)."""
    batch_size: int = 32
    """Images per forward pass."""
    text_batch_size: int = 64
    """Captions per forward pass."""
    seed: int = 0
    """Seed of the sample, splits, probes, resamples and random weights."""
    trust_remote_code: bool = False
    """Run code that ships with an encoder, only for encoders given as `id@COMMIT` and for local folders."""
    dry_run: bool = False
    """List the candidates and the disk space they need; encode nothing."""

    def __post_init__(self) -> None:
        for name in ("vision", "text", "captions", "layers", "text_layers", "features"):
            values = getattr(self, name)
            check(bool(values) and len(set(values)) == len(values), f"--{name} {' '.join(values)}", "give at least one, each once")
        for flag, layers in (("--layers", self.layers), ("--text-layers", self.text_layers)):
            for layer in layers:
                check(bool(re.fullmatch(r"-?\d+|last|all", layer)), f"{flag} {layer}", "is neither a number nor `last` nor `all`")
        strange = [name for name in self.random_weights or () if name not in self.vision]
        check(not strange, f"--random-weights {' '.join(strange)}", "must be among --vision")
        check_least(self, rows=100, labelled_rows=100, test_rows=100, similarity_rows=100, resamples=100, neighbors=1, class_neighbors=1)
        check_least(self, probe_width=1, probe_batch=2, probe_steps=1, probe_every=1, probe_patience=1)
        check_least(self, batch_size=1, text_batch_size=1, workers=0, seed=0, worth=0)
        check(self.patch_images == 0 or self.patch_images >= 100, f"--patch-images {self.patch_images}", "is 0 (none) or at least 100")
        check_trust(self.trust_remote_code, *map(split_revision, (*self.vision, *self.text)))
        check(self.probe_lr > 0, f"--probe-lr {self.probe_lr}", "must be above 0")
