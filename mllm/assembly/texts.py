"""Texts without images: read from files or from caption stores, and brought into the aligned space.

Shapes: `n` texts, `D` text feature width, `E` head width.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from align.common.errors import DataError, FingerprintError, UsageError
from align.common.fingerprints import compare_encoders
from align.common.reject_codes import Reject
from align.features.store import FeatureStore
from align.features.texts import texts_of_shard
from align.model.dual_encoder import SailModel
from align.model.saving import model_folder
from align.sources.gate import Limits, gate_captions, split_captions
from align.sources.plan import Plan, Source, open_shard, plan
from align.sources.safe_files import bounded_lines, text_start

BATCH = 512  # texts read and embedded at a time
ENCODER_BATCH = 64
KINDS = ".txt (a text a line), .jsonl, .csv, .tsv, .parquet, .tar, and caption stores of align/encode.py"


class Batch(NamedTuple):
    """Texts in a row, their features (n, D) float16 if a store has them, and which share of everything is read with them."""

    texts: list[str]
    features: np.ndarray | None
    share: float


@dataclass(frozen=True)
class Texts:
    """Text files (one text a line), tables or tars with text columns, and caption stores; at most `most` texts are read, in order."""

    files: tuple[str, ...]
    columns: tuple[str, ...] = ("caption",)
    most: int = 1_000_000
    _plans: dict[str, Plan] = field(default_factory=dict, init=False, repr=False, compare=False)

    def batches(self) -> Iterator[Batch]:
        """Yield up to BATCH texts at a time; what is no usable text is left out. DataError if a file has none of `columns`."""
        left = self.most
        for texts, features, share in _gathered(self._pieces()):
            texts = texts[:left]
            left -= len(texts)
            yield Batch(texts, None if features is None else features[: len(texts)], max(share, 1 - left / self.most))
            if not left:
                return

    def require_encoder(self, fingerprint: dict[str, Any]) -> None:
        """Raise FingerprintError unless every store among the files was made by the text encoder that `fingerprint` is of."""
        for folder in filter(is_store, self.files):
            try:
                compare_encoders(fingerprint, FeatureStore(folder).fingerprint, folder)
            except FingerprintError as error:
                raise FingerprintError(
                    f"{error} The head knows only its own text encoder: give --texts the data, which is then encoded."
                ) from error

    def _pieces(self) -> Iterator[Batch]:
        """Yield the texts of one file after the other, a few at a time."""
        sizes, before = list(map(_size, self.files)), 0
        for file, size in zip(self.files, sizes, strict=True):
            if is_store(file):
                pieces = _stored(FeatureStore(file))
            else:
                pieces = _lines(file) if file.endswith(".txt") else self._cells(file)
            for piece in pieces:
                yield piece._replace(share=(before + size * piece.share) / max(sum(sizes), 1))
            before += size

    def _cells(self, data: str) -> Iterator[Batch]:
        """Yield the texts in the columns of a table, tar, or pattern of such files; no image is read."""
        source = Source(data, group="none", key_prefix="file")  # every row counts, and keys pair nothing here
        if data not in self._plans:
            self._plans[data] = plan(source, rows_per_shard=10_000, columns=self.columns)
        found, read = self._plans[data], 0
        for shard in range(len(found.shards)):
            for row in open_shard(source, found, shard).rows(images=False):
                read += 1
                for column in self.columns if row.reject is None else ():
                    try:
                        yield Batch(split_captions(row.fields.get(column), Limits())[0], None, read / found.rows)
                    except Reject:
                        continue


def is_store(file: str) -> bool:
    """Return whether `file` is the folder of a feature store."""
    return os.path.isfile(os.path.join(file, "store.json"))


def _gathered(pieces: Iterator[Batch]) -> Iterator[Batch]:
    """Yield pieces joined, or cut, to BATCH texts; those of a store, which have features, as they are."""
    texts: list[str] = []
    share = 0.0
    for piece in pieces:
        if piece.features is not None:
            if texts:
                yield Batch(texts, None, share)
            texts, share = [], piece.share
            yield piece
            continue
        texts += piece.texts
        share = piece.share
        while len(texts) >= BATCH:
            yield Batch(texts[:BATCH], None, share)
            texts = texts[BATCH:]
    if texts:
        yield Batch(texts, None, share)


def _size(file: str) -> int:
    """Return the bytes of a file, of all that a pattern matches, or of what a folder holds: what its share of the reading is told by."""
    if os.path.isdir(file):
        return sum(path.stat().st_size for path in Path(file).rglob("*") if path.is_file())
    return sum(os.path.getsize(path) for path in ([file] if os.path.isfile(file) else glob.glob(file, recursive=True)))


def _lines(file: str) -> Iterator[Batch]:
    """Yield the lines of a text file, or of all that a pattern matches, that are usable as captions."""
    found = [file] if os.path.isfile(file) else sorted(glob.glob(file))
    if not found:
        raise UsageError(f"no such file: {file}; --texts takes {KINDS}")
    size, read = max(sum(map(os.path.getsize, found)), 1), 0
    for path in found:
        with open(path, "rb") as opened:
            opened.seek(text_start(path))
            for line, length in bounded_lines(opened):
                read += length
                try:
                    yield Batch(gate_captions(line.decode("utf-8").strip(), Limits())[:1], None, read / size)
                except (UnicodeDecodeError, Reject):
                    continue


def _stored(store: FeatureStore) -> Iterator[Batch]:
    """Yield the captions of a store with their features. UsageError if it is none of captions, DataError if their data is gone."""
    column = store.folder.name.removeprefix("captions-")
    if store.header.kind != "caption" or column == store.folder.name:
        raise UsageError(f"--texts {store.folder}: a {store.header.kind} store; give a folder captions-COLUMN that align/encode.py wrote")
    made = [Plan.load(folder) for folder in (store.folder.parent, store.folder.parent.parent) if (folder / "plan.parquet").is_file()]
    plans = [one for one in made if one.digest == store.header.data]
    if not plans:
        raise DataError(f"{store.folder}: the plan.parquet that it was encoded by is not beside it; restore it, or give --texts the data")
    source = Source(str(plans[0].shards["file"][0].as_py()))  # the plan says which files, and of which layout
    for shard in range(store.header.shards):
        texts = texts_of_shard(store, shard, source, plans[0], column)
        for start in range(0, len(texts), BATCH):
            some = texts[start : start + BATCH]
            rows = np.arange(len(some)) + store.starts[shard] + start
            yield Batch(some, store.features(rows), float(rows[-1] + 1) / len(store))


class TextSide:
    """The text encoder and text head of a stage-one run: aligned embeddings before normalization, as the image head's are."""

    def __init__(self, sail: str, device: torch.device) -> None:
        self.model: SailModel = SailModel.from_pretrained(model_folder(Path(sail).expanduser())).to(device).eval()
        self.fingerprint: dict[str, Any] = self.model.config.text_fingerprint

    @torch.no_grad()
    def embed(self, batch: Batch, kept: Sequence[int]) -> Tensor:
        """Return the embeddings (n, E) float32 of the texts at the places `kept` of a batch; features of a store are not computed again."""
        if batch.features is None:
            features = self.model.text_encoder.encode([batch.texts[place] for place in kept], ENCODER_BATCH)
        else:
            features = torch.from_numpy(batch.features[list(kept)])
        return self.model.text_head(features.to(self.model.logit_scale)).float()


def require_texts(count: int, files: Sequence[str], least: int) -> None:
    """Raise DataError if fewer than `least` texts could be used."""
    if count < least:
        raise DataError(f"--texts {' '.join(files)}: {count} usable texts, at least {least} are needed; check --text-columns")
