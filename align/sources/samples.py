"""Which rows make a sample, over a whole data set: rows that name one image are one sample, and no two samples share a key.

Rows are numbered over all shards of a plan. Shapes: `N` rows.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from align.common.errors import DataError
from align.common.files import hash64, hash_bytes
from align.common.reject_codes import Reject

Group = Literal["image", "key", "none"]  # which rows are one sample: those that name one image, those with one key, each its own
# A row that is no sample of its own: its shard and row in it, and those of the row whose sample it belongs to (`same`), or that has its
# key. File, number in it and offset are where the row itself is; without `same`, where the other one is.
JOINED_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()), ("row", pa.int64()), ("first_shard", pa.int32()), ("first_row", pa.int64()), ("same", pa.bool_()),
        ("file", pa.string()), ("number", pa.int64()), ("offset", pa.int64()),
    ]
)  # fmt: skip
_ELSEWHERE = -1  # the shard of a row that is in no shard of a part of a plan


class Place(NamedTuple):
    """Rows start..stop of a file; `offset` is the byte of the first (0 for parquet)."""

    file: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class ShardSamples:
    """What a plan knows about the rows of one shard, by their number in it."""

    absorbed: frozenset[int] = frozenset()  # rows that belong to the sample of another row
    duplicates: dict[int, Reject] = field(default_factory=dict)  # rows whose key an earlier sample has
    others: dict[int, list[Place]] = field(default_factory=dict)  # the other rows of a row's sample
    prefix: str = ""  # put before each key

    def runs(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return start..stop without the absorbed rows, as (start, stop) of neighbors."""
        if not self.absorbed:
            return [(start, stop)]
        kept = np.array([row for row in range(start, stop) if row not in self.absorbed], dtype=np.int64)
        pieces = np.split(kept, np.flatnonzero(np.diff(kept) != 1) + 1)
        return [(int(piece[0]), int(piece[-1]) + 1) for piece in pieces if len(piece)]


class Identities(NamedTuple):
    """What rows call themselves, as hashes (N,) int64. 0: nothing."""

    keys: np.ndarray
    images: np.ndarray


def identities(names: Iterable[tuple[str | None, str | None]]) -> Identities:
    """Return the identities of rows from each one's key and the name of its image."""
    columns = [*zip(*names, strict=True)] or [(), ()]
    found = [hash64(name or "" for name in column) for column in columns]
    for hashes, column in zip(found, columns, strict=True):
        hashes[[name is None for name in column]] = 0
    return Identities(*found)


@dataclass(frozen=True)
class Shards:
    """The shards of a plan: the file of each, the number of its first row there, and how many rows it has."""

    files: Sequence[str]
    starts: Sequence[int]
    lengths: Sequence[int]
    open: Callable[[int], Any]  # returns the ShardReader of a shard

    def identities(self, images: bool) -> Identities:
        """Read what all rows call themselves; their images only if asked for."""
        parts = [identities(self.open(shard).names(images)) for shard in range(len(self.files))]
        return Identities(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def same_images(self, marks: np.ndarray) -> np.ndarray:
        """Return the identities (N,) of images with the `marks` (N,) of their files: by all bytes, where two have one mark; else 0."""
        found = np.zeros_like(marks)
        owners = _first_rows(marks)
        rows = np.flatnonzero(np.isin(owners, owners[owners != np.arange(len(marks))]))
        shards, places = self.where(rows)
        for shard in np.unique(shards).tolist():
            reader, here = self.open(shard), shards == shard
            images = [next(iter(reader.rows(place, place + 1))).image for place in places[here].tolist()]
            names = [hash_bytes(image) if isinstance(image, bytes) else None for image in images]
            found[rows[here]] = identities((None, name) for name in names).images
        return found

    def where(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards of rows (n,), and their numbers in them."""
        starts = np.cumsum([0, *self.lengths])
        shard = np.searchsorted(starts, rows, side="right") - 1
        return shard, rows - starts[shard]

    def said(self, row: int) -> str:
        """Return a row's place for people, counted from 1."""
        shard, local = (int(place) for place in self.where(np.array(row)))
        return f"row {self.starts[shard] + local + 1} of {self.files[shard]}"


def joined_rows(shards: Shards, names: Identities, group: Group, by_file: bool) -> pa.Table | None:
    """Return the table (JOINED_SCHEMA, sorted) of the rows that are no sample of their own, or None if all are.

    With `by_file` keys count within their file only. DataError if samples of two files have the same key.
    """
    numbers = {file: number for number, file in enumerate(dict.fromkeys(shards.files))}
    home = np.repeat([numbers[file] for file in shards.files], shards.lengths)
    keys = np.where(names.keys == 0, 0, names.keys * 31 + home) if by_file else names.keys
    rows = np.arange(len(keys))
    owners = _first_rows({"image": names.images, "key": keys, "none": np.zeros_like(rows)}[group])
    alone, namesakes = np.flatnonzero(owners == rows), rows.copy()
    namesakes[alone] = alone[_first_rows(keys[alone])]
    if not by_file:
        _refuse_collisions(shards, [(int(row), int(namesakes[row])) for row in np.flatnonzero(home[namesakes] != home)])
        _refuse_equal_names(list(numbers), keys, home)
    apart = np.flatnonzero((owners != rows) | (namesakes != rows))
    return _table(shards, apart, np.minimum(owners, namesakes)[apart], owners[apart] != apart) if len(apart) else None


def _first_rows(ids: np.ndarray) -> np.ndarray:
    """Return for each row (N,) the first row with the same id; for id 0 the row itself."""
    first = np.arange(len(ids))
    ordered = np.sort(ids)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    rows = np.flatnonzero(np.isin(ids, repeated[repeated != 0]))
    if len(rows):
        _, begins, number = np.unique(ids[rows], return_index=True, return_inverse=True)
        first[rows] = rows[begins[number]]
    return first


def _table(shards: Shards, apart: np.ndarray, first: np.ndarray, same: np.ndarray) -> pa.Table:
    places = {}
    for name, rows in (("", apart), ("first_", first)):
        places[f"{name}shard"], places[f"{name}row"] = shards.where(rows)
    shard, row = (np.where(same, places[name], places[f"first_{name}"]) for name in ("shard", "row"))
    offsets = np.zeros(len(apart), dtype=np.int64)
    for number in np.unique(shard[same]).tolist():
        reader, here = shards.open(number), np.flatnonzero(same & (shard == number))
        offsets[here] = [reader.begin(index) for index in row[here].tolist()]
    file = pa.array(shards.files, pa.string()).take(pa.array(shard))
    columns = {**places, "same": same, "file": file, "number": np.array(shards.starts)[shard] + row, "offset": offsets}
    return pa.table(columns, schema=JOINED_SCHEMA)


def _refuse_collisions(shards: Shards, pairs: Sequence[tuple[int, int]]) -> None:
    """Raise DataError if there are pairs of rows with one key that lie in two files."""
    if pairs:
        row, first = pairs[0]
        shard, local = (int(place) for place in shards.where(np.array(row)))
        reader = shards.open(shard)
        key = list(reader.names(False))[local][0]
        first_shard, first_local = (int(place) for place in shards.where(np.array(first)))
        here, there = reader.parts(local), shards.open(first_shard).parts(first_local)
        if here and there and not here & there:
            places = [f"{', '.join(sorted(parts))} in {shards.files[at]}" for parts, at in ((there, first_shard), (here, shard))]
            raise DataError(
                f"{len(pairs)} samples lie in two files, for example {key!r}: {'; '.join(places)}. The members of a sample have to be "
                "neighbors in one tar: extract both into one folder and pack it sorted (GNU tar): tar --sort=name -cf all.tar -C FOLDER ."
            )
        raise DataError(
            f"{len(pairs)} keys stand in two files, for example {key!r}: {shards.said(first)} and {shards.said(row)}. Rows are paired by "
            "key, so they must differ: give --key-prefix file (of a task: `key_prefix: file`), which puts the file's path before its keys"
        )


def _refuse_equal_names(files: Sequence[str], keys: np.ndarray, home: np.ndarray) -> None:
    """Raise DataError if two files without keys of their own have one name, as the name and the row number make the keys."""
    named = dict[str, str]()
    keyed = set(np.unique(home[keys != 0]).tolist())
    for number, file in enumerate(files):
        stem = os.path.splitext(os.path.basename(file))[0]
        if number in keyed:
            continue
        if stem in named:
            raise DataError(
                f"{named[stem]} and {file} have no key column, so the file's name and the row number make the keys, and row 1 of both "
                f"is '{stem}-000000000'. Give --key-prefix file (of a task: `key_prefix: file`), or rename one"
            )
        named[stem] = file


def joined_part(joined: pa.Table | None, chosen: Sequence[int]) -> pa.Table | None:
    """Return what a table of JOINED_SCHEMA says about the chosen shards, which are numbered anew in the given order."""
    if joined is None:
        return None
    size = max(*chosen, *(pc.max(joined[name]).as_py() for name in ("shard", "first_shard"))) + 1
    numbers = np.full(size, _ELSEWHERE, dtype=np.int32)
    numbers[list(chosen)] = np.arange(len(chosen))
    for name in ("shard", "first_shard"):
        place, anew = joined.schema.get_field_index(name), pa.array(numbers[joined[name].to_numpy()])
        joined = joined.set_column(place, joined.schema.field(name), anew)
    used = pc.or_(pc.not_equal(joined["shard"], _ELSEWHERE), pc.not_equal(joined["first_shard"], _ELSEWHERE))
    return joined.filter(used).sort_by([("shard", "ascending"), ("row", "ascending")])


def shard_samples(joined: pa.Table | None, shard: int, prefix: str = "") -> ShardSamples:
    """Return what a table of JOINED_SCHEMA says about one shard."""
    if joined is None:
        return ShardSamples(prefix=prefix)
    here = joined.filter(pc.equal(joined["shard"], shard)).to_pylist()
    mine = joined.filter(pc.and_(pc.equal(joined["first_shard"], shard), joined["same"]))
    others = dict[int, list[Place]]()
    for row in mine.sort_by([("file", "ascending"), ("number", "ascending")]).to_pylist():
        places = others.setdefault(row["first_row"], [])
        if places and (places[-1].file, places[-1].stop) == (row["file"], row["number"]):
            places[-1] = places[-1]._replace(stop=row["number"] + 1)
        else:
            places.append(Place(row["file"], row["number"], row["number"] + 1, row["offset"]))
    absorbed = frozenset(row["row"] for row in here if row["same"])
    duplicates = {row["row"]: f"row {row['number'] + 1} of {row['file']} has it" for row in here if not row["same"]}
    return ShardSamples(absorbed, {row: Reject("duplicate_key", said) for row, said in duplicates.items()}, others, prefix)
