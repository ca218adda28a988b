"""Rows of a source, and the base of the readers of all layouts.

A reader opens fast, can be pickled and keeps no file open between calls. A row has an index in its shard (from 0) and a number in its
file (`start + index`).
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from align.common.errors import DataError
from align.common.reject_codes import Reject
from align.sources.safe_files import MAX_FILE_BYTES, UTF8_MARK, image_cell, read_below

HEAD_ROWS = 100  # rows that decide which columns a JSONL file or an archive has
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm")


@dataclass(frozen=True)
class Row:
    """One row of a source. `reject` says why all of it is unusable; it does not depend on whether images are read."""

    index: int  # within its shard
    key: str  # the file's name and row number if a rejected row has no usable key
    image: bytes | Reject | None  # encoded file, or why it is unreadable, or None if not requested
    fields: dict[str, Any]  # the other columns
    reject: Reject | None = None


class ShardReader(ABC):
    """Rows `start` to `stop` of one file or listing. Opening it finds duplicate keys among them."""

    def __init__(self, file: str, start: int, stop: int, offset: int, image: str, key: str, root: str) -> None:
        """`offset`: byte where row `start` begins; `image`, `key`: column names; `root`: folder that image paths must stay in."""
        self.file, self.start, self.stop, self.offset, self.image, self.key = file, start, stop, offset, image, key
        self.root = os.path.realpath(root)
        self._open()
        self._duplicates = self._find_duplicates()

    def __len__(self) -> int:
        return self.stop - self.start

    def rows(self, start: int = 0, stop: int | None = None, images: bool = True) -> Iterator[Row]:
        """Yield the rows with indices start..stop. Raise DataError if the file changed, or if `images` and it has no image column."""
        for row in self._read(start, len(self) if stop is None else min(stop, len(self)), images):
            if row.index in self._duplicates and row.reject is None:
                yield replace(row, image=None, fields={}, reject=Reject("duplicate_key", f"{row.key!r} in {self.file}"))
            else:
                yield row

    @cached_property
    def columns(self) -> list[str]:
        """Columns of the file, the image's included. Without a header, the first rows decide."""
        names = {self.image: None}
        for row in self._read(0, min(HEAD_ROWS, len(self)), images=False):
            names.update(dict.fromkeys(row.fields))
        return list(names)

    @abstractmethod
    def _open(self) -> None:
        """Locate the rows."""

    @abstractmethod
    def _keys(self) -> Iterator[str | None]:
        """Yield each row's key in the file, None for a rejected row."""

    @abstractmethod
    def _read(self, start: int, stop: int, images: bool) -> Iterator[Row]:
        """Yield the rows with indices start..stop."""

    def _require_rows(self, found: int) -> None:
        if found < len(self):
            raise DataError(f"{self.file} changed since it was planned: {len(self)} rows from row {self.start} on expected, {found} found")

    def _find_duplicates(self) -> frozenset[int]:
        seen, found = set[str](), list[int]()
        for index, key in enumerate(self._keys()):
            if key in seen:
                found.append(index)
            elif key is not None:
                seen.add(key)
        return frozenset(found)

    def _row_name(self, index: int) -> str:
        return f"{Path(self.file).stem}-{self.start + index:09d}"

    def _image_of(self, value: Any) -> bytes | Reject:
        """Return the encoded image in a cell: bytes, a path under the image root, or a struct of both."""
        try:
            found = image_cell(value)
            return found if isinstance(found, bytes) else read_below(self.root, found, MAX_FILE_BYTES)
        except Reject as reject:
            return reject


def require_columns(file: str, present: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise DataError, listing the columns that exist, unless `file` has all `wanted` columns."""
    missing = [name for name in wanted if name not in present]
    if missing:
        names, given = ", ".join(map(repr, missing)), ", ".join(map(repr, present)) or "none"
        raise DataError(f"{file} has no column {names}; it has {given}. Name one of those.")


def text_captions(data: bytes, whole: bool) -> str | list[str]:
    """Return the text of a .txt file as one string, or as a list of lines if there are several and not `whole`."""
    try:
        text = data.removeprefix(UTF8_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Reject("row_utf8", str(error)) from error
    lines = [line for line in text.splitlines() if line.strip()]
    return text if whole or len(lines) < 2 else lines
