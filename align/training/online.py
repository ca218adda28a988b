"""Pairs with frozen encoders in the loop: features are computed when a batch needs them, and images may be augmented.

`OnlinePairs` replaces `PairedFeatures` where stores do not pay: token heads read hundreds of kilobytes an image, and a random crop
is used only once. The samples, crops and captions of a batch depend only on (seed, step, sample), so a killed run resumes exactly.
A rejected sample is left out of its batch, counted, and listed in a file. Features are rounded to float16 as in stores, so without
augmentation both train to the same weights.

Shapes: `b` this process's share of a batch, `F` image feature width, `D` caption feature width; H, W pixels.
"""

import copy
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from align.common.errors import DataError
from align.common.files import hash64
from align.common.preemption import stay
from align.common.reject_codes import Reject, advice
from align.common.seeds import generator
from align.encoders.text import TextEncoder
from align.encoders.transforms import PixelNormalizer, Transform, pixel_normalizer
from align.encoders.vision import VisionEncoder
from align.runtime.runs import JsonLines
from align.sources.content import content_digest
from align.sources.gate import Limits, gate_image, split_captions
from align.sources.plan import Plan, Source, image_names, open_shard
from align.sources.row import ShardReader
from align.training.config import Positives
from align.training.holdout import drawn_images, image_numbers
from align.training.pairs import BatchOrder, PairBatch

SHARD_ROWS = 1024  # samples per shard; opening a shard reads the places of its samples
KEPT_READERS = 64  # shards that a worker keeps open
BLOCK_ROWS = 64  # neighboring rows read together if there are more shards, or if single rows are slow to reach
MIN_ROWS_FOR_SHARE = 1000  # samples seen before the share of rejects can stop a run
IN_A_ROW = 100  # consecutive rejects that stop a run
_SEED_CAPTIONS, _SEED_AUGMENT = 21, 22  # random streams, distinct from those of align.training.pairs and align.training.step


@dataclass(frozen=True)
class Augmentation:
    """freeze-align's augmentation: RandomResizedCrop(0.2, 1), flip, RandAugment(2, 7), then the encoder's pixel normalization."""

    size: tuple[int, int]  # (H, W) of the crop, as the encoder's transform gives
    normalizer: PixelNormalizer

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Return pixels (3, H, W) float32 of an RGB image. They depend only on image and seed."""
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(seed)
            crop = _steps(self.size, self.normalizer.resample.name.lower())(image)
        return self.normalizer(crop, self.size)


@lru_cache(maxsize=2)
def _steps(size: tuple[int, int], resample: str) -> Any:
    from torchvision import transforms  # slow to import (a second), and only augmented runs need it

    crop = transforms.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode(resample))
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.RandAugment(2, 7)])


@dataclass(frozen=True)
class _Piece:
    """Samples that a worker decodes together, as row numbers (n,) int64 in the data."""

    step: int  # -1: validation
    rows: np.ndarray


@dataclass
class _Decoded:
    """The usable samples of a piece (keys, pixels (n, 3, H, W), captions) and its rejects."""

    piece: _Piece
    keys: list[str] = field(default_factory=list)
    pixels: Tensor | None = None
    captions: list[list[Any]] = field(default_factory=list)  # per sample: one text a slot; in validation all texts of each column
    rejects: list[tuple[int, str, str, str]] = field(default_factory=list)  # row, key, code, detail
    dropped: list[tuple[int, str, str, str]] = field(default_factory=list)  # the same for single captions of usable samples


class _Samples(Dataset):
    """Decodes samples in DataLoader workers, which get pieces instead of row numbers."""

    def __init__(
        self, source: Source, plan: Plan, slots: Sequence[str], transform: Transform, augmentation: Augmentation | None, seed: int
    ) -> None:
        self.source, self.plan, self.slots, self.transform = source, plan, tuple(slots), transform
        self.augmentation, self.seed, self.limits = augmentation, seed, Limits(gray_bits=source.gray_bits)
        self.starts = np.cumsum([0, *plan.lengths])
        self._readers: dict[int, ShardReader] = {}

    def __getitem__(self, piece: _Piece) -> _Decoded:
        decoded, good = _Decoded(piece), []
        for row in piece.rows.tolist():
            key = ""
            try:
                key, image, cells = self.read(row)
                captions, unusable = zip(*(split_captions(cell, self.limits) for cell in cells), strict=True)
                pixels = self._pixels(gate_image(image, self.limits), piece.step, row)
            except Reject as reject:
                decoded.rejects.append((row, key or self.key(row), reject.code, reject.detail[:500]))
                continue
            decoded.dropped += [
                (row, key, reject.code, reject.detail[:500])
                for column in dict(zip(self.slots, unusable, strict=True)).values()
                for reject in column
            ]
            decoded.keys.append(key)
            good.append(pixels)
            columns = dict(zip(self.slots, captions, strict=True))
            decoded.captions.append(list(columns.values()) if piece.step < 0 else self._draw(columns, piece.step, row))
        if good:
            decoded.pixels = torch.stack(good)
        return decoded

    def read(self, row: int, images: bool = True) -> tuple[str, Any, list[Any]]:
        """Return key, encoded image and caption cells of one row; raise Reject if one of them is missing."""
        shard = int(np.searchsorted(self.starts, row, side="right") - 1)
        if shard not in self._readers:
            if len(self._readers) >= KEPT_READERS:
                self._readers.pop(next(iter(self._readers)))
            self._readers[shard] = open_shard(self.source, self.plan, shard)
        local = row - int(self.starts[shard])
        found = next(self._readers[shard].rows(local, local + 1, images=images))
        if found.reject is not None:
            raise found.reject
        return found.key, found.image, [found.cell(column) for column in self.slots]

    def key(self, row: int) -> str:
        """Return the sample key of one row, or `row N` if it has none."""
        try:
            return self.read(row, images=False)[0]
        except Reject:
            return f"row {row}"

    def _pixels(self, image: Image.Image, step: int, row: int) -> Tensor:
        if self.augmentation is None or step < 0:
            return self.transform(image)
        return self.augmentation(image, int(generator(self.seed, _SEED_AUGMENT, step, row).integers(1 << 62)))

    def _draw(self, columns: dict[str, list[str]], step: int, row: int) -> list[str]:
        """Return one caption per slot. Slots on the same column draw without repeats."""
        random = generator(self.seed, _SEED_CAPTIONS, step, row)
        shuffled = {column: itertools.cycle([texts[n] for n in random.permutation(len(texts))]) for column, texts in columns.items()}
        return [next(shuffled[column]) for column in self.slots]


@dataclass(eq=False)
class OnlinePairs:
    """Image and caption features of one data set, computed batch by batch: pooled or all tokens, as the encoders' `feature` says."""

    source: Source
    plan: Plan
    slots: Sequence[str]  # caption columns; each gives one caption, a column named twice gives two different ones
    vision: VisionEncoder
    text: TextEncoder
    _: KW_ONLY
    seed: int = 0
    augment: bool = False
    batch_size: int = 64  # of the encoders
    workers: int = 2
    max_reject_fraction: float = 0.05
    positives: Positives = "diagonal"

    unpaired = repeated = nbytes = 0  # samples are unknown before they are read, and nothing is stored

    def __post_init__(self) -> None:
        vision, text = self.vision, self.text
        augmentation = Augmentation(vision.image_size, pixel_normalizer(vision.transform)) if self.augment else None
        self._samples = _Samples(self.source, self.plan, self.slots, vision.transform, augmentation, self.seed)
        self._rows = np.concatenate([start + self.plan.sample_rows(n) for n, start in enumerate(self._samples.starts[:-1])])
        self.image_fingerprint, self.image_width = vision.fingerprint, vision.feature_width
        self.text_fingerprint, self.text_width = text.fingerprint, text.width
        self.rejects: JsonLines | None = None
        self._encoding = 0.0  # seconds
        self._seen, self._in_a_row, self._rejected, self._listed = 0, 0, 0, set[int]()
        self._last: tuple[int, str, str, str] | None = None
        self._validation: tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def block_rows(self) -> int:
        """Neighboring rows to read together: 1 unless single rows are slow to reach."""
        return 1 if self.plan.layout != "parquet" and len(self.plan.shards) <= KEPT_READERS else BLOCK_ROWS

    def split(self, held_out: int, seed: int) -> "OnlinePairs":
        """Move the samples of `held_out` images to a new object and return it.

        The choice depends only on `seed` and on which samples name one image (with `group: none`, several may).
        """
        rows = np.arange(len(self))
        names = image_names(self.source, self.plan)[self._rows] if self.source.group != "image" else np.zeros_like(rows)
        other, chosen = copy.copy(self), drawn_images(image_numbers(np.where(names == 0, -1 - rows, names)), held_out, seed)
        self._rows, other._rows, other._listed = self._rows[~chosen], self._rows[chosen], set()
        return other

    def only(self, chosen: pa.Table) -> int:
        """Keep the samples whose key is in `chosen`. Return how many of its keys no sample has; DataError if no sample is left."""
        wanted, rows, found = set(chosen["key"].to_pylist()), [], set[str]()
        for shard, start in enumerate(self._samples.starts[:-1].tolist()):
            for row in open_shard(self.source, self.plan, shard).rows(images=False):
                if row.reject is None and row.key in wanted:
                    rows.append(start + row.index)
                    found.add(row.key)
        if not rows:
            raise DataError(f"none of the {len(chosen)} chosen keys is a sample of {self.source.data}; was the file made from it?")
        self._rows = np.array(rows)
        return len(wanted - found)

    def digest(self) -> str:
        """Return the hash of what the samples are, as `content_digest` finds it."""
        return content_digest(self.source, self.plan, True, self._samples.slots)

    def keys(self, indices: np.ndarray) -> list[str]:
        """Return the sample keys of pairs."""
        return [self._samples.key(row) for row in self._rows[indices].tolist()]

    def encode_seconds(self) -> float:
        """Return the seconds that the encoders ran for batches since the last call."""
        spent, self._encoding = self._encoding, 0.0
        return spent

    def resume(self, rejects: JsonLines, step: int) -> None:
        """From now on list each rejected sample once in `rejects`. Entries of a killed run after `step` are removed."""
        rejects.cut(step)
        self.rejects, self._listed = rejects, {row["row"] for row in rejects.rows()}

    def batches(self, order: BatchOrder, steps: range, part: slice) -> Iterator[PairBatch]:
        """Yield this process's part of each batch of `steps`, without rejects: features (b, F) and (b, D), float16 on the device."""
        pieces = (piece for step in steps for piece in self._cut(step, order.indices(step)[part]))
        count = len(range(*part.indices(order.batch_size)))
        batches = zip(*[self._decoded(pieces)] * -(-count // self.batch_size), strict=False)  # as many pieces as a batch has
        for step, decoded in zip(steps, batches, strict=True):
            began = time.monotonic()
            self._count(step, decoded)
            keys = [key for one in decoded for key in one.keys]
            if not keys:
                raise DataError(f"step {step + 1}: none of the {count} samples of this process can be used; give a larger --batch-size")
            images = torch.cat([self._images(one.pixels) for one in decoded if one.pixels is not None])
            texts = [captions for one in decoded for captions in one.captions]
            slots = [[chosen[slot] for chosen in texts] for slot in range(len(self.slots))]
            captions = [self.text.encode(chosen, self.batch_size).half().to(images.device) for chosen in slots]
            self._encoding += time.monotonic() - began
            image_ids = None if self.positives == "diagonal" else hash64(keys)
            caption_ids = [hash64(chosen) for chosen in slots] if self.positives == "same_caption" else None
            yield PairBatch(images, captions, image_ids, caption_ids)  # type: ignore[arg-type]

    def everything(self, limit: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return at most `limit` images (n, F) and their captions (T, D), float16, and each caption's image number (T,). Kept for reuse."""
        size = len(self) if limit is None else min(limit, len(self))
        if self._validation is None or self._validation[0] != size:
            images, columns = [], list[list[list[str]]]()
            for one in self._decoded(iter(self._cut(-1, np.arange(size)))):
                self._count(-1, [one])
                if one.pixels is not None:
                    images.append(self._images(one.pixels).numpy(force=True))
                columns += one.captions
            if not images:
                raise DataError(f"none of the {size} samples for validation can be used; mend the data")
            chosen = [(text, n) for number in range(len(columns[0])) for n, cells in enumerate(columns) for text in cells[number]]
            captions = self.text.encode([text for text, _ in chosen], self.batch_size).half().numpy(force=True)
            self._validation = size, (np.concatenate(images), captions, np.array([owner for _, owner in chosen]))
        return self._validation[1]

    def _cut(self, step: int, indices: np.ndarray) -> list[_Piece]:
        return [_Piece(step, rows) for rows in np.split(self._rows[indices], range(self.batch_size, len(indices), self.batch_size))]

    def _decoded(self, pieces: Iterator[_Piece]) -> Iterator[_Decoded]:
        workers: dict[str, Any] = {"num_workers": self.workers, "prefetch_factor": 4 if self.workers else None, "worker_init_fn": stay}
        return iter(DataLoader(self._samples, sampler=pieces, batch_size=None, **workers))

    @torch.no_grad()
    def _images(self, pixels: Tensor) -> Tensor:
        return self.vision(pixels).half()

    def _count(self, step: int, decoded: Sequence[_Decoded]) -> None:
        """List new rejects. DataError if there are too many in all or in a row."""
        for one in decoded:
            self._seen += len(one.piece.rows)
            self._rejected += len(one.rejects)
            bad = {row for row, *_ in one.rejects}
            for row in one.piece.rows.tolist():
                self._in_a_row = self._in_a_row + 1 if row in bad else 0
                if self._in_a_row >= IN_A_ROW:
                    last = one.rejects[-1]
                    raise DataError(f"{IN_A_ROW} samples in a row were rejected, the last: {last}. {advice(last[2])}")
            self._last = one.rejects[-1] if one.rejects else self._last
            for row, key, code, detail in one.rejects + one.dropped:
                if row not in self._listed and self.rejects is not None:
                    self.rejects.append({"step": step + 1, "row": row, "key": key, "code": code, "detail": detail})
            self._listed |= {row for row, *_ in one.rejects + one.dropped}
        if self._seen >= MIN_ROWS_FOR_SHARE and self._rejected > self.max_reject_fraction * self._seen:
            raise DataError(
                f"{self._rejected} of {self._seen} samples were rejected, for example {self._last}. "
                + advice(self._last[2] if self._last else "", f"Mend the data, or raise --max-reject-fraction ({self.max_reject_fraction})")
            )
