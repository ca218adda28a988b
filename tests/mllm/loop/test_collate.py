"""The counts of a micro-batch are those of the rows in it, padding apart."""

from functools import partial

import torch

from mllm.conversations.batches import collate
from mllm.loop.collate import Collate
from mllm.loop.flops import StepCost


def item(lengths, learned, images):
    """A row, or a pack of rows, whose last `learned` tokens are learned."""
    labels = torch.full((sum(lengths),), -100)
    labels[len(labels) - learned :] = 7
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {
        "input_ids": torch.ones(sum(lengths)).long(),
        "labels": labels,
        "position_ids": positions,
        "pixel_values": [torch.zeros(3, 2, 2)] * images,
    }


def test_rows_of_a_pack_are_counted_one_by_one():
    cost = StepCost(token=1, pair=10, label=100, image=1000)
    counts = Collate(partial(collate, pad_id=0, packed=True), cost)([item([3, 2], 2, 1), item([4], 4, 0)])["counts"]
    # of the second item the first token is not predicted: 2 + 3 supervised ones; 2 x 5 slots, one of them padding
    assert counts == {"tokens": 9, "slots": 10, "supervised": 5, "images": 1, "flops": 9 + 10 * (9 + 4 + 16) + 100 * 5 + 1000}


def test_unpacked_rows_have_the_same_counts():
    cost = StepCost(token=1, pair=0, label=0, image=0)
    batch = Collate(partial(collate, pad_id=0, packed=False), cost)([item([5], 1, 1), item([2], 1, 1)])
    assert batch["counts"] == {"tokens": 7, "slots": 10, "supervised": 2, "images": 2, "flops": 7}
    assert batch["input_ids"].shape == (2, 5) and len(batch["pixel_values"]) == 2
