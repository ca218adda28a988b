"""Which pairs make a batch is a pure function of seed and step."""

import numpy as np
import pytest

from align.common.errors import UsageError
from align.training.order import BatchOrder


@pytest.mark.parametrize("block", [1, 16])
def test_each_epoch_sees_every_pair_at_most_once_in_another_order(block):
    order = BatchOrder(103, 10, seed=0, block_rows=block)
    epochs = [np.concatenate([order.indices(e * order.steps_per_epoch + s) for s in range(10)]) for e in range(3)]
    for epoch in epochs:
        assert len(np.unique(epoch)) == 100 and epoch.min() >= 0 and epoch.max() < 103
    assert not np.array_equal(epochs[0], epochs[1])
    fresh = BatchOrder(103, 10, seed=0, block_rows=block)
    assert np.array_equal(fresh.indices(27), epochs[2][70:80]), "a resumed run reads the same batch"
    assert not np.array_equal(BatchOrder(103, 10, seed=1, block_rows=block).indices(27), epochs[2][70:80])


def test_blocks_are_read_in_one_piece():
    order = BatchOrder(1024, 64, seed=0, block_rows=16)
    assert sum(np.diff(order.indices(3)) == 1) >= 64 - 64 // 16 - 2


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UsageError, match=r"a batch of 11 is larger than the data \(10 pairs\)"):
        BatchOrder(10, 11, seed=0)
