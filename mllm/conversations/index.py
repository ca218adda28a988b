"""Measures every conversation once with the tokenizer (length, how many labels, images, reject code) and caches the result.

Legend: `N` conversations, including repeated ones.
"""

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from align.common.errors import DataError
from align.common.files import hash_bytes, load_hashed, save_hashed
from align.common.preemption import stay
from align.common.reject_codes import CONVERSATION_CODES, Reject
from mllm.conversations.table import Conversations
from mllm.conversations.tokens import IGNORED, Chat

STATUS = ("good", *CONVERSATION_CODES)  # meaning of a conversation's status number
_CHUNK = 256  # conversations tokenized at once
_ARRAYS = ("lengths", "supervised", "images", "dropped", "status")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ConversationIndex:
    """The measurements of every conversation: arrays (N,) int32, all but `status` 0 for rejected ones."""

    lengths: np.ndarray  # tokens, visual ones included
    supervised: np.ndarray  # tokens that are learned
    images: np.ndarray
    dropped: np.ndarray  # turns dropped because of the maximum length
    status: np.ndarray  # number in STATUS
    max_length: int
    unread: dict[str, int]  # rows that are not conversations, by code
    fingerprint: str  # xxh3-128 of conversations, tokenizer, template and maximum length

    @cached_property
    def good(self) -> np.ndarray:
        """Numbers of the usable conversations, ascending."""
        return np.flatnonzero(self.status == 0)

    @property
    def codes(self) -> Counter[str]:
        """Count of rejects by code, including rows that are not conversations."""
        counts = np.bincount(self.status, minlength=len(STATUS)).tolist()
        return Counter(self.unread) + Counter(dict(zip(STATUS[1:], counts[1:], strict=True)))  # a sum leaves out zeros

    def summary(self) -> str:
        """Return one line: number of conversations, their length, share to learn, and rejects."""
        tokens, learned, images = int(self.lengths.sum()), int(self.supervised.sum()), int(self.images.sum())
        rejected = ", ".join(f"{code} {count}" for code, count in self.codes.most_common()) or "none"
        shortened = int((self.dropped > 0).sum())
        return (
            f"{len(self.good)} conversations with {images} images and {tokens} tokens ({learned / max(1, tokens):.0%} learned), "
            f"{shortened} shortened to {self.max_length} tokens; rejected: {rejected}"
        )


def build_index(
    conversations: Conversations, chat: Chat, max_length: int, *, cache: Path | None = None, max_reject_fraction: float = 0.05,
    workers: int = 0, progress: Progress = lambda done, total: None,
) -> ConversationIndex:  # fmt: skip
    """Return the index of all conversations, from the folder `cache` (None: their own) or computed by `workers` extra processes.

    DataError with the codes and an example if more than `max_reject_fraction` are rejected or none is left. 1: never.
    """
    fingerprint = hash_bytes(repr((STATUS, conversations.fingerprint, chat.fingerprint, max_length)).encode())
    stem = (cache or conversations.folder) / f"index-{fingerprint}"
    cached = load_hashed(stem, ".npz")
    if cached is None:
        buffer = io.BytesIO()
        np.savez(buffer, **_measure(conversations, chat, max_length, workers, progress))  # type: ignore[arg-type]
        cached = buffer.getvalue()
        save_hashed(stem, ".npz", cached)
    with np.load(io.BytesIO(cached), allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in _ARRAYS}
    index = ConversationIndex(**arrays, max_length=max_length, unread=dict(conversations.codes), fingerprint=fingerprint)
    _require_good(index, conversations, chat, max_reject_fraction)
    return index


def _measure(conversations: Conversations, chat: Chat, max_length: int, workers: int, progress: Progress) -> dict[str, np.ndarray]:
    """Return the arrays of a ConversationIndex. A repeated conversation is tokenized only once."""
    first, copies = conversations.distinct()
    numbers: Any = first
    measured = []
    work = partial(_measure_chunk, conversations, chat, max_length)
    for done, chunk in enumerate(DataLoader(numbers, _CHUNK, num_workers=workers, collate_fn=work, worker_init_fn=stay), 1):
        measured.append(chunk)
        progress(min(len(first), done * _CHUNK), len(first))
    table = np.concatenate(measured)[copies]  # (N, 5)
    return {name: np.ascontiguousarray(table[:, column]) for column, name in enumerate(_ARRAYS)}


def _measure_chunk(conversations: Conversations, chat: Chat, max_length: int, numbers: list[int]) -> np.ndarray:
    """Return (n, 5) int32 for n conversations: the columns of _ARRAYS."""
    measured = np.zeros((len(numbers), len(_ARRAYS)), dtype=np.int32)
    messages = [conversations[number].messages for number in numbers]
    for line, encoded in zip(measured, chat.encode_many(messages, max_length, seams=True), strict=True):
        if isinstance(encoded, Reject):
            line[-1] = STATUS.index(encoded.code)
        else:
            learned = len(encoded.labels) - encoded.labels.count(IGNORED)
            line[:] = len(encoded.input_ids), learned, encoded.images, encoded.dropped_turns, 0
    return measured


def _require_good(index: ConversationIndex, conversations: Conversations, chat: Chat, max_reject_fraction: float) -> None:
    unread = sum(index.unread.values())
    unread_share = unread / (unread + sum(file.count for file in conversations.files))
    bad = np.flatnonzero(index.status)
    share = unread_share + (1 - unread_share) * len(bad) / len(index.status)
    if max_reject_fraction >= 1 or (share <= max_reject_fraction and len(index.good)):
        return
    codes = ", ".join(f"{code} {count}" for code, count in index.codes.most_common(5))
    if len(bad):
        found = conversations[int(bad[0])]
        problem = chat.encode_many([found.messages], index.max_length, seams=True)[0]
        first = f"{found.source} (id {found.id!r}): {problem}"
    else:
        reject = next(conversations.rejects())
        first = f"{reject.source} (id {reject.key!r}): {reject.code}: {reject.detail}"
    raise DataError(
        f"{share:.1%} of the conversations are rejected, {max_reject_fraction:.1%} are allowed ({codes}). First: {first}. Mend the data "
        "(mllm/check.py lists every one), or raise --max-reject-fraction"
    )
