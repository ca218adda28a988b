"""Candidates of a curation: feature stores of one encoder as one stream of samples.

Shapes: `r` rows and `n` samples of a chunk, `W` feature width, `S` rows of all stores. A sample is an image, or all the captions of
one. Its number is its first row.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from align.common.errors import UsageError
from align.common.fingerprints import compare_fingerprints
from align.features.store import FeatureStore


class CandidatePool:
    """Stores of one encoder with continuous row numbers, read shard by shard."""

    def __init__(self, stores: Sequence[FeatureStore]) -> None:
        """Join the stores. Raise UsageError if kinds differ or all are empty, FingerprintError if encoders differ."""
        self.stores = list(stores)
        first = self.stores[0]
        for store in self.stores[1:]:
            if store.header.kind != first.header.kind:
                raise UsageError(f"{store.folder} holds {store.header.kind}s, {first.folder} {first.header.kind}s; give stores of one kind")
            compare_fingerprints(store.fingerprint, first.fingerprint, str(first.folder))
        self.kind, self.fingerprint, self.width = first.header.kind, first.fingerprint, first.width
        self.starts = np.cumsum([0, *map(len, self.stores)])
        self.shards = [(number, shard) for number, store in enumerate(self.stores) for shard in range(store.header.shards)]
        if not len(self):
            raise UsageError(f"{', '.join(str(store.folder) for store in self.stores)}: no candidates in it")

    @classmethod
    def open(cls, *folders: str) -> "CandidatePool":
        """Return the stores in `folders` as one pool."""
        return cls([FeatureStore(folder) for folder in folders])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def samples(self) -> int:
        """Return the number of samples. For captions this reads all keys."""
        return sum(len(self._begins(shard)) for shard in range(len(self.shards)))

    def _begins(self, shard: int) -> np.ndarray:
        """Return the places of each sample's first row in a shard."""
        rows = len(self.rows_of(shard))
        if self.kind == "image" or not rows:
            return np.arange(rows)
        table = self.shard_keys(shard)  # captions of one sample: one key, rising item numbers, as align.training.pairs joins them
        keys = pc.dictionary_encode(table["key"].combine_chunks()).indices.to_numpy()
        items = table["item"].to_numpy()
        return np.flatnonzero(np.concatenate([[True], (keys[1:] != keys[:-1]) | (items[1:] <= items[:-1])]))

    def rows_of(self, shard: int) -> range:
        """Return the row numbers of a shard, given by its place in `shards`."""
        number, own = self.shards[shard]
        start, stop = self.starts[number] + self.stores[number].starts[own : own + 2]
        return range(int(start), int(stop))

    def shard_keys(self, shard: int) -> pa.Table:
        """Return key and item of the rows of a shard. Raise DamagedError if its file is not as committed."""
        number, own = self.shards[shard]
        return self.stores[number].shard_keys(own)

    def chunks(self, shard: int, size: int, only: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (features (r, W) float16, first row of each sample in them (n,), sample numbers (n,)), about `size` rows at a time.

        A sample is never split. `only` (S,) bool is True for the samples wanted.
        """
        span = self.rows_of(shard)
        begins = self._begins(shard)
        lengths = np.diff(np.append(begins, len(span)))
        if only is not None:
            wanted = only[span.start + begins]
            begins, lengths = begins[wanted], lengths[wanted]
        piece = (np.cumsum(lengths) - 1) // size
        for at in np.split(np.arange(len(begins)), np.flatnonzero(np.diff(piece)) + 1):
            if len(at):
                firsts = np.cumsum(lengths[at]) - lengths[at]
                rows = np.arange(lengths[at].sum()) + np.repeat(begins[at] - firsts, lengths[at])
                yield self.features(span.start + rows), firsts, span.start + begins[at]

    def features(self, rows: np.ndarray) -> np.ndarray:
        """Return features (n, W) float16 of row numbers (n,), in the given order."""
        home = np.searchsorted(self.starts, rows, side="right") - 1
        out = np.empty((len(rows), self.width), dtype=np.float16)
        for number in np.unique(home).tolist():
            here = home == number
            out[here] = self.stores[number].features(rows[here] - self.starts[number])
        return out

    def keys(self, rows: np.ndarray) -> list[str]:
        """Return the sample keys of row numbers (n,), in the given order. Each shard's keys are read once."""
        order = np.argsort(rows, kind="stable")
        found: list[str] = []
        for shard in range(len(self.shards)):
            span = self.rows_of(shard)
            low, high = np.searchsorted(rows[order], [span.start, span.stop])
            if low < high:
                found += self.shard_keys(shard)["key"].take(rows[order[low:high]] - span.start).to_pylist()
        keys = np.empty(len(rows), dtype=object)
        keys[order] = found
        return keys.tolist()

    def rows_in(self, other: "CandidatePool") -> np.ndarray:
        """Return (S,) int64: the first row in `other` with the same key, or -1. Raise UsageError unless both have the same data."""
        ours, theirs = ([store.header.data for store in side.stores] for side in (self, other))
        if ours != theirs:
            raise UsageError(
                f"{', '.join(str(store.folder) for store in other.stores)} was not encoded from the same data as the candidates, store by "
                "store; encode images and captions in one command, or in two with the same --data and --shard-rows"
            )
        found = []
        for shard in range(len(self.shards)):
            mine, there = (pool.shard_keys(shard)["key"].combine_chunks() for pool in (self, other))
            places = pc.fill_null(pc.index_in(mine, value_set=there), -1).to_numpy(zero_copy_only=False).astype(np.int64)
            found.append(np.where(places >= 0, places + other.rows_of(shard).start, -1))
        return np.concatenate(found)
