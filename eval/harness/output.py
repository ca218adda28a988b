"""lmms-eval's output folder, checked and turned into rows of results.json, answers and examples.

lmms-eval always exits with code 0, so a run counts only if every task has a number and an answer to every question.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from align.common.errors import DataError
from align.common.files import hash_bytes, hash_file, read_object
from align.common.intervals import wilson_interval
from align.common.seeds import generator
from align.runtime.runs import git_commit, versions
from eval.harness.local import data_files
from eval.measures.generation import YES_NO, estimate, normalized
from eval.results.examples import drawn_questions, generation_examples, save_examples
from eval.results.records import Entry, ModelRecord, Results, TaskRecord, file_name, load_answers, save_answers

KINDS = {"trained": "mllm", "random": "mllm_random", "none": "mllm_none"}  # sail_head -> kind of the column
POINTS = " (points)"  # suffix of metrics that are not fractions
OURS = (*YES_NO, "cider")  # recomputed from the answers; must equal lmms-eval's numbers


@dataclass(frozen=True)
class TaskRun:
    """One task of one run: lmms-eval's config, its numbers by (metric, filter), and the logged answers of each filter."""

    task: str
    config: dict[str, Any]
    numbers: dict[tuple[str, str], float]
    samples: dict[str, list[dict[str, Any]]]
    questions: int  # in the whole task; a limit asks fewer

    @property
    def answered(self) -> list[dict[str, Any]]:
        """The logged answers, one per question."""
        return next(iter(self.samples.values()))


def read_run(folder: Path, tasks: Sequence[str], limit: int | None = None, failures: list[str] | None = None) -> list[TaskRun]:
    """Return one TaskRun per task in `folder`, groups expanded.

    DataError if a task, a number or an answer (up to `limit`) is missing. With a list `failures`, what is missing of a task is added
    to it instead, and the other tasks are returned; DataError only if there are none.
    """
    failed = list[str]()
    found = sorted(folder.rglob("*_results.json"))
    if len(found) != 1:
        raise DataError(f"{len(found)} results files of lmms-eval in {folder}, expected 1: the evaluation did not finish")
    content = read_object(found[0])
    sizes = content.get("n-samples", {})
    missing = [task for task in tasks if task not in sizes and task not in content.get("group_subtasks", {})]
    if missing or not sizes:
        failed.append(f"{found[0]} lacks the tasks {', '.join(missing or tasks)}; it has {', '.join(sizes) or 'none'}")
    runs = []
    for task in sorted(sizes, key=lambda task: (tasks.index(task) if task in tasks else len(tasks), task)):
        try:
            runs.append(_task_run(content, found[0], task, int(sizes[task]["original"]), limit))
        except DataError as error:
            failed.append(str(error))
    if failed and (failures is None or not runs):
        raise DataError("; ".join(failed))
    if failures is not None:
        failures += failed
    return runs


def _task_run(content: dict[str, Any], path: Path, task: str, questions: int, limit: int | None) -> TaskRun:
    given = {}
    for name, value in content["results"][task].items():
        metric, comma, chosen = name.partition(",")
        if comma and not metric.endswith(("_stderr", "_stderr_clt", "_stderr_clustered")):
            given[metric, chosen] = value
    numbers = {name: float(value) for name, value in given.items() if isinstance(value, int | float)}
    if not numbers:
        said = ", ".join(f"{metric} {value!r}" for (metric, _), value in given.items()) or "no metric"
        raise DataError(f"task {task} has no number in {path} ({said}): of a split that a server scores, only the answers beside it count")
    if not all(math.isfinite(value) for value in numbers.values()):
        said = ", ".join(f"{metric} {value}" for (metric, _), value in numbers.items() if not math.isfinite(value))
        raise DataError(f"task {task} has no finite number in {path} ({said})")
    asked = min(questions, limit) if limit else questions
    filters = list(dict.fromkeys(chosen for _, chosen in given))  # answers are logged for each, numbers or not
    logged = path.with_name(path.name.removesuffix("results.json") + f"samples_{task}.jsonl")
    if not logged.is_file():
        raise DataError(f"{logged} is missing: task {task} did not finish (or ran without --log_samples)")
    try:
        rows = [json.loads(line) for line in logged.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise DataError(f"{logged} is cut or damaged ({error}); run again") from error
    parts = {chosen: rows[at * asked : (at + 1) * asked] for at, chosen in enumerate(filters)}
    complete = all(len({row["doc_id"] for row in part}) == asked for part in parts.values())
    if len(rows) != asked * len(filters) or not complete:
        raise DataError(f"task {task} has answers to {len({row['doc_id'] for row in rows})} of {asked} questions in {logged}; run again")
    return TaskRun(task, content["configs"][task], numbers, parts, questions)


def run_entries(run: TaskRun, model: str, generator: np.random.Generator, confidence: float) -> list[Entry]:
    """Return a task's entries: Wilson intervals for rates, bootstrap for means, none for metrics that only lmms-eval computes.

    DataError if the kit's value of a metric differs from lmms-eval's: the logged answers are then not those that were scored.
    """
    entries = []
    for (metric, chosen), value in run.numbers.items():
        values = [row[metric] for row in run.samples[chosen] if metric in row]
        name = metric if chosen == next(iter(run.samples)) else f"{metric} {chosen}"
        found = estimate(metric, values, generator, confidence) if values else None
        if found and math.isclose(found[0], value, rel_tol=1e-6, abs_tol=1e-9):
            entries.append(Entry(run.task, name, *found, len(values), model))
        elif found and metric in OURS:
            raise DataError(f"task {run.task}: lmms-eval says {metric} is {value}, the logged answers give {found[0]}")
        else:
            name = name if 0 <= value <= 1 else name + POINTS
            entries.append(Entry(run.task, name, value, value, value, len(values) or len(run.answered), model))
    return entries


def majority_entry(run: TaskRun, confidence: float) -> list[Entry]:
    """Return the score of always giving the most frequent right answer, or [] if answers are not simply right or wrong."""
    for metric in ("accuracy", "exact_match"):
        scores = [row.get(metric) for row in run.answered]
        targets = [str(row["target"]) for row in run.answered]
        if all(_is_number(score) and score in (0, 1) for score in scores) and not any(target.startswith("[") for target in targets):
            most, n = Counter(normalized(target) for target in targets).most_common(1)[0][1], len(targets)
            return [Entry(run.task, metric, most / n, *wilson_interval(most, n, confidence), n, "majority")]
    return []


def task_record(run: TaskRun) -> TaskRecord:
    """Return a task's record. Its digest covers questions, right answers and local data files."""
    asked = [[row["doc_id"], row.get("input"), row["target"]] for row in sorted(run.answered, key=lambda row: row["doc_id"])]
    files = [hash_file(Path(path)) for _, path in data_files(run.config) if Path(path).is_file()]
    digest = hash_bytes(json.dumps([asked, files]).encode())[:16]
    metadata = run.config.get("metadata")
    told = metadata if isinstance(metadata, dict) else {}
    notes = [str(told["note"])] if "note" in told else []
    if len(asked) < run.questions:
        notes.append(f"{run.task}: only the first {len(asked)} of {run.questions} questions were asked.")
    prompt = " ".join(_prompts(run.config)[1].split())
    return TaskRecord(run.task, "generation", len(asked), len(asked), prompt, digest, " ".join(notes), str(told.get("credit", "")), {})


def answers_table(run: TaskRun) -> pa.Table:
    """Return one row per question, in order: key (its number), question, expected and given answer, score (null if it has none)."""
    before, after = _prompts(run.config)
    main = next((metric for metric, _ in run.numbers if all(_is_number(row.get(metric)) for row in run.answered)), None)
    rows = sorted(run.answered, key=lambda row: row["doc_id"])
    return pa.table(
        {
            "key": pa.array([str(row["doc_id"]) for row in rows], pa.string()),
            "question": pa.array([str(row.get("input", "")).removeprefix(before).removesuffix(after).strip() for row in rows], pa.string()),
            "expected": pa.array([str(row["target"]) for row in rows], pa.string()),
            "answer": pa.array([_text(row["filtered_resps"]) for row in rows], pa.string()),
            "score": pa.array([float(row[main]) if main else None for row in rows], pa.float64()),
        }
    )


def model_record(name: str, folder: Path) -> ModelRecord:
    """Return the record of an MLLM folder: its parts and the hash of its weights; DataError if the folder is incomplete."""
    config = read_object(folder / "config.json")
    head, text = str(config.get("sail_head", "none")), config.get("text_config") or {}
    files = {file.name: hash_file(file) for file in sorted(folder.glob("*.safetensors"))}
    if not files or head not in KINDS:
        raise DataError(f"{folder} is no complete MLLM folder ({len(files)} weight files, sail_head {head!r}); make it again")
    made_of = config.get("sail_fingerprint") or {}
    fingerprint = {"weights": hash_bytes(json.dumps(files).encode()), **{key: str(value) for key, value in made_of.items()}}
    seen = [_described(config)]
    for tower in config.get("sail_beside") or []:
        seen.append(_described(tower))
        fingerprint |= {f"second {key}": str(value) for key, value in (tower.get("sail_fingerprint") or {}).items()}
    shape = f"{text.get('num_hidden_layers', '?')} layers of width {text.get('hidden_size', '?')}"
    together = f" and, joined by {config.get('sail_join')}, ".join(seen)
    said = f"{text.get('model_type', 'LLM')} ({shape}) sees through {together}"
    return ModelRecord(name, KINDS[head], said, str(folder), fingerprint)


def _described(tower: dict[str, Any]) -> str:
    """Return an encoder and its head in words."""
    head, kind = str(tower.get("sail_head", "none")), str(tower.get("sail_head_kind", ""))
    encoder = (tower.get("sail_fingerprint") or {}).get("encoder", (tower.get("vision_config") or {}).get("model_type", "an encoder"))
    described = "no head" if head == "none" else f"{'a trained' if head == 'trained' else 'an untrained'} {kind} head"
    return f"{encoder} and {described}"


def collect(
    output: Path,
    answered: Sequence[tuple[ModelRecord, Sequence[TaskRun]]],
    command: str,
    seconds: float,
    seed: int,
    confidence: float,
    baseline: bool,
) -> Results:
    """Return what `command` measured as results, and write all answers to `output`. `baseline` adds the majority rates."""
    entries: list[Entry] = []
    for record, runs in answered:
        for run in runs:
            entries += run_entries(run, record.name, generator(seed, 11), confidence)
            save_answers(output, run.task, record.name, answers_table(run))
    asked = {run.task: run for _, runs in reversed(answered) for run in runs}  # of each task the first model's
    tasks = [asked[task] for task in dict.fromkeys(run.task for _, runs in answered for run in runs)]
    majority = [entry for run in tasks for entry in majority_entry(run, confidence)] if baseline else []
    records = [record for record, _ in answered]
    if majority:
        records.append(ModelRecord("majority", "majority", "always names the most frequent classes or answers", "", {}))
    return Results(
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        command=command,
        versions={**versions(), "lmms-eval": version("lmms-eval"), "source": git_commit() or "no git checkout"},
        seed=seed,
        confidence=confidence,
        seconds={"generated answers": round(seconds, 2)},
        models=tuple(records),
        tasks=tuple(map(task_record, tasks)),
        entries=(*entries, *majority),
    )


def write_examples(output: Path, results: Results, measured: Results, count: int, seed: int) -> None:
    """Write `count` examples of each task just measured, with the answers of every model in `results`."""
    for task in measured.tasks:
        asked = {entry.model for entry in results.entries if entry.task == task.id} - {"majority"}
        tables = {model.name: load_answers(output, task.id, model.name) for model in results.models if model.name in asked}
        answers = {name: {int(row["key"]): row for row in table.to_pylist()} for name, table in tables.items()}
        numbers = drawn_questions(task.id, next(iter(answers.values())), count, seed)
        found = {path.stem: path for path in (output / "lmms").glob(f"**/thumbnails/{file_name(task.id)}/*.jpg")}
        pictures = {number: Image.open(found[str(number)]) for number in numbers if str(number) in found}
        save_examples(output, task.id, generation_examples(numbers, answers, pictures), pictures.items())


def _prompts(config: dict[str, Any]) -> tuple[str, str]:
    """Return the texts before and after every question of a task."""
    settings = config.get("lmms_eval_specific_kwargs") or {}
    chosen = settings.get("sail_llava") or settings.get("default") or {}
    return str(chosen.get("pre_prompt", "")), str(chosen.get("post_prompt", ""))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _text(answer: Any) -> str:
    if isinstance(answer, str):
        return answer
    if isinstance(answer, list) and all(isinstance(part, str) for part in answer):
        return " | ".join(answer)
    return json.dumps(answer)
