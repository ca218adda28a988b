"""Rows of JSONL, parquet and Arrow files: their places, and random access to those of a shard. CSV: `align.sources.delimited`."""

import os
from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate, islice, pairwise, repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from align.common.errors import DataError
from align.common.files import hash_bytes
from align.common.reject_codes import Reject
from align.sources.gate import gate_key
from align.sources.row import HEAD_ROWS, Row, Scan, ShardReader
from align.sources.safe_files import MAX_ROW_BYTES, bounded_lines, image_cell, json_line, text_start

_HELD_BYTES = 1 << 18  # of a text file, read at once
MAX_GROUP_BYTES = 1 << 30  # of one parquet row group, uncompressed: it is read whole


def newline_blocks(descriptor: int, offset: int) -> Iterator[np.ndarray]:
    """Yield the byte positions of newlines from `offset` on, as one array (n,) int64 per block of 16 KiB at first, later 4 MiB."""
    size = 1 << 14  # a single row is read fast
    while block := os.pread(descriptor, size, offset):
        yield np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == 10) + offset
        offset += len(block)
        size = min(2 * size, 1 << 22)


class TableReader(ShardReader):
    """Base of readers of records with named cells. Without a key column, the file's name and row number make the key."""

    @staticmethod
    @abstractmethod
    def scan(file: str, step: int) -> Scan:
        """Return the places of the rows of a file; `step`: rows of a shard."""

    @abstractmethod
    def _records(self, start: int, stop: int, columns: set[str] | None) -> Iterator[dict[str, Any] | Reject]:
        """Yield the records with indices start..stop. `columns`: those that will be used; None: all."""

    def names(self, images: bool) -> Iterator[tuple[str | None, str | None]]:
        keyed, shown = self.key in self.columns, images and self.image in self.columns
        if not keyed and not shown:
            yield from repeat((None, None), len(self))
            return
        wanted = {self.key, self.image} if shown else {self.key}
        for record in self._records(0, len(self), wanted):
            if isinstance(record, Reject):
                yield None, None
                continue
            try:
                key = gate_key(record.get(self.key)) if keyed else None
            except Reject:
                yield None, None
                continue
            yield key, self._image_name(record.get(self.image)) if shown else None

    def _image_name(self, value: Any) -> str | None:
        """Return what an image cell names: the path, or the hash of its bytes."""
        try:
            found = image_cell(value)
        except Reject:
            return None
        return hash_bytes(found) if isinstance(found, bytes) else os.path.normpath(os.path.join(self.root, found))

    def _read(self, start: int, stop: int, images: bool) -> Iterator[Row]:
        if images:
            self.require([self.image])
        wanted = None if images else set(self.columns) - {self.image} | {self.key}  # the image may be the key
        for index, record in zip(range(start, stop), self._records(start, stop, wanted), strict=True):
            yield self._row(index, record, images)

    def _row(self, index: int, record: dict[str, Any] | Reject, images: bool) -> Row:
        if isinstance(record, Reject):
            return Row(index, self._row_name(index), None, {}, record)
        fields = {name: value for name, value in record.items() if name != self.image}
        key = self._row_name(index)
        if self.key in self.columns:
            try:
                if self.key not in record:
                    raise Reject("missing_column", f"no {self.key!r}")
                key = gate_key(record[self.key])
            except Reject as reject:
                return Row(index, key, None, {}, reject)
        if not images:
            return Row(index, key, None, fields)
        image = self._image_of(record[self.image]) if self.image in record else Reject("missing_column", f"no {self.image!r}")
        return Row(index, key, image, fields)


class JsonlReader(TableReader):
    """Lines of JSON objects."""

    @staticmethod
    def scan(file: str, step: int) -> Scan:
        begin = text_start(file)
        size, last, rows = os.path.getsize(file), begin - 1, 0
        offsets = [begin]
        with open(file, "rb") as opened:
            for ends in newline_blocks(opened.fileno(), begin):
                chosen = np.arange((rows // step + 1) * step, rows + len(ends) + 1, step)  # rows that begin a shard
                offsets += (ends[chosen - rows - 1] + 1).tolist()
                rows += len(ends)
                last = int(ends[-1]) if len(ends) else last
        rows += last + 1 < size  # a last line without its newline
        return Scan(rows, offsets[: -(-rows // step)])

    def _open(self) -> None:
        found = [np.array([self.offset - 1], dtype=np.int64)]
        with open(self.file, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            for block in newline_blocks(file.fileno(), self.offset):
                found.append(block)
                if sum(map(len, found)) > len(self):
                    break
        self._ends = np.concatenate([*found, np.array([size], dtype=np.int64)])[: len(self) + 1]  # a last line may lack its newline
        self._require_rows(len(self._ends) - 1)

    def begin(self, index: int) -> int:
        return int(self._ends[index]) + 1

    @cached_property
    def columns(self) -> list[str]:
        names, rejects = dict[str, None](), list[Reject]()
        with open(self.file, "rb") as file:
            file.seek(text_start(self.file))
            for line, length in islice(bounded_lines(file), HEAD_ROWS):
                found = json_line(line, length)
                if isinstance(found, Reject):
                    rejects.append(found)
                else:
                    names.update(dict.fromkeys(found))
        if not names and rejects:
            raise DataError(f"{self.file}: none of its first rows is a JSON object ({rejects[0]}); expected one object a line")
        return list(names)

    def _records(self, start: int, stop: int, columns: set[str] | None) -> Iterator[dict[str, Any] | Reject]:
        with open(self.file, "rb") as file:
            held, at = b"", 0  # neighboring lines are read together
            for begin, end in pairwise(self._ends[start : stop + 1].tolist()):
                begin, length = begin + 1, end - begin - 1
                if length > MAX_ROW_BYTES:
                    yield json_line(b"", length)
                    continue
                if not at <= begin <= end <= at + len(held):
                    held, at = os.pread(file.fileno(), max(length, min(_HELD_BYTES, int(self._ends[stop]) - begin)), begin), begin
                yield json_line(held[begin - at : end - at], length)


class ParquetReader(TableReader):
    """Rows of a parquet file. The last row group is kept in memory, because neighboring batches need it."""

    @staticmethod
    def scan(file: str, step: int) -> Scan:
        metadata = pq.read_metadata(file)
        for number in range(metadata.num_row_groups):
            size = metadata.row_group(number).total_byte_size
            if size > MAX_GROUP_BYTES:
                raise DataError(
                    f"{file}: row group {number} has {size} bytes, at most {MAX_GROUP_BYTES} are read at once; rewrite the file with "
                    "smaller ones, for example pyarrow.parquet.write_table(table, path, row_group_size=1000)"
                )
        return Scan(metadata.num_rows, [0] * -(-metadata.num_rows // step))

    def _open(self) -> None:
        self._metadata = pq.read_metadata(self.file)
        counts = [self._metadata.row_group(number).num_rows for number in range(self._metadata.num_row_groups)]
        self._starts = [0, *accumulate(counts)]  # row at which each group begins, and the number of all rows
        self._require_rows(self._starts[-1] - self.start)
        self._kept: tuple[Any, pa.Table] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def begin(self, index: int) -> int:
        return 0

    @cached_property
    def columns(self) -> list[str]:
        return list(pq.ParquetFile(self.file, metadata=self._metadata).schema_arrow.names)

    def _records(self, start: int, stop: int, columns: set[str] | None) -> Iterator[dict[str, Any] | Reject]:
        first, last = self.start + start, self.start + stop
        for group, (low, high) in enumerate(pairwise(self._starts)):
            begin, end = max(first, low), min(last, high)
            if begin >= end:
                continue
            try:
                table = self._group(group, columns)
            except (OSError, pa.ArrowException) as error:
                yield from [Reject("row_unreadable", str(error)[:200])] * (end - begin)
                continue
            yield from _python_rows(table, begin - low, end - low)

    def _group(self, group: int, columns: set[str] | None) -> pa.Table:
        names = [name for name in self.columns if columns is None or name in columns]
        if self._kept is None or self._kept[0] != (group, names):
            self._kept = None  # one at a time in memory
            file = pq.ParquetFile(self.file, metadata=self._metadata)
            self._kept = ((group, names), file.read_row_group(group, columns=names, use_threads=False))
        return self._kept[1]


class ArrowReader(TableReader):
    """Rows of an Arrow file, as `save_to_disk` of Hugging Face `datasets` writes them. It is memory-mapped, so rows are read directly."""

    @staticmethod
    def scan(file: str, step: int) -> Scan:
        rows = len(_arrow_table(file))
        return Scan(rows, [0] * -(-rows // step))

    def _open(self) -> None:
        self._table: pa.Table | None = None
        self._require_rows(len(self._rows()) - self.start)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}

    def _rows(self) -> pa.Table:
        if self._table is None:
            self._table = _arrow_table(self.file)
        return self._table

    def begin(self, index: int) -> int:
        return 0

    @cached_property
    def columns(self) -> list[str]:
        return list(self._rows().column_names)

    def _records(self, start: int, stop: int, columns: set[str] | None) -> Iterator[dict[str, Any] | Reject]:
        table = self._rows().select([name for name in self.columns if columns is None or name in columns])
        yield from _python_rows(table, self.start + start, self.start + stop)


def _arrow_table(file: str) -> pa.Table:
    """Return the memory-mapped rows of an Arrow file, a stream or not."""
    mapped = pa.memory_map(file)
    try:
        return pa.ipc.open_stream(mapped).read_all()
    except pa.ArrowInvalid:
        mapped.seek(0)
        return pa.ipc.open_file(mapped).read_all()


def _python_rows(table: pa.Table, start: int, stop: int) -> Iterator[dict[str, Any] | Reject]:
    """Yield rows start..stop of a table."""
    for number in range(start, stop):
        try:
            yield {name: table[name][number].as_py() for name in table.column_names}
        except UnicodeDecodeError as error:
            yield Reject("row_utf8", str(error))
