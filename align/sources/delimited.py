"""Rows of CSV and TSV files. CSV has quoted cells, which may span lines; TSV has no quoting: a line is a row, a quote is text."""

import ast
import csv
import json
import os
import re
import warnings
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from align.common.errors import DataError
from align.common.reject_codes import Reject
from align.sources.row import IMAGE_ENDINGS, Scan
from align.sources.safe_files import MAX_ROW_BYTES, bounded_lines, text_start
from align.sources.tables import TableReader

DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_TEXT = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|None|null|nan"""
_ITEM = re.compile(_TEXT, re.DOTALL)
_LIST = re.compile(rf"\[\s*(?:(?:{_TEXT})[\s,]*)*\]", re.DOTALL)  # numpy writes no commas
_LIST_BEGINS = re.compile(r"""\[\s*(?:['"\]\[{(]|None\b|null\b|nan\b)""")


class Record(NamedTuple):
    """A row: its bytes from `begin` to `end`, how many lines they are, and its cells, one character per byte."""

    begin: int
    end: int
    lines: int
    cells: list[str] | Reject


class _Lines(Iterator[str]):
    """Lines of a file for `csv`, one character per byte, with their lengths."""

    def __init__(self, file: BinaryIO) -> None:
        self.lines, self.position = bounded_lines(file), file.tell()
        self.lengths: list[int] = []  # of the lines since it was last cleared

    def __next__(self) -> str:
        line, length = next(self.lines)
        self.lengths.append(length)
        self.position += length
        if length > MAX_ROW_BYTES:
            raise csv.Error(f"a line of {length} bytes")
        return line.decode("latin-1")


def csv_records(file: BinaryIO) -> Iterator[Record]:
    """Yield the records of an open CSV file from its position on. `cell.encode("latin-1")` gives a cell's bytes.

    A record with bad quotes, with a cell above `csv.field_size_limit()`, or with a quote left open that swallows other rows, is rejected
    and ends at its first line end, so an open quote costs one row.
    """
    while True:
        lines = _Lines(file)
        begin = lines.position
        try:
            for cells in csv.reader(lines, strict=True):
                if len(lines.lengths) > 1 and (row := _swallowed(cells)):
                    raise csv.Error(f"a quote is left open: the cell would take in the row of {row!r}")
                yield Record(begin, lines.position, len(lines.lengths), cells or Reject("row_blank"))
                begin = lines.position
                lines.lengths.clear()
            return
        except csv.Error as error:
            end = begin + lines.lengths[0]
            yield Record(begin, end, 1, Reject("row_syntax", str(error)))
            file.seek(end)


def _swallowed(cells: list[str]) -> str:
    """Return the image path in a cell of several lines, or "": an open quote takes in the following rows up to the next quote."""
    for cell in cells:
        if "\n" in cell:
            for piece in cell.replace("\n", ",").split(","):
                path = piece.strip(' \r"')
                if path.lower().endswith(IMAGE_ENDINGS) and (" " not in path or "/" in path):
                    return path
    return ""


def tsv_records(file: BinaryIO) -> Iterator[Record]:
    """Yield the records of an open TSV file from its position on, one a line. `cell.encode("latin-1")` gives a cell's bytes."""
    begin = file.tell()
    for line, length in bounded_lines(file):
        text = line.removesuffix(b"\n").removesuffix(b"\r")
        cells: list[str] | Reject = text.decode("latin-1").split("\t") if text else Reject("row_blank")
        if length > MAX_ROW_BYTES:
            cells = Reject("row_large", f"a line of {length} bytes, at most {MAX_ROW_BYTES} are read")
        yield Record(begin, begin + length, 1, cells)
        begin += length


def is_tsv(path: str) -> bool:
    """Return whether a file is read as TSV: its name ends with .tsv."""
    return path.lower().endswith(".tsv")


def records(file: BinaryIO, path: str) -> Iterator[Record]:
    """Yield the records of an open file from its position on, as its name says."""
    return tsv_records(file) if is_tsv(path) else csv_records(file)


def header(path: str) -> tuple[list[str], int]:
    """Return (column names, byte of the first row) of a CSV or TSV file. Raise DataError if the names are unusable."""
    with open(path, "rb") as opened:
        opened.seek(text_start(path))
        first = next(records(opened, path), Record(0, 0, 1, Reject("row_blank")))
    if isinstance(first.cells, Reject):
        raise DataError(f"{path}: its first line is not a header ({first.cells}); expected column names")
    try:
        names = [cell.encode("latin-1").decode("utf-8") for cell in first.cells]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: its header is not UTF-8 ({error}); convert the file") from error
    if len(set(names)) != len(names):
        raise DataError(f"{path}: a column name occurs twice in its header {names}; rename one")
    if len(names) == 1 and (fitting := fitting_delimiter(path, names)):
        raise DataError(f"{path}: its header is one column, {names[0]!r}. {fitting}")
    return names, first.end


def fitting_delimiter(path: str, names: list[str]) -> str:
    """Return which delimiter would cut a header into more columns than `names`, and what to do about it; or ""."""
    own = "\t" if is_tsv(path) else ","
    line = own.join(names)
    mark = max((mark for mark in DELIMITERS if mark != own), key=line.count)
    if line.count(mark) < len(names):
        return ""
    given = f"Cells are separated by {DELIMITERS[own]} in a {os.path.splitext(path)[1]} file, but {DELIMITERS[mark]} would give "
    given += f"{line.count(mark) + 1} columns: "
    stem, other = os.path.splitext(path)[0], {",": ".csv", "\t": ".tsv"}.get(mark)
    if other:
        return f"{given}name the file {stem}{other}"
    convert = f"csv.reader(sys.stdin, delimiter={mark!r}, skipinitialspace=True)"
    return f'{given}python -c "import csv, sys; csv.writer(sys.stdout).writerows({convert})" < {path} > {stem}-commas.csv'


class CsvReader(TableReader):
    """Records of a CSV or TSV file with a header."""

    @staticmethod
    def scan(file: str, step: int) -> Scan:
        _, begin = header(file)
        offsets, several, wrapped, line = list[int](), list[str](), 0, 2
        with open(file, "rb") as opened:
            opened.seek(begin)
            rows = 0
            for record in records(opened, file):
                if rows % step == 0:
                    offsets.append(record.begin)
                rows += 1
                if record.lines > 1:
                    several.append(f"lines {line} to {line + record.lines - 1}")
                elif is_tsv(file) and not isinstance(record.cells, Reject):
                    wrapped += sum(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in record.cells)
                line += record.lines
        notes = []
        if several:
            notes.append(f"{file}: {len(several)} rows have a quoted cell over several lines, the first in {several[0]}")
        if wrapped:
            notes.append(f"{file}: {wrapped} cells are wrapped in double quotes. A .tsv file has no quoting, so they are part of the text")
        return Scan(rows, offsets, notes=tuple(notes))

    def _open(self) -> None:
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            self._edges = np.array([self.offset, *(record.end for record in islice(records(file, self.file), len(self)))], dtype=np.int64)
        self._require_rows(len(self._edges) - 1)

    def begin(self, index: int) -> int:
        return int(self._edges[index])

    @cached_property
    def columns(self) -> list[str]:
        return header(self.file)[0]

    def advice(self) -> str:
        if row := next((name for name in self.columns if name.lower().endswith(IMAGE_ENDINGS)), ""):
            return f"{row!r} looks like a cell: the first line has to be the column names, for example image,caption. Put one there."
        return fitting_delimiter(self.file, self.columns) or super().advice()

    def _records(self, start: int, stop: int, columns: set[str] | None) -> Iterator[dict[str, Any] | Reject]:
        if start >= stop:
            return
        with open(self.file, "rb") as file:
            file.seek(int(self._edges[start]))
            for record in islice(records(file, self.file), stop - start):
                yield record.cells if isinstance(record.cells, Reject) else self._named(record.cells)

    def _named(self, cells: list[str]) -> dict[str, Any] | Reject:
        if len(cells) > len(self.columns):
            return Reject("row_syntax", f"{len(cells)} cells under {len(self.columns)} column names")
        try:
            values = [cell.encode("latin-1").decode("utf-8") for cell in cells]
        except UnicodeDecodeError as error:
            return Reject("row_utf8", str(error))
        return dict(zip(self.columns, map(listed, values), strict=False))  # cells missing at the end are missing columns


def listed(cell: str) -> Any:
    """Return a cell that spells a list of texts as that list: JSON's, or as pandas and numpy print Python's. Other cells are text.

    A cell that begins like a list and is none becomes a Reject, which is raised where the cell is used.
    """
    text = cell.strip() if cell[:1] in ("[", " ") else ""
    if not (text.endswith("]") and _LIST_BEGINS.match(text)):
        return cell
    try:
        found = json.loads(text)
        if all(item is None or isinstance(item, str) for item in found):
            return found
    except (ValueError, RecursionError):
        pass
    try:
        if _LIST.fullmatch(text):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about escapes
                return [ast.literal_eval(item) if item[0] in "'\"" else None for item in _ITEM.findall(text[1:-1])]
    except (ValueError, SyntaxError):
        pass
    return Reject("row_syntax", f"no list of texts: {text[:100]!r}; write it as JSON, or one caption a row")
