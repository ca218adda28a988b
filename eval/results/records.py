"""Results on disk: one schema for encoder pairs and MLLMs, written atomically, loaded strictly.

`<output>/results.json` holds what was run and all numbers, as fractions. Beside it are `answers/<task>--<model>.parquet` (one row per
sample, for paired comparisons) and `examples/<task>.json` with its thumbnails.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from align.common.errors import DamagedError, UsageError
from align.common.files import atomic_json, atomic_path, read_json

FORMAT_VERSION = 1
RESULTS = "results.json"
MODEL_KINDS = ("trained", "untrained", "clip", "majority", "chance", "mllm", "mllm_random", "mllm_none")
SUBJECTS = ("trained", "mllm")  # the kinds that a report is about; all others are for comparison
TASK_KINDS = ("classification", "retrieval", "compositional", "segmentation", "generation")
GRADED = ("cider", "rouge_l")  # means of graded scores, even if all scores happen to be 0 or 1
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
    """One column of the results table. `kind` is one of MODEL_KINDS; `fingerprint` is empty for majority and chance.

    trained, untrained: encoder pairs with trained or fresh heads. clip: a dual encoder trained on pairs from scratch, to compare with.
    mllm, mllm_random, mllm_none: LLaVA-style models with a trained, random or no image head.
    """

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
    """What a task was measured on."""

    id: str
    kind: str
    images: int  # generation: questions
    targets: int  # classes, captions or questions
    prompts: str
    digest: str
    note: str
    credit: str
    rejected: dict[str, int]  # samples left out, by reject code

    def __post_init__(self) -> None:
        if self.kind not in TASK_KINDS:
            raise UsageError(f"task {self.id!r} has the unknown kind {self.kind!r}; known: {', '.join(TASK_KINDS)}")


@dataclass(frozen=True)
class Results:
    """All that `eval/run.py` and `eval/lmms.py` measured: what was run (one command per line), by which code, and the numbers."""

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


def merge_results(old: Results, new: Results) -> Results:
    """Return both results together: `new` replaces the same task and model of `old`, and the rest of `old` stays.

    Entries of `old` whose model, data or prompts have changed are dropped. UsageError unless seed and confidence are the same.
    """
    if (old.seed, old.confidence) != (new.seed, new.confidence):
        kept_apart = f"seed {old.seed} and confidence {old.confidence:g}, not seed {new.seed} and confidence {new.confidence:g}"
        raise UsageError(f"the results that are already there have {kept_apart}; use the same, or another --output")
    models = {model.name: (model.kind, model.fingerprint) for model in new.models}
    tasks = {task.id: (task.digest, task.prompts) for task in new.tasks}
    changed_models = {m.name for m in old.models if m.name in models and models[m.name] != (m.kind, m.fingerprint)}
    changed_tasks = {t.id for t in old.tasks if t.id in tasks and tasks[t.id] != (t.digest, t.prompts)}
    measured = {(entry.task, entry.model) for entry in new.entries}
    kept = [
        entry
        for entry in old.entries
        if (entry.task, entry.model) not in measured and entry.model not in changed_models and entry.task not in changed_tasks
    ]
    entries = (*kept, *new.entries)
    used_models, used_tasks = {entry.model for entry in entries}, {entry.task for entry in entries}
    return replace(
        new,
        command="\n".join([*(line for line in old.command.splitlines() if line != new.command), new.command]),
        versions={**old.versions, **new.versions},
        seconds={**old.seconds, **new.seconds},
        models=_together(old.models, new.models, "name", used_models),
        tasks=_together(old.tasks, new.tasks, "id", used_tasks),
        entries=entries,
    )


def generated_half(folder: Path, seed: int, confidence: float) -> Results | None:
    """Return the part of the results in `folder` from eval/lmms.py, or None; UsageError if its seed or confidence differs."""
    if not (folder / RESULTS).is_file():
        return None
    old = load_results(folder)
    tasks = tuple(task for task in old.tasks if task.kind == "generation")
    if not tasks:
        return None
    if (old.seed, old.confidence) != (seed, confidence):
        raise UsageError(
            f"{folder} has generated answers with seed {old.seed} and confidence {old.confidence:g}; use these, or another --output"
        )
    names = {task.id for task in tasks}
    return replace(old, tasks=tasks, entries=tuple(entry for entry in old.entries if entry.task in names))


def _together(old: Sequence[Record], new: Sequence[Record], key: str, used: set[str]) -> tuple[Record, ...]:
    """Return the used records in their newest version, those of `old` first."""
    newest = {getattr(record, key): record for record in (*old, *new)}
    return tuple(record for name, record in newest.items() if name in used)


def save_results(folder: Path, results: Results) -> Path:
    """Write `results.json` into `folder` and return its path."""
    path = folder / RESULTS
    atomic_json(path, {"format_version": FORMAT_VERSION, **asdict(results)})
    return path


def load_results(folder: Path) -> Results:
    """Return the results in `folder`; DamagedError for a missing, unknown or wrongly typed field, or another format version."""
    path = folder / RESULTS
    if not path.is_file():
        raise UsageError(f"no {RESULTS} in {folder}; run `python eval/run.py --output {folder} ...` first")
    content = versioned(path, FORMAT_VERSION, "measure again")
    for name, kind in (("models", ModelRecord), ("tasks", TaskRecord), ("entries", Entry)):
        content[name] = records_of(kind, content, name, str(path))
    return record_of(Results, content, str(path))


def versioned(path: Path, version: int, advice: str) -> dict[str, Any]:
    """Return the object in a JSON file without its format version; DamagedError, with `advice`, unless that is `version`."""
    content = read_json(path)
    found = content.pop("format_version", None) if isinstance(content, dict) else type(content).__name__
    if found != version:
        raise DamagedError(f"{path} has format version {found!r}, this code reads {version}; {advice}")
    return content


def records_of(kind: type[Record], content: dict[str, Any], name: str, where: str) -> tuple[Record, ...]:
    """Return the list `name` in a file's content as records; DamagedError as in `record_of`."""
    if not isinstance(content.get(name), list):
        raise DamagedError(f"{where}: {name!r} should be a list")
    return tuple(record_of(kind, row, f"{where}: {name}[{at}]") for at, row in enumerate(content[name]))


_JSON_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (float, int)}


def record_of(kind: type[Record], values: Any, where: str) -> Record:
    """Return a dataclass made of the fields in `values`; DamagedError for a missing, unknown or wrongly typed field."""
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
    """Return `name` as a safe part of a file name: only letters, digits, `.`, `_` and `-` stay."""
    return re.sub(r"[^\w.-]+", "_", name).strip(".") or "_"


def answers_path(folder: Path, task: str, model: str) -> Path:
    """Return the path of a model's per-sample answers to a task, below a results folder."""
    return folder / "answers" / f"{file_name(task)}--{file_name(model)}.parquet"


def save_answers(folder: Path, task: str, model: str, answers: pa.Table) -> Path:
    """Write per-sample answers (their columns depend on the kind of task) and return their path."""
    path = answers_path(folder, task, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        pq.write_table(answers, temporary)
    return path


def load_answers(folder: Path, task: str, model: str) -> pa.Table:
    """Return the per-sample answers of a model to a task; DamagedError if the file is missing or unreadable."""
    path = answers_path(folder, task, model)
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DamagedError(f"cannot read the answers {path} ({error}); measure again") from error


def csv_rows(results: Results) -> list[Sequence[Any]]:
    """Return the entries as rows for a CSV file, the header first."""
    return [[field.name for field in fields(Entry)], *map(astuple, results.entries)]
