"""Image and caption features joined by key, and their batches, which depend only on (seed, step).

Shapes: `B` global batch, `F` image feature width, `D` caption feature width, `N` images that have their captions.
"""

import copy
import functools
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from align.common.errors import DataError, UsageError
from align.common.fingerprints import compare_fingerprints
from align.common.seeds import generator
from align.features.store import FeatureStore
from align.training.config import Positives
from align.training.holdout import BLOCK, content_ids, drawn_images, image_numbers, merged, near, unit

BLOCK_BYTES = 1 << 20  # read at once if features do not fit in memory
MEMORY_SHARE = 0.5  # share of the available memory above which features are read in blocks
NAMESAKES = 64  # images compared if two data sets share keys


class BatchOrder:
    """The pair numbers of each batch. They depend only on rows, batch size, seed, block rows and step.

    Each epoch permutes blocks of `block_rows` neighboring pairs (1: single pairs) and drops the last, incomplete batch.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, block_rows: int = 1) -> None:
        if batch_size > rows:
            raise UsageError(
                f"a batch of {batch_size} is larger than the data ({rows} pairs); give a smaller --batch-size, and with a few thousand "
                "pairs start from align/recipes/few_photos.yaml: the defaults are made for millions"
            )
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
        shift = int(random.integers(self.block_rows))  # blocks begin at other rows in each epoch
        edges = np.arange(shift - self.block_rows, self.rows + self.block_rows, self.block_rows).clip(0, self.rows)
        blocks = [np.arange(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True) if a < b]
        return np.concatenate([blocks[number] for number in random.permutation(len(blocks))])


@dataclass(frozen=True)
class PairBatch:
    """Features of one batch, float16. Rows with equal ids are positives of each other."""

    images: np.ndarray  # (B, F)
    captions: list[np.ndarray]  # (B, D) a slot
    image_ids: np.ndarray | None = None  # (B,) int64, equal for rows of one image
    caption_ids: list[np.ndarray] | None = None  # (B,) int64 a slot, equal for the same words


@dataclass(frozen=True)
class _Dataset:
    images: FeatureStore
    slots: list[FeatureStore]
    image_rows: np.ndarray  # (n,) of usable images
    first: np.ndarray  # (slots, n) row of the image's first caption in the slot's store
    count: np.ndarray  # (slots, n) captions of the image from that row on

    @property
    def stores(self) -> list[FeatureStore]:
        """The image store and the caption stores."""
        return [self.images, *self.slots]

    @property
    def image_ids(self) -> np.ndarray:
        """Hashes of the images' keys (n,) int64."""
        return self.images.key_ids[self.image_rows]

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (number of the first image, features (n, F)) of neighboring images, in order."""
        for begin in range(0, len(self.image_rows), BLOCK):
            yield begin, self.images.features(self.image_rows[begin : begin + BLOCK])

    def only(self, mask: np.ndarray) -> "_Dataset":
        """Return the images where `mask` (n,) is True."""
        return replace(self, image_rows=self.image_rows[mask], first=self.first[:, mask], count=self.count[:, mask])


class PairedFeatures:
    """Image and caption features of one or more data sets.

    `images[d]` is the image store of data set d, and `slots[c][d]` its caption store for slot c. A slot gives each image one
    caption. If there are several, one is drawn in each step; a store in two slots gives two different ones. `positives` decides
    which ids a batch has: `same_key` those of the image keys over all data sets, `same_caption` also those of the drawn captions'
    words.
    """

    def __init__(self, images: Sequence[FeatureStore], slots: Sequence[Sequence[FeatureStore]], positives: Positives = "diagonal") -> None:
        if not images or not slots:
            raise UsageError("pairs need at least one image store and one caption slot")
        for slot in slots:
            if len(slot) != len(images):
                raise UsageError(f"a caption slot lists {len(slot)} stores for {len(images)} image stores; list one per image store")
        texts = [store for slot in slots for store in slot]
        for first, *others in (images, texts):
            for other in others:
                compare_fingerprints(other.fingerprint, first.fingerprint, str(first.folder))
        self.image_fingerprint, self.image_width = images[0].fingerprint, images[0].width
        self.text_fingerprint, self.text_width = texts[0].fingerprint, texts[0].width
        self.positives = positives
        self._merges = False  # whether equal images are one in `everything`
        self.unpaired = 0  # images left out: no caption in a slot, or an ambiguous key
        self._datasets = [self._join(store, [slot[d] for slot in slots]) for d, store in enumerate(images)]
        if len(self) == 0:
            raise DataError(
                f"no image of {', '.join(str(store.folder) for store in images)} has a caption with its key in every slot "
                f"({', '.join(str(slot[0].folder) for slot in slots)}); were they made from the same data?"
            )
        if positives != "diagonal":
            self._refuse_namesakes()
        if positives == "same_caption":  # fail now, not in a batch, if a store has no text ids
            assert all(len(store.text_ids) == len(store) for store in texts)

    @property
    def _starts(self) -> np.ndarray:
        """The first pair number of each data set, then the number of pairs."""
        return np.cumsum([0, *(len(dataset.image_rows) for dataset in self._datasets)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def nbytes(self) -> int:
        """Total bytes of the stores."""
        return sum({store.folder: store.nbytes for dataset in self._datasets for store in dataset.stores}.values())

    def _join(self, images: FeatureStore, slots: list[FeatureStore]) -> _Dataset:
        keys = images.keys.combine_chunks()
        codes = pc.dictionary_encode(keys).indices.to_numpy(zero_copy_only=False)
        usable = np.bincount(codes)[codes] == 1  # the key occurs once
        firsts, counts = [], []
        for store in slots:
            first, count, unambiguous = _caption_runs(keys, store)
            if images.header.data == store.header.data:  # image and caption must be in one shard: catches a key of two samples
                found = first >= 0
                unambiguous[found] &= images.shard_of(np.flatnonzero(found)) == store.shard_of(first[found])
            usable &= unambiguous & (count > 0)
            firsts.append(first)
            counts.append(count)
        rows = np.flatnonzero(usable)
        self.unpaired += len(keys) - len(rows)
        return _Dataset(images, slots, rows, np.stack(firsts)[:, rows], np.stack(counts)[:, rows])

    def _located(self, pairs: np.ndarray) -> Iterator[tuple[_Dataset, np.ndarray, np.ndarray]]:
        """Yield each data set that has some of the pairs (n,), with their positions in `pairs` and in the data set."""
        home = np.searchsorted(self._starts, pairs, side="right") - 1
        for number in np.unique(home).tolist():
            here = np.flatnonzero(home == number)
            yield self._datasets[number], here, pairs[here] - self._starts[number]

    def _refuse_namesakes(self) -> None:
        """Raise UsageError if two data sets use the same keys for different images, as downloads with running numbers do."""
        for one, other in itertools.combinations(self._datasets, 2):
            _, here, there = np.intersect1d(one.image_ids, other.image_ids, return_indices=True)
            drawn = np.linspace(0, len(here) - 1, min(len(here), NAMESAKES)).astype(np.int64)
            ours = unit(one.images.features(one.image_rows[here[drawn]]))
            theirs = unit(other.images.features(other.image_rows[there[drawn]]))
            similarity = ours @ theirs.T  # (n, n) cosines; an image's nearest should be itself
            if 2 * np.count_nonzero(similarity.diagonal() >= similarity.max(axis=1, initial=-1)) < len(drawn):
                raise UsageError(
                    f"--positives {self.positives}: {one.images.folder} and {other.images.folder} share {len(here)} keys, but they "
                    "name different images; encode with keys that differ, or train with --positives diagonal"
                )

    @property
    def repeated(self) -> int:
        """How many pairs share their image with an earlier pair."""
        return len(self) - len(np.unique(np.concatenate([dataset.image_ids for dataset in self._datasets])))

    @property
    def block_rows(self) -> int:
        """Neighboring pairs to read together: 1 if the features fit in half of the available memory, else a block of at least 1 MiB."""
        if self.nbytes < MEMORY_SHARE * psutil.virtual_memory().available:
            return 1
        return max(1, BLOCK_BYTES // (2 * min(self.image_width, self.text_width)))

    def only(self, chosen: pa.Table) -> int:
        """Keep the pairs whose key is in the column `key` of `chosen`. Return how many of its rows match no pair.

        An optional column `data` (digest of a store's data, as align/curate.py writes it) limits a key to the data sets that have a
        store with this digest. DataError if no data set has a digest, or if no pair is left.
        """
        tied = "data" in chosen.column_names
        known = {store.header.data for dataset in self._datasets for store in dataset.stores}
        strangers = set(chosen["data"].unique().to_pylist()) - known if tied else set()
        if strangers:
            raise DataError(
                f"the keys were chosen from other data ({', '.join(sorted(strangers))}) than the stores; train on stores encoded with the "
                "same --data and --shard-rows, or drop the column data, and keys will count wherever they occur"
            )
        found = np.zeros(len(chosen), dtype=bool)
        for number, dataset in enumerate(self._datasets):
            digests = pa.array(sorted({store.header.data for store in dataset.stores}))
            mine = np.flatnonzero(pc.is_in(chosen["data"], value_set=digests).to_numpy()) if tied else np.arange(len(chosen))
            wanted = chosen["key"].combine_chunks().take(pa.array(mine))
            keys = dataset.images.keys.combine_chunks().take(pa.array(dataset.image_rows))
            found[mine] |= pc.is_in(wanted, value_set=keys).to_numpy(zero_copy_only=False)
            self._datasets[number] = dataset.only(pc.is_in(keys, value_set=wanted).to_numpy(zero_copy_only=False))
        if len(self) == 0:
            raise DataError(f"none of the {len(chosen)} chosen keys is a pair of the stores; was the file made from the same data?")
        return int((~found).sum())

    def split(self, held_out: int, seed: int) -> "PairedFeatures":
        """Move the pairs of `held_out` images to a new object and return it.

        Pairs show one image if they have one key, in any data set, or equal features. The choice depends only on `seed` and on which
        pairs show one image.
        """
        keys = np.concatenate([dataset.image_ids for dataset in self._datasets])
        contents = content_ids(features for dataset in self._datasets for _, features in dataset.blocks())
        chosen = drawn_images(image_numbers(keys, contents), held_out, seed)
        other, parts = copy.copy(self), list(zip(self._datasets, np.split(chosen, self._starts[1:-1]), strict=True))
        other._datasets, other._merges = [dataset.only(mask) for dataset, mask in parts], True
        self._datasets = [dataset.only(~mask) for dataset, mask in parts]
        return other

    def leave_out_near(self, held_out: "PairedFeatures", cosine: float) -> int:
        """Leave out the pairs whose image has at least this cosine with one of `held_out`; return how many. DataError if none is left."""
        others = held_out.everything()[0]
        masks = [
            np.concatenate([np.zeros(0, dtype=bool), *(near(rows, others, cosine) for _, rows in dataset.blocks())])
            for dataset in self._datasets
        ]
        self._datasets = [dataset.only(~mask) for dataset, mask in zip(self._datasets, masks, strict=True)]
        if len(self) == 0:
            raise DataError(f"--val-apart {cosine}: every image is as near to a held-out one; give a larger cosine")
        return int(sum(mask.sum() for mask in masks))

    def batch(self, indices: np.ndarray, seed: int, step: int, part: slice = slice(None)) -> PairBatch:
        """Return the pairs `indices[part]` (numbers in 0..N-1). Captions are drawn for the whole batch, whatever the part."""
        draws = generator(seed, 2, step).random((len(indices), max(int(d.count.max(initial=1)) for d in self._datasets)))
        indices, draws = indices[part], draws[part]
        images = np.empty((len(indices), self.image_width), dtype=np.float16)
        captions = [np.empty((len(indices), self.text_width), dtype=np.float16) for _ in self._datasets[0].slots]
        image_ids = None if self.positives == "diagonal" else np.empty(len(indices), dtype=np.int64)
        caption_ids = [np.empty(len(indices), dtype=np.int64) for _ in captions] if self.positives == "same_caption" else None
        for dataset, here, local in self._located(indices):
            images[here] = dataset.images.features(dataset.image_rows[local])
            if image_ids is not None:
                image_ids[here] = dataset.images.key_ids[dataset.image_rows[local]]
            for slot, rows in enumerate(_draw(dataset, local, draws[here])):
                captions[slot][here] = dataset.slots[slot].features(rows)
                if caption_ids is not None:
                    caption_ids[slot][here] = dataset.slots[slot].text_ids[rows]
        return PairBatch(images, captions, image_ids, caption_ids)

    def batches(self, order: BatchOrder, steps: range, part: slice) -> Iterator[PairBatch]:
        """Yield this process's part of each batch of `steps`. The next batch is read while the current one is used."""

        def read(step: int) -> PairBatch:
            return self.batch(order.indices(step), order.seed, step, part)

        with ThreadPoolExecutor(1) as reader:
            following = reader.submit(read, steps.start) if len(steps) else None
            for step in steps:
                assert following is not None
                current = following.result()
                following = reader.submit(read, step + 1) if step + 1 < steps.stop else None
                yield current

    def encode_seconds(self) -> float | None:
        """Return None: stores were encoded before the run."""
        return None

    def keys(self, indices: np.ndarray) -> list[str]:
        """Return the sample keys of pairs, prefixed with their image store if there are several data sets."""
        names = np.empty(len(indices), dtype=object)
        for dataset, here, local in self._located(indices):
            prefix = f"{dataset.images.folder}:" if len(self._datasets) > 1 else ""
            names[here] = [prefix + key for key in dataset.images.keys.take(dataset.image_rows[local]).to_pylist()]
        return names.tolist()

    def everything(self, limit: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return at most `limit` images (n, F), all their captions (T, D), and each caption's image number (T,), for validation."""
        images, captions, owners = [], [], []
        for dataset, here, local in self._located(np.arange(len(self))[:limit]):
            images.append(dataset.images.features(dataset.image_rows[local]))
            folders = [store.folder for store in dataset.slots]
            for slot in sorted({folders.index(folder) for folder in folders}):  # a store in two slots counts once
                count = dataset.count[slot, local]
                offsets = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
                captions.append(dataset.slots[slot].features(np.repeat(dataset.first[slot, local], count) + offsets))
                owners.append(np.repeat(here, count))
        found = np.concatenate(images), np.concatenate(captions), np.concatenate(owners)
        return merged(*found) if self._merges else found


def open_pairs(images: Sequence[str], slots: Sequence[str], positives: Positives = "diagonal") -> PairedFeatures:
    """Return the pairs of image stores and caption slots ('+' joins the stores of one slot). Each store is opened once."""
    store = functools.cache(FeatureStore)
    return PairedFeatures([*map(store, images)], [[*map(store, slot.split("+"))] for slot in slots], positives)


def read_keys(path: str) -> pa.Table:
    """Return the column key, and data if present, of a parquet file of samples. DataError if it has no column key."""
    try:
        names = ["key", "data"] if "data" in pq.read_schema(path).names else ["key"]
        return pq.read_table(path, columns=names).cast(pa.schema([(name, pa.string()) for name in names]))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path} is not a parquet file with a column key, such as align/curate.py's chosen.parquet ({error})") from error


def _caption_runs(keys: pa.Array, store: FeatureStore) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each key the first row of its captions in `store` (-1: none), their number, and whether they are one run."""
    table = store.key_table
    if len(table) == 0:
        return np.full(len(keys), -1), np.zeros(len(keys), dtype=np.int64), np.zeros(len(keys), dtype=bool)
    codes = pc.dictionary_encode(table["key"].combine_chunks())
    numbers = codes.indices.to_numpy(zero_copy_only=False)
    items = table["item"].to_numpy()
    begins = np.flatnonzero(np.concatenate([[True], (numbers[1:] != numbers[:-1]) | (items[1:] <= items[:-1])]))
    lengths = np.diff(np.append(begins, len(numbers)))
    _, run_of_key, runs_of_key = np.unique(numbers[begins], return_index=True, return_counts=True)
    position = pc.fill_null(pc.index_in(keys, value_set=codes.dictionary), -1).to_numpy(zero_copy_only=False)
    there, run = position >= 0, run_of_key[position]
    return np.where(there, begins[run], -1), np.where(there, lengths[run], 0), there & (runs_of_key[position] == 1)


def _draw(dataset: _Dataset, local: np.ndarray, draws: np.ndarray) -> list[np.ndarray]:
    """Return for each slot the drawn caption rows (n,) of the images `local` (n,). Slots on one store draw without repeats."""
    chosen, folders = [], [store.folder for store in dataset.slots]
    for slot, folder in enumerate(folders):
        count = dataset.count[slot, local]
        # random order of each image's captions; numbers beyond its count sort last
        order = np.where(np.arange(draws.shape[1]) < count[:, None], draws, 2.0).argsort(axis=1, kind="stable")
        turn = folders[:slot].count(folder) % count
        chosen.append(dataset.first[slot, local] + order[np.arange(len(local)), turn])
    return chosen
