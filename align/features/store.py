"""The feature store: fixed-width fp16 features in shards that are committed one by one and read by key.

    store/
      store.json               what made the features (fingerprint), their width, how many shards the plan has
      shards/000000.safetensors  "features" (N, W) float16
      shards/000000.parquet      key (string), item (int16: which caption of the sample), one row a feature; of captions also
                                 text (int64 hash of the words, see `hash64`) if they were at hand
      shards/000000.rejects.parquet
      commits/000000.json      rows, rejects and the xxh3-128 of each file; written last
      rejects.parquet          all rejects, written when every shard is committed
      tokenizer/               of captions: the text encoder's, so that training needs no encoder
      COMMIT.json              written last: hashes of all these files but the shards', which are in the commit records, and of the plan

Shapes: `N` rows of a shard, `W` width. A shard without its commit record does not exist for readers.
"""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from align.common.errors import DamagedError, DataError, UsageError
from align.common.files import TEMPORARY, hash64, hash_bytes, human_bytes, read_json, read_object
from align.common.folders import COMMIT, WORK, read_sealed, require_intact

FORMAT_VERSION = 1
PLAN_FILES = ("plan.parquet", "listing.arrow", "joined.parquet")  # of align.sources.plan, beside the stores
REJECTS_SCHEMA = pa.schema(
    [("shard", pa.int32()), ("row", pa.int64()), *((name, pa.string()) for name in ("key", "column", "code", "detail"))]
)
KEYS_SCHEMA = pa.schema([("key", pa.string()), ("item", pa.int16())])


@dataclass(frozen=True)
class StoreHeader:
    """What a store holds; two stores can be one only if every field is equal."""

    kind: Literal["image", "caption"]
    fingerprint: dict[str, Any]  # of the encoder and its settings, flat
    loader: dict[str, Any]  # how the encoder was loaded (name, revision, ...); not compared: a moved folder is the same encoder
    width: int
    data: str  # digest of the plan: which rows of which files make which shard
    shards: int
    rows: int  # rows of the source, before rejects
    format_version: int = FORMAT_VERSION


HEADER_TYPES = {
    "kind": str,
    "fingerprint": dict,
    "loader": dict,
    "width": int,
    "data": str,
    "shards": int,
    "rows": int,
    "format_version": int,
}


def sealed_files(folder: Path) -> dict[str, Path]:
    """Return the files whose hashes are in a store's COMMIT.json, by relative path: all but the shards', and the plan beside the store."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    kept = {name: path for name, path in found.items() if name != COMMIT and not name.endswith(TEMPORARY)}
    inner = {name: path for name, path in kept.items() if name.split("/")[0] not in ("shards", WORK)}
    return inner | {f"../{name}": path for name in PLAN_FILES if (path := folder.parent / name).is_file()}


def read_commit(path: Path) -> dict[str, Any]:
    """Return the commit record of a shard. DamagedError, with advice, if it is not one."""
    try:
        record = read_json(path)
        if {"rows", "bytes", "xxh3"} <= record.keys():
            return record
    except (AttributeError, DamagedError):
        pass
    raise DamagedError(f"{path} is not a commit record; delete it and run align/encode.py again")


def flat_header(header: StoreHeader) -> dict[str, Any]:
    """Return what two stores must have in common to be one: the header without the loader, flat."""
    values = asdict(header)
    del values["loader"]
    return {**values.pop("fingerprint"), **values}


def read_header(folder: Path) -> StoreHeader:
    """Return the header of the store in `folder`; UsageError if there is no store, DamagedError if it is unreadable."""
    if not (folder / "store.json").exists():
        raise UsageError(f"{folder} is not a feature store (no store.json); make one with align/encode.py")
    values = read_object(folder / "store.json")
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise DamagedError(f"{folder} has store format {version!r}, this version reads {FORMAT_VERSION}; encode again")
    try:
        header = StoreHeader(**values)
    except TypeError as error:
        raise DamagedError(f"{folder}/store.json is not a store header ({error}); restore it or encode again") from error
    for name, kind in HEADER_TYPES.items():
        value: Any = getattr(header, name)
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            found = f"{folder}/store.json: {name} is {str(value)[:80]!r}, expected a {kind.__name__}"
            raise DamagedError(f"{found}; restore it or encode again")
    return header


class FeatureStore:
    """Reads a complete store: keys and memory-mapped features. Rows are numbered over all shards in order."""

    def __init__(self, folder: Path | str) -> None:
        """Open the store; DataError if shards are missing, DamagedError if a file has not its committed size."""
        self.folder = Path(folder)
        self.header = read_header(self.folder)
        self.fingerprint, self.width = self.header.fingerprint, self.header.width
        self._commits = []
        for shard in range(self.header.shards):
            path = self.folder / "commits" / f"{shard:06d}.json"
            if not path.exists():
                raise DataError(
                    f"{self.folder} is incomplete: shard {shard} of {self.header.shards} is not committed. Run align/encode.py again."
                )
            self._commits.append(read_commit(path))
        self._check_seal()
        self.starts = np.concatenate([[0], np.cumsum([commit["rows"] for commit in self._commits])]).astype(np.int64)
        self._maps: dict[int, np.ndarray] = {}

    def _check_seal(self) -> None:
        """Raise DamagedError if header or commit records are not as they were when the store was completed (older ones say nothing)."""
        if not (self.folder / COMMIT).is_file():
            return
        files = read_sealed(self.folder / COMMIT)["files"]
        for name, digest in files.items():
            if name == "store.json" or name.startswith("commits/"):
                require_intact(self.folder / name, digest, f"`align/encode.py --output {self.folder.parent} --verify` says what to do")

    def __len__(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def digest(self) -> str:
        """The xxh3-128 of what the store holds: its fingerprint, and the hashes of all shards' files."""
        content = [(commit["rows"], sorted(commit["xxh3"].items())) for commit in self._commits]
        return hash_bytes(json.dumps([flat_header(self.header), content], sort_keys=True).encode())

    @property
    def nbytes(self) -> int:
        """Bytes of all features."""
        return len(self) * self.width * 2

    @cached_property
    def key_table(self) -> pa.Table:
        """Columns key (string) and item (int16), one row a feature."""
        return pa.concat_tables([KEYS_SCHEMA.empty_table(), *map(self.shard_keys, range(self.header.shards))])

    @property
    def keys(self) -> pa.ChunkedArray:
        """Sample keys, one a row."""
        return self.key_table["key"]

    @cached_property
    def key_ids(self) -> np.ndarray:
        """Hashes of the sample keys (N,) int64."""
        return hash64(key for chunk in self.keys.chunks for key in chunk.to_pylist())

    @cached_property
    def text_ids(self) -> np.ndarray:
        """Hashes of the captions' words (N,) int64; UsageError if the store has none: it is of an older version, or was imported."""
        schema = KEYS_SCHEMA.append(pa.field("text", pa.int64()))
        column = pa.concat_tables([schema.empty_table(), *(self.shard_keys(shard, schema) for shard in range(self.header.shards))])["text"]
        if column.null_count:
            raise UsageError(f"{self.folder} does not know which captions have the same words; encode them again with align/encode.py")
        return column.to_numpy()

    def shard_keys(self, shard: int, schema: pa.Schema = KEYS_SCHEMA) -> pa.Table:
        """Return key and item of the rows of one shard; DamagedError if its file is not as committed."""
        path, rows = self._intact(shard, "parquet"), self._commits[shard]["rows"]
        try:
            table = pq.read_table(path, schema=schema)
        except (OSError, pa.ArrowException) as error:
            raise DamagedError(f"{path} cannot be read ({error}); delete its commit record and encode again") from error
        if len(table) != rows:
            raise DamagedError(f"{path} has {len(table)} keys where {rows} were committed; delete its commit record and encode again")
        return table

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            self._maps[shard] = _map_features(self._intact(shard, "safetensors"), self._commits[shard]["rows"], self.width)
        return self._maps[shard]

    def _intact(self, shard: int, suffix: str) -> Path:
        """Return the path of a shard's file, whose hash is compared when this process reads it first."""
        path = self.folder / "shards" / f"{shard:06d}.{suffix}"
        advice = f"delete {self.folder}/commits/{shard:06d}.json and run align/encode.py again"
        require_intact(path, self._commits[shard]["xxh3"][path.name], advice)
        return path

    def features(self, rows: np.ndarray) -> np.ndarray:
        """Return features (n, W) float16 of the given row numbers (n,) int64, in the order asked for."""
        order = np.argsort(rows, kind="stable")  # neighboring rows are read together
        ordered = rows[order]
        bounds = np.searchsorted(ordered, self.starts)
        out = np.empty((len(rows), self.width), dtype=np.float16)
        for shard in range(self.header.shards):
            begin, end = bounds[shard], bounds[shard + 1]
            if begin < end:
                out[order[begin:end]] = self._map(shard)[ordered[begin:end] - self.starts[shard]]
        return out

    def shard_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the shard number (n,) of each row number (n,)."""
        return np.searchsorted(self.starts, rows, side="right") - 1


def _map_features(path: Path, rows: int, width: int) -> np.ndarray:
    """Return the (rows, width) float16 memory map of a shard, after checking header and size against the commit."""
    size = rows * width * 2
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 0 < length < 10_000 else {}
        actual = path.stat().st_size
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path} cannot be read ({error}); delete its commit record and encode again") from error
    header.pop("__metadata__", None)
    expected = {"features": {"dtype": "F16", "shape": [rows, width], "data_offsets": [0, size]}}
    if header != expected or actual != 8 + length + size:
        raise DamagedError(
            f"{path}: expected {rows} x {width} float16 ({human_bytes(size)}), found {header} in {human_bytes(actual)}; "
            "delete its commit record and encode again"
        )
    if rows == 0:
        return np.empty((0, width), dtype=np.float16)
    return np.memmap(path, dtype=np.float16, mode="r", offset=8 + length, shape=(rows, width))
