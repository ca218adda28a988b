"""Samples of a webdataset tar: which byte ranges of the archive belong to which key, found by reading headers only.

`tarfile` is not used because it reads header payloads of any announced size into memory, keeps every member for ever and
takes three times as long; nothing is ever extracted, so only headers matter. Reads ustar, GNU and pax headers.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

from align.common.reject_codes import Reject

BLOCK = 512
MAX_HEADER_BYTES = 1 << 20  # payload of a pax or GNU long-name header
_REGULAR, _PAX, _LONG_NAME, _IGNORED = b"0\x007", b"x", b"L", b"gK5"  # type flags; all others are links, devices or sparse files


class Member(NamedTuple):
    """A file in a sample: its suffix without the dot (after the first dot of the file name, lower case) and its bytes."""

    suffix: str
    offset: int  # of the content, bytes from the start of the archive
    size: int  # bytes


class TarSample(NamedTuple):
    """Neighboring members with one key (the path up to the first dot of the file name)."""

    key: str
    offset: int  # of the first header, bytes from the start of the archive
    members: tuple[Member, ...]
    reject: Reject | None  # why the sample cannot be used


class _Header(NamedTuple):
    name: str
    kind: bytes
    offset: int  # of the first of its headers
    content: int  # offset of the content
    size: int


def tar_samples(descriptor: int, offset: int = 0) -> Iterator[TarSample]:
    """Yield the samples of an open tar from byte `offset` (where a sample begins) on, in order.

    If the archive is cut (has no end mark) or damaged, the last sample before that point carries the reject
    `archive_truncated` and the iteration ends. A sample with a link, a device or an unsafe name carries a reject. Directories
    and hidden files are passed over.
    """
    key, begin, members, reject = "", offset, list[Member](), None
    try:
        for header in _headers(descriptor, offset):
            folder, _, name = header.name.removeprefix("./").rpartition("/")
            stem, _, suffix = name.partition(".")
            if not stem:  # hidden files, such as the ._ twins that macOS writes
                continue
            this_key = f"{folder}/{stem}" if folder or header.name.startswith("/") else stem
            if this_key != key:
                if key:
                    yield TarSample(key, begin, tuple(members), reject)
                key, begin, members, reject = this_key, header.offset, [], None
            if header.kind not in _REGULAR:
                reject = Reject("archive_link", f"{header.name!r} has type {header.kind!r}")
            elif header.name.startswith("/") or ".." in header.name.split("/"):
                reject = Reject("unsafe_path", f"member {header.name!r}")
            members.append(Member(suffix.lower(), header.content, header.size))
    except _Damage as damage:
        # the sample in hand may lack members: it goes with the lost ones
        yield TarSample(key, begin if key else damage.offset, (), Reject("archive_truncated", str(damage)))
    else:
        if key:
            yield TarSample(key, begin, tuple(members), reject)


class _Damage(Exception):
    """The archive cannot be read from `offset` on."""

    def __init__(self, offset: int, what: str) -> None:
        super().__init__(f"{what} at byte {offset}")
        self.offset = offset


def _headers(descriptor: int, offset: int) -> Iterator[_Header]:
    """Yield the members' headers; raise _Damage at the first that cannot be right."""
    end = os.fstat(descriptor).st_size
    name, size, first = "", -1, -1  # from extension headers, for the next member
    while True:
        block = os.pread(descriptor, BLOCK, offset)
        if len(block) < BLOCK:
            raise _Damage(offset, "no end mark" if not block else "half a header")
        if block[0] == 0 and not any(block):
            return
        if _octal(block[148:156]) != sum(block) - sum(block[148:156]) + 256:
            raise _Damage(offset, "a header with a wrong checksum")
        kind, content = block[156:157], offset + BLOCK
        announced = size if size >= 0 else _octal(block[124:136])
        begin = first if first >= 0 else offset
        if announced < 0 or content + announced > end:
            if kind in _REGULAR:  # tells the reader which sample is the incomplete one
                yield _Header(name or _plain_name(block), kind, begin, content, 0)
            raise _Damage(offset, f"a member of {announced} bytes in an archive of {end} bytes")
        offset = content + (announced + BLOCK - 1) // BLOCK * BLOCK
        if kind in _PAX + _LONG_NAME:
            if announced > MAX_HEADER_BYTES:
                raise _Damage(content - BLOCK, f"an extension header of {announced} bytes")
            payload = os.pread(descriptor, announced, content)
            if kind == _LONG_NAME:
                name = _text(payload)
            else:
                name, size = _pax(payload, name, size)
            first = begin
            continue
        if kind not in _IGNORED:
            yield _Header(name or _plain_name(block), kind, begin, content, announced)
        name, size, first = "", -1, -1


def _pax(payload: bytes, name: str, size: int) -> tuple[str, int]:
    """Return name and size as changed by the records `length key=value` of a pax header."""
    while payload:
        length, _, _ = payload.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(payload):
            break
        record, payload = payload[len(length) + 1 : int(length) - 1], payload[int(length) :]
        field, _, value = record.partition(b"=")
        if field == b"path":
            name = _text(value)
        elif field == b"size" and value.isdigit():
            size = int(value)
    return name, size


def _plain_name(block: bytes) -> str:
    name = _text(block[:100])
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\x00" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    # names that are not UTF-8 become lone surrogates, which the key gate rejects
    return field.partition(b"\x00")[0].decode("utf-8", "surrogateescape")


def _octal(field: bytes) -> int:
    """Return a header's number (octal digits, or base 256 if the first bit is set), -1 if it is not one."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    digits = field.strip(b" \x00")
    return int(digits or b"0", 8) if not digits.strip(b"01234567") else -1
