"""Opens the data of a training run, from stores or from images with the encoders in the loop, and builds the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from align.common.checks import batch_for, check_divides
from align.common.errors import UsageError
from align.common.fingerprints import fingerprint_digest
from align.common.hardware import resolve_precision
from align.encoders.text import load_text_encoder
from align.encoders.vision import load_vision_encoder
from align.features.store import FeatureStore
from align.model.dual_encoder import SailConfig, SailModel
from align.runtime.runs import JsonLines
from align.sources.gate import Limits
from align.sources.plan import Plan, plan
from align.sources.trial import try_samples
from align.training.config import TrainConfig
from align.training.online import SHARD_ROWS, OnlinePairs
from align.training.pairs import PairedFeatures, open_pairs
from align.training.start import start_from_correlations


@dataclass
class TrainingData:
    """Training and validation pairs, the arguments that load the encoders, and the folder of the text encoder's tokenizer."""

    pairs: PairedFeatures | OnlinePairs
    held_out: PairedFeatures | OnlinePairs | None
    loaders: dict[str, dict[str, Any]]
    tokenizer: Path
    remarks: tuple[str, ...] = ()  # what the user should know about how --data was read
    inputs: dict[str, str] = field(default_factory=dict)  # by field of the config: hashes of what its paths hold

    def hold_out(self, rows: int, seed: int, tell: Callable[[str], None]) -> None:
        """Split `rows` images off for validation, with all their pairs; a fifth if that is more than half, and `tell` is told of it."""
        if 2 * rows > len(self.pairs):
            asked, rows = rows, max(1, len(self.pairs) // 5)
            tell(f"--val-rows {asked} is more than half of the {len(self.pairs)} pairs: {rows} are held out")
        self.held_out = self.pairs.split(rows, seed)
        if len(self.held_out) != rows:
            tell(f"{rows} images are held out with all their {len(self.held_out)} pairs")

    def list_rejects(self, folder: Path, rank: int, step: int) -> None:
        """From now on list rejected samples in files of `folder`. Entries of a killed run after `step` are removed."""
        for pairs, name in ((self.pairs, "rejects"), (self.held_out, "rejects-val")):
            if isinstance(pairs, OnlinePairs):
                pairs.resume(JsonLines(folder / f"{name}-{rank}.jsonl"), step)


def from_stores(config: TrainConfig) -> TrainingData:
    """Return the training data of the feature stores."""
    images, captions = config.images[0], config.captions[0].split("+")[0]
    held_out = open_pairs((config.val_images,), config.val_captions) if config.val_images else None
    loaders = {"vision": FeatureStore(images).header.loader, "text": FeatureStore(captions).header.loader}
    pairs = open_pairs(config.images, config.captions, config.positives)
    named = {"images": config.images, "captions": _stores(config.captions)}
    named |= {"val_images": (config.val_images,), "val_captions": _stores(config.val_captions)} if config.val_images else {}
    inputs = {f"{name}[{number}]": FeatureStore(store).digest for name, stores in named.items() for number, store in enumerate(stores)}
    return TrainingData(pairs, held_out, loaders, Path(captions) / "tokenizer", inputs=inputs)


def _stores(slots: Sequence[str]) -> list[str]:
    return [store for slot in slots for store in slot.split("+")]


def from_samples(config: TrainConfig, state: PartialState) -> TrainingData:
    """Return the training data of --data: the files, of which some samples are tried, then both encoders.

    Only the first process lists the files.
    """
    plans, remarks = planned(config, state)
    options: dict[str, Any] = {"precision": resolve_precision(config.precision, state.device)}
    if config.head == "token":
        options["feature"] = "tokens"
    vision_spec, text_spec = config.specs({"image_size": config.image_size}, {}, **options)
    assert config.data and vision_spec and text_spec
    vision, text = load_vision_encoder(vision_spec, state.device), load_text_encoder(text_spec, state.device)
    loaders = {"vision": vision.spec.stored(), "text": text.spec.stored()}
    inputs = {"vision": fingerprint_digest(vision.fingerprint), "text": fingerprint_digest(text.fingerprint)}
    opened = []
    for name, made in plans.items():
        pairs = OnlinePairs(
            config.source(str(getattr(config, name))), made, config.captions, vision, text, seed=config.seed,
            augment=config.augment and name == "data", batch_size=config.encoder_batch_size, workers=config.workers,
            max_reject_fraction=config.max_reject_fraction, positives=config.positives,
        )  # fmt: skip
        opened.append(pairs)
        if state.is_main_process:  # which alone compares
            inputs[name] = pairs.digest()
    tokenizer = Path(config.output) / "tokenizer"
    if state.is_main_process:
        text.tokenizer.save_pretrained(tokenizer)
    return TrainingData(opened[0], opened[1] if len(opened) > 1 else None, loaders, tokenizer, tuple(remarks), inputs)


def planned(config: TrainConfig, state: PartialState) -> tuple[dict[str, Plan], list[str]]:
    """Return the plans of `data` and, if given, `val_data`, kept in the run folder, and what the user should know about them."""
    plans, remarks = dict[str, Plan](), list[str]()
    for name, data in (("data", config.data), ("val_data", config.val_data)):
        if data is None:
            continue
        source, folder = config.source(data), Path(config.output) / name.replace("_", "-")
        tried = list[str]()
        if state.is_main_process or config.dry_run:  # each process of a dry run has a view of its own
            made = plan(source, SHARD_ROWS, config.captions)
            limits = Limits(gray_bits=config.gray_bits)
            if begun := (folder / "plan.parquet").exists():
                made.keep(folder, "files or columns")  # refuses another one
            tried = try_samples(source, made, config.captions, True, limits, config.max_reject_fraction)
            if not begun:
                made.keep(folder, "files or columns")
        state.wait_for_everyone()
        plans[name] = Plan.load(folder)
        remarks += [f"{data}: {plans[name].counted()}", *plans[name].notes, *tried]
    return plans, remarks


def fit_batch(asked: int, pairs: int, processes: int, tell: Callable[[str], None]) -> int:
    """Return the pairs of a step: `asked`, or fewer where the data has fewer; then `tell` is called with a sentence."""
    batch_size = batch_for(asked, pairs, steps=1)
    if batch_size < asked:
        tell(
            f"--batch-size {asked} is more than the {pairs} pairs: each step takes {batch_size}. Give a smaller --batch-size to choose it, "
            "and with a few thousand pairs start from align/recipes/few_photos.yaml"
        )
        check_divides(batch_size, processes)
    return batch_size


def build_model(config: TrainConfig, data: TrainingData) -> SailModel:
    """Return the model at step 0: heads of the configured type between the feature widths and E, with their initial weights."""
    pairs = data.pairs
    vision, text = pairs.image_fingerprint, pairs.text_fingerprint
    tokens = vision.get("feature") == "tokens"
    if tokens != (config.head == "token") or tokens != (text.get("pooling") == "tokens"):
        held = "all tokens" if tokens else "pooled features"
        raise UsageError(f"--head {config.head}, but the image store holds {held}; token heads need stores encoded with --feature tokens")
    settings = SailConfig(
        vision=data.loaders["vision"], text=data.loaders["text"], vision_fingerprint=vision, text_fingerprint=text,
        vision_width=pairs.image_width // vision["tokens"] if tokens else pairs.image_width, vision_cls=vision.get("has_cls", True),
        text_width=pairs.text_width // text["max_length"] if tokens else pairs.text_width, width=config.width,
        head=config.head, expansion=config.expansion, dropout=config.dropout, log_scale=config.log_scale,
        bias=config.bias if config.loss == "sigmoid" else None, precision=vision.get("precision", "fp32"),
    )  # fmt: skip
    model = SailModel(settings).initialize(config.seed)
    if config.start == "cca":
        start_from_correlations(model, pairs)
    return model
