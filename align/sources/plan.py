"""Image-caption sources: their files, the plan that cuts rows into shards, and the reader of a shard.

Layouts: webdataset tars (img2dataset, CLIP_benchmark); parquet and the Arrow files of Hugging Face `datasets` (image cells with bytes,
paths, or structs of both);
JSONL and CSV/TSV (image paths relative to an image root); image folders. A plan depends only on the files. One scan of headers or line
ends makes it, and it is saved beside the features.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from align.common.errors import DamagedError, DataError, UsageError
from align.common.files import atomic_path
from align.common.fingerprints import compare_fingerprints
from align.sources.delimited import CsvReader
from align.sources.folder import FolderReader, list_images
from align.sources.gate import FULL_BITS
from align.sources.places import find_files, refuse_compressed
from align.sources.row import Scan, ShardReader
from align.sources.samples import JOINED_SCHEMA, Group, Identities, Shards, joined_part, joined_rows, shard_samples
from align.sources.tables import ArrowReader, JsonlReader, ParquetReader, TableReader
from align.sources.tar import TarReader

Layout = Literal["auto", "webdataset", "parquet", "arrow", "jsonl", "csv", "folder"]
READERS: dict[str, type[TarReader] | type[TableReader]]
READERS = {"webdataset": TarReader, "parquet": ParquetReader, "arrow": ArrowReader, "jsonl": JsonlReader, "csv": CsvReader}
SHARDS_SCHEMA = pa.schema([("shard", pa.int32()), ("file", pa.string()), *((name, pa.int64()) for name in ("start", "stop", "offset"))])


@dataclass(frozen=True)
class Source:
    """Where samples are and how to read them."""

    data: str  # a file, a folder, or a glob pattern (files in sorted order)
    layout: Layout = "auto"
    image: str = "image"  # column with the image; in a tar: the suffix, needed only if samples have several images
    key: str = "key"  # column with the sample key; tars and folders have their own keys
    image_root: str | None = None  # folder that image paths are relative to and must stay in; None: the file's own folder
    group: Group = "image"  # which rows of a table are one sample
    key_prefix: Literal["none", "file"] = "none"  # file: the path of the row's file below the common folder, put before the key
    gray_bits: int = 16  # of 16-bit gray images: see Limits


@dataclass(frozen=True)
class Plan:
    """Which rows belong to which shard."""

    layout: str  # as found
    shards: pa.Table  # shard, file, start and stop (row numbers in the file or listing), offset (byte of row `start`)
    listing: pa.ChunkedArray | None  # of an image folder: paths below it, as bytes, sorted
    digest: str  # xxh3-128 of layout, column names, file names, sizes, row ranges and samples; not of parent folders or times
    joined: pa.Table | None = None  # of JOINED_SCHEMA, sorted by shard and row: rows that are no sample of their own
    notes: tuple[str, ...] = ()  # what the user should know about the files
    folder: Path | None = None  # where it was loaded from

    @property
    def rows(self) -> int:
        """Rows of all shards, before rejects."""
        return sum(self.lengths)

    @cached_property
    def lengths(self) -> list[int]:
        """Rows of each shard."""
        return pc.subtract(self.shards["stop"], self.shards["start"]).to_pylist()

    @property
    def samples(self) -> int:
        """Samples of all shards, before rejects. Rows that name the same image are one."""
        return sum(self.counts)

    @property
    def counts(self) -> list[int]:
        """Samples of each shard."""
        if self.joined is None:
            return self.lengths
        gone = self.joined.filter(pc.and_(self.joined["same"], pc.greater_equal(self.joined["shard"], 0)))["shard"].to_numpy()
        absorbed = np.bincount(gone, minlength=len(self.lengths))
        return [length - int(fewer) for length, fewer in zip(self.lengths, absorbed, strict=True)]

    def sample_rows(self, shard: int) -> np.ndarray:
        """Return the rows of a shard that a sample begins with (n,) int64: all but those in the sample of another row."""
        rows = np.arange(self.lengths[shard])
        return rows if self.joined is None else np.setdiff1d(rows, list(shard_samples(self.joined, shard).absorbed))

    def counted(self) -> str:
        """Return "N samples", and of how many rows if that is another number."""
        return f"{self.samples} samples" + (f" ({self.rows} rows, grouped by image or key)" if self.samples != self.rows else "")

    def part(self, chosen: Sequence[int]) -> "Plan":
        """Return the plan of some shards, in the given order. Their samples keep rows of other shards."""
        digest = xxhash.xxh3_128(f"{self.digest} {list(chosen)}".encode()).hexdigest()
        numbers = pa.array(range(len(chosen)), pa.int32())
        table = self.shards.take(pa.array(chosen)).set_column(0, self.shards.schema.field(0), numbers)
        return Plan(self.layout, table, self.listing, digest, joined_part(self.joined, chosen), self.notes)

    def keep(self, folder: Path, settings: str) -> None:
        """Save the plan in `folder` for all processes. Raise FingerprintError, naming `settings`, if another plan is there."""
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "plan.parquet").exists():
            compare_fingerprints({"data": self.digest}, {"data": Plan.load(folder).digest}, f"{folder} ({settings})")
            return
        if self.listing is not None:
            table = pa.table({"name": self.listing})
            with atomic_path(folder / "listing.arrow") as temporary, pa.ipc.new_file(str(temporary), table.schema) as file:
                file.write_table(table)
        if self.joined is not None:
            with atomic_path(folder / "joined.parquet") as temporary:
                pq.write_table(self.joined, temporary, compression="zstd")
        facts = {"layout": self.layout, "digest": self.digest, "notes": json.dumps(self.notes), "joined": str(self.joined is not None)}
        with atomic_path(folder / "plan.parquet") as temporary:
            pq.write_table(self.shards.replace_schema_metadata(facts), temporary, compression="zstd")

    @staticmethod
    def load(folder: Path) -> "Plan":
        """Return the plan saved in `folder`, its listing memory-mapped. Raise DamagedError if it cannot be read."""
        try:
            shards = pq.read_table(folder / "plan.parquet")
            facts = shards.schema.metadata or {}
            layout, digest = facts[b"layout"].decode(), facts[b"digest"].decode()
            listing = None
            if layout == "folder":
                listing = pa.ipc.open_file(pa.memory_map(str(folder / "listing.arrow"))).read_all()["name"]
            joined = pq.read_table(folder / "joined.parquet", schema=JOINED_SCHEMA) if facts.get(b"joined") == b"True" else None
            notes = tuple(json.loads(facts.get(b"notes", b"[]")))
            return Plan(layout, shards.replace_schema_metadata(None), listing, digest, joined, notes, folder)
        except (OSError, pa.ArrowException, KeyError) as error:
            raise DamagedError(f"the plan in {folder} cannot be read ({error}); delete plan.parquet and run again") from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a loaded plan as its folder, because a listing may be large."""
        if self.folder:
            return (Plan.load, (self.folder,))
        return (Plan, (self.layout, self.shards, self.listing, self.digest, self.joined, self.notes))


def plan(source: Source, rows_per_shard: int, columns: Sequence[str] = ()) -> Plan:
    """Return the plan of a source. A shard has neighboring rows of one file, or of the sorted listing of an image folder.

    Nothing is decoded. Raise DataError if there are no samples, a file is unreadable, the first file lacks one of `columns`, or rows of
    two files have one key.
    """
    if rows_per_shard < 1:
        raise UsageError(f"rows per shard is {rows_per_shard}; it must be at least 1")
    try:
        layout, files = find_files(source.data, source.layout)
    except OSError as error:
        raise DataError(f"{source.data} cannot be listed ({error})") from error
    settings = (layout, source.image, source.key, rows_per_shard) + ((source.gray_bits,) if source.gray_bits != FULL_BITS else ())
    digest = xxhash.xxh3_128(repr(settings).encode())
    listing, pieces, scans = None, list[tuple[int, str, int, int, int]](), list[Scan]()
    for file in files:
        try:
            if layout == "folder":
                listing = list_images(file)
                found = Scan(len(listing), [0] * -(-len(listing) // rows_per_shard))
                for buffer in listing.chunk(0).buffers()[1:] if len(listing) else ():
                    digest.update(buffer)
            else:
                refuse_compressed(file)
                found = READERS[layout].scan(file, rows_per_shard)
                digest.update(repr((os.path.basename(file), os.path.getsize(file), found.rows)).encode())
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{file} cannot be read as {layout} ({error}); mend or remove it") from error
        scans.append(found)
        for start, offset in zip(range(0, found.rows, rows_per_shard), found.offsets, strict=True):
            pieces.append((len(pieces), file, start, min(start + rows_per_shard, found.rows), offset))
    if not pieces:
        raise DataError(
            f"{source.data} has no samples (read as {layout}). For manifests or archives deeper in a folder give a pattern "
            f"such as '{source.data}/**/*.tar'"
        )
    shards = pa.table([list(column) for column in zip(*pieces, strict=True)], schema=SHARDS_SCHEMA)
    made = Plan(layout, shards, listing, digest.hexdigest())
    if columns:
        open_shard(source, made, 0).require(columns)
    joined = _joined(source, made, scans)
    if source.key_prefix == "file":
        digest.update(repr(sorted(_prefixes(made.shards["file"].unique().to_pylist()).values())).encode())
    if joined is not None and (same := joined.filter(joined["same"])).num_rows:
        for name in ("shard", "row", "first_shard", "first_row"):
            digest.update(same[name].to_numpy().tobytes())
    return Plan(layout, shards, listing, digest.hexdigest(), joined, tuple(note for scan in scans for note in scan.notes))


def open_shard(source: Source, plan: Plan, shard: int) -> ShardReader:
    """Return random access to the rows of a shard. Raise DataError if its file is gone or changed since planning."""
    piece = plan.shards.slice(shard, 1).to_pylist()[0]
    file, start, stop = piece["file"], piece["start"], piece["stop"]
    root = source.image_root or os.path.dirname(file) or "."
    prefix = _prefixes(plan.shards["file"].unique().to_pylist())[file] if source.key_prefix == "file" else ""
    samples = shard_samples(plan.joined, shard, prefix)
    try:
        if plan.listing is not None:
            return FolderReader(file, start, stop, source.image, plan.listing.slice(start, stop - start).to_pylist(), samples)
        return READERS[plan.layout](file, start, stop, piece["offset"], source.image, source.key, root, samples)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read any more ({error}); restore it or plan again") from error


def _prefixes(files: list[str]) -> dict[str, str]:
    """Return what `key_prefix: file` puts before the keys of each file: its path below the common folder, without the suffix."""
    common = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    return {file: os.path.splitext(os.path.relpath(os.path.abspath(file), common))[0] for file in files}


def image_names(source: Source, plan: Plan) -> np.ndarray:
    """Return a hash of what names each row's image (N,) int64, a path or its bytes; 0 in tars and folders, where only the key does."""
    if plan.layout in ("webdataset", "folder"):
        return np.zeros(plan.rows, dtype=np.int64)
    return _shards(source, plan).identities(True).images


def _shards(source: Source, made: Plan) -> Shards:
    return Shards(made.shards["file"].to_pylist(), made.shards["start"].to_pylist(), made.lengths, partial(open_shard, source, made))


def _joined(source: Source, made: Plan, scans: Sequence[Scan]) -> pa.Table | None:
    """Return the rows that are no sample of their own, or None; DataError if rows of two files have one key."""
    shards = _shards(source, made)
    keys, marks = ([part for part in column if part is not None] for column in ([s.keys for s in scans], [s.marks for s in scans]))
    if keys:
        names = Identities(np.concatenate(keys), np.zeros(made.rows, dtype=np.int64))
        if source.group == "image":
            names = names._replace(images=shards.same_images(np.concatenate(marks)))
    else:
        by_image = source.group == "image" and made.layout != "folder"  # a file in a folder has no other name than its key
        names = shards.identities(by_image)
    return joined_rows(shards, names, source.group, by_file=source.key_prefix == "file")
