"""Random access to the rows of one shard of a source: one Unit class a layout.

A Unit is cheap to open, may be pickled, and holds no open file between calls. Numbers: a row has an index within its unit
(from 0) and a number within its file (from 0, `start + index`). Bytes are read only up to the limits below.
"""

import errno
import json
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from align.common.errors import DataError
from align.common.reject_codes import Reject
from align.sources.gate import gate_key
from align.sources.tar import Member, TarSample, tar_samples

MAX_FILE_BYTES = 256 << 20  # of one image, as a file, archive member or cell
MAX_ROW_BYTES = 64 << 20  # of one line of JSONL or CSV, or of a sample's text or JSON file
HEAD_ROWS = 100  # rows that decide which columns a JSONL file or an archive has
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm")
UTF8_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One row of a source; `reject` says why nothing of it can be used, whether or not images are asked for."""

    index: int  # within its unit
    key: str  # for a rejected row without a usable key: the file's name and the row's number
    image: bytes | Reject | None  # encoded file; why it could not be read; None if not asked for
    fields: dict[str, Any]  # the other columns
    reject: Reject | None = None


class Unit(ABC):
    """The rows `start` to `stop` of one file (or listing); opening it finds duplicate keys within them."""

    def __init__(self, file: str, start: int, stop: int, offset: int, image: str, key: str, root: str) -> None:
        """`offset`: byte at which row `start` begins; `image`, `key`: column names; `root`: folder that image paths stay in."""
        self.file, self.start, self.stop, self.offset, self.image, self.key = file, start, stop, offset, image, key
        self.root = os.path.realpath(root)
        self._open()
        self._duplicates = self._find_duplicates()

    def __len__(self) -> int:
        return self.stop - self.start

    def rows(self, start: int = 0, stop: int | None = None, images: bool = True) -> Iterator[Row]:
        """Yield the rows with indices start..stop; with `images=False` no image is read.

        DataError if images are asked for and the file has no such column at all, or if the file is not what was planned.
        """
        for row in self._read(start, len(self) if stop is None else min(stop, len(self)), images):
            if row.index in self._duplicates and row.reject is None:
                yield replace(row, image=None, fields={}, reject=Reject("duplicate_key", f"{row.key!r} in {self.file}"))
            else:
                yield row

    @cached_property
    @abstractmethod
    def columns(self) -> list[str]:
        """The columns of the file, the image's among them (judged by its first rows where there is no header)."""

    @abstractmethod
    def _open(self) -> None:
        """Find out where the rows are."""

    @abstractmethod
    def _keys(self) -> Iterator[str | None]:
        """Yield the key of each row that a file gives, None where it is rejected."""

    @abstractmethod
    def _read(self, start: int, stop: int, images: bool) -> Iterator[Row]:
        """Yield the rows with indices start..stop."""

    def _require_rows(self, found: int) -> None:
        if found < len(self):
            raise DataError(f"{self.file} changed since it was planned: {len(self)} rows from row {self.start} on expected, {found} found")

    def _find_duplicates(self) -> frozenset[int]:
        seen: set[str] = set()
        found = []
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
        if isinstance(value, dict) and ("bytes" in value or "path" in value):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if value is None or value == "":
            return Reject("image_missing")
        if isinstance(value, bytes):
            return value if len(value) <= MAX_FILE_BYTES else Reject("file_large", f"{len(value)} bytes")
        if isinstance(value, str):
            return _kept(read_below, self.root, value, MAX_FILE_BYTES)
        return Reject("image_type", f"{type(value).__name__} {str(value)[:50]!r}")


def require_columns(file: str, present: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise DataError, naming the columns that are there, unless `file` has all that are wanted."""
    missing = [name for name in wanted if name not in present]
    if missing:
        names, given = ", ".join(map(repr, missing)), ", ".join(map(repr, present)) or "none"
        raise DataError(f"{file} has no column {names}; it has {given}. Name one of those.")


def _kept(read: Callable[..., bytes], *arguments: Any) -> bytes | Reject:
    try:
        return read(*arguments)
    except Reject as reject:
        return reject


def read_below(root: str, path: str, limit: int) -> bytes:
    """Return the content of the file `path` (relative) below `root` (a real path); raise Reject if it is not safe to read.

    Refused: absolute paths, URLs, paths and links that lead out of `root`, anything but a regular file, more than `limit` bytes.
    """
    if path.startswith(("/", "\\")) or "://" in path or "\x00" in path or ".." in path.replace("\\", "/").split("/"):
        raise Reject("unsafe_path", f"{path[:200]!r}; allowed are paths below {root}")
    try:
        real = os.path.realpath(os.path.join(root, path))
        if os.path.commonpath([root, real]) != root:
            raise Reject("unsafe_path", f"{path!r} links to {real}, which is outside {root}")
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would block for ever
    except OSError as error:
        raise _os_reject(error, path) from error
    except UnicodeEncodeError as error:
        raise Reject("unsafe_path", f"{path!r} holds a lone surrogate") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Reject("file_kind", repr(path))
        if status.st_size > limit:
            raise Reject("file_large", f"{path!r} has {status.st_size} bytes, at most {limit} are read")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limit)
    except OSError as error:
        raise _os_reject(error, path) from error
    finally:
        os.close(descriptor)


def _os_reject(error: OSError, path: str) -> Reject:
    codes = {
        errno.ENOENT: "file_missing",
        errno.ENOTDIR: "file_missing",
        errno.EACCES: "file_denied",
        errno.EPERM: "file_denied",
        errno.ELOOP: "file_kind",
        errno.ENXIO: "file_kind",
        errno.EISDIR: "file_kind",
    }
    return Reject(codes.get(error.errno or 0, "file_unreadable"), f"{path[:200]!r}: {error.strerror}")


def parse_json(data: bytes) -> dict[str, Any]:
    """Return the JSON object in `data`; raise Reject for what JSON does not allow and for names given twice."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_names, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise Reject("row_utf8", str(error)) from error
    except (ValueError, RecursionError) as error:
        raise Reject("row_syntax", str(error)[:200]) from error
    if not isinstance(value, dict):
        raise Reject("row_type", f"a JSON {type(value).__name__}, expected an object")
    return value


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise Reject("row_duplicate_name", repr(next(name for name in names if names.count(name) > 1)))
    return values


def _no_constant(name: str) -> None:
    raise Reject("row_nonfinite", name)


def text_captions(data: bytes, whole: bool) -> str | list[str]:
    """Return the text of a sample's .txt file: one string, or one a line if there are several lines and not `whole`."""
    try:
        text = data.removeprefix(UTF8_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Reject("row_utf8", str(error)) from error
    lines = [line for line in text.splitlines() if line.strip()]
    return text if whole or len(lines) < 2 else lines


class TarUnit(Unit):
    """Samples of a webdataset tar. Fields: the names in its .json, `txt` and `cls` (a whole number where it is one).

    A .txt of several lines is several captions (CLIP_benchmark), unless the sample has a .json, too (img2dataset).
    """

    def _open(self) -> None:
        with open(self.file, "rb") as file:
            samples = tar_samples(file.fileno(), self.offset)
            self._samples = [sample for _, sample in zip(range(len(self)), samples, strict=False)]
        self._require_rows(len(self._samples))

    def _keys(self) -> Iterator[str | None]:
        for sample in self._samples:
            yield None if sample.reject else sample.key

    @cached_property
    def columns(self) -> list[str]:
        names = {self.image: None}
        for row in self._read(0, min(HEAD_ROWS, len(self)), images=False):
            names.update(dict.fromkeys(row.fields))
        return list(names)

    def _read(self, start: int, stop: int, images: bool) -> Iterator[Row]:
        with open(self.file, "rb") as file:
            for index in range(start, stop):
                sample = self._samples[index]
                key = self._row_name(index)
                try:
                    key = gate_key(sample.key) if sample.key else key  # damage before the first name leaves none
                    if sample.reject is not None:
                        raise sample.reject
                    fields = self._fields(file.fileno(), sample)
                except Reject as reject:
                    yield Row(index, key, None, {}, reject)
                    continue
                yield Row(index, key, _kept(self._image_bytes, file.fileno(), sample) if images else None, fields)

    def _fields(self, descriptor: int, sample: TarSample) -> dict[str, Any]:
        found = {member.suffix: member for member in sample.members if member.suffix in ("json", "txt", "cls")}
        data = {suffix: self._member(descriptor, member, MAX_ROW_BYTES) for suffix, member in found.items()}
        fields = parse_json(data["json"]) if "json" in data else {}
        if "txt" in data:
            fields["txt"] = text_captions(data["txt"], whole="json" in data)
        if "cls" in data:
            label = str(text_captions(data["cls"], whole=True)).strip()
            fields["cls"] = int(label) if label.isdecimal() and len(label) < 19 else label
        return fields

    def _image_bytes(self, descriptor: int, sample: TarSample) -> bytes:
        named = [member for member in sample.members if member.suffix == self.image]
        images = named or [member for member in sample.members if member.suffix in IMAGE_SUFFIXES]
        suffixes = ", ".join(member.suffix for member in sample.members)
        if not images:
            raise Reject("image_missing", f"the sample has {suffixes}")
        if len(images) > 1:
            raise Reject("image_ambiguous", f"the sample has {suffixes}; name one of them as the image column")
        return self._member(descriptor, images[0], MAX_FILE_BYTES)

    def _member(self, descriptor: int, member: Member, limit: int) -> bytes:
        if member.size > limit:
            raise Reject("file_large", f"a member of {member.size} bytes, at most {limit} are read")
        data = os.pread(descriptor, member.size, member.offset)
        if len(data) < member.size:
            raise Reject("archive_truncated", f"{len(data)} of {member.size} bytes")
        return data


class FolderUnit(Unit):
    """Image files of a folder. Fields: `label`, the parent folder's name, and `txt`, from a .txt file beside it."""

    def __init__(self, file: str, start: int, stop: int, image: str, names: Sequence[bytes]) -> None:
        """`file`: the folder; `names`: paths below it of the rows start to stop."""
        self._names = names
        super().__init__(file, start, stop, 0, image, "", file)

    def _open(self) -> None:
        assert len(self._names) == len(self)

    def _keys(self) -> Iterator[str | None]:
        for name in self._names:
            yield os.path.splitext(os.fsdecode(name))[0]

    @cached_property
    def columns(self) -> list[str]:
        names = {self.image: None}
        for row in self._read(0, min(HEAD_ROWS, len(self)), images=False):
            names.update(dict.fromkeys(row.fields))
        return list(names)

    def _read(self, start: int, stop: int, images: bool) -> Iterator[Row]:
        for index in range(start, stop):
            path = os.fsdecode(self._names[index])
            stem = os.path.splitext(path)[0]
            key = self._row_name(index)
            fields: dict[str, Any] = {}
            try:
                key = gate_key(stem)
                folder = os.path.dirname(path)
                if folder:
                    fields["label"] = os.path.basename(folder)
                if os.path.lexists(os.path.join(self.root, f"{stem}.txt")):
                    fields["txt"] = text_captions(read_below(self.root, f"{stem}.txt", MAX_ROW_BYTES), whole=False)
            except Reject as reject:
                yield Row(index, key, None, {}, reject)
                continue
            yield Row(index, key, self._image_of(path) if images else None, fields)
