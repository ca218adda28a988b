"""What the samples of a plan hold, as a digest: names and sizes of files do not say that their content changed."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.common.files import hash_bytes, hash_file
from align.common.reject_codes import Reject
from align.sources.plan import Plan, Source, open_shard
from align.sources.row import Row

ROWS, RUN = 1024, 8  # samples that are read if there are more, in runs of neighbors: a parquet file is read by row groups
BYTES = 256 << 20  # of files that are hashed whole


def content_digest(source: Source, plan: Plan, images: bool, columns: Sequence[str]) -> str:
    """Return the xxh3-128 of what the samples are, by their images (if `images`) and captions in `columns`.

    It covers the plan, small files whole (tars; tables if there are `columns`; up to BYTES together), and ROWS rows spread evenly. A data
    set that has no more rows is covered whole; of a larger one a single changed sample may pass.
    """
    found: list[Any] = [plan.digest, *_files(plan, bool(columns))]
    starts = np.cumsum([0, *plan.lengths])
    chosen = _spread(plan.rows)
    for shard in np.unique(np.searchsorted(starts, chosen, side="right") - 1).tolist():
        here = chosen[(chosen >= starts[shard]) & (chosen < starts[shard + 1])] - starts[shard]
        reader = open_shard(source, plan, shard)
        for run in np.split(here, np.flatnonzero(np.diff(here) > 1) + 1):
            found += [_of(row, columns) for row in reader.rows(int(run[0]), int(run[-1]) + 1, images=images)]
    return hash_bytes(repr(found).encode("utf-8", "surrogatepass"))


def _spread(rows: int) -> np.ndarray:
    """Return ROWS row numbers (n,) int64 in runs of neighbors that are spread evenly, or all of them."""
    if rows <= ROWS:
        return np.arange(rows)
    first = np.linspace(0, rows - RUN, ROWS // RUN).astype(np.int64)
    return np.unique(first[:, None] + np.arange(RUN))


def _files(plan: Plan, tables: bool) -> Iterator[str]:
    """Yield the hashes of the plan's files, as many as are together no larger than BYTES."""
    left = BYTES
    if plan.layout == "folder" or not (tables or plan.layout == "webdataset"):
        return
    for file in sorted({Path(name) for name in plan.shards["file"].to_pylist()}):
        size = file.stat().st_size if file.is_file() else left + 1
        if size <= left:
            left -= size
            yield hash_file(file)


def _of(row: Row, columns: Sequence[str]) -> tuple[Any, ...]:
    """Return what a digest needs of a row: hashes and plain values, without places on disk."""
    if row.reject is not None:
        return (row.reject.code,)
    image = row.image.code if isinstance(row.image, Reject) else hash_bytes(row.image) if row.image is not None else None
    return (row.key, image, *(_cell(row, column) for column in columns))


def _cell(row: Row, column: str) -> Any:
    try:
        value = row.cell(column)
    except Reject as reject:
        return reject.code
    return [part.code if isinstance(part, Reject) else part for part in value] if isinstance(value, list) else value
