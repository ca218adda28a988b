"""Conversation data: files are converted once to Arrow files in a cache and memory-mapped, whatever their size.

    cache/NAME-HASH.arrow          the usable conversations: id, row in the file, messages as JSON, images as paths or bytes
    cache/NAME-HASH.rejects.jsonl  the other rows, each with its code
    cache/NAME-HASH.json           written last: counts, and the hashes of both

Usable rows are conversations. They are numbered 0 to N-1 after weighting.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from align.common.errors import DamagedError, DataError, UsageError
from align.common.files import atomic_json, atomic_path, hash_bytes, hash_file, read_object, require_free
from align.common.folders import damage
from align.common.reject_codes import Reject, RejectedRow
from align.common.seeds import generator
from align.embedded.assets import cache_root
from align.sources.gate import gate_key
from align.sources.safe_files import MAX_FILE_BYTES, read_below
from mllm.conversations.files import read_rows, reader_of
from mllm.conversations.messages import Message
from mllm.conversations.rows import normalize

FORMAT = 4  # raise when conversations come out differently: older caches are then rebuilt
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("row", pa.int64()),
        ("messages", pa.string()),
        ("paths", pa.list_(pa.string())),  # one entry an image: its path, or null; likewise its bytes, and its description
        ("blobs", pa.list_(pa.binary())),
        ("described", pa.list_(pa.string())),
    ]
)
_BATCH, _BATCH_BYTES = 1024, 64 << 20
_REPORT = 10_000  # rows
DIGEST_IMAGES = 1024  # conversations whose images are read for a digest
Report = Callable[[str], None]


@dataclass(frozen=True)
class ImageRef:
    """Place of an image: number `item` of conversation `place` in Arrow file `file`.

    `path` is None if that file has the bytes, or if the image is only `described`.
    """

    file: int
    place: int
    item: int
    path: str | None
    described: str | None = None


@dataclass(frozen=True)
class StoredConversation:
    """One conversation and the places of its images."""

    id: str
    source: str  # file name and row number in it (from 0)
    messages: list[Message]
    images: list[ImageRef]


@dataclass(frozen=True)
class _File:
    path: str
    weight: float
    root: str  # folder that image paths start at
    arrow: str
    rejects: str
    digest: str  # of the source file's content and the keys not read
    count: int  # usable conversations
    codes: dict[str, int]
    skipped: int  # usable conversations that began with an answer


class Conversations:
    """Random access to the conversations of files. Can be pickled: nothing is kept open across a fork or pickle."""

    def __init__(self, files: Sequence[_File], folder: Path, seed: int) -> None:
        self.files, self.folder, self.seed = list(files), folder, seed
        self.places = np.concatenate([_weighted(number, file, seed) for number, file in enumerate(files)])  # (N, 2): file, place in it
        self.codes = sum((Counter(file.codes) for file in files), Counter[str]())  # of rows that are not conversations
        self.skipped = sum(file.skipped for file in files)  # conversations whose first answer, to no question, was left out
        self._tables: dict[int, pa.Table] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def __len__(self) -> int:
        return len(self.places)

    @property
    def fingerprint(self) -> str:
        """The xxh3-128 of file contents, weights and seed. Images behind paths are not included."""
        return hash_bytes(repr((FORMAT, self.seed, [(file.digest, file.weight) for file in self.files])).encode())

    @property
    def remarks(self) -> list[str]:
        """Sentences on what was read in another way than it stands in the files."""
        began = f"{self.skipped} conversations begin with an answer: what stands before the first question was left out, as in LLaVA"
        return [began] if self.skipped else []

    def distinct(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers (D,) of the different conversations, and for all N the position of their conversation among these (N,)."""
        keys = self.places[:, 0] << 48 | self.places[:, 1]
        _, first, copies = np.unique(keys, return_index=True, return_inverse=True)
        return first, copies.reshape(-1)

    def __getitem__(self, number: int) -> StoredConversation:
        """Return conversation `number` without reading its images."""
        file, place = map(int, self.places[number])
        table = self._table(file)
        name, row, messages, paths, texts = (table[column][place].as_py() for column in ("id", "row", "messages", "paths", "described"))
        images = [ImageRef(file, place, item, path, text) for item, (path, text) in enumerate(zip(paths, texts, strict=True))]
        return StoredConversation(name, f"{os.path.basename(self.files[file].path)}:{row}", json.loads(messages), images)

    @property
    def any_described(self) -> bool:
        """Whether an image is only described."""
        columns = (self._table(file)["described"].combine_chunks().values for file in range(len(self.files)))
        return any(column.null_count < len(column) for column in columns)

    def image_identity(self, image: ImageRef) -> str:
        """Return a text that is the same for two uses of one image file."""
        return f"{image.file} {image.place} {image.item}" if image.path is None else os.path.join(self.files[image.file].root, image.path)

    def read_image(self, image: ImageRef) -> bytes:
        """Return the bytes of the encoded image file. Raise Reject if it is missing or its path is not safe."""
        if image.path is None:
            return self._table(image.file)["blobs"][image.place].values[image.item].as_py()
        return read_below(self.files[image.file].root, image.path, MAX_FILE_BYTES)

    def images_digest(self) -> str:
        """Return the xxh3-128 of DIGEST_IMAGES images, of conversations that are spread evenly; of all images if there are no more."""
        found: dict[str, str] = {}
        numbers, _ = self.distinct()
        for number in np.unique(np.linspace(0, len(numbers) - 1, min(len(numbers), DIGEST_IMAGES)).astype(np.int64)).tolist():
            for image in self[int(numbers[number])].images:
                if image.described is not None:
                    continue  # it is in the file
                try:
                    found[f"{image.place} {image.item} {image.path}"] = hash_bytes(self.read_image(image))
                except Reject as reject:
                    found[f"{image.place} {image.item} {image.path}"] = reject.code
        return hash_bytes(repr(found).encode())

    def rejects(self) -> Iterator[RejectedRow]:
        """Yield the rows that are not conversations."""
        for file in self.files:
            with open(file.rejects, encoding="utf-8") as lines:
                for line in lines:
                    found = json.loads(line)
                    number = int(found["source"].rpartition(":")[2])
                    yield RejectedRow(number, found["id"], "conversation", found["code"], found["detail"], found["source"])

    def _table(self, file: int) -> pa.Table:
        if file not in self._tables:
            self._tables[file] = pa.ipc.open_file(pa.memory_map(self.files[file].arrow)).read_all()
        return self._tables[file]


def open_conversations(
    specs: Sequence[str], image_root: str | None = None, cache: Path | None = None, seed: int = 0, report: Report = lambda line: None,
    ignored: Sequence[str] = (),
) -> Conversations:  # fmt: skip
    """Return the conversations of files given as PATH or PATH:WEIGHT, converted once to `cache` (default: the user's cache).

    Weight 1.5 takes each conversation once and a random half of them, drawn by `seed`, again. Relative image paths start at
    `image_root` (None: the folder of each file) and may not leave it. Keys in `ignored` are not read, other unknown ones reject their
    row. UsageError for a missing file or bad weight, DataError if a
    file has other data or no usable row.
    """
    if not specs:
        raise UsageError("no conversation files were given; expected PATH or PATH:WEIGHT")
    if image_root is not None and not os.path.isdir(image_root):
        raise UsageError(f"the image root {image_root!r} is not a folder")
    folder = cache or cache_root() / "conversations"
    folder.mkdir(parents=True, exist_ok=True)
    files = [_cached(*_parse(spec), image_root, folder, report, sorted(ignored)) for spec in specs]
    conversations = Conversations(files, folder, seed)
    if not len(conversations):
        raise DataError(f"the weights leave no conversation of {', '.join(specs)}; raise them")
    return conversations


def _parse(spec: str) -> tuple[str, float]:
    path, colon, tail = spec.rpartition(":")
    if os.path.isfile(spec) or not colon:
        path, tail = spec, "1"
    if not os.path.isfile(path):
        raise UsageError(f"no such file: {path}" + (f" (from {spec!r}; expected PATH or PATH:WEIGHT)" if colon else ""))
    try:
        weight = float(tail)
    except ValueError:
        weight = -1
    if not 0 < weight <= 1000:
        raise UsageError(f"{spec!r}: the weight is {tail!r}; expected a number above 0 and up to 1000, such as 0.5")
    reader_of(path)
    return path, weight


def _weighted(number: int, file: _File, seed: int) -> np.ndarray:
    """Return (n, 2) file numbers and places: all places as often as the whole part of the weight says, then a random part, sorted."""
    whole, part = divmod(file.weight, 1)
    more = generator(seed, number).permutation(file.count)[: round(part * file.count)]
    places = np.concatenate([np.tile(np.arange(file.count), int(whole)), np.sort(more)]).astype(np.int64)
    return np.stack([np.full(len(places), number, dtype=np.int64), places], axis=1)


def _cached(path: str, weight: float, image_root: str | None, folder: Path, report: Report, ignored: list[str]) -> _File:
    """Return the cache entry of a file. It is rebuilt unless both of its parts have their committed hashes."""
    root = os.path.realpath(image_root if image_root is not None else os.path.dirname(path) or ".")
    digest = hash_file(Path(path))
    digest = hash_bytes(f"{digest} without {ignored}".encode()) if ignored else digest
    stem = folder / f"{Path(path).stem[:60]}-{digest[:16]}"
    arrow, rejects, commit = (stem.with_name(stem.name + suffix) for suffix in (".arrow", ".rejects.jsonl", ".json"))
    facts = _committed(commit, arrow, rejects)
    if facts is None:
        require_free(folder, os.path.getsize(path))
        found = _read(path, arrow, rejects, report, ignored)
        facts = {"format": FORMAT, **found, "arrow": hash_file(arrow), "rejects": hash_file(rejects)}
        atomic_json(commit, facts)
    if not facts["rows"]:
        counts = ", ".join(f"{code} {count}" for code, count in facts["codes"].items()) or "it is empty"
        with open(rejects, encoding="utf-8") as lines:
            first = lines.readline().strip()
        raise DataError(f"{path} has no row that can be used ({counts}).{' First: ' + first if first else ''}")
    return _File(path, weight, root, str(arrow), str(rejects), digest, facts["rows"], facts["codes"], facts["skipped"])


def _committed(commit: Path, arrow: Path, rejects: Path) -> dict[str, Any] | None:
    with suppress(OSError, DamagedError, LookupError, TypeError):
        facts = read_object(commit)
        if facts["format"] == FORMAT and not damage(arrow, facts["arrow"]) and not damage(rejects, facts["rejects"]):
            return facts
    return None


def _read(path: str, arrow: Path, rejects: Path, report: Report, ignored: list[str]) -> dict[str, Any]:
    """Write the conversations and rejects of a file. Return `rows` (conversations), `codes` (their counts), `skipped` (as in _File)."""
    count, skipped, codes = 0, 0, Counter[str]()
    batch, size = list[dict[str, Any]](), 0
    with atomic_path(arrow) as table, atomic_path(rejects) as others:
        with pa.OSFile(str(table), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer, open(others, "w", encoding="utf-8") as lines:
            for number, row in enumerate(read_rows(path)):
                name = f"{Path(path).stem}-{number:09d}"
                try:
                    if isinstance(row, Reject):
                        raise row
                    with suppress(Reject):  # ids in LLaVA's files are numbers or texts, repeat, or are missing
                        name = gate_key(row.get("id"))
                    messages, images, unasked = normalize(row, ignored)
                except Reject as reject:
                    codes[reject.code] += 1
                    found = RejectedRow.of(reject, number, name, "conversation", f"{os.path.basename(path)}:{number}")
                    lines.write(json.dumps(reject_line(found)) + "\n")
                    continue
                text = json.dumps(messages, ensure_ascii=False)
                places = {"paths": [i.path for i in images], "blobs": [i.data for i in images], "described": [i.described for i in images]}
                batch.append({"id": name, "row": number, "messages": text, **places})
                size += len(text) + sum(len(image.data or image.described or b"") for image in images)
                count, skipped = count + 1, skipped + bool(unasked)
                if len(batch) == _BATCH or size >= _BATCH_BYTES:
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, SCHEMA))
                    batch, size = [], 0
                if (number + 1) % _REPORT == 0:
                    report(f"{path}: {number + 1} rows read, {codes.total()} of them rejected")
            if batch:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, SCHEMA))
    return {"rows": count, "codes": dict(codes.most_common()), "skipped": skipped}


def reject_line(row: RejectedRow) -> dict[str, str]:
    """Return the JSON line of a rejected conversation or image."""
    return {"source": row.source, "id": row.key, "code": row.code, "detail": row.detail}
