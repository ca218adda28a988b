"""Official data-set layouts by exact id, and the manifest that is made of their rows.

A manifest is JSONL with image paths, or parquet with image bytes if the data set has no image files. `align.sources.plan` reads it
like a user's data: same limits, same rejects, same digests.
"""

import errno
import json
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from align.common.errors import DataError
from align.common.files import atomic_path
from align.sources.plan import Source
from eval.tasks.official.captions import CAPTIONS
from eval.tasks.official.layout import ManifestRow, Official, OfficialLayout
from eval.tasks.official.pairs import PAIRS
from eval.tasks.official.photos import PHOTOS

GROUP_ROWS = 1024  # of a parquet manifest, held in memory at once

READERS: dict[str, OfficialLayout] = {**PHOTOS, **CAPTIONS, **PAIRS}


def read_official(layout: str, place: Path, task_id: str, cache: Path) -> tuple[Source, Official]:
    """Return the manifest, made in `cache`/manifests, as a Source, and what was read from `place` (its rows are used up)."""
    official = READERS[layout].read(place)
    path = write_manifest(official.rows, cache / "manifests", task_id)
    folder = place if place.is_dir() else place.parent
    return Source(str(path), "parquet" if path.suffix == ".parquet" else "jsonl", image_root=str(folder), group="none"), official


def write_manifest(rows: Iterable[ManifestRow], folder: Path, name: str) -> Path:
    """Write rows to `folder`/`name`.jsonl, or .parquet if images are bytes, and return the path; DataError without rows."""
    rows = iter(rows)
    if (first := next(rows, None)) is None:
        raise DataError(f"task {name!r}: its lists name no test image; get the data set again")
    rows = chain([first], rows)
    path = folder / f"{name}.{'parquet' if isinstance(first['image'], bytes) else 'jsonl'}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            _write_parquet(rows, temporary) if path.suffix == ".parquet" else _write_lines(rows, temporary)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise DataError(f"cannot write {path} ({error.strerror}); give a cache folder that can be written") from error
    return path


def _write_lines(rows: Iterator[ManifestRow], path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)  # ASCII: file names need not be UTF-8


def _write_parquet(rows: Iterator[ManifestRow], path: Path) -> None:
    table = pa.Table.from_pylist(list(islice(rows, GROUP_ROWS)))
    with pq.ParquetWriter(path, table.schema) as writer:
        while len(table):
            writer.write_table(table)
            table = pa.Table.from_pylist(list(islice(rows, GROUP_ROWS)), schema=table.schema)
