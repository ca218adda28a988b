"""A few samples of a plan, read and decoded before anything heavy is loaded, and what to do about what is wrong with them."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from align.common.errors import DataError
from align.common.reject_codes import Reject, advice
from align.sources.gate import GRAY_BITS, GrayCount, Limits, gate_image, split_captions
from align.sources.plan import Plan, Source, open_shard
from align.sources.row import Row

SHARDS, ROWS = 8, 32  # at most: shards that are opened, samples that are read
STOP = 0.5  # share of bad samples above which a job would stop in any case
_LISTED = 200  # folders looked into for an image


def try_samples(source: Source, plan: Plan, columns: Sequence[str], images: bool, limits: Limits, allowed: float = STOP) -> list[str]:
    """Read samples that are spread over the plan, decode their images if `images`, and return what the user should know.

    Raise DataError with advice if more than STOP of them (or than `allowed`, if that is more) cannot be used.
    """
    found, gray, tried = list[tuple[Row, Reject]](), GrayCount(), 0
    for row in _spread(source, plan, images):
        tried += 1
        try:
            _require_usable(row, columns, images, limits, gray)
        except Reject as reject:
            found.append((row, reject))
    notes = [gray.note(limits.gray_bits)]
    if found:
        counts = Counter(reject.code for _, reject in found)
        code = counts.most_common(1)[0][0]
        row, first = next(one for one in found if one[1].code == code)
        shown = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        said = f"{len(found)} of {tried} samples that were tried cannot be used ({shown}). First: {row.key!r}: {first}."
        if len(found) > max(STOP, allowed) * tried:
            raise DataError(f"{said} {_found_elsewhere(source, plan, first) or advice(code)}")
        notes.append(said)
    return [note for note in notes if note]


def _require_usable(row: Row, columns: Sequence[str], images: bool, limits: Limits, gray: GrayCount) -> None:
    """Raise Reject if a sample has a problem."""
    if row.reject is not None:
        raise row.reject
    if images:
        gray.add(gate_image(row.image, limits).info.get(GRAY_BITS))
    for column in columns:
        split_captions(row.cell(column), limits)


def _spread(source: Source, plan: Plan, images: bool) -> Iterator[Row]:
    """Yield samples that are spread evenly over shards that are spread evenly."""
    shards = _some(np.arange(len(plan.shards)), SHARDS)
    for shard in shards:
        reader = open_shard(source, plan, shard)
        for row in _some(plan.sample_rows(shard), ROWS // len(shards)):
            yield from reader.rows(row, row + 1, images=images)


def _some(numbers: np.ndarray, count: int) -> list[int]:
    """Return at most `count` of the numbers (n,), spread evenly."""
    return numbers[np.linspace(0, len(numbers) - 1, min(count, len(numbers))).astype(int)].tolist()


def _found_elsewhere(source: Source, plan: Plan, reject: Reject) -> str:
    """Return where an image that is missing lies instead, as a sentence, or ""."""
    file = plan.shards["file"][0].as_py()
    root = os.path.realpath(source.image_root or os.path.dirname(file) or ".")
    tried = reject.detail.partition("'")[2].rpartition("'")[0]
    if reject.code != "file_missing" or not tried.startswith(root):
        return ""
    path = os.path.relpath(tried, root)
    near = [root, os.path.dirname(root), os.path.dirname(os.path.dirname(root)), os.getcwd()]
    for folder in [*near, *(os.path.join(one, name) for one in near for name in sorted(_folders(one)))]:
        if os.path.isfile(os.path.join(folder, path)):
            return f"{path} is in {folder}: give --image-root {folder} (of a task: `image_root`)."
    return ""


def _folders(place: str) -> list[str]:
    try:
        with os.scandir(place) as entries:
            return [entry.name for entry in islice(entries, _LISTED) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return []
