"""Image-caption sources: their files, the plan that cuts rows into shards, and the reader of a shard.

Layouts: webdataset tars (img2dataset, CLIP_benchmark); parquet (image cells with bytes, paths, or Hugging Face `datasets` structs);
JSONL and CSV/TSV (image paths relative to an image root); image folders. A plan depends only on the files. One scan of headers or line
ends makes it, and it is saved beside the features.
"""

import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from align.common.errors import DamagedError, DataError, UsageError
from align.common.files import atomic_path
from align.common.fingerprints import compare_fingerprints
from align.sources.folder import FolderReader, list_images
from align.sources.row import ShardReader, require_columns
from align.sources.tables import CsvReader, JsonlReader, ParquetReader, TableReader
from align.sources.tar import TarReader

SUFFIXES = {".tar": "webdataset", ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv"}
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}  # by first bytes
READERS: dict[str, type[TarReader] | type[TableReader]]
READERS = {"webdataset": TarReader, "parquet": ParquetReader, "jsonl": JsonlReader, "csv": CsvReader}
SHARDS_SCHEMA = pa.schema([("shard", pa.int32()), ("file", pa.string()), *((name, pa.int64()) for name in ("start", "stop", "offset"))])


@dataclass(frozen=True)
class Source:
    """Where samples are and how to read them."""

    data: str  # a file, a folder, or a glob pattern (files in sorted order)
    layout: Literal["auto", "webdataset", "parquet", "jsonl", "csv", "folder"] = "auto"
    image: str = "image"  # column with the image; in a tar: the suffix, needed only if samples have several images
    key: str = "key"  # column with the sample key; tars and folders have their own keys
    image_root: str | None = None  # folder that image paths are relative to and must stay in; None: the file's own folder


@dataclass(frozen=True)
class Plan:
    """Which rows belong to which shard."""

    layout: str  # as found
    shards: pa.Table  # shard, file, start and stop (row numbers in the file or listing), offset (byte of row `start`)
    listing: pa.ChunkedArray | None  # of an image folder: paths below it, as bytes, sorted
    digest: str  # xxh3-128 of layout, column names, file names, sizes and row ranges; not of parent folders or times
    folder: Path | None = None  # where it was loaded from

    @property
    def rows(self) -> int:
        """Rows of all shards, before rejects."""
        return sum(self.lengths)

    @cached_property
    def lengths(self) -> list[int]:
        """Rows of each shard."""
        return pc.subtract(self.shards["stop"], self.shards["start"]).to_pylist()

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
        facts = {"layout": self.layout, "digest": self.digest}
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
            return Plan(layout, shards.replace_schema_metadata(None), listing, digest, folder)
        except (OSError, pa.ArrowException, KeyError) as error:
            raise DamagedError(f"the plan in {folder} cannot be read ({error}); delete plan.parquet and run again") from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a loaded plan as its folder, because a listing may be large."""
        return (Plan.load, (self.folder,)) if self.folder else (Plan, (self.layout, self.shards, self.listing, self.digest))


def plan(source: Source, rows_per_shard: int, columns: Sequence[str] = ()) -> Plan:
    """Return the plan of a source. A shard has neighboring rows of one file, or of the sorted listing of an image folder.

    Nothing is decoded. Raise DataError if there are no samples, a file is unreadable, or the first file lacks one of `columns`.
    """
    if rows_per_shard < 1:
        raise UsageError(f"rows per shard is {rows_per_shard}; it must be at least 1")
    try:
        layout, files = _find(source)
    except OSError as error:
        raise DataError(f"{source.data} cannot be listed ({error})") from error
    digest = xxhash.xxh3_128(repr((layout, source.image, source.key, rows_per_shard)).encode())
    listing, pieces = None, list[tuple[int, str, int, int, int]]()
    for file in files:
        try:
            if layout == "folder":
                listing = list_images(file)
                rows, offsets = len(listing), [0] * -(-len(listing) // rows_per_shard)
                for buffer in listing.chunk(0).buffers()[1:] if rows else ():
                    digest.update(buffer)
            else:
                _refuse_compressed(file)
                rows, offsets = READERS[layout].scan(file, rows_per_shard)
                digest.update(repr((os.path.basename(file), os.path.getsize(file), rows)).encode())
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{file} cannot be read as {layout} ({error}); mend or remove it") from error
        for start, offset in zip(range(0, rows, rows_per_shard), offsets, strict=True):
            pieces.append((len(pieces), file, start, min(start + rows_per_shard, rows), offset))
    if not pieces:
        raise DataError(
            f"{source.data} has no samples (read as {layout}). For manifests or archives deeper in a folder give a pattern "
            f"such as '{source.data}/**/*.tar'"
        )
    shards = pa.table([list(column) for column in zip(*pieces, strict=True)], schema=SHARDS_SCHEMA)
    made = Plan(layout, shards, listing, digest.hexdigest())
    if columns:
        require_columns(pieces[0][1], open_shard(source, made, 0).columns, columns)
    return made


def open_shard(source: Source, plan: Plan, shard: int) -> ShardReader:
    """Return random access to the rows of a shard. Raise DataError if its file is gone or changed since planning."""
    piece = plan.shards.slice(shard, 1).to_pylist()[0]
    file, start, stop = piece["file"], piece["start"], piece["stop"]
    root = source.image_root or os.path.dirname(file) or "."
    try:
        if plan.listing is not None:
            return FolderReader(file, start, stop, source.image, plan.listing.slice(start, stop - start).to_pylist())
        return READERS[plan.layout](file, start, stop, piece["offset"], source.image, source.key, root)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read any more ({error}); restore it or plan again") from error


def _find(source: Source) -> tuple[str, list[str]]:
    """Return the layout and the sorted files of a source. For the layout `folder`, the only file is the folder."""
    data, given = source.data, source.layout
    inside = os.path.isdir(data)
    if inside:
        if given == "folder":
            return given, [data]
        files = sorted(os.path.join(data, name) for name in os.listdir(data) if not name.startswith("."))
        files = [file for file in files if _suffix(file) in SUFFIXES and given in ("auto", SUFFIXES[_suffix(file)])]
    else:
        files = [data] if os.path.exists(data) else sorted(glob.glob(data, recursive=True))
    if given == "folder":
        raise DataError(f"{data} is not a folder, which the layout 'folder' needs")
    if not files and not (inside and given == "auto"):
        raise DataError(f"{data} matches no file (layout: {given}); give a file, a folder or a pattern such as 'data/*.tar'")
    if given != "auto":
        return given, files
    kinds = {SUFFIXES.get(_suffix(file), "unknown") for file in files}
    stems = {kind: {os.path.splitext(file)[0] for file in files if SUFFIXES.get(_suffix(file)) == kind} for kind in kinds}
    if kinds == {"webdataset", "parquet"} and stems["parquet"] <= stems["webdataset"]:
        return "webdataset", [file for file in files if _suffix(file) == ".tar"]  # img2dataset's metadata beside its tars
    if len(kinds) == 1 and kinds != {"unknown"}:
        return kinds.pop(), files
    if not kinds:
        return "folder", [data]
    seen = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in Counter(map(_suffix, files)).most_common())
    raise DataError(
        f"cannot tell the layout of {data} from its files ({seen}). Known: {', '.join(SUFFIXES)}; all must be of one kind. "
        "Name the layout, or give a pattern that matches one kind."
    )


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _refuse_compressed(file: str) -> None:
    with open(file, "rb") as opened:
        first = opened.read(6)
    for mark, command in COMPRESSED.items():
        if first.startswith(mark):
            raise DataError(f"{file} is compressed, so rows in it cannot be reached directly; unpack it first: {command} {file}")
