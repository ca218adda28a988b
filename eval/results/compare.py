"""Which differences between two runs are real: both models' stored answers to the same samples, paired by key.

A and B are results folders, or FOLDER:MODEL. A task is compared only if data and prompts are the same; otherwise the reason is given.
Right-or-wrong metrics get an exact test, the others a paired bootstrap. All p-values are Holm-corrected.
"""

import csv
import io
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.table import Table

from align.common.errors import DamagedError, UsageError
from align.common.files import atomic_bytes, atomic_json
from align.common.intervals import Statistic, mean_of, median_of, percentiles
from eval.results.paired import bootstrap_p, holm, mean_per_class_of, mean_ratio_of, paired_bootstrap, ratio_of, sign_flip_p
from eval.results.records import (
    GRADED,
    SUBJECTS,
    Results,
    TaskRecord,
    answers_path,
    load_answers,
    load_results,
    record_of,
    records_of,
    versioned,
)

FORMAT_VERSION = 1
FILE = "comparison.json"
MCNEMAR, FLIPS, BOOTSTRAP = "McNemar, exact", "sign flips by image, exact", "paired bootstrap"
COLUMNS = {"text_score": "text", "image_score": "image", "group_score": "group", "pair_accuracy": "image"}  # metric -> column


@dataclass(frozen=True)
class Difference:
    """One metric of one task: A, B, and B - A with its interval and p-value."""

    task: str
    metric: str
    unit: str  # points (values are fractions) or ranks (lower is better)
    model_a: str
    model_b: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    n: int
    clusters: int  # independent groups among the n samples
    test: str
    p: float
    p_holm: float  # p corrected for the number of tests


@dataclass(frozen=True)
class Comparison:
    """All differences between A and B, and the skipped tasks."""

    a: str
    b: str
    created: tuple[str, str]  # times of the two results; the comparison holds for no others
    seed: int
    confidence: float
    differences: tuple[Difference, ...]
    skipped: tuple[tuple[str, str], ...]  # (task, reason)

    def shown(self, one: Difference) -> bool:
        """Return whether a difference is significant: its corrected p is below 1 - confidence."""
        return one.p_holm < 1 - self.confidence


@dataclass(frozen=True)
class _Side:
    given: str
    folder: Path
    results: Results
    model: str

    def model_of(self, task: str) -> str:
        """Return the model to compare on a task: the named one, or else the first trained one; "" if it was not measured."""
        named = [self.model] if self.model else [model.name for model in self.results.models if model.kind in SUBJECTS]
        measured = {entry.model for entry in self.results.entries if entry.task == task}
        return next((name for name in named if name in measured), "")


def compare(a: str, b: str, generator: np.random.Generator, seed: int, confidence: float) -> Comparison:
    """Return the comparison of B against A; UsageError if nothing can be compared. `generator` must be made from `seed`."""
    first, second = _side(a), _side(b)
    found: list[Difference] = []
    skipped = []
    tasks = {task.id: task for task in second.results.tasks}
    for task in first.results.tasks:
        reason = _obstacle(task, tasks.pop(task.id, None), first, second)
        if reason:
            skipped.append((task.id, reason))
            continue
        try:
            found += _task_differences(task, first, second, generator, confidence)
        except _Unpaired as unpaired:
            skipped.append((task.id, str(unpaired)))
    skipped += [(task, f"not measured in {first.folder}") for task in tasks]
    if not found:
        reasons = "; ".join(f"{task}: {reason}" for task, reason in skipped) or "the results hold no tasks"
        raise UsageError(f"nothing to compare between {a} and {b}: {reasons}")
    adjusted = holm([one.p for one in found])
    corrected = tuple(Difference(**{**asdict(one), "p_holm": p}) for one, p in zip(found, adjusted, strict=True))
    created = (first.results.created, second.results.created)
    return Comparison(a, b, created, seed, confidence, corrected, tuple(skipped))


class _Unpaired(Exception):
    """The answers of a task cannot be paired; the message says why."""


def _side(given: str) -> _Side:
    path, colon, model = given.rpartition(":")
    if not colon or Path(given).is_dir():
        path, model = given, ""
    results = load_results(Path(path))
    known = [one.name for one in results.models]
    if model and model not in known:
        raise UsageError(f"{path} has no model {model!r}; it has {', '.join(known)}")
    if not model and not any(one.kind in SUBJECTS for one in results.models):
        raise UsageError(f"{path} has no trained model; name one: {path}:MODEL with MODEL one of {', '.join(known)}")
    return _Side(given, Path(path), results, model)


def _obstacle(task: TaskRecord, other: TaskRecord | None, a: _Side, b: _Side) -> str:
    """Return why a task cannot be compared, or ""."""
    if other is None:
        return f"not measured in {b.folder}"
    if (task.kind, task.digest) != (other.kind, other.digest):
        return f"other data ({task.digest} and {other.digest})"
    if task.prompts != other.prompts:
        return f"other prompts ({task.prompts} and {other.prompts}): numbers of different prompts are never compared"
    for side in (a, b):
        model = side.model_of(task.id)
        if not model or not answers_path(side.folder, task.id, model).is_file():
            return f"{side.given} has no answers{f' of {model}' if model else ''} to it"
    if a.folder.resolve() == b.folder.resolve() and a.model_of(task.id) == b.model_of(task.id):
        raise UsageError(f"{a.given} and {b.given} are the same model ({a.model_of(task.id)}); name two: FOLDER:MODEL FOLDER:MODEL")
    return ""


def _task_differences(task: TaskRecord, a: _Side, b: _Side, generator: np.random.Generator, confidence: float) -> list[Difference]:
    """Return the differences of all metrics in both results. Metrics of the same samples share one bootstrap."""
    models = a.model_of(task.id), b.model_of(task.id)
    tables = [load_answers(side.folder, task.id, model) for side, model in zip((a, b), models, strict=True)]
    known = [_values(side.results, task.id, model) for side, model in zip((a, b), models, strict=True)]
    found = []
    for part in ("i2t", "t2i") if task.kind == "retrieval" else ("",):
        rows = [_rows(table, part) for table in tables]
        if not rows[0].select(_keys(part)).equals(rows[1].select(_keys(part))):
            raise _Unpaired("the two runs left out different samples, so their answers do not pair")
        clusters = rows[0]["key"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
        measured = [_measures(task, part, table, numbers) for table, numbers in zip(rows, known, strict=True)]
        names = [name for name in measured[0] if name in measured[1] and all(name in numbers for numbers in known)]
        if not names:
            raise _Unpaired("no metric that is known for each sample")
        pairs = {name: (_statistic(measured[0][name]), _statistic(measured[1][name])) for name in names}
        once = np.ones((1, len(clusters)))
        for side, numbers, place in zip((a, b), known, (0, 1), strict=True):
            _check(side, task.id, {name: float(pairs[name][place](once)[0]) for name in names}, numbers)
        drawn = paired_bootstrap(pairs, clusters, generator)
        for name in names:
            test, p = _test(measured[0][name], measured[1][name], clusters, drawn[name])
            low, high = percentiles(drawn[name], confidence)
            values = known[0][name], known[1][name]
            unit = "ranks" if name.endswith("median_rank") else "points"
            counted = len(clusters), int(clusters.max()) + 1
            found.append(Difference(task.id, name, unit, *models, *values, values[1] - values[0], low, high, *counted, test, p, p))
    return found


def _values(results: Results, task: str, model: str) -> dict[str, float]:
    return {entry.metric: entry.value for entry in results.entries if (entry.task, entry.model) == (task, model)}


def _keys(part: str) -> list[str]:
    return ["key", "caption"] if part == "t2i" else ["key"]


def _rows(table: pa.Table, part: str) -> pa.Table:
    """Return the rows of one retrieval direction (of other tasks: all rows), sorted by key."""
    chosen = table.filter(pa.array(np.array(table["direction"]) == part)) if part else table
    return chosen.sort_by([(name, "ascending") for name in _keys(part)])


def _measures(task: TaskRecord, part: str, table: pa.Table, known: dict[str, float]) -> dict[str, np.ndarray | Statistic]:
    """Return each metric's per-sample data: (N,) bool for right or wrong, else a statistic of the samples."""
    if task.kind in ("classification", "retrieval"):
        ranks, prefix = table["rank"].to_numpy(), f"{part}_r" if part else "acc"
        found: dict[str, np.ndarray | Statistic] = {f"{prefix}@{k}": ranks <= k for k in (1, 5, 10)}
        if part:
            return found | {f"{part}_median_rank": median_of(ranks)}
        return found | {"mean_per_class": mean_per_class_of(ranks == 1, table["label"].to_numpy())}
    if task.kind == "compositional":
        return {metric: np.array(table[column]) for metric, column in COLUMNS.items()}
    if task.kind == "segmentation":
        tp, fp, fn = class_counts(table)
        return {
            "miou": mean_ratio_of(tp, tp + fp + fn),
            "pixel_accuracy": ratio_of(table["right"].to_numpy(), table["pixels"].to_numpy()),
            "mean_class_accuracy": mean_ratio_of(tp, tp + fn),
        }
    scores = np.array(table["score"].to_pylist(), dtype=np.float64)  # None becomes NaN
    if not np.isfinite(scores).all():
        raise _Unpaired("its answers have no score of their own")
    named = (metric for metric, value in known.items() if math.isclose(value, scores.mean(), rel_tol=1e-6, abs_tol=1e-9))
    right_or_wrong = bool(np.isin(scores, (0, 1)).all())
    return {metric: scores == 1 if right_or_wrong and metric not in GRADED else mean_of(scores) for metric in list(named)[:1]}


def class_counts(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tp, fp and fn (N, C) int64, in pixels, from the answers to a segmentation task."""
    columns = (table[name].combine_chunks() for name in ("tp", "fp", "fn"))
    tp, fp, fn = (column.flatten().to_numpy().reshape(len(table), -1) for column in columns)
    return tp, fp, fn


def _statistic(measure: np.ndarray | Statistic) -> Statistic:
    return mean_of(measure) if isinstance(measure, np.ndarray) else measure


def _check(side: _Side, task: str, computed: dict[str, float], known: dict[str, float]) -> None:
    """Raise DamagedError if the answers of a side and its results disagree."""
    for metric, value in computed.items():
        if not math.isclose(value, known[metric], rel_tol=1e-6, abs_tol=1e-6):
            told = f"the answers to {task} give {metric} {value:.6g}, its results say {known[metric]:.6g}"
            raise DamagedError(f"{side.folder}: {told}; measure again")


def _test(a: np.ndarray | Statistic, b: np.ndarray | Statistic, clusters: np.ndarray, drawn: np.ndarray) -> tuple[str, float]:
    """Return the name and the two-sided p of the test that fits the metric."""
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
        return BOOTSTRAP, bootstrap_p(drawn)
    sums = np.bincount(clusters, weights=b.astype(np.float64) - a).astype(np.int64)  # (G,)
    return MCNEMAR if len(sums) == len(clusters) else FLIPS, sign_flip_p(sums)


def verdict(one: Difference, shown: bool) -> str:
    """Return what a difference means in words, for example "B is better by 3.1 points (1.0 to 5.2), p = 0.003"."""
    factor = 1 if one.unit == "ranks" else 100
    value, low, high = (factor * number for number in (one.difference, one.low, one.high))
    p = "p < 0.001" if one.p_holm < 0.001 else f"p = {one.p_holm:.3f}" if one.p_holm < 0.1 else f"p = {one.p_holm:.2f}"
    if not shown:
        return f"no difference shown: B - A is {value:+.1f} {one.unit} ({low:.1f} to {high:.1f}), {p}"
    if value < 0:
        low, high = -high, -low
    name = "B" if (value > 0) != (one.unit == "ranks") else "A"
    return f"{name} is better by {abs(value):.1f} {one.unit} ({low:.1f} to {high:.1f}), {p}"


def comparison_table(comparison: Comparison) -> Table:
    """Return a comparison as a table for the terminal, one row per metric. Skipped tasks are listed below it."""
    note = f"p corrected for {len(comparison.differences)} tests (Holm); intervals {100 * comparison.confidence:g}%, each for itself"
    lines = [note, *(f"left out: {task}: {reason}" for task, reason in comparison.skipped)]
    table = Table(title=f"A: {comparison.a}\nB: {comparison.b}", title_justify="left", caption="\n".join(lines), caption_justify="left")
    for heading in ("task", "metric", "A", "B", "n", "what it says"):
        table.add_column(heading, justify="right" if heading in ("A", "B", "n") else "left", overflow="fold")
    for one in comparison.differences:
        factor = 1 if one.unit == "ranks" else 100
        said = verdict(one, comparison.shown(one))
        table.add_row(one.task, one.metric, f"{factor * one.a:.1f}", f"{factor * one.b:.1f}", str(one.n), said)
    return table


def save_comparison(folder: Path, comparison: Comparison) -> Path:
    """Write comparison.json and comparison.csv into `folder` and return the path of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_json(folder / FILE, {"format_version": FORMAT_VERSION, **asdict(comparison)})
    rows = [{**asdict(one), "verdict": verdict(one, comparison.shown(one))} for one in comparison.differences]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_bytes(folder / "comparison.csv", text.getvalue().encode())
    return folder / FILE


def load_comparison(folder: Path) -> Comparison | None:
    """Return the comparison saved in `folder`, or None if there is none; DamagedError if it is invalid."""
    path = folder / FILE
    if not path.is_file():
        return None
    content = versioned(path, FORMAT_VERSION, "compare again")
    where = f"{path} (compare again)"
    content["differences"] = records_of(Difference, content, "differences", where)
    try:
        content["skipped"] = tuple((str(task), str(reason)) for task, reason in content.get("skipped", ()))
        content["created"] = tuple(content.get("created", ()))
    except (TypeError, ValueError) as error:
        raise DamagedError(f"{where}: {error}") from error
    return record_of(Comparison, content, where)
