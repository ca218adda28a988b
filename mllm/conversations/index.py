"""What the tokenizer makes of every conversation: lengths, labels, images and rejects, measured once and kept in a cache.

Legend: N conversations, repeated ones too.
"""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset

from align.common.errors import DataError
from align.common.files import hash_bytes, load_hashed, save_hashed
from align.common.reject_codes import CONVERSATION_CODES, Reject
from mllm.conversations.table import Conversations
from mllm.conversations.tokens import IGNORED, Chat

STATUS = ("good", *CONVERSATION_CODES)  # what a conversation's status number means
_CHUNK = 256  # conversations tokenized at once
_ARRAYS = ("lengths", "supervised", "images", "dropped", "status")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ConversationIndex:
    """What the tokenizer makes of every conversation; arrays (N,) int32, 0 where one is rejected."""

    lengths: np.ndarray  # tokens, visual ones included
    supervised: np.ndarray  # tokens that are learned
    images: np.ndarray
    dropped: np.ndarray  # turns dropped because of the maximum length
    status: np.ndarray  # number in STATUS
    max_length: int
    unread: dict[str, int]  # rows of the files that are no conversation, by code
    fingerprint: str  # xxh3-128 of conversations, tokenizer, template and maximum length

    @cached_property
    def good(self) -> np.ndarray:
        """Numbers of the usable conversations, in order."""
        return np.flatnonzero(self.status == 0)

    @property
    def codes(self) -> Counter[str]:
        """Count of rejects by code, rows that are no conversation among them."""
        counts = np.bincount(self.status, minlength=len(STATUS))
        return Counter(self.unread) + Counter({code: int(count) for code, count in zip(STATUS[1:], counts[1:], strict=True) if count})

    def summary(self) -> str:
        """Return all in one line: how many, how long, how much is learned, what was rejected."""
        tokens, learned, images = int(self.lengths.sum()), int(self.supervised.sum()), int(self.images.sum())
        rejected = ", ".join(f"{code} {count}" for code, count in self.codes.most_common()) or "none"
        shortened = int((self.dropped > 0).sum())
        return (
            f"{len(self.good)} conversations with {images} images and {tokens} tokens ({learned / max(1, tokens):.0%} learned), "
            f"{shortened} shortened to {self.max_length} tokens; rejected: {rejected}"
        )


def build_index(
    conversations: Conversations,
    chat: Chat,
    max_length: int,
    *,
    cache: Path | None = None,
    max_reject_fraction: float = 0.05,
    workers: int = 0,
    progress: Progress = lambda done, total: None,
) -> ConversationIndex:
    """Return the index of all conversations, tokenized here by `workers` further processes unless `cache` has it for the same inputs.

    `cache` is a folder (None: the conversations' own). `progress(done, total)` is called now and then. DataError, with the codes
    and an example, if more than `max_reject_fraction` are rejected or none is left (1: never).
    """
    fingerprint = hash_bytes(repr((STATUS, conversations.fingerprint, chat.fingerprint, max_length)).encode())
    stem = (cache or conversations.folder) / f"index-{fingerprint}"
    cached = load_hashed(stem, ".npz")
    if cached is None:
        cached = _to_bytes(_measure(conversations, chat, max_length, workers, progress))
        save_hashed(stem, ".npz", cached)
    index = ConversationIndex(**_from_bytes(cached), max_length=max_length, unread=dict(conversations.codes), fingerprint=fingerprint)
    _require_good(index, conversations, chat, max_reject_fraction)
    return index


def _measure(conversations: Conversations, chat: Chat, max_length: int, workers: int, progress: Progress) -> dict[str, np.ndarray]:
    """Tokenize every conversation once, however often it is repeated, and return the arrays of a ConversationIndex."""
    first, copies = conversations.distinct()
    chunks = [first[start : start + _CHUNK] for start in range(0, len(first), _CHUNK)]
    loader = DataLoader(_Chunks(conversations, chat, max_length, chunks), batch_size=None, num_workers=workers)
    measured = []
    for done, chunk in enumerate(loader):
        measured.append(np.asarray(chunk))
        progress(min(len(first), (done + 1) * _CHUNK), len(first))
    table = np.concatenate(measured)[copies]  # (N, 5)
    return {name: np.ascontiguousarray(table[:, column]) for column, name in enumerate(_ARRAYS)}


class _Chunks(Dataset):
    """Lengths of chunks of conversations: (n, 5) int32 with the columns of _ARRAYS."""

    def __init__(self, conversations: Conversations, chat: Chat, max_length: int, chunks: Sequence[np.ndarray]) -> None:
        self.conversations, self.chat, self.max_length, self.chunks = conversations, chat, max_length, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> np.ndarray:
        messages = [self.conversations[int(place)].messages for place in self.chunks[number]]
        measured = np.zeros((len(messages), len(_ARRAYS)), dtype=np.int32)
        for line, encoded in zip(measured, self.chat.encode_many(messages, self.max_length), strict=True):
            if isinstance(encoded, Reject):
                line[-1] = STATUS.index(encoded.code)
            else:
                learned = sum(label != IGNORED for label in encoded.labels)
                line[:] = len(encoded.input_ids), learned, encoded.images, encoded.dropped_turns, 0
        return measured


def _to_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _from_bytes(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in _ARRAYS}


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
        problem = chat.encode_many([found.messages], index.max_length)[0]
        first = f"{found.source} (id {found.id!r}): {problem}"
    else:
        reject = next(conversations.rejects())
        first = f"{reject.source} (id {reject.key!r}): {reject.code}: {reject.detail}"
    raise DataError(
        f"{share:.1%} of the conversations are rejected, {max_reject_fraction:.1%} are allowed ({codes}). First: {first}. Mend the data "
        "(mllm/check.py lists every one), or raise --max-reject-fraction"
    )
