"""What an assessment compares: the sample of pairs, the layers and features of each encoder, and their rows in the stores.

Shapes: `N` rows, `D` encoder width, `F` feature width, `T` captions.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoConfig, AutoModel

from align.common.errors import DataError, UsageError
from align.common.folders import replaced_folder
from align.common.seeds import generator
from align.encoders.claims import within_weights
from align.encoders.loading import VISION_FILES, load_errors_named, recorded_id, resolve_encoder
from align.encoders.spec import VisionSpec
from align.encoders.transforms import load_transform
from align.encoders.trust import split_revision
from align.features.store import FeatureStore
from align.features.texts import texts_of_shard
from align.sources.plan import Plan, Source, open_shard, plan

SHARD_ROWS = 64  # neighboring rows drawn together


@dataclass(frozen=True)
class Candidate:
    """One combination to compare: a layer and a feature of a vision encoder, with a text encoder."""

    vision: str
    layer: int
    feature: str
    text: str
    random: bool = False  # random weights: the baseline

    @property
    def name(self) -> str:
        """The candidate's name in tables."""
        return f"{self.vision} layer {self.layer} {self.feature} + {self.text}"


def sampled_plan(source: Source, rows: int, seed: int, columns: Sequence[str], folder: Path) -> Plan:
    """Return a plan of about `rows` rows (or all), saved in `folder`: random pieces of neighboring rows, in random order.

    A piece has at most `SHARD_ROWS` rows, fewer if there would be less than 30 pieces. The plan depends only on source, `rows` and
    `seed`. FingerprintError if `folder` holds another plan.
    """
    whole = plan(source, min(SHARD_ROWS, max(1, rows // 30)), columns)
    order = generator(seed, 7).permutation(len(whole.shards))
    lengths = np.array(whole.counts)[order]
    chosen = order[: int(np.searchsorted(lengths.cumsum(), rows)) + 1]
    whole.part(chosen.tolist()).keep(folder, "files, columns, --rows or --seed")
    return Plan.load(folder)


def folder_name(encoder: str, random: bool = False) -> str:
    """Return the name of an encoder in folders and tables: its id or folder name, with `-` for all but letters, digits, `.` and `_`."""
    name = re.sub(r"[^A-Za-z0-9._]+", "-", recorded_id(split_revision(encoder)[0]).removeprefix("embedded:")).strip("-.")
    return f"{name}-random" if random else name


def random_copy(name: str, folder: Path, seed: int) -> str:
    """Return a folder that holds the encoder `name` with random initial weights, drawn by `seed`: the baseline."""
    if folder.exists():
        return str(folder)
    spec = VisionSpec(*split_revision(name))
    source = resolve_encoder(spec.name)
    guard = within_weights(spec.name, source)
    with (
        replaced_folder(folder, "random") as temporary,
        load_errors_named(spec.name, VISION_FILES),
        guard,
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(source, **spec.from_pretrained)
        model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
        transform = load_transform(spec)
        normalizers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        if normalizers:  # measure their statistics, or activations die out over the layers
            size = transform(Image.new("RGB", (64, 64))).shape
            for module in normalizers:
                module.momentum = 1.0
            with torch.no_grad():
                model.train()(torch.randn(8, *size))
        model.save_pretrained(temporary)
        if not transform.is_timm:  # a timm transform is in the config
            transform.processor.save_pretrained(temporary)
    return str(folder)


def chosen_layers(wanted: Sequence[str], encoder: str, first: int, last: int) -> list[int]:
    """Return the layer numbers that `wanted` (numbers, `last`, `all`) selects. Missing layers are skipped; UsageError if none is left."""
    numbers = [n for word in wanted for n in (range(1, last + 1) if word == "all" else [last if word == "last" else int(word)])]
    found = {n if n >= 0 else last + 1 + n for n in numbers} & set(range(first, last + 1))
    if not found:
        raise UsageError(f"{encoder} has layers {first} to {last}, none of {', '.join(wanted)}; add `last`")
    return sorted(found)


def chosen_features(wanted: Sequence[str], has_cls: bool) -> list[str]:
    """Return the feature modes that `wanted` selects. An encoder without a CLS token has only the mean."""
    if not has_cls:
        return ["mean"]
    return list(dict.fromkeys("cls_mean" if word == "auto" else word for word in wanted))


def feature_columns(features: np.ndarray, feature: str, has_cls: bool) -> np.ndarray:
    """Return the columns (N, F) of one feature from a layer's rows: (N, 2D), or (N, D) without a CLS token."""
    if not has_cls or feature == "cls_mean":
        return features
    width = features.shape[1] // 2
    return features[:, :width] if feature == "cls" else features[:, width:]


def read_labels(source: Source, plan: Plan, column: str) -> dict[str, int]:
    """Return the class number of each sample key, from `column` of every row. DataError for fewer than two classes."""
    named: dict[str, str] = {}
    for shard in range(len(plan.shards)):
        for row in open_shard(source, plan, shard).rows(images=False):
            if row.reject is None and row.fields.get(column) is not None:
                named[row.key] = str(row.fields[column])
    names = sorted(set(named.values()))
    if len(names) < 2:
        raise DataError(f"{source.data} has {len(names)} classes in column {column!r}; give --label-column with two or more classes")
    return {key: names.index(name) for key, name in named.items()}


def unique_keys(store: FeatureStore) -> set[str]:
    """Return the keys of a store that have no repeated (key, item)."""
    counted = store.key_table.group_by(["key", "item"]).aggregate([([], "count_all")])
    repeated = set(counted.filter(pa.compute.greater(counted["count_all"], 1))["key"].to_pylist())
    return set(counted["key"].to_pylist()) - repeated


def rows_of(store: FeatureStore, keys: Sequence[str]) -> np.ndarray:
    """Return the features (n, W) float16 of the sample keys. Each key must occur exactly once in the store."""
    place = {key: row for row, key in enumerate(store.keys.to_pylist())}
    return store.features(np.array([place[key] for key in keys], dtype=np.int64))


def texts_of(stores: Sequence[FeatureStore], source: Source, plan: Plan, columns: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Return the words of each caption (T,) that `captions_of` gives for the same stores and keys; `columns` are what each encoded."""
    place = {key: number for number, key in enumerate(keys)}
    found: list[tuple[int, str]] = []
    for store, column in zip(stores, columns, strict=True):
        texts = (text for shard in range(len(plan.shards)) for text in texts_of_shard(store, shard, source, plan, column))
        found += [(place[key], text) for key, text in zip(store.keys.to_pylist(), texts, strict=True) if key in place]
    return [text for _, text in sorted(found, key=lambda one: one[0])]


def captions_of(stores: Sequence[FeatureStore], keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the captions (T, D) float16 of the sample keys from all stores, and each caption's key number (T,), ascending."""
    place = {key: number for number, key in enumerate(keys)}
    features, owners = [], []
    for store in stores:
        numbers = np.array([place.get(key, -1) for key in store.keys.to_pylist()], dtype=np.int64)
        rows = np.flatnonzero(numbers >= 0)
        features.append(store.features(rows))
        owners.append(numbers[rows])
    order = np.concatenate(owners).argsort(kind="stable")
    return np.concatenate(features)[order], np.concatenate(owners)[order]
