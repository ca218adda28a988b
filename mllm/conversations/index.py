"""Conversations as training sees them: an index of lengths, a dataset of token ids and pixels, and batches.

Legend: N rows, B items of a batch, T tokens, images of a batch in the order of their placeholders.
"""

import io
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from align.common.errors import DamagedError, DataError
from align.common.files import atomic_bytes, atomic_json, disk_full_named, hash_bytes, read_json
from align.common.reject_codes import Reject, RejectedRow
from align.sources.gate import Limits, gate_image
from mllm.conversations.packing import STATUS, EpochPlan, RowIndex, fill_rate, length_grouped, pack
from mllm.conversations.table import Conversations, reject_line
from mllm.conversations.tokens import IGNORED, Chat

__all__ = ["ConversationDataset", "EpochPlan", "RowIndex", "build_index", "collate", "fill_rate", "length_grouped", "pack"]

MIN_REJECTS = 20  # images that cannot be decoded before their share can stop a run
_CHUNK_ROWS = 256
_ARRAYS = ("lengths", "supervised", "images", "dropped", "status")
Progress = Callable[[int, int], None]


def build_index(
    conversations: Conversations,
    chat: Chat,
    max_length: int,
    *,
    cache: Path | None = None,
    max_reject_fraction: float = 0.05,
    workers: int = 0,
    progress: Progress = lambda done, total: None,
) -> RowIndex:
    """Return the index of all rows, tokenized here by `workers` further processes unless `cache` has it for the same inputs.

    `cache` is a folder (None: the conversations' own). `progress(done, total)` is called about every 256 rows. Raises DataError,
    with the codes and a row, if more than `max_reject_fraction` of the rows are rejected or none is left (1: never).
    """
    fingerprint = hash_bytes(repr((STATUS, conversations.fingerprint, chat.fingerprint, max_length)).encode())
    stem = (cache or conversations.folder) / f"index-{fingerprint[:16]}"
    arrays = _load(stem, fingerprint)
    if arrays is None:
        arrays = _measure(conversations, chat, max_length, workers, progress)
        _save(stem, fingerprint, arrays)
    index = RowIndex(**arrays, max_length=max_length, unread=dict(conversations.codes), fingerprint=fingerprint)
    _require_good(index, conversations, chat, max_reject_fraction)
    return index


def _measure(conversations: Conversations, chat: Chat, max_length: int, workers: int, progress: Progress) -> dict[str, np.ndarray]:
    """Tokenize every row once, repeated ones too, and return the arrays of a RowIndex."""
    first, copies = conversations.distinct()
    chunks = [first[start : start + _CHUNK_ROWS] for start in range(0, len(first), _CHUNK_ROWS)]
    loader = DataLoader(_Chunks(conversations, chat, max_length, chunks), batch_size=None, num_workers=workers)
    measured = []
    for done, chunk in enumerate(loader):
        measured.append(np.asarray(chunk))
        progress(min(len(first), (done + 1) * _CHUNK_ROWS), len(first))
    table = np.concatenate(measured)[copies]  # (N, 5)
    return {name: np.ascontiguousarray(table[:, column]) for column, name in enumerate(_ARRAYS)}


class _Chunks(Dataset):
    """Lengths of chunks of rows: (rows, 5) int32 with the columns of _ARRAYS."""

    def __init__(self, conversations: Conversations, chat: Chat, max_length: int, chunks: Sequence[np.ndarray]) -> None:
        self.conversations, self.chat, self.max_length, self.chunks = conversations, chat, max_length, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> np.ndarray:
        rows = [self.conversations.row(int(row)).messages for row in self.chunks[number]]
        measured = np.zeros((len(rows), len(_ARRAYS)), dtype=np.int32)
        for line, encoded in zip(measured, self.chat.encode_many(rows, self.max_length), strict=True):
            if isinstance(encoded, Reject):
                line[-1] = STATUS.index(encoded.code)
            else:
                learnt = sum(label != IGNORED for label in encoded.labels)
                line[:] = len(encoded.input_ids), learnt, encoded.images, encoded.dropped_turns, 0
        return measured


def _save(stem: Path, fingerprint: str, arrays: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    stem.parent.mkdir(parents=True, exist_ok=True)
    atomic_bytes(stem.with_suffix(".npz"), buffer.getvalue())
    atomic_json(stem.with_suffix(".json"), {"fingerprint": fingerprint, "hash": hash_bytes(buffer.getvalue())})


def _load(stem: Path, fingerprint: str) -> dict[str, np.ndarray] | None:
    """Return the cached arrays, or None unless they are there with their committed hash."""
    try:
        facts, data = read_json(stem.with_suffix(".json")), stem.with_suffix(".npz").read_bytes()
    except (OSError, DamagedError):
        return None
    if facts != {"fingerprint": fingerprint, "hash": hash_bytes(data)}:
        return None
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in _ARRAYS}


def _require_good(index: RowIndex, conversations: Conversations, chat: Chat, max_reject_fraction: float) -> None:
    unread = sum(index.unread.values())
    unread_share = unread / (unread + sum(file.rows for file in conversations.files))
    bad = np.flatnonzero(index.status)
    share = unread_share + (1 - unread_share) * len(bad) / len(index.status)
    if max_reject_fraction >= 1 or (share <= max_reject_fraction and len(index.good)):
        return
    codes = ", ".join(f"{code} {count}" for code, count in index.codes.most_common(5))
    if len(bad):
        row = conversations.row(int(bad[0]))
        problem = chat.encode_many([row.messages], index.max_length)[0]
        first = f"{row.source} (id {row.id!r}): {problem}"
    else:
        reject = next(conversations.rejects())
        first = f"{reject.source} (id {reject.key!r}): {reject.code}: {reject.detail}"
    raise DataError(
        f"{share:.1%} of the rows are rejected, {max_reject_fraction:.1%} are allowed ({codes}). First: {first}. Mend the data "
        "(mllm/check.py lists every row), or raise --max-reject-fraction"
    )


class ConversationDataset(Dataset):
    """Rows, or packs of rows, as tensors. Lives in DataLoader workers, which share one count of bad images.

    A row with an image that cannot be decoded keeps a picture of the mean color and loses all its labels: nothing is learnt from
    it, and its length stays. It is written to `rejects` (JSON lines). DataError if more than `max_reject_fraction` of the images
    are bad, of at least MIN_REJECTS.
    """

    def __init__(
        self,
        conversations: Conversations,
        index: RowIndex,
        chat: Chat,
        image_processor: Any,
        *,
        max_pixels: int = 64_000_000,
        rejects: Path | None = None,
        max_reject_fraction: float = 0.05,
    ) -> None:
        """`image_processor` is a SailLlavaImageProcessor: `to_pixels`, `size` and `pad_color`."""
        self.conversations, self.index, self.chat, self.image_processor = conversations, index, chat, image_processor
        self.limits, self.rejects, self.max_reject_fraction = Limits(max_pixels=max_pixels), rejects, max_reject_fraction
        self._counts = multiprocessing.Array("q", 2)  # images seen, images rejected

    def __len__(self) -> int:
        return len(self.index.lengths)

    @property
    def rejected_images(self) -> int:
        """How many images could not be used so far, in this process and its workers."""
        return int(self._counts[1])

    def __getitem__(self, item: int | Sequence[int]) -> dict[str, Any]:
        """Return input_ids, labels, position_ids (T,) int64 and pixel_values, a list of (3, H, W).

        Of a pack, position ids begin at 0 with every row.
        """
        rows = [self._row(int(number)) for number in ([item] if isinstance(item, int | np.integer) else item)]
        return {
            "input_ids": torch.cat([ids for ids, _, _ in rows]),
            "labels": torch.cat([labels for _, labels, _ in rows]),
            "position_ids": torch.cat([torch.arange(len(ids)) for ids, _, _ in rows]),
            "pixel_values": [image for _, _, images in rows for image in images],
        }

    def collate(self, items: Sequence[dict[str, Any]], packed: bool) -> dict[str, Tensor]:
        """Return `collate(items)` with the tokenizer's padding token, or its end token if it has none."""
        tokenizer = self.chat.tokenizer
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return collate(items, pad_id or 0, packed)

    def _row(self, number: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        row = self.conversations.row(number)
        encoded = self.chat.encode_many([row.messages], self.index.max_length)[0]
        if isinstance(encoded, Reject) or len(encoded.input_ids) != self.index.lengths[number]:
            found = str(encoded) if isinstance(encoded, Reject) else f"{len(encoded.input_ids)} tokens"
            raise DataError(
                f"{row.source}: {found}, {self.index.lengths[number]} tokens when indexed; the index belongs to other data or another "
                "tokenizer. Remove the cache folder and run again"
            )
        images, learn = [], True
        for place in row.images[: encoded.images]:
            try:
                image = gate_image(self.conversations.read_image(place), self.limits)
                self._count(0)
            except Reject as reject:
                size = self.image_processor.size
                image, learn = Image.new("RGB", (size["width"], size["height"]), self.image_processor.pad_color), False
                self._write(number, row.source, row.id, reject)
                self._count(1)
            images.append(self.image_processor.to_pixels(image))
        labels = torch.tensor(encoded.labels)
        return torch.tensor(encoded.input_ids), labels if learn else torch.full_like(labels, IGNORED), images

    def _count(self, rejected: int) -> None:
        with self._counts.get_lock():
            self._counts[0] += 1
            self._counts[1] += rejected
            seen, bad = self._counts[:]
        if rejected and bad >= MIN_REJECTS and bad > self.max_reject_fraction * seen:
            raise DataError(
                f"{bad} of the first {seen} images cannot be used, {self.max_reject_fraction:.1%} are allowed"
                f"{f' (each in {self.rejects})' if self.rejects else ''}. Check the data with mllm/check.py, and --image-root"
            )

    def _write(self, number: int, source: str, name: str, reject: Reject) -> None:
        if self.rejects is None:
            return
        found = {"row": number, **reject_line(RejectedRow.of(reject, number, name, "image", source))}
        self.rejects.parent.mkdir(parents=True, exist_ok=True)
        with disk_full_named(self.rejects):
            descriptor = os.open(self.rejects, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, (json.dumps(found) + "\n").encode())  # one write: lines of several workers do not mix
            finally:
                os.close(descriptor)


def collate(items: Sequence[dict[str, Any]], pad_id: int, packed: bool) -> dict[str, Tensor]:
    """Return a batch: input_ids, labels and position_ids (B, T), padded on the right, and pixel_values (images, 3, H, W) if any.

    Unpacked batches have an attention_mask (B, T). Packed ones must not: rows are kept apart by their position ids, and padding
    stands as a row of its own (exact with eager and SDPA attention; flash attention needs B = 1 for it).
    """
    longest = max(len(item["input_ids"]) for item in items)
    batch = {
        "input_ids": torch.full((len(items), longest), pad_id),
        "labels": torch.full((len(items), longest), IGNORED),
        "position_ids": torch.zeros((len(items), longest), dtype=torch.int64),
    }
    if not packed:
        batch["attention_mask"] = torch.zeros((len(items), longest), dtype=torch.int64)
    for line, item in enumerate(items):
        length = len(item["input_ids"])
        for name in ("input_ids", "labels", "position_ids"):
            batch[name][line, :length] = item[name]
        if packed:
            batch["position_ids"][line, length:] = torch.arange(longest - length)
        else:
            batch["attention_mask"][line, :length] = 1
    images = [image for item in items for image in item["pixel_values"]]
    if images:
        batch["pixel_values"] = torch.stack(images)
    return batch
