"""Draws the samples and encodes them once with every encoder; the features go to stores in one folder.

FOLDER/pairs/plan.parquet       the sample that all encoders see (FOLDER/labelled likewise)
FOLDER/pairs/ENCODER/...        stores of `align.features.layers`; captions-COLUMN for a text encoder
FOLDER/random/ENCODER-random    encoders with random weights
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from align.assessment.candidates import chosen_features, chosen_layers, folder_name, random_copy, sampled_plan
from align.assessment.config import AssessConfig
from align.common.errors import UsageError
from align.common.files import human_bytes
from align.common.fingerprints import fingerprint_digest
from align.encoders.spec import TextSpec, VisionSpec
from align.encoders.text import load_text_encoder
from align.encoders.trust import split_revision
from align.encoders.vision import load_vision_encoder
from align.features.extract import Extraction
from align.features.layers import LayerExtraction, LayerFeatures
from align.features.store import FeatureStore
from align.runtime.console import Progress
from align.sources.plan import Plan, Source


class Sample(NamedTuple):
    """Rows that all encoders see, and the folder of their stores."""

    source: Source
    plan: Plan
    folder: Path

    def store(self, encoder: str, name: str) -> FeatureStore:
        """Return one store of an encoder, such as `layer-09`."""
        return FeatureStore(self.folder / encoder / name)


class EncodedVision(NamedTuple):
    """A vision encoder whose stores are filled, and the layers and features to compare."""

    name: str
    layers: list[int]
    features: list[str]
    has_cls: bool
    random: bool


def draw_samples(config: AssessConfig) -> dict[str, Sample]:
    """Return the sample `pairs`, and the sample `labelled` if labelled images are given."""

    def drawn(name: str, source: Source, rows: int, columns: Sequence[str]) -> Sample:
        folder = Path(config.output) / name
        return Sample(source, sampled_plan(source, rows, config.seed, columns, folder), folder)

    source = config.source(config.data)
    samples = {"pairs": drawn("pairs", source, config.rows, config.captions)}
    if config.labelled:
        source = replace(config.source(config.labelled), layout="auto", image_root=None)
        samples["labelled"] = drawn("labelled", source, config.labelled_rows, (config.label_column,))
    return samples


def encode_visions(
    config: AssessConfig, samples: Mapping[str, Sample], options: dict[str, Any], device: torch.device, console: Console
) -> list[EncodedVision]:
    """Fill the stores of all vision encoders, one encoder in memory at a time. `options` go to every VisionSpec."""
    found, seen = [], dict[str, str]()
    floors = () if config.random_weights is None else config.random_weights or config.vision
    for name, random in (*itertools.product(config.vision, [False]), *itertools.product(floors, [True])):
        if random:
            name = random_copy(name, Path(config.output) / "random" / folder_name(name, True), config.seed)
        encoder = load_vision_encoder(VisionSpec(*split_revision(name), **options), device)
        if _known(encoder.fingerprint, folder_name(name), seen, console):
            continue
        layers = chosen_layers(("last",) if random else config.layers, name, encoder.backbone.first, encoder.layers)
        features = chosen_features(("auto",) if random else config.features, encoder.has_cls)
        found.append(EncodedVision(folder_name(name), layers, features, encoder.has_cls, random))
        for kind, sample in samples.items():
            patches = config.patch_images if kind == "pairs" else 0
            outputs, folder = LayerFeatures(encoder, layers, with_patches=patches > 0), sample.folder / folder_name(name)
            workers: dict[str, Any] = {"batch_size": config.batch_size, "workers": config.workers}
            _fill(LayerExtraction(sample.source, sample.plan, folder, outputs, patches, **workers), config, console)
    return found


def encode_texts(
    config: AssessConfig, pairs: Sample, options: dict[str, Any], device: torch.device, console: Console, taken: Sequence[str]
) -> list[str]:
    """Fill the caption stores of all text layers, one model in memory at a time. Return their names; UsageError if one is in `taken`."""
    found, seen = list[str](), dict[str, str]()
    for name in config.text:
        spec = TextSpec(*split_revision(name), **options)
        text: Any = load_text_encoder(spec, device)
        if _known(text.fingerprint, folder_name(name), seen, console):
            continue
        last: int = text.layers
        if not last and set(config.text_layers) - {"last", "all", "-1"}:
            raise UsageError(f"{name}: its blocks are not one list, so its inner layers cannot be read; give --text-layers last")
        for layer in reversed(chosen_layers(config.text_layers, name, 1, last) if last else [last]):
            if layer != last:
                text = None  # freed before the next is loaded
                text = load_text_encoder(replace(spec, layer=layer), device)
            found.append(folder_name(name) + ("" if layer == last else f"-layer-{layer:02d}"))
            refuse_equal_names([*taken, *found])
            how: dict[str, Any] = {"columns": config.captions, "text_batch_size": config.text_batch_size, "workers": 0}
            _fill(Extraction(pairs.source, pairs.plan, pairs.folder / found[-1], text=text, **how), config, console)
    return found


def _known(fingerprint: dict[str, Any], name: str, seen: dict[str, str], console: Console) -> bool:
    """Return whether an encoder with the same weights and preprocessing was seen; if so say it, else add this one to `seen`."""
    first = seen.setdefault(fingerprint_digest(fingerprint), name)
    if first != name:
        console.print(f"{name} is the same encoder as {first}: it is assessed once, as {first}")
    return first != name


def refuse_equal_names(names: Sequence[str]) -> None:
    """Raise UsageError if two candidates have the same name: they would share a folder."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UsageError(f"two candidates would share a name ({', '.join(repeated)}); rename one folder")


def _fill(job: Extraction, config: AssessConfig, console: Console) -> None:
    """Encode the missing shards of one folder and print the number of rejects. A dry run only prints what is missing."""
    if config.dry_run:
        console.print(f"{job.output}: {len(job.writers)} stores, {human_bytes(job.predicted_bytes())} to encode")
        return
    rows = sum(job.plan.lengths[shard] for shard in job.pending())
    rejects = job.fill(Progress(console, f"{job.output.relative_to(config.output)}:", rows))
    if len(rejects):
        console.print(f"{job.output}: {len(rejects)} rejected (each in rejects.parquet)")
