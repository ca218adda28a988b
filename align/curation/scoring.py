"""Candidates of a curation: feature stores as one stream of samples, and their scores against concept prototypes.

Shapes: `r` rows and `n` samples of a chunk, `W` feature width, `E` width of the space of concepts, `C` concepts, `S` rows of all stores.
A sample is an image, or all the captions of one: its score is that of its best caption, and it goes by the number of its first row.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn import functional

from align.common.errors import DamagedError, UsageError
from align.common.fingerprints import compare_fingerprints
from align.curation.toplists import TopLists
from align.features.store import KEYS_SCHEMA, FeatureStore

CHUNK_SCORES = 1 << 22  # scores held at once (16 MiB): a chunk has about this many over C rows

Projection = Callable[[Tensor], Tensor]  # features (r, W) float32 -> L2-normalised (r, E)


def chunk_rows(concepts: int) -> int:
    """Return how many rows are scored at once: a function of C alone, so that a rerun rounds as the first run did."""
    return max(256, min(8192, CHUNK_SCORES // concepts))


def normalize(features: Tensor) -> Tensor:
    """Return features (r, W) with norm 1: the projection of those who need none."""
    return functional.normalize(features, dim=1)


class Candidates:
    """One or more stores of the same encoder, their rows numbered through, read shard by shard."""

    def __init__(self, stores: Sequence[FeatureStore]) -> None:
        """Join the stores; UsageError if they hold other kinds or nothing, FingerprintError if other encoders made them."""
        self.stores = list(stores)
        first = self.stores[0]
        for store in self.stores[1:]:
            if store.header.kind != first.header.kind:
                raise UsageError(f"{store.folder} holds {store.header.kind}s, {first.folder} {first.header.kind}s; give stores of one kind")
            compare_fingerprints(store.fingerprint, first.fingerprint, str(first.folder))
        self.kind, self.fingerprint, self.width = first.header.kind, first.fingerprint, first.width
        self.starts = np.concatenate([[0], np.cumsum([len(store) for store in self.stores])]).astype(np.int64)
        self.shards = [(number, shard) for number, store in enumerate(self.stores) for shard in range(store.header.shards)]
        if not len(self):
            raise UsageError(f"{', '.join(str(store.folder) for store in self.stores)}: no candidates in it")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def rows_of(self, shard: int) -> range:
        """Return the row numbers of shard `shard` (a place in `shards`)."""
        number, own = self.shards[shard]
        begin = int(self.starts[number])
        return range(begin + int(self.stores[number].starts[own]), begin + int(self.stores[number].starts[own + 1]))

    def shard_keys(self, shard: int) -> pa.Table:
        """Return key and item of the rows of one shard; DamagedError if its file is not as committed."""
        number, own = self.shards[shard]
        path = self.stores[number].folder / "shards" / f"{own:06d}.parquet"
        try:
            table = pq.read_table(path, schema=KEYS_SCHEMA)
        except (OSError, pa.ArrowException) as error:
            raise DamagedError(f"{path} cannot be read ({error}); delete its commit record and encode again") from error
        if len(table) != len(self.rows_of(shard)):
            raise DamagedError(f"{path} has {len(table)} keys where {len(self.rows_of(shard))} were committed; encode again")
        return table

    def chunks(self, shard: int, size: int, only: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (features (r, W) float16, first row of each sample in them (n,), the samples' numbers (n,)), up to `size` samples.

        With `only` (S,) bool just the samples for which it is True. A sample is never cut in two.
        """
        span = self.rows_of(shard)
        begins = np.arange(len(span))
        if self.kind == "caption" and len(span):  # captions of one sample: one key, rising item numbers, as align.training.pairs joins them
            table = self.shard_keys(shard)
            keys = pc.dictionary_encode(table["key"].combine_chunks()).indices.to_numpy()
            items = table["item"].to_numpy()
            begins = np.flatnonzero(np.concatenate([[True], (keys[1:] != keys[:-1]) | (items[1:] <= items[:-1])]))
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
        """Return features (n, W) float16 of row numbers (n,), in the order asked for."""
        home = np.searchsorted(self.starts, rows, side="right") - 1
        out = np.empty((len(rows), self.width), dtype=np.float16)
        for number in np.unique(home).tolist():
            here = home == number
            out[here] = self.stores[number].features(rows[here] - self.starts[number])
        return out

    def keys(self, rows: np.ndarray) -> list[str]:
        """Return the sample keys of row numbers (n,), in the order asked for; each shard's keys are read once."""
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

    def rows_in(self, other: "Candidates") -> np.ndarray:
        """Return (S,) int64: for each row here the first row in `other` with its key, -1 if there is none.

        Both must be made from the same data in the same shards (as one align/encode.py command makes them): UsageError if not.
        """
        ours, theirs = ([store.header.data for store in side.stores] for side in (self, other))
        if ours != theirs:
            raise UsageError(
                f"{', '.join(str(store.folder) for store in other.stores)} was not encoded from the same data as the candidates, store by "
                "store; encode images and captions in one command, or in two with the same --data and --shard-rows"
            )
        found = np.full(len(self), -1, dtype=np.int64)
        for shard in range(len(self.shards)):
            mine, there = self.rows_of(shard), other.rows_of(shard)
            place = pc.index_in(self.shard_keys(shard)["key"].combine_chunks(), value_set=other.shard_keys(shard)["key"].combine_chunks())
            places = pc.fill_null(place, -1).to_numpy(zero_copy_only=False).astype(np.int64)
            found[mine.start : mine.stop] = np.where(places >= 0, places + there.start, -1)
        return found


@torch.no_grad()
def scored_chunks(
    candidates: Candidates, shard: int, prototypes: Tensor, project: Projection, only: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (cosines (n, C) float32, sample numbers (n,)) of one shard: `prototypes` (C, E) are normalized, on the device to use."""
    for features, firsts, samples in candidates.chunks(shard, chunk_rows(len(prototypes)), only):
        rows = project(torch.from_numpy(features).to(prototypes.device).float())
        scores = (rows @ prototypes.T).cpu().numpy()  # (r, C)
        if len(firsts) < len(scores):
            scores = np.maximum.reduceat(scores, firsts, axis=0)  # a sample's best caption
        yield scores, samples


def score_shard(candidates: Candidates, shard: int, prototypes: Tensor, project: Projection, lists: TopLists) -> np.ndarray:
    """Add one shard's samples to the lists and return (C,) int64: how many of them have each concept as their best."""
    counts = np.zeros(len(lists), dtype=np.int64)
    for scores, samples in scored_chunks(candidates, shard, prototypes, project):
        lists.add(scores, samples)
        counts += np.bincount(scores.argmax(axis=1), minlength=len(lists))
    return counts
