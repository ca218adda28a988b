"""Tasks by exact id, and how their data is read: keys, labels or captions, and a digest of exactly what was measured.

A task's data lies below the data root, in the layouts that `align.samples` reads. Classification needs a label a sample (a
class number or name), retrieval one or more captions. CLIP_benchmark's webdataset layout works as it is: `test/*.tar` with
.jpg and .cls or .txt members, `classnames.txt`, `zeroshot_classification_templates.txt`.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import xxhash

from align.cli import load_yaml, nearest
from align.errors import DataError, UsageError
from align.gate import Limits, Reject, gate_captions
from align.samples import Plan, Source, open_unit, plan
from eval.prompts import read_lines

Layout = Literal["webdataset", "folder", "jsonl", "csv", "parquet"]
Kind = Literal["classification", "retrieval"]
SHARD_ROWS = 4096  # samples encoded between two commits
_LABEL = {"webdataset": "cls"}  # where the label or the captions are unless the task says so
_CAPTIONS = {"webdataset": "txt", "folder": "txt"}
_EXPECTED = {
    "webdataset": "tars whose samples hold an image and a .cls (class number) or .txt (captions, one a line)",
    "folder": "one folder of images a class, named like the class",
    "jsonl": 'a JSONL file with {"key", "image", "label" or "captions"} rows, image paths relative to it',
    "csv": "a CSV file with the columns key, image and label or captions, image paths relative to it",
    "parquet": "parquet files with the columns key, image and label or captions",
}


@dataclass(frozen=True)
class Task:
    """One thing to measure: what kind, where its data lies and how it is laid out. All paths are relative."""

    id: str
    """Name in results; letters, digits, `.`, `_` and `-`."""
    kind: Kind
    """classification or retrieval."""
    layout: Layout
    """How the data lies on disk."""
    path: str
    """The task's folder, below the data root."""
    data: str = "."
    """The data in that folder: a file, a folder or a glob."""
    templates: str = "simple"
    """Prompts: the id of a set, or a .txt (templates) or .json (sentences of each class) file in the task's folder."""
    classes: str = ""
    """File of class names in the task's folder, one a line: the name of class 0, 1, ... or `label<TAB>name`."""
    label: str = ""
    """Column of the label; by default `cls` in tars, the folder's name in folders, else `label`."""
    captions: str = ""
    """Column of the captions; by default `txt` in tars and folders, else `captions`."""
    image: str = "image"
    """Column of the image."""
    key: str = "key"
    """Column of the sample key."""
    note: str = ""
    """Shown with the numbers, for example what they may not be compared with."""
    credit: str = ""
    """Whom the data is by."""

    def __post_init__(self) -> None:
        for name, known in (("kind", get_args(Kind)), ("layout", get_args(Layout))):
            value = getattr(self, name)
            if value not in known:
                raise UsageError(f"task {self.id!r}: unknown {name} {value!r}; {nearest(str(value), known)}")
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.id):
            raise UsageError(f"task id {self.id!r}: use letters, digits, '.', '_' and '-' only")

    @property
    def column(self) -> str:
        """The column that holds the label or the captions."""
        if self.kind == "classification":
            return self.label or _LABEL.get(self.layout, "label")
        return self.captions or _CAPTIONS.get(self.layout, "captions")


_DEMONSTRATION = (
    "Sprite scenes are a small embedded demonstration: drawn pictures with exact answers. Their numbers show that the kit works "
    "and what was learned; they cannot be compared with published ones."
)
_TWEMOJI = "Graphics: Twemoji by Twitter, Inc. and other contributors, CC-BY 4.0."
_SPRITES = {"templates": "zeroshot_classification_templates.txt", "classes": "classnames.txt", "data": "test/*.tar"}
_TASKS = (
    Task("sprites-seen", "classification", "webdataset", "sprites-seen", **_SPRITES, note=_DEMONSTRATION, credit=_TWEMOJI),
    Task("sprites-unseen", "classification", "webdataset", "sprites-unseen", **_SPRITES, note=_DEMONSTRATION, credit=_TWEMOJI),
    Task("sprites-retrieval", "retrieval", "jsonl", "sprites-retrieval", "retrieval.jsonl", note=_DEMONSTRATION, credit=_TWEMOJI),
)
TASKS: dict[str, Task] = {task.id: task for task in _TASKS}


def find_task(name: str) -> Task:
    """Return the task of that exact id, or the one a YAML file describes; UsageError for an unknown id, key or value."""
    if not name.endswith((".yaml", ".yml")):
        if name not in TASKS:
            raise UsageError(f"unknown task {name!r}; {nearest(name, sorted(TASKS))} (a task of your own is a YAML file)")
        return TASKS[name]
    content = load_yaml(Path(name))
    known = [field.name for field in fields(Task)]
    if not isinstance(content, dict):
        raise UsageError(f"{name}: expected `field: value` lines; fields are {', '.join(known)}")
    for key, value in content.items():
        if key not in known:
            raise UsageError(f"{name}: unknown field {key!r}; {nearest(str(key), known)}")
        if not isinstance(value, str):
            raise UsageError(f"{name}: {key} should be text, found {value!r}; put it in quotes")
    missing = [field for field in ("id", "kind", "layout", "path") if field not in content]
    if missing:
        raise UsageError(f"{name} lacks {', '.join(missing)}; a task needs at least id, kind, layout and path")
    if content["id"] in TASKS:
        raise UsageError(f"{name}: the id {content['id']!r} is taken by a built-in task; choose another")
    return Task(**content)


@dataclass(frozen=True)
class TaskData:
    """The samples of a task. Labels are class numbers; caption j belongs to sample `caption_image[j]`, in ascending order."""

    task: Task
    folder: Path
    source: Source
    plan: Plan
    keys: tuple[str, ...]
    places: np.ndarray  # (N, 2) shard and row within it
    labels: np.ndarray  # (N,) int64; empty for retrieval
    class_names: tuple[str, ...]
    captions: tuple[str, ...]
    caption_image: np.ndarray  # (M,) int64
    rejected: dict[str, int]
    images_digest: str  # of keys and encoded images: what image features depend on
    digest: str  # of everything measured: images, labels, class names, captions

    def keep(self, usable: np.ndarray, rejected: dict[str, int]) -> "TaskData":
        """Return the samples where `usable` (N,) bool is set, adding what was `rejected` to the counts."""
        number = np.cumsum(usable) - 1  # new number of each kept sample
        kept = usable[self.caption_image] if len(self.caption_image) else np.zeros(0, dtype=bool)
        return replace(
            self,
            keys=tuple(key for key, use in zip(self.keys, usable, strict=True) if use),
            places=self.places[usable],
            labels=self.labels[usable] if len(self.labels) else self.labels,
            captions=tuple(text for text, use in zip(self.captions, kept, strict=True) if use),
            caption_image=number[self.caption_image[kept]],
            rejected=dict(Counter(self.rejected) + Counter(rejected)),
        )


def load_task(task: Task, data_root: Path, limits: Limits | None = None) -> TaskData:
    """Return the samples of `task`; DataError, saying what to put where, if its data is missing or unusable.

    Every image's bytes are read once, for the digest, and none is decoded. Samples that cannot be used are left out and
    counted by reject code. A label that is no known class is an error: it would falsify the result.
    """
    folder = data_root / task.path
    place = folder / task.data
    if not folder.is_dir() or not (place.exists() or any(folder.glob(task.data))):
        expected = f"{_EXPECTED[task.layout]} at {place}{_beside(task, folder)}"
        raise DataError(f"task {task.id!r} has no data: put {expected}, or give another --data-root")
    for name in (task.classes, task.templates):
        if name.endswith((".txt", ".json")) and not (folder / name).is_file():
            raise DataError(f"task {task.id!r} lacks {folder / name}{_beside(task, folder)}")
    source = Source(str(place), task.layout, task.image, task.key)
    made = plan(source, SHARD_ROWS, (task.column,))
    rows = list(_read(task, source, made, limits or Limits()))
    counts = Counter(row.key for row in rows if row.value is not None)
    rejected: Counter[str] = Counter()
    usable = []
    pixels, content = xxhash.xxh3_128(made.digest.encode()), xxhash.xxh3_128()
    for row in rows:
        pixels.update(f"{row.key}\0{row.image_hash}\0".encode())
        if row.value is None or counts[row.key] > 1:
            rejected[row.code if row.value is None else "duplicate_key"] += 1
        else:
            usable.append(row)
            content.update(repr((row.key, row.value)).encode())
    if not usable:
        raise DataError(f"task {task.id!r}: none of the {len(rows)} samples in {place} is usable ({_shown(rejected)})")
    labels, names = np.zeros(0, dtype=np.int64), tuple[str, ...]()
    captions: list[list[str]] = []
    if task.kind == "classification":
        labels, names = _labels(task, folder, [row.value for row in usable])
    else:
        captions = [row.value for row in usable]
    content.update(repr((pixels.hexdigest(), names)).encode())
    return TaskData(
        task=task,
        folder=folder,
        source=source,
        plan=made,
        keys=tuple(row.key for row in usable),
        places=np.array([row.place for row in usable]),
        labels=labels,
        class_names=names,
        captions=tuple(text for texts in captions for text in texts),
        caption_image=np.repeat(np.arange(len(captions)), [len(texts) for texts in captions]),
        rejected=dict(rejected),
        images_digest=pixels.hexdigest(),
        digest=content.hexdigest(),
    )


def read_images(data: TaskData, numbers: Sequence[int]) -> Iterator[tuple[int, bytes | Reject | None]]:
    """Yield (number, encoded image) of the given samples of a task, shard by shard."""
    wanted = sorted(numbers, key=lambda number: tuple(data.places[number]))
    opened, unit = -1, None
    for number in wanted:
        shard, row = (int(value) for value in data.places[number])
        if unit is None or shard != opened:
            opened, unit = shard, open_unit(data.source, data.plan, shard)
        yield number, next(iter(unit.rows(row, row + 1))).image


@dataclass(frozen=True)
class _Sample:
    """A row as it was read: `value` is its label or list of captions, None if the row is rejected with `code`."""

    key: str
    place: tuple[int, int]
    image_hash: str
    value: Any
    code: str


def _read(task: Task, source: Source, made: Plan, limits: Limits) -> Iterator[_Sample]:
    for shard in range(len(made.shards)):
        for row in open_unit(source, made, shard).rows():
            place = (shard, row.index)
            image = xxhash.xxh3_128_hexdigest(row.image) if isinstance(row.image, bytes) else "none"
            try:
                if row.reject is not None:
                    raise row.reject
                if task.column not in row.fields:
                    raise Reject("missing_column", f"no {task.column!r}")
                value = row.fields[task.column]
                if task.kind == "retrieval":
                    value = gate_captions(value, limits)
                elif isinstance(value, bool) or not isinstance(value, int | str):
                    raise DataError(f"task {task.id!r}: {row.key!r} has the label {value!r}; expected a class number or name")
            except Reject as reject:
                yield _Sample(row.key, place, image, None, reject.code)
                continue
            yield _Sample(row.key, place, image, value, "")


def _labels(task: Task, folder: Path, values: list[int | str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return class numbers (N,) and class names; class numbers need a file of names, class names may do without."""
    lines = read_lines(folder / task.classes) if task.classes else ()
    if any(isinstance(value, int) for value in values):
        if not all(isinstance(value, int) for value in values):
            raise DataError(f"task {task.id!r}: some labels are class numbers, others names; use one of them")
        if not lines:
            raise DataError(f"task {task.id!r}: labels are numbers, so it needs `classes`, a file with the names of class 0, 1, ...")
        numbers = np.array(values, dtype=np.int64)
        if not 0 <= numbers.min() <= numbers.max() < len(lines):
            found = f"labels from {numbers.min()} to {numbers.max()}"
            raise DataError(f"task {task.id!r}: {found}, but {task.classes} names classes 0 to {len(lines) - 1}")
        return numbers, lines
    found_labels = sorted({str(value) for value in values})
    pairs = [line.partition("\t") for line in lines] or [(label, "\t", label.replace("_", " ")) for label in found_labels]
    known = {label: number for number, (label, _, _) in enumerate(pairs)}
    if len(known) < len(pairs):
        raise DataError(f"task {task.id!r}: {task.classes} names a class twice; labels that are names must differ")
    for value in values:
        if value not in known:
            raise DataError(f"task {task.id!r}: label {value!r} is not in {task.classes}; {nearest(str(value), sorted(known))}")
    numbers = np.array([known[str(value)] for value in values], dtype=np.int64)
    return numbers, tuple(name if tab else label for label, tab, name in pairs)


def _beside(task: Task, folder: Path) -> str:
    files = [name for name in (task.classes, task.templates) if name.endswith((".txt", ".json"))]
    made = " (`make quickstart` makes it)" if task.note == _DEMONSTRATION else ""
    return (f", with {' and '.join(files)} in {folder}" if files else "") + made


def _shown(counts: Counter[str]) -> str:
    return ", ".join(f"{code} {count}" for code, count in counts.most_common())
