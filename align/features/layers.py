"""Features of many candidates from one pass over the images: a store for each layer, and one for a sample of its patches.

    folder/plan.parquet               a random sample of the source's rows, in pieces of `SHARD_ROWS` neighbors
    folder/ENCODER/layer-09           [cls ; mean of patches], or the mean where there is no CLS: what align/encode.py writes
    folder/ENCODER/patches-09         the patches of the first images, averaged to a small grid (side by side in one row)
    folder/ENCODER/captions-COLUMN    of a text encoder

A layer's store serves the features `cls`, `mean` and `cls_mean` (slices of its columns) and is a store that align/train.py takes.
Shapes: `B` batch, `P` patches, `D` encoder width, `N` rows.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoConfig, AutoModel

from align.common.errors import DataError, UsageError
from align.common.files import TEMPORARY, put_in_place
from align.common.fingerprints import compare_fingerprints
from align.common.reject_codes import RejectedRow
from align.common.seeds import generator
from align.encoders.loading import VISION_FILES, opening, recorded_id, resolve_encoder
from align.encoders.trust import split_revision
from align.encoders.vision import VisionEncoder, load_transform
from align.features.extract import Extraction
from align.features.store import FeatureStore, StoreHeader, StoreWriter
from align.sources.plan import Plan, Source, open_unit, plan

SHARD_ROWS = 64  # neighbors in the source that are drawn together
PATCH_SIDE = 7  # patches are averaged to at most 7 x 7 before their neighborhoods are compared


def sampled_plan(source: Source, rows: int, seed: int, columns: Sequence[str], folder: Path) -> Plan:
    """Return a plan of about `rows` rows (or all), random pieces of neighbors in random order, saved in `folder`.

    The pieces are of `SHARD_ROWS` rows, or of fewer, so that there are 30 of them. A pure function of the source, `rows` and
    `seed`. FingerprintError if `folder` holds a plan of something else.
    """
    whole = plan(source, min(SHARD_ROWS, max(1, rows // 30)), columns)
    order = generator(seed, 7).permutation(len(whole.shards))
    lengths = np.array(whole.lengths)[order]
    chosen = order[: int(np.searchsorted(lengths.cumsum(), rows)) + 1]
    table = whole.shards.take(pa.array(chosen)).set_column(0, whole.shards.schema.field(0), pa.array(range(len(chosen)), pa.int32()))
    digest = xxhash.xxh3_128(f"{whole.digest} {chosen.tolist()}".encode()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "plan.parquet").exists():
        compare_fingerprints({"data": digest}, {"data": Plan.load(folder).digest}, f"{folder} (files, columns, --rows or --seed)")
    else:
        Plan(whole.layout, table, whole.listing, digest).save(folder)
    return Plan.load(folder)


def folder_name(encoder: str, random: bool = False) -> str:
    """Return the name that stands for an encoder in folders and tables: its id, or its folder's name, in plain letters."""
    name = re.sub(r"[^A-Za-z0-9._]+", "-", recorded_id(split_revision(encoder)[0]).removeprefix("embedded:")).strip("-.")
    return f"{name}-random" if random else name


def text_name(encoder: str, layer: int, last: int) -> str:
    """Return the name of a text encoder's layer in folders and tables; its last layer has the encoder's own."""
    return folder_name(encoder) + ("" if layer == last else f"-layer-{layer:02d}")


def random_copy(name: str, folder: Path, seed: int) -> str:
    """Return a folder with the encoder `name` whose weights are its architecture's initial ones, drawn by `seed`: the floor.

    The folder is like any other encoder's: it can be encoded with, trained on and compared.
    """
    if folder.exists():
        return str(folder)
    temporary = folder.with_name(f"{folder.name}{TEMPORARY}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    name, revision = split_revision(name)
    source = resolve_encoder(name, revision, trust_remote_code=False)
    with opening(name, VISION_FILES), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(AutoConfig.from_pretrained(source, revision=revision), dtype=torch.float32)
        transform = load_transform(name, revision=revision)
        normalizers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        if normalizers:  # their statistics are not drawn but measured; without, activations die out over the layers
            size = transform(Image.new("RGB", (64, 64))).shape
            for module in normalizers:
                module.momentum = 1.0
            with torch.no_grad():
                model.train()(torch.randn(8, *size))
        model.save_pretrained(temporary)
        if not transform.is_timm:  # timm's is in the config
            transform.processor.save_pretrained(temporary)
    put_in_place(temporary, folder, "random")
    return str(folder)


def chosen_layers(wanted: Sequence[str], encoder: str, first: int, last: int) -> list[int]:
    """Return the layer numbers that `wanted` (numbers, `last`, `all`) means for an encoder; those it does not have are left out."""
    found: set[int] = set()
    for word in wanted:
        if word == "all":
            found |= set(range(1, last + 1))
        else:
            number = last if word == "last" else int(word)
            number = number if number >= 0 else last + 1 + number
            found |= {number} if first <= number <= last else set()
    if not found:
        raise UsageError(f"{encoder} has layers {first} to {last}, none of {', '.join(wanted)}; add `last`")
    return sorted(found)


def chosen_features(wanted: Sequence[str], has_cls: bool) -> list[str]:
    """Return the feature modes that `wanted` means for an encoder; without a CLS token there is only the mean."""
    if not has_cls:
        return ["mean"]
    return list(dict.fromkeys("cls_mean" if word == "auto" else word for word in wanted))


def feature_columns(features: np.ndarray, feature: str, has_cls: bool) -> np.ndarray:
    """Return the columns (N, F) of a layer's rows (N, 2D), or (N, D) of an encoder without CLS, that are its `feature`."""
    if not has_cls or feature == "cls_mean":
        return features
    width = features.shape[1] // 2
    return features[:, :width] if feature == "cls" else features[:, width:]


@dataclass(frozen=True)
class LayerShape:
    """What one layer gives: width D and the grid of its patches, as it is and as it is kept."""

    width: int
    grid: tuple[int, int]
    kept: tuple[int, int]


class LayerFeatures:
    """Called with pixels, returns the features and pooled patches of several layers side by side, float16."""

    def __init__(self, encoder: VisionEncoder, layers: Sequence[int], with_patches: bool) -> None:
        self.encoder, self.layers, self.with_patches, self.transform = encoder, layers, with_patches, encoder.transform
        size = encoder.transform(Image.new("RGB", (64, 64))).shape
        self.shapes = {}
        for layer, (_, patches) in zip(layers, encoder.encode_layers(torch.zeros(1, *size), layers), strict=True):
            rows = round((patches.shape[1] * encoder.patch_grid[0] / encoder.patch_grid[1]) ** 0.5)  # of the last layer's proportions
            grid = (rows, patches.shape[1] // rows)
            assert grid[0] * grid[1] == patches.shape[1], f"layer {layer}: {patches.shape[1]} patches are no grid"
            self.shapes[layer] = LayerShape(patches.shape[2], grid, (min(PATCH_SIDE, grid[0]), min(PATCH_SIDE, grid[1])))

    def widths(self, patches: bool) -> dict[int, int]:
        """Return, per layer, the columns of its features or of its pooled patches."""
        factor = 2 if self.encoder.has_cls else 1
        return {k: shape.width * (shape.kept[0] * shape.kept[1] if patches else factor) for k, shape in self.shapes.items()}

    @property
    def feature_width(self) -> int:
        """Columns of one row."""
        return sum(self.widths(False).values()) + (sum(self.widths(True).values()) if self.with_patches else 0)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return (B, W): every layer's [cls ; mean of patches] (or mean), then every layer's patches if they are wanted."""
        pooled, kept = [], []
        for layer, (cls, patches) in zip(self.layers, self.encoder.encode_layers(pixels, self.layers), strict=True):
            pooled.append(patches.mean(1) if cls is None else torch.cat([cls, patches.mean(1)], dim=-1))
            if not self.with_patches:
                continue
            shape = self.shapes[layer]
            map_ = patches.transpose(1, 2).unflatten(2, shape.grid)  # (B, D, rows, columns)
            kept.append(functional.adaptive_avg_pool2d(map_, shape.kept).flatten(2).transpose(1, 2).flatten(1))
        return torch.cat([*pooled, *kept], dim=1).half()


class LayerStores:
    """Several stores that are written as one: each gets its columns of the rows; the patch stores those of the first rows only."""

    def __init__(self, writers: Sequence[StoreWriter], starts: Sequence[int], limits: Sequence[int]) -> None:
        """`starts` (shards): rows of the plan before each shard; `limits`: rows of the plan that each store may keep."""
        self.writers, self.starts, self.limits = writers, starts, limits

    def done(self, shard: int) -> bool:
        """Return whether every store has committed `shard`."""
        return all(writer.done(shard) for writer in self.writers)

    def write(self, shard: int, features: np.ndarray, keys: Sequence[str], items: Sequence[int], rejects: list[RejectedRow]) -> None:
        """Write and commit one shard in every store that lacks it."""
        edges = np.cumsum([0, *(writer.header.width for writer in self.writers)])
        for writer, limit, begin, end in zip(self.writers, self.limits, edges[:-1], edges[1:], strict=True):
            keep = min(len(keys), max(0, limit - self.starts[shard]))
            if not writer.done(shard):
                writer.write(shard, features[:keep, begin:end], keys[:keep], items[:keep], rejects)

    def finish(self) -> pa.Table:
        """Finish every store and return the rejects of the first: bad images are bad for all layers."""
        return [writer.finish() for writer in self.writers][0]

    def clean(self) -> None:
        """Remove what a killed writer left in any of the stores."""
        for writer in self.writers:
            writer.clean()

    def predicted_bytes(self) -> int:
        """Return the space that all stores together still need."""
        return sum(writer.predicted_bytes() for writer in self.writers)


class LayerExtraction(Extraction):
    """An extraction whose forward fills the stores of several layers at once."""

    def __init__(
        self, source: Source, plan: Plan, output: Path, features: LayerFeatures, name: str, patch_images: int = 0, **options: Any
    ) -> None:
        """`output`: folder of the encoder's stores; `name`: the id that loads it again; `options` as of Extraction."""
        super().__init__(source, plan, output, **options)
        encoder, writers, limits = features.encoder, [], []
        feature = "cls_mean" if encoder.has_cls else "mean"
        for kind, count in {"layer": plan.rows, **({"patches": min(plan.rows, patch_images)} if features.with_patches else {})}.items():
            for layer, width in features.widths(kind == "patches").items():
                fingerprint = {**encoder.fingerprint, "feature": feature, "layer": layer}
                if kind == "patches":
                    fingerprint |= {"feature": f"patches {features.shapes[layer].kept}", "images": count}
                identity, revision = split_revision(name)
                loader = {"name": identity, "revision": revision, "feature": feature, "layer": layer, "image_size": None}
                header = StoreHeader("image", fingerprint, loader, width, plan.digest, len(plan.shards), count)
                writers.append(StoreWriter(output / f"{kind}-{layer:02d}", header))
                limits.append(count)
        starts = np.cumsum([0, *plan.lengths]).tolist()
        self.vision = features  # type: ignore[assignment]  # what an extraction asks of an encoder: transform, width, a call
        self.image_writer = LayerStores(writers, starts, limits)  # type: ignore[assignment]  # likewise of a store


def read_labels(source: Source, plan: Plan, column: str) -> dict[str, int]:
    """Return the class number of each sample key, from `column` of every row; nothing is decoded.

    DataError if fewer than two classes are there.
    """
    named: dict[str, str] = {}
    for shard in range(len(plan.shards)):
        for row in open_unit(source, plan, shard).rows(images=False):
            if row.reject is None and row.fields.get(column) is not None:
                named[row.key] = str(row.fields[column])
    names = sorted(set(named.values()))
    if len(names) < 2:
        raise DataError(f"{source.data} has {len(names)} classes in column {column!r}; give --label-column with two or more classes")
    return {key: names.index(name) for key, name in named.items()}


def unique_keys(store: FeatureStore) -> set[str]:
    """Return the keys of a store whose (key, item) occur once."""
    table = store.key_table
    if len(table) == 0:
        return set()
    counted = table.group_by(["key", "item"]).aggregate([([], "count_all")])
    repeated = set(counted.filter(pa.compute.greater(counted["count_all"], 1))["key"].to_pylist())
    return set(table["key"].to_pylist()) - repeated


def rows_of(store: FeatureStore, keys: Sequence[str]) -> np.ndarray:
    """Return features (n, W) float16 of the given sample keys, which the store has once each."""
    place = {key: row for row, key in enumerate(store.keys.to_pylist())}
    return store.features(np.array([place[key] for key in keys], dtype=np.int64))


def captions_of(stores: Sequence[FeatureStore], keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return all captions (T, D) float16 of the sample keys, over all columns, and the number of each one's key (T,), ascending."""
    place = {key: number for number, key in enumerate(keys)}
    features, owners = [], []
    for store in stores:
        numbers = np.array([place.get(key, -1) for key in store.keys.to_pylist()], dtype=np.int64)
        rows = np.flatnonzero(numbers >= 0)
        features.append(store.features(rows))
        owners.append(numbers[rows])
    joined = np.concatenate(owners)
    order = joined.argsort(kind="stable")
    return np.concatenate(features)[order], joined[order]
