"""The feature store: fixed-width fp16 features in shards that are committed one by one and read by key.

    store/
      store.json               what made the features (fingerprint), their width, how many shards the plan has
      shards/000000.safetensors  "features" (N, W) float16
      shards/000000.parquet      key (string), item (int16: which caption of the sample), one row a feature; of captions also
                                 text (int64 hash of the words, see `hash64`) if they were at hand
      shards/000000.rejects.parquet
      commits/000000.json      rows, rejects and the xxh3-128 of each file; written last
      rejects.parquet          all rejects, written when every shard is committed

Shapes: `N` rows of a shard, `W` width. A shard without its commit record does not exist for readers.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from safetensors.numpy import save as safetensors_bytes

from align.common.errors import DamagedError, DataError, UsageError
from align.common.files import atomic_bytes, atomic_json, atomic_path, failpoint, hash_file, human_bytes, read_json, remove_temporaries
from align.common.fingerprints import compare_fingerprints
from align.common.folders import damage
from align.common.reject_codes import Reject, RejectedRow

FORMAT_VERSION = 1
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


class StoreWriter:
    """Writes and commits the shards of one store; several processes may each write other shards of it at once."""

    def __init__(self, folder: Path, header: StoreHeader) -> None:
        """Create the store, or open it for going on; FingerprintError if it was made differently."""
        self.folder, self.header = folder, header
        for name in ("shards", "commits"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        if (folder / "store.json").exists():
            compare_fingerprints(_flat(header), _flat(read_header(folder)), str(folder))
        else:
            atomic_json(folder / "store.json", asdict(header))

    def clean(self) -> None:
        """Remove what a killed writer left half-written; call it before any process writes."""
        for name in ("", "shards", "commits"):
            remove_temporaries(self.folder / name)

    def done(self, shard: int) -> bool:
        """Return whether `shard` is committed and its files have their committed sizes."""
        path, shards = self.folder / "commits" / f"{shard:06d}.json", self.folder / "shards"
        return path.exists() and not any(damage(shards / name, size=size) for name, size in read_json(path)["bytes"].items())

    def write(
        self,
        shard: int,
        features: np.ndarray,
        keys: Sequence[str],
        items: Sequence[int],
        rejects: list[RejectedRow],
        texts: Sequence[str] | None = None,
    ) -> None:
        """Write and commit one shard: features (N, W) floats, keys and item numbers (N), what was rejected, the captions if known.

        A row that is not finite in fp16, or all zero, is rejected here (`nonfinite_feature`, `zero_feature`).
        """
        assert features.shape == (len(keys), self.header.width) and len(items) == len(keys), (features.shape, len(keys))
        with np.errstate(over="ignore"):
            half = features.astype(np.float16)
        finite, nonzero = np.all(np.isfinite(half), axis=1), np.any(half, axis=1)
        good = finite & nonzero
        if not good.all():
            rejects = rejects + [
                RejectedRow.of(Reject("zero_feature" if finite[row] else "nonfinite_feature"), row, keys[row], "feature")
                for row in np.flatnonzero(~good).tolist()
            ]
        kept = np.flatnonzero(good).tolist()
        name, shards = f"{shard:06d}", self.folder / "shards"
        atomic_bytes(shards / f"{name}.safetensors", safetensors_bytes({"features": np.ascontiguousarray(half[kept])}))
        table = pa.table({"key": [keys[row] for row in kept], "item": [items[row] for row in kept]}, schema=KEYS_SCHEMA)
        if texts is not None:
            table = table.append_column("text", pa.array(hash64(texts[row] for row in kept)))
        with atomic_path(shards / f"{name}.parquet") as temporary:
            pq.write_table(table, temporary, compression="zstd")
        with atomic_path(shards / f"{name}.rejects.parquet") as temporary:
            rows = [{"shard": shard, **asdict(reject)} for reject in rejects]
            pq.write_table(pa.Table.from_pylist(rows, schema=REJECTS_SCHEMA), temporary, compression="zstd")
        failpoint("commit")
        files = [shards / f"{name}.{suffix}" for suffix in ("safetensors", "parquet", "rejects.parquet")]
        commit = {
            "rows": len(kept),
            "rejected": len(rejects),
            "bytes": {file.name: file.stat().st_size for file in files},
            "xxh3": {file.name: hash_file(file) for file in files},
        }
        atomic_json(self.folder / "commits" / f"{name}.json", commit)

    def finish(self) -> pa.Table:
        """Write `rejects.parquet` from all shards and return it; DataError if a shard is not committed yet."""
        missing = [shard for shard in range(self.header.shards) if not self.done(shard)]
        if missing:
            raise DataError(f"{self.folder}: {len(missing)} of {self.header.shards} shards are not committed; run the same command again")
        parts = [pq.read_table(self.folder / "shards" / f"{shard:06d}.rejects.parquet") for shard in range(self.header.shards)]
        rejects = pa.concat_tables([REJECTS_SCHEMA.empty_table(), *parts])
        with atomic_path(self.folder / "rejects.parquet") as temporary:
            pq.write_table(rejects, temporary, compression="zstd")
        return rejects

    def predicted_bytes(self) -> int:
        """Return the space the missing shards need, from rows, width and 40 bytes a key."""
        missing = sum(not self.done(shard) for shard in range(self.header.shards))
        return int(self.header.rows * (2 * self.header.width + 40) * missing / max(1, self.header.shards))


def hash64(texts: Iterable[str]) -> np.ndarray:
    """Return (n,) int64 hashes of strings: xxh3-64 of their UTF-8 bytes. Among a billion strings a collision has a chance of 3%."""
    hashes = (xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) for text in texts)
    return np.fromiter(hashes, dtype=np.uint64).view(np.int64)


def _flat(header: StoreHeader) -> dict[str, Any]:
    values = asdict(header)
    del values["loader"]
    return {**values.pop("fingerprint"), **values}


def read_header(folder: Path) -> StoreHeader:
    """Return the header of the store in `folder`; UsageError if there is no store, DamagedError if it is unreadable."""
    if not (folder / "store.json").exists():
        raise UsageError(f"{folder} is not a feature store (no store.json); make one with align/encode.py")
    values = read_json(folder / "store.json")
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise DamagedError(f"{folder} has store format {version!r}, this version reads {FORMAT_VERSION}; encode again")
    try:
        return StoreHeader(**values)
    except TypeError as error:
        raise DamagedError(f"{folder}/store.json is not a store header ({error}); restore it or encode again") from error


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
            self._commits.append(read_json(path))
        self.starts = np.concatenate([[0], np.cumsum([commit["rows"] for commit in self._commits])]).astype(np.int64)
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

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
        path, rows = self.folder / "shards" / f"{shard:06d}.parquet", self._commits[shard]["rows"]
        try:
            table = pq.read_table(path, schema=schema)
        except (OSError, pa.ArrowException) as error:
            raise DamagedError(f"{path} cannot be read ({error}); delete its commit record and encode again") from error
        if len(table) != rows:
            raise DamagedError(f"{path} has {len(table)} keys where {rows} were committed; delete its commit record and encode again")
        return table

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            path = self.folder / "shards" / f"{shard:06d}.safetensors"
            self._maps[shard] = _map_features(path, self._commits[shard]["rows"], self.width)
        return self._maps[shard]

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

    def verify(self) -> None:
        """Read every byte and compare with the committed hashes; DamagedError lists the shards that differ."""
        shards = self.folder / "shards"
        files = {name: (digest, shard) for shard, commit in enumerate(self._commits) for name, digest in commit["xxh3"].items()}
        damaged = [f"{name} (shard {shard})" for name, (digest, shard) in files.items() if damage(shards / name, digest)]
        extra = [path.name for path in shards.iterdir() if path.name not in files]
        if damaged or extra:
            raise DamagedError(
                f"{self.folder}: damaged: {', '.join(damaged) or 'none'}; not committed: {', '.join(extra) or 'none'}. "
                "Delete the commit records of damaged shards and run align/encode.py again."
            )


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
