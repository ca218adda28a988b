"""Rows of a source, and the base of the readers of all layouts.

A reader opens fast, can be pickled and keeps no file open between calls. A row has an index in its shard (from 0) and a number in its
file (`start + index`). Several rows may be one sample (`align.sources.samples`): it is read as its first row, with the others in it.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from align.common.errors import DataError
from align.common.reject_codes import Reject
from align.sources.gate import gate_key
from align.sources.safe_files import MAX_FILE_BYTES, UTF8_MARK, image_cell, read_below
from align.sources.samples import Place, ShardSamples

HEAD_ROWS = 100  # rows that decide which columns a JSONL file or an archive has
IMAGE_SUFFIXES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm")
IMAGE_ENDINGS = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)  # of file names in lower case
_SHOWN = 30  # columns in a message

ALONE = ShardSamples()  # every row is a sample


@dataclass(frozen=True)
class Row:
    """A sample: one row of a source, or the first of several. `reject` says why it is unusable, whether images are read or not."""

    index: int  # within its shard
    key: str  # the file's name and row number if a rejected row has no usable key
    image: bytes | Reject | None  # encoded file, or why it is unreadable, or None if not requested
    fields: dict[str, Any]  # the other columns
    reject: Reject | None = None
    others: tuple[dict[str, Any] | Reject, ...] = ()  # columns of the sample's other rows, or why one is unusable

    def cell(self, column: str) -> Any:
        """Return what the sample has in a column: the cell of its row, or a list of what is in the cells of all its rows.

        Raise Reject if it has no such column. In the list a Reject stands for a row that is unusable or lacks the column.
        """
        lacking = Reject("missing_column", f"no {column!r}; the row has {', '.join(self.fields) or 'nothing'}")
        cells = [row if isinstance(row, Reject) else row.get(column, lacking) for row in (self.fields, *self.others)]
        if all(cell is lacking for cell in cells):
            raise lacking
        if not self.others and isinstance(cells[0], Reject):
            raise cells[0]
        return [value for cell in cells for value in (cell if isinstance(cell, list | tuple) else [cell])] if self.others else cells[0]


class Scan(NamedTuple):
    """What one pass over a file finds."""

    rows: int
    offsets: list[int]  # the byte where each shard begins, 0 for parquet
    keys: np.ndarray | None = None  # (rows,) int64 hashes of the keys, 0 for rejected rows; None: not looked at
    notes: tuple[str, ...] = ()  # what the user should know about the file
    marks: np.ndarray | None = None  # (rows,) int64 of the images: equal images have equal ones, 0: none; beside keys


class ShardReader(ABC):
    """Rows `start` to `stop` of one file or listing."""

    def __init__(
        self, file: str, start: int, stop: int, offset: int, image: str, key: str, root: str, samples: ShardSamples = ALONE
    ) -> None:
        """`offset`: byte where row `start` begins; `image`, `key`: column names; `root`: folder that image paths must stay in."""
        self.file, self.start, self.stop, self.offset, self.image, self.key = file, start, stop, offset, image, key
        self.root, self.samples = os.path.realpath(root), samples
        self._open()

    def __len__(self) -> int:
        return self.stop - self.start

    def rows(self, start: int = 0, stop: int | None = None, images: bool = True) -> Iterator[Row]:
        """Yield the samples whose first row has an index in start..stop.

        Raise DataError if the file changed, or if `images` and it has no image column.
        """
        for begin, end in self.samples.runs(start, len(self) if stop is None else min(stop, len(self))):
            for row in self._read(begin, end, images):
                yield self._sample(row, images)

    @cached_property
    def columns(self) -> list[str]:
        """Columns of the file, the image's included. Without a header, the first rows decide."""
        names = {self.image: None}
        for row in self._read(0, min(HEAD_ROWS, len(self)), images=False):
            names.update(dict.fromkeys(row.fields))
        return list(names)

    def require(self, wanted: Sequence[str]) -> None:
        """Raise DataError, listing the columns that exist, unless the file has all `wanted` columns."""
        missing = [name for name in wanted if name not in self.columns]
        if missing:
            names, given = ", ".join(map(repr, missing)), ", ".join(map(repr, self.columns[:_SHOWN])) or "none"
            given += f" and {len(self.columns) - _SHOWN} more" if len(self.columns) > _SHOWN else ""
            raise DataError(f"{self.file} has no column {names}; it has {given}. {self.advice()}")

    def advice(self) -> str:
        """Return what to do if a column is not there."""
        return "Name one of those."

    @abstractmethod
    def _open(self) -> None:
        """Locate the rows."""

    @abstractmethod
    def names(self, images: bool) -> Iterator[tuple[str | None, str | None]]:
        """Yield what each row calls itself: its key in the file, and the image that it names (if `images`); None for nothing.

        Rejected rows have neither. Image files that only have a place of their own have no name.
        """

    def parts(self, index: int) -> frozenset[str]:
        """Return what a row consists of, if other files may hold more of it: the suffixes of its members in a tar."""
        return frozenset()

    @abstractmethod
    def begin(self, index: int) -> int:
        """Return the byte where a row begins, or 0 if rows are not found by it."""

    @abstractmethod
    def _read(self, start: int, stop: int, images: bool) -> Iterator[Row]:
        """Yield the rows with indices start..stop."""

    def _require_rows(self, found: int) -> None:
        if found < len(self):
            raise DataError(f"{self.file} changed since it was planned: {len(self)} rows from row {self.start} on expected, {found} found")

    def _sample(self, row: Row, images: bool) -> Row:
        """Return a row as a sample: with its other rows and prefix, or rejected because an earlier sample has its key."""
        samples = self.samples
        places = samples.others.get(row.index, ())
        if places and row.index not in samples.duplicates:
            instead = images and row.reject is not None  # a later row takes the place of a first one that is unusable
            rows = [row, *(other for place in places for other in self._rows_at(place, instead))]
            first = next((one for one in rows if one.reject is None), row)
            row = replace(first, index=row.index, others=tuple(one.reject or one.fields for one in rows if one is not first))
        if row.reject is not None:
            return row
        try:
            if samples.prefix:
                row = replace(row, key=gate_key(f"{samples.prefix}:{row.key}"))
            if row.index in samples.duplicates:
                raise samples.duplicates[row.index]
        except Reject as reject:
            return replace(row, image=None, fields={}, reject=reject, others=())
        return row

    def _rows_at(self, place: Place, images: bool) -> Iterator[Row]:
        """Yield rows of this file or another one."""
        if place.file == self.file and self.start <= place.start and place.stop <= self.stop:
            return self._read(place.start - self.start, place.stop - self.start, images)
        reader = type(self)(place.file, place.start, place.stop, place.offset, self.image, self.key, self.root)
        return reader._read(0, len(reader), images)

    def _row_name(self, index: int) -> str:
        return f"{Path(self.file).stem}-{self.start + index:09d}"

    def _image_of(self, value: Any) -> bytes | Reject:
        """Return the encoded image in a cell: bytes, a path under the image root, or a struct of both."""
        try:
            found = image_cell(value)
            return found if isinstance(found, bytes) else read_below(self.root, found, MAX_FILE_BYTES)
        except Reject as reject:
            return reject


def text_captions(data: bytes, whole: bool) -> str | list[str]:
    """Return the text of a .txt file as one string, or as a list of lines if there are several and not `whole`."""
    try:
        text = data.removeprefix(UTF8_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Reject("row_utf8", str(error)) from error
    lines = [line for line in text.splitlines() if line.strip()]
    return text if whole or len(lines) < 2 else lines
