"""The order of training batches in stage two, and which conversations make a batch: packs, or single ones of similar length.

A conversation is given by its number in the index. Everything depends only on lengths and a generator; no data is read.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from align.common.errors import UsageError
from align.common.seeds import generator
from mllm.conversations.index import ConversationIndex

Item = int | list[int]  # a conversation, or a pack of them


def pack(lengths: Sequence[int] | np.ndarray, max_length: int, random: np.random.Generator) -> list[list[int]]:
    """Return packs: lists of positions in `lengths` whose lengths sum to at most `max_length`. Every position is in exactly one pack.

    Best fit decreasing: the longest first, into the pack where it leaves the least space. `random` orders packs and conversations
    of equal length; the number and fill of the packs do not depend on it.
    """
    sizes = np.asarray(lengths)
    if len(sizes) and (sizes.max() > max_length or sizes.min() < 1):
        raise UsageError(f"conversations of {sizes.min()} to {sizes.max()} tokens; a pack takes those of 1 to {max_length}")
    shuffled = random.permutation(len(sizes))
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    packs: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(max_length + 1)]  # by free tokens: numbers of packs
    occupied = 0  # bit s is set if with_space[s] is not empty
    for position in order.tolist():
        size = int(sizes[position])
        fitting = occupied >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            number = with_space[space].pop()
            occupied ^= 0 if with_space[space] else 1 << space
            packs[number].append(position)
        else:
            space, number = max_length, len(packs)
            packs.append([position])
        if space > size:
            with_space[space - size].append(number)
            occupied |= 1 << (space - size)
    return [packs[number] for number in random.permutation(len(packs))]


def fill_rate(packs: Sequence[Sequence[int]], lengths: Sequence[int] | np.ndarray, max_length: int) -> float:
    """Return the share (0 to 1) of the packs' tokens that are not padding."""
    used = sum(int(lengths[position]) for positions in packs for position in positions)
    return used / (max_length * len(packs)) if packs else 0.0


def length_grouped(lengths: np.ndarray, multimodal: np.ndarray, batch_size: int, random: np.random.Generator) -> np.ndarray:
    """Return (batches, batch_size) positions in `lengths`: random batches with images, without images, and mixed ones of the rest.

    Fewer than `batch_size` positions are left out. Each batch is sorted longest first, so its micro-batches have similar lengths.
    """
    kinds = [random.permutation(np.flatnonzero(multimodal)), random.permutation(np.flatnonzero(~multimodal))]
    whole = [kind[: len(kind) // batch_size * batch_size] for kind in kinds]
    rest = random.permutation(np.concatenate([kind[len(kept) :] for kind, kept in zip(kinds, whole, strict=True)]))
    batches = random.permutation(np.concatenate([*whole, rest[: len(rest) // batch_size * batch_size]]).reshape(-1, batch_size))
    return np.take_along_axis(batches, np.argsort(-lengths[batches], axis=1, kind="stable"), axis=1)


def items_an_epoch(index: ConversationIndex, packing: bool, seed: int) -> int:
    """Return how many conversations, or packs of them, an epoch has."""
    return len(pack(index.lengths[index.good], index.max_length, generator(seed, 0))) if packing else len(index.good)


class EpochPlan:
    """The batches of every epoch. They depend only on index, seed and epoch, not on the number of processes."""

    def __init__(self, index: ConversationIndex, batch_size: int, packing: bool = False, seed: int = 0) -> None:
        """`batch_size` counts items (conversations or packs) per optimizer step, over all processes. UsageError if there are fewer."""
        self.index, self.batch_size, self.packing, self.seed = index, batch_size, packing, seed
        self.batches = lru_cache(2)(self._batches)  # by epoch: the current one and one more
        if not self.batches(0):
            raise UsageError(
                f"a batch of {batch_size} {'packs' if packing else 'conversations'} is larger than the data: "
                f"{len(index.good)} conversations, {int(index.lengths[index.good].sum())} tokens. Make the batch smaller"
            )

    def _batches(self, epoch: int) -> list[list[Item]]:
        """Return the epoch's batches of `batch_size` items. The few items that fill no batch are left out of this epoch."""
        random, good = generator(self.seed, epoch), self.index.good
        lengths = self.index.lengths[good]
        if not self.packing:
            return good[length_grouped(lengths, self.index.images[good] > 0, self.batch_size, random)].tolist()
        packs = [good[positions].tolist() for positions in pack(lengths, self.index.max_length, random)]
        return [packs[start : start + self.batch_size] for start in range(0, len(packs) - self.batch_size + 1, self.batch_size)]
