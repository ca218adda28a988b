"""Batch order: which pairs make a batch."""

import numpy as np

from align.common.errors import UsageError
from align.common.seeds import generator


class BatchOrder:
    """Which pairs make batch number `step`: a pure function of (rows, batch size, seed, block rows, step).

    Each epoch is a fresh permutation of blocks of `block_rows` neighbors (1: of all pairs), without the last, incomplete batch.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, block_rows: int = 1) -> None:
        if batch_size > rows:
            raise UsageError(f"a batch of {batch_size} is larger than the data ({rows} pairs); give a smaller --batch-size")
        self.rows, self.batch_size, self.seed, self.block_rows = rows, batch_size, seed, block_rows
        self.steps_per_epoch = rows // batch_size
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def indices(self, step: int) -> np.ndarray:
        """Return the (B,) int64 pair numbers of batch `step` (from 0)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(epoch)
        return self._order[within * self.batch_size : (within + 1) * self.batch_size]

    def _permutation(self, epoch: int) -> np.ndarray:
        random = generator(self.seed, 1, epoch)
        if self.block_rows == 1:
            return random.permutation(self.rows)
        shift = int(random.integers(self.block_rows))  # other neighbors meet in a block in each epoch
        edges = np.arange(shift - self.block_rows, self.rows + self.block_rows, self.block_rows).clip(0, self.rows)
        blocks = [np.arange(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True) if a < b]
        return np.concatenate([blocks[number] for number in random.permutation(len(blocks))])
