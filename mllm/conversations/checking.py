"""Finds the problems of conversation data and counts what an epoch contains. Every row and every image is read once."""

from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import xxhash
from torch.utils.data import DataLoader

from align.common.charts import INK, SERIES, new_figure, png, style_axes
from align.common.preemption import stay
from align.common.reject_codes import Reject, RejectedRow
from align.common.seeds import generator
from align.sources.gate import Limits, gate_image
from mllm.conversations.index import ConversationIndex
from mllm.conversations.packing import fill_rate, pack
from mllm.conversations.table import Conversations
from mllm.conversations.tokens import Chat

CHUNK = 64  # images a task


def _bad_images(conversations: Conversations, limits: Limits, chunk: Sequence[np.ndarray]) -> dict[int, Reject]:
    """Decode images, given as (place, conversation, item). Return the reject of each unusable one, by place."""
    bad = {}
    for place, number, item in map(np.ndarray.tolist, chunk):
        try:
            gate_image(conversations.read_image(conversations[number].images[item]), limits)
        except Reject as reject:
            bad[place] = reject
    return bad


def image_problems(
    conversations: Conversations, limits: Limits, workers: int, progress: Callable[[int, int], None]
) -> tuple[list[RejectedRow], int]:
    """Return a problem for each use of an unusable image, and the number of different images. Each image is decoded once."""
    numbers, keys = array("q"), array("Q")  # numbers holds conversation and item of each image, in turn
    for number in conversations.distinct()[0].tolist():
        for item, image in enumerate(conversations[number].images):
            if image.described is not None:
                continue  # checked with its row
            numbers.extend((number, item))
            keys.append(xxhash.xxh3_64_intdigest(conversations.image_identity(image).encode()))
    if not keys:
        return [], 0
    pairs = np.array(numbers).reshape(-1, 2)
    _, first, which = np.unique(np.array(keys), return_index=True, return_inverse=True)
    order = np.argsort(first)  # the order of the files
    rows: Any = np.column_stack([order, pairs[first[order]]])
    found: dict[int, Reject] = {}
    check = partial(_bad_images, conversations, limits)
    for done, bad in enumerate(DataLoader(rows, CHUNK, num_workers=workers, collate_fn=check, worker_init_fn=stay), 1):
        found |= bad
        progress(min(len(first), done * CHUNK), len(first))
    problems = []
    for place in np.flatnonzero(np.isin(which, list(found))):
        number = int(pairs[place, 0])
        conversation = conversations[number]
        problems.append(RejectedRow.of(found[int(which[place])], number, conversation.id, "image", conversation.source))
    return problems, len(first)


def conversation_problems(conversations: Conversations, index: ConversationIndex, chat: Chat) -> Iterator[RejectedRow]:
    """Yield the rows that are not conversations, then the conversations that the template or the maximum length rejects."""
    yield from conversations.rejects()
    for number in conversations.distinct()[0].tolist():
        if index.status[number]:
            conversation = conversations[number]
            problem = chat.encode_many([conversation.messages], index.max_length, seams=True)[0]
            assert isinstance(problem, Reject)
            yield RejectedRow.of(problem, number, conversation.id, "conversation", conversation.source)


def epoch_facts(index: ConversationIndex, images: int) -> dict[str, Any]:
    """Return the counts of an epoch: conversations, tokens, images and packs."""
    lengths = index.lengths[index.good]
    packs = pack(lengths, index.max_length, generator(0))
    return {
        "rows": len(lengths),
        "tokens": int(lengths.sum()),
        "supervised_tokens": int(index.supervised.sum()),
        "images": int(index.images.sum()),
        "different_images": images,
        "shortened_rows": int((index.dropped > 0).sum()),
        "max_length": index.max_length,
        "packs": len(packs),
        "pack_fill": round(fill_rate(packs, lengths, index.max_length), 4),
    }


def bins_of(lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return counts and edges of a histogram of the lengths, with at most 16 bins from 0 to the longest."""
    width = max(1, -(-int(max(lengths.max(initial=1), max_length / 16)) // 16))
    return np.histogram(lengths, bins=np.arange(0, lengths.max(initial=1) + width + 1, width))


def draw_histogram(counts: np.ndarray, edges: np.ndarray, max_length: int) -> bytes:
    """Return the histogram as a PNG."""
    figure = new_figure(7, 3.5, dpi=120)
    axes = figure.add_subplot()
    style_axes(axes)
    axes.stairs(counts, edges, fill=True, color=SERIES[0])
    axes.axvline(max_length, color=INK, linestyle="--", linewidth=1)
    axes.set(xlabel=f"tokens of a conversation (dashed: maximum {max_length})", ylabel="conversations")
    return png(figure)
