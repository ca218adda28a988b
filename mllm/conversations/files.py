"""Reads conversation files as streams of rows (JSON arrays, JSON lines, parquet), never a whole file in memory.

Every reader yields, for each row, a JSON object or the Reject with the reason why it is unusable.
"""

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align.common.errors import DataError, UsageError
from align.common.reject_codes import Reject
from align.sources.safe_files import MAX_ROW_BYTES, STRICT_JSON, bounded_lines, json_line, require_object, text_start
from mllm.conversations.rows import TURN_KEYS, TURNS_SAID, is_read

_SPACE = " \t\r\n"
_ANY_JSON = json.JSONDecoder(parse_int=str)  # finds the end of a rejected element
Reader = Callable[[str], Iterator[dict[str, Any] | Reject]]


def read_rows(path: str) -> Iterator[dict[str, Any] | Reject]:
    """Yield the rows of a file in order. UsageError for an unknown suffix; DataError if the whole file is unreadable (UTF-16, bad JSON)."""
    reader = reader_of(path)
    try:
        yield from reader(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read ({error}); mend or remove it") from error


def reader_of(path: str) -> Reader:
    """Return the reader for the suffix of a file. UsageError if there is none."""
    suffix = Path(path).suffix.lower()
    if suffix not in READERS:
        raise UsageError(f"{path}: conversations are read from {', '.join(READERS)}; convert the file to one of these")
    return READERS[suffix]


def _json_lines(path: str) -> Iterator[dict[str, Any] | Reject]:
    with open(path, "rb") as file:
        file.seek(text_start(path))
        yield from (json_line(line, length) for line, length in bounded_lines(file))


def _json_array(path: str) -> Iterator[dict[str, Any] | Reject]:
    with open(path, "rb") as file:
        file.seek(text_start(path))
        yield from _ArrayReader(path, file.read).elements()


class _ArrayReader:
    """Decodes a JSON array element by element, from a text buffer that is refilled as needed."""

    def __init__(self, path: str, read: Callable[[int], bytes], step: int = 1 << 20) -> None:
        self.path, self.read, self.step = path, read, step
        self.text, self.place, self.ended = "", 0, False
        self.decode = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape").decode  # bad bytes cost one row
        self.number = 0  # of the current element

    def elements(self) -> Iterator[dict[str, Any] | Reject]:
        if self._next() != "[":
            raise self._broken(
                f"a JSON array has to begin with [, found {self.text[self.place : self.place + 20]!r}; name JSON lines .jsonl"
            )
        self.place += 1
        separator = "]" if self._next() == "]" else ","
        self.place += separator == "]"
        while separator != "]":
            yield self._element()
            self.number += 1
            separator = self._next()
            self.place += 1
            if separator not in ("]", ","):
                raise self._broken(f"expected , or ] after the row, found {separator!r}" if separator else "the file ends within the array")
        if self._next():
            raise self._broken("there is more after the end of the array")

    def _element(self) -> dict[str, Any] | Reject:
        self._next()
        step = self.step
        while True:
            value: dict[str, Any] | Reject
            try:
                try:
                    found, end = STRICT_JSON.raw_decode(self.text, self.place)
                    value = require_object(found)
                except Reject as reject:
                    value, end = reject, _ANY_JSON.raw_decode(self.text, self.place)[1]
                if self.ended or len(self.text) - end > 2:  # else a number such as 1.5 or 1e+5 may continue after the buffer
                    break
            except json.JSONDecodeError as error:
                if self.ended or len(self.text) - self.place > MAX_ROW_BYTES:
                    raise self._broken(f"{error.msg} ({self.text[error.pos : error.pos + 30]!r})") from error
            except RecursionError as error:
                raise self._broken("nesting too deep") from error
            self._refill(step)
            step *= 2
        self.place = end
        return value

    def _next(self) -> str:
        """Skip white space and return the next character, or "" at the end of the file."""
        while True:
            while self.place < len(self.text) and self.text[self.place] in _SPACE:
                self.place += 1
            if self.place < len(self.text):
                return self.text[self.place]
            if not self._refill(self.step):
                return ""

    def _refill(self, size: int) -> bool:
        """Drop the decoded text and read more. Return whether there was more."""
        if self.ended:
            return False
        data = self.read(size)
        self.ended = not data
        self.text, self.place = self.text[self.place :] + self.decode(data, self.ended), 0
        return not self.ended

    def _broken(self, why: str) -> DataError:
        return DataError(
            f"{self.path}: row {self.number}: {why}. The rows after it cannot be found; mend the file, or write one object a line (.jsonl)"
        )


def _parquet(path: str) -> Iterator[dict[str, Any] | Reject]:
    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    if not set(TURN_KEYS) & set(names):
        raise DataError(
            f"{path} has no column {', '.join(TURN_KEYS)}; it has {', '.join(names)}; {TURNS_SAID}. Rename the column that has such "
            "a list, or make one of captions or of questions and answers, such as "
            '[{"from": "human", "value": "<image>\\nDescribe the image."}, {"from": "gpt", "value": CAPTION}]'
        )
    columns = [name for name in names if name == "id" or is_read(name)]
    for group in range(file.metadata.num_row_groups):
        rows, seen = file.metadata.row_group(group).num_rows, 0
        try:
            for batch in file.iter_batches(batch_size=64, row_groups=[group], columns=columns, use_threads=False):
                for number in range(batch.num_rows):
                    seen += 1
                    try:
                        yield {name: batch[name][number].as_py() for name in columns}
                    except UnicodeDecodeError as error:
                        yield Reject("row_utf8", str(error)[:200])
        except (OSError, pa.ArrowException) as error:
            yield from [Reject("row_unreadable", str(error)[:200])] * (rows - seen)


READERS: dict[str, Reader] = {".json": _json_array, ".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": _parquet}
