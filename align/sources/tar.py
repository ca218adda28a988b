"""Samples of a webdataset tar, located by headers (ustar, GNU, pax). `tarfile` is three times slower and keeps all members in memory."""

import os
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from align.common.files import hash_bytes
from align.common.reject_codes import Reject
from align.sources.gate import gate_key
from align.sources.row import HEAD_ROWS, Row, Scan, ShardReader, text_captions
from align.sources.safe_files import MAX_FILE_BYTES, MAX_ROW_BYTES, parse_json
from align.sources.samples import identities
from align.sources.tar_members import FIELD_SUFFIXES, TEXT_SUFFIXES, images_of, is_half, last_of, members_told, refuse_scattered

BLOCK = 512
MAX_HEADER_BYTES = 1 << 20  # payload of a pax or GNU long-name header
MARKED_BYTES = 1024  # of an image
_REGULAR, _PAX, _LONG_NAME, _IGNORED = b"0\x007", b"x", b"L", b"gK5"  # type flags; all others are links, devices or sparse files


class Member(NamedTuple):
    """A file of a sample: its bytes, and its suffix in lower case, which starts after the first dot of the file name."""

    suffix: str
    offset: int  # of the content, bytes from the start of the archive
    size: int  # bytes


class TarSample(NamedTuple):
    """Neighboring members with one key, the path up to the first dot of the file name."""

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
    """Yield the samples of an open tar in order, from byte `offset`, where a sample begins.

    In an archive that is damaged or cut (without end mark), the last sample has the reject `archive_truncated`. A sample with a link, a
    device or an unsafe name has a reject. Directories and hidden files are skipped.
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
        # the current sample may lack members, so it counts as lost
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
    """Yield the members' headers. Raise _Damage at the first invalid one."""
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
            if kind in _REGULAR:  # so that the incomplete sample is known by name
                yield _Header(name or _plain_name(block), kind, begin, content, 0)
            raise _Damage(offset, f"a member of {announced} bytes in an archive of {end} bytes")
        offset = content + (announced + BLOCK - 1) // BLOCK * BLOCK
        if kind in _PAX + _LONG_NAME:
            if announced > MAX_HEADER_BYTES:
                raise _Damage(content - BLOCK, f"an extension header of {announced} bytes")
            payload = os.pread(descriptor, announced, content)
            name, size = (_text(payload), size) if kind == _LONG_NAME else _pax(payload, name, size)
            first = begin
            continue
        if kind not in _IGNORED:
            yield _Header(name or _plain_name(block), kind, begin, content, announced)
        name, size, first = "", -1, -1


def _pax(payload: bytes, name: str, size: int) -> tuple[str, int]:
    """Return name and size, updated by the records `length key=value` of a pax header."""
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
    """Return a header's number (octal digits, or base 256 if the first bit is set), or -1 if it is invalid."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    digits = field.strip(b" \x00")
    return int(digits or b"0", 8) if not digits.strip(b"01234567") else -1


def _image_mark(descriptor: int, sample: TarSample) -> str | None:
    """Return what a sample's image and its copies have in common and few others have: the size and the last bytes. None without an image.

    The last bytes lie beside the next header, which is read anyway, so that a scan costs no more.
    """
    images = images_of(sample)
    if len(images) != 1 or not images[0].size:
        return None
    end, size = images[0].offset + images[0].size, min(images[0].size, MARKED_BYTES)
    return f"{images[0].size} {hash_bytes(os.pread(descriptor, size, end - size))}"


class TarReader(ShardReader):
    """Samples of a webdataset tar.

    Fields: the names in its .json, `cls` (a whole number if it is one), and the texts (TEXT_SUFFIXES), by their suffix: `txt`, `caption`,
    `outputs.txt`.
    """

    @staticmethod
    def scan(file: str, step: int) -> Scan:
        """Return the places of the samples of a tar, their keys and the marks of their images; `step`: samples of a shard."""
        rows, halves, offsets, found = 0, 0, [], [identities([])]
        with open(file, "rb") as opened:
            samples = tar_samples(opened.fileno())
            while some := list(islice(samples, step)):
                offsets.append(some[0].offset)
                named = [(None, None) if one.reject else (one.key, _image_mark(opened.fileno(), one)) for one in some]
                found.append(identities(named))
                rows += len(some)
                halves += sum(sample.reject is None and is_half(sample) for sample in some)
            if halves:
                refuse_scattered(file, tar_samples(opened.fileno()), halves)
        keys, marks = (np.concatenate(part) for part in zip(*found, strict=True))
        return Scan(rows, offsets, keys, marks=marks)

    def _open(self) -> None:
        with open(self.file, "rb") as file:
            self._samples = list(islice(tar_samples(file.fileno(), self.offset), len(self)))
        self._require_rows(len(self._samples))

    def names(self, images: bool) -> Iterator[tuple[str | None, str | None]]:
        for sample in self._samples:
            yield None if sample.reject else sample.key, None

    def begin(self, index: int) -> int:
        return self._samples[index].offset

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
                yield Row(index, key, self._image_bytes(file.fileno(), sample) if images else None, fields)

    def _fields(self, descriptor: int, sample: TarSample) -> dict[str, Any]:
        found = {member.suffix: member for member in sample.members if last_of(member.suffix) in FIELD_SUFFIXES}
        data = {suffix: self._member(descriptor, member, MAX_ROW_BYTES) for suffix, member in found.items()}
        fields = parse_json(data["json"]) if "json" in data else {}
        for suffix in [suffix for suffix in data if last_of(suffix) in TEXT_SUFFIXES]:
            fields[suffix] = text_captions(data[suffix], whole="json" in data)  # without .json (CLIP_benchmark), one caption per line
        if "cls" in data:
            label = str(text_captions(data["cls"], whole=True)).strip()
            fields["cls"] = int(label) if label.isdecimal() and len(label) < 19 else label
        return fields

    def _image_bytes(self, descriptor: int, sample: TarSample) -> bytes | Reject:
        named = [member for member in sample.members if member.suffix == self.image]
        images = named or images_of(sample)
        suffixes = ", ".join(member.suffix for member in sample.members)
        if not images:
            return Reject("image_missing", f"the sample has {suffixes}")
        if len(images) > 1:
            return Reject("image_ambiguous", f"the sample has {suffixes}; name one of them as the image column")
        try:
            return self._member(descriptor, images[0], MAX_FILE_BYTES)
        except Reject as reject:
            return reject

    def advice(self) -> str:
        return members_told(self._samples[:HEAD_ROWS])

    def parts(self, index: int) -> frozenset[str]:
        return frozenset(member.suffix for member in self._samples[index].members)

    def _member(self, descriptor: int, member: Member, limit: int) -> bytes:
        if member.size > limit:
            raise Reject("file_large", f"a member of {member.size} bytes, at most {limit} are read")
        data = os.pread(descriptor, member.size, member.offset)
        if len(data) < member.size:
            raise Reject("archive_truncated", f"{len(data)} of {member.size} bytes")
        return data
