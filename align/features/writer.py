"""Writes feature stores shard by shard; `align.features.store` says what a store holds and reads it.

Shapes: `N` rows of a shard, `W` width.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save as safetensors_bytes

from align.common.errors import DataError, FingerprintError
from align.common.files import atomic_bytes, atomic_json, atomic_path, failpoint, hash64, hash_file, remove_temporaries
from align.common.fingerprints import compare_fingerprints
from align.common.folders import COMMIT, damage, read_sealed, require_intact, write_sealed
from align.common.reject_codes import Reject, RejectedRow
from align.features.store import KEYS_SCHEMA, REJECTS_SCHEMA, StoreHeader, flat_header, read_commit, read_header, sealed_files

SOURCE = "source.json"  # in a store: what its samples are


class StoreWriter:
    """Writes and commits the shards of one store; several processes may each write other shards of it at once."""

    def __init__(self, folder: Path, header: StoreHeader) -> None:
        """Go on with the store in `folder`, or make a new one at the first write. FingerprintError if it was made differently."""
        self.folder, self.header = folder, header
        if (folder / "store.json").exists():
            compare_fingerprints(flat_header(header), flat_header(read_header(folder)), str(folder))

    def create(self) -> None:
        """Write the header and make the folders, if they are not there."""
        for name in ("shards", "commits"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if not (self.folder / "store.json").exists():
            atomic_json(self.folder / "store.json", asdict(self.header))

    def clean(self, living: Callable[[], Collection[str]] = tuple) -> None:
        """Remove what killed writers left half-written, but not what `living` ones write (see `align.common.locks.Lease`)."""
        for name in ("", "shards", "commits", "tokenizer"):
            remove_temporaries(self.folder / name, living)

    def keep(self, name: str, data: bytes) -> None:
        """Write a file that belongs to the store, such as one of a tokenizer, unless it is there already."""
        path = self.folder / name
        if not path.is_file() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_bytes(path, data)

    def keep_content(self, digest: str) -> None:
        """Note what the samples are, by their `content_digest`. FingerprintError if the store was begun with others of the same names."""
        path = self.folder / SOURCE
        if not path.is_file():  # new, or of an older version
            self.create()
            write_sealed(path, {"content": digest})
        elif (stored := read_sealed(path).get("content")) != digest:
            raise FingerprintError(
                f"{self.folder} was begun with other samples (content: {stored} there, {digest} now). The files changed under the same "
                "names: restore them, or give another --output."
            )

    def done(self, shard: int) -> bool:
        """Return whether `shard` is committed and its files have their committed sizes."""
        path, shards = self.folder / "commits" / f"{shard:06d}.json", self.folder / "shards"
        return path.exists() and not any(damage(shards / name, size=size) for name, size in read_commit(path)["bytes"].items())

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
        self.create()
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
        """Write `rejects.parquet` from all shards and return it, then COMMIT.json. DataError if a shard is not committed yet."""
        self.create()
        if (self.folder / COMMIT).is_file():  # a damaged header must not be committed anew
            require_intact(self.folder / "store.json", read_sealed(self.folder / COMMIT)["files"]["store.json"])
        missing = [shard for shard in range(self.header.shards) if not self.done(shard)]
        if missing:
            raise DataError(f"{self.folder}: {len(missing)} of {self.header.shards} shards are not committed; run the same command again")
        parts = [pq.read_table(self.folder / "shards" / f"{shard:06d}.rejects.parquet") for shard in range(self.header.shards)]
        rejects = pa.concat_tables([REJECTS_SCHEMA.empty_table(), *parts])
        with atomic_path(self.folder / "rejects.parquet") as temporary:
            pq.write_table(rejects, temporary, compression="zstd")
        write_sealed(self.folder / COMMIT, {"files": {name: hash_file(path) for name, path in sealed_files(self.folder).items()}})
        return rejects

    def predicted_bytes(self) -> int:
        """Return the space the missing shards need, from rows, width and 40 bytes a key."""
        missing = sum(not self.done(shard) for shard in range(self.header.shards))
        return int(self.header.rows * (2 * self.header.width + 40) * missing / max(1, self.header.shards))
