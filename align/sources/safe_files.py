"""Safe reading of untrusted files: one folder only, lines and JSON objects of bounded size, a code for each refusal."""

import errno
import json
import os
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO

from align.common.errors import DataError
from align.common.reject_codes import Reject

MAX_FILE_BYTES = 256 << 20  # of one image, as a file, archive member or cell
MAX_ROW_BYTES = 64 << 20  # of one line of JSONL or CSV, or of a sample's text or JSON file
_MAX_DIGITS = 4000  # Python refuses to convert longer numbers
UTF8_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_below(root: str, path: str, limit: int) -> bytes:
    """Return the content of the file `path` below `root` (a real path). Raise Reject if it is not safe to read.

    `path` is relative, or absolute and below `root`. Refused: URLs, paths and links that lead out of `root`, non-regular files, more than
    `limit` bytes.
    """
    if path.startswith("\\") or "://" in path or "\x00" in path or ".." in path.replace("\\", "/").split("/"):
        raise Reject("unsafe_path", f"{path[:200]!r}; allowed are paths below {root}")
    try:
        place = os.path.join(root, path)
        real = os.path.realpath(place)
        if os.path.commonpath([root, real]) != root:
            led = f"links to {real}, which is" if real != place else "is"
            raise Reject("unsafe_path", f"{path[:200]!r} {led} outside {root}; if it is meant, give a folder above it as --image-root")
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would block for ever
    except OSError as error:
        raise _os_reject(error, place) from error
    except UnicodeEncodeError as error:
        raise Reject("unsafe_path", f"{path!r} holds a lone surrogate") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Reject("file_kind", repr(place))
        if status.st_size > limit:
            raise Reject("file_large", f"{place!r} has {status.st_size} bytes, at most {limit} are read")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limit)
    except OSError as error:
        raise _os_reject(error, place) from error
    finally:
        os.close(descriptor)


def _os_reject(error: OSError, path: str) -> Reject:
    codes = {
        errno.ENOENT: "file_missing", errno.ENOTDIR: "file_missing", errno.EACCES: "file_denied", errno.EPERM: "file_denied",
        errno.ELOOP: "file_kind", errno.ENXIO: "file_kind", errno.EISDIR: "file_kind",
    }  # fmt: skip
    return Reject(codes.get(error.errno or 0, "file_unreadable"), f"{path[-300:]!r}: {error.strerror}")


def text_start(file: str) -> int:
    """Return the byte where a text file's content begins, after a UTF-8 mark. Raise DataError for UTF-16."""
    with open(file, "rb") as opened:
        first = opened.read(3)
    if first[:2] in UTF16_MARKS:
        raise DataError(f"{file} is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {file} > new.{file.rpartition('.')[2]}")
    return 3 if first == UTF8_MARK else 0


def bounded_lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yield (line with its end, its length in bytes) from the file's position on. A line above MAX_ROW_BYTES is cut."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        length, part = len(line), line
        while length > MAX_ROW_BYTES and part and not part.endswith(b"\n"):
            part = file.readline(MAX_ROW_BYTES + 1)
            length += len(part)
        yield line, length


def json_line(line: bytes, length: int) -> dict[str, Any] | Reject:
    """Return the JSON object on a line of `length` bytes, or a Reject."""
    if length > MAX_ROW_BYTES:
        return Reject("row_large", f"a line of {length} bytes, at most {MAX_ROW_BYTES} are read")
    try:
        return parse_json(line) if line.strip() else Reject("row_blank")
    except Reject as reject:
        return reject


def parse_json(data: bytes) -> dict[str, Any]:
    """Return the JSON object in `data`. Raise Reject for invalid JSON and for repeated names."""
    try:
        return require_object(STRICT_JSON.decode(data.decode("utf-8")))
    except UnicodeDecodeError as error:
        raise Reject("row_utf8", str(error)) from error
    except (ValueError, RecursionError) as error:
        raise Reject("row_syntax", str(error)[:200]) from error


def require_object(value: Any) -> dict[str, Any]:
    """Return `value` if it is a JSON object, else raise Reject."""
    if not isinstance(value, dict):
        raise Reject("row_type", f"a JSON {type(value).__name__}, expected an object")
    return value


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise Reject("row_duplicate_name", repr(next(name for name in names if names.count(name) > 1))[:100])
    return values


def _short_integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise Reject("row_syntax", f"a number of {len(digits)} digits")
    return int(digits)


# Raises Reject. NaN and Infinity, which are not JSON, are read as numbers: pandas writes them into columns that nobody reads.
STRICT_JSON = json.JSONDecoder(object_pairs_hook=_unique_names, parse_int=_short_integer)


def image_cell(value: Any) -> bytes | str:
    """Return the encoded file or path in an image cell. In a struct, bytes come before path. Raise Reject for anything else."""
    if isinstance(value, dict) and ("bytes" in value or "path" in value):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None or value == "" or value != value:  # NaN, which pandas writes into empty cells
        raise Reject("image_missing")
    if isinstance(value, bytes) and len(value) > MAX_FILE_BYTES:
        raise Reject("file_large", f"{len(value)} bytes, at most {MAX_FILE_BYTES} are read")
    if not isinstance(value, bytes | str):
        raise Reject("image_type", f"{type(value).__name__} {str(value)[:50]!r}")
    return value
