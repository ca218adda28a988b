"""The results of a measurement on disk: one schema, written atomically, loaded strictly.

`<output>/results.json` holds what was run and every number; beside it lie `answers/<task>--<model>.parquet` (one row per
sample, so that runs can be compared pairwise) and `examples/<task>.json` with its thumbnails. Numbers are fractions.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from align.errors import DamagedError, UsageError
from align.files import atomic_json, atomic_path, read_json

FORMAT_VERSION = 1
RESULTS = "results.json"
MODEL_KINDS = ("trained", "untrained", "majority", "chance")
Record = TypeVar("Record")


@dataclass(frozen=True)
class Entry:
    """One number: `value` of `metric` with its interval [low, high], over `n` samples (images or queries)."""

    task: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    model: str

    def __post_init__(self) -> None:
        if not all(math.isfinite(number) for number in (self.value, self.low, self.high)):
            shown = f"{self.value} [{self.low}, {self.high}]"
            raise UsageError(f"{self.task} {self.metric} of {self.model} is not a finite number: {shown}")


@dataclass(frozen=True)
class ModelRecord:
    """What a column of the table is: `kind` is one of MODEL_KINDS; `fingerprint` is empty for majority and chance."""

    name: str
    kind: str
    description: str
    folder: str
    fingerprint: dict[str, Any]

    def __post_init__(self) -> None:
        if self.kind not in MODEL_KINDS:
            raise UsageError(f"model {self.name!r} has the unknown kind {self.kind!r}; known: {', '.join(MODEL_KINDS)}")


@dataclass(frozen=True)
class TaskRecord:
    """What a task was measured on; `rejected` counts the samples left out, by reject code."""

    id: str
    kind: str
    images: int
    targets: int
    prompts: str
    digest: str
    note: str
    credit: str
    rejected: dict[str, int]


@dataclass(frozen=True)
class Results:
    """All that `eval/run.py` found out: what was run, by which code, and the numbers."""

    created: str
    command: str
    versions: dict[str, str]
    seed: int
    confidence: float
    seconds: dict[str, float]
    models: tuple[ModelRecord, ...]
    tasks: tuple[TaskRecord, ...]
    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        for names, what in (([m.name for m in self.models], "model"), ([t.id for t in self.tasks], "task")):
            if len(set(names)) < len(names):
                raise UsageError(f"two {what}s of the same name in {', '.join(names)}; give each its own")
        models, tasks = {m.name for m in self.models}, {t.id for t in self.tasks}
        for entry in self.entries:
            if entry.model not in models or entry.task not in tasks:
                raise UsageError(f"entry {entry.task} / {entry.metric} / {entry.model} belongs to no listed task or model")

    def value(self, task: str, metric: str, model: str) -> Entry | None:
        """Return the entry of that task, metric and model, or None if it was not measured."""
        return next((e for e in self.entries if (e.task, e.metric, e.model) == (task, metric, model)), None)


def save_results(folder: Path, results: Results) -> Path:
    """Write `results.json` into `folder` and return its path."""
    path = folder / RESULTS
    atomic_json(path, {"format_version": FORMAT_VERSION, **asdict(results)})
    return path


def load_results(folder: Path) -> Results:
    """Return the results in `folder`; DamagedError for a missing, unknown or wrongly typed field or another format version."""
    path = folder / RESULTS
    if not path.is_file():
        raise UsageError(f"no {RESULTS} in {folder}; run `python eval/run.py --output {folder} ...` first")
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        found = content.get("format_version") if isinstance(content, dict) else type(content).__name__
        raise DamagedError(f"{path} has format version {found!r}, this code reads {FORMAT_VERSION}; measure again")
    del content["format_version"]
    for name, kind in (("models", ModelRecord), ("tasks", TaskRecord), ("entries", Entry)):
        if not isinstance(content.get(name), list):
            raise DamagedError(f"{path}: {name!r} should be a list")
        content[name] = tuple(_record(kind, row, f"{path}: {name}[{at}]") for at, row in enumerate(content[name]))
    return _record(Results, content, str(path))


_JSON_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (float, int)}


def _record(kind: type[Record], values: Any, where: str) -> Record:
    known = {field.name: field.type for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(values, dict) or set(values) != set(known):
        found = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise DamagedError(f"{where}: expected the fields {', '.join(sorted(known))}, found {found}")
    for name, declared in known.items():
        plain = _JSON_TYPES.get(declared.__name__) if isinstance(declared, type) else None
        if plain and (not isinstance(values[name], plain) or isinstance(values[name], bool)):
            raise DamagedError(f"{where}: {name} should be {plain[0].__name__}, found {values[name]!r}")
    return kind(**values)


def file_name(name: str) -> str:
    """Return `name` with everything but letters, digits, `.`, `_` and `-` replaced, safe as a part of a file name."""
    return re.sub(r"[^\w.-]+", "_", name).strip(".") or "_"


def answers_path(folder: Path, task: str, model: str) -> Path:
    """Return where the per-sample answers of a model on a task lie below a results folder."""
    return folder / "answers" / f"{file_name(task)}--{file_name(model)}.parquet"


def save_answers(folder: Path, task: str, model: str, answers: pa.Table) -> Path:
    """Write per-sample answers (columns as `eval.zeroshot` and `eval.retrieval` document) and return their path."""
    path = answers_path(folder, task, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        pq.write_table(answers, temporary)
    return path


def load_answers(folder: Path, task: str, model: str) -> pa.Table:
    """Return the per-sample answers of a model on a task; DamagedError if the file is missing or does not read."""
    path = answers_path(folder, task, model)
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DamagedError(f"cannot read the answers {path} ({error}); measure again") from error


def csv_rows(results: Results) -> list[Sequence[Any]]:
    """Return the entries as rows for a CSV file, the header first."""
    names = [field.name for field in fields(Entry)]
    return [names, *([asdict(entry)[name] for name in names] for entry in results.entries)]
