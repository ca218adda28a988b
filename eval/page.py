"""One HTML page from results on disk: self-contained, offline, readable on a phone and on paper.

Reads results.json, answers/*.parquet, examples/*.json and the training runs' metrics.jsonl. Needs neither torch nor the data.
Everything that comes from data is escaped: a caption is text, whatever it holds.
"""

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from align.files import atomic_bytes, read_json
from eval.figures import DARK, LIGHT, Theme, bars, class_bars, curves, model_color, recall_curve, similarity, sorted_classes
from eval.results import SUBJECTS, Entry, ModelRecord, Results, TaskRecord, csv_rows, file_name, load_answers, load_results

SHOWN_METRICS = {
    "classification": {"acc@1": "top-1 accuracy", "acc@5": "top-5 accuracy", "mean_per_class": "mean per class"},
    "retrieval": {
        f"{direction}_{metric}": f"{name} {label}"
        for direction, name in (("t2i", "text to image"), ("i2t", "image to text"))
        for metric, label in (("r@1", "R@1"), ("r@5", "R@5"), ("r@10", "R@10"), ("median_rank", "median rank"))
    },
    "generation": {  # the main one of a task is the first that it has; metrics of other benchmarks come after these
        "accuracy": "accuracy",
        "exact_match": "exact match",
        "cider": "CIDEr-D",
        "rouge_l": "ROUGE-L",
        "f1": "F1 of yes",
        "precision": "precision of yes",
        "recall": "recall of yes",
        "yes_ratio": "answers that are yes",
        "accuracy_exists": "accuracy, is it there",
        "accuracy_relation": "accuracy, is the relation true",
    },
}
BARS = {  # kind -> figures: (title, metric -> name below its bars)
    "classification": {"accuracy": {"acc@1": "top-1", "acc@5": "top-5", "mean_per_class": "mean per class"}},
    "retrieval": {
        "text to image": {f"t2i_r@{k}": f"R@{k}" for k in (1, 5, 10)},
        "image to text": {f"i2t_r@{k}": f"R@{k}" for k in (1, 5, 10)},
    },
    "generation": {
        "yes or no": {"accuracy": "accuracy", "f1": "F1", "precision": "precision", "recall": "recall", "yes_ratio": "says yes"},
        "caption": {"cider": "CIDEr-D", "rouge_l": "ROUGE-L"},
    },
}
HEADLINE = {"classification": ("acc@1", "top-1 accuracy"), "retrieval": ("t2i_r@1", "text to image R@1")}
POINTS = "(points)"  # ends the name of a metric that is no fraction and has its own scale
KIND_ORDER = ("trained", "mllm", "untrained", "mllm_random", "mllm_none", "majority", "chance")  # of columns
CURVES = (
    ("loss", {"loss": "loss"}),
    ("mean logits", {"positive_logit": "positive pairs", "negative_logit": "negative pairs"}),
    ("scale t", {"scale": "t"}),
    ("bias b", {"bias": "b"}),
    ("learning rate", {"lr": "learning rate"}),
)
VALIDATION = {f"val_{d}_r{k}": f"{name} R@{k}" for d, name in (("i2t", "image→text"), ("t2i", "text→image")) for k in (1, 5, 10)}
MOST_CLASSES = 24  # up to so many classes are all shown; of more, the best and worst 12


class Figures:
    """The figures of a page: light ones are written to `folder`, and all are kept as data URIs for the page."""

    def __init__(self, folder: Path, dark: bool) -> None:
        self.folder = folder
        self.themes = [LIGHT, *([DARK] if dark else [])]
        self.uris: dict[str, dict[str, str]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, draw: Any, *arguments: Any, **options: Any) -> None:
        """Draw a figure in every theme: `draw(*arguments, theme=theme, **options)` returns PNG bytes."""
        self.uris[name] = {"dark": ""}
        for theme in self.themes:
            png = draw(*arguments, theme=theme, **options)
            self.uris[name][theme.name] = _data_uri(png, "png")
            if theme is LIGHT:
                atomic_bytes(self.folder / f"{name}.png", png)


def write_report(
    results_folder: Path,
    output: Path,
    train_runs: Sequence[Path] = (),
    title: str = "What the encoder learned",
    dark: bool = True,
) -> Path:
    """Write report.html, figures/*.png and entries.csv into `output` and return the path of the page.

    `train_runs` are folders with metrics.jsonl; without any, those that the models lie in are used.
    """
    results = load_results(results_folder)
    results = replace(results, models=tuple(sorted(results.models, key=lambda model: KIND_ORDER.index(model.kind))))
    examples = {task.id: _examples(results_folder, task) for task in results.tasks}
    drawn = Figures(output / "figures", dark)
    training = _training(train_runs or found_runs(results), drawn)
    tables = [_table(results, task, drawn) for task in results.tasks]
    of_kind = {kind: [task for task in results.tasks if task.kind == kind] for kind in SHOWN_METRICS}
    if len(of_kind["generation"]) > 1:
        _overview(results, of_kind["generation"], drawn)
    context = {
        "title": title,
        "notes": list(dict.fromkeys(task.note for task in results.tasks if task.note)),
        "models": results.models,
        "lead": "; ".join(model.description for model in _subjects(results)),
        "tasks": results.tasks,
        "headlines": [line for task in results.tasks if (line := _headline(results, task))],
        "confidence": f"{100 * results.confidence:g}%",
        "tables": tables,
        "answers": _answers_table(results, of_kind["generation"]),
        "training": training,
        "retrieval": [_retrieval(results, task, examples[task.id], results_folder, drawn) for task in of_kind["retrieval"]],
        "classification": [_classification(results, task, examples[task.id], results_folder, drawn) for task in of_kind["classification"]],
        "generation": [_generation(results, task, examples[task.id]) for task in of_kind["generation"]],
        "thumbs": {task.id: _thumbs(results_folder, examples[task.id]) for task in results.tasks},
        "figures": drawn.uris,
        "command": results.command,
        "created": results.created,
        "seed": results.seed,
        "seconds": ", ".join(f"{name} {value:.0f} s" for name, value in results.seconds.items()),
        "versions": results.versions,
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(context)
    atomic_bytes(output / "report.html", page.encode("utf-8", "replace"))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(csv_rows(results))
    atomic_bytes(output / "entries.csv", text.getvalue().encode())
    return output / "report.html"


def found_runs(results: Results) -> list[Path]:
    """Return the folders with metrics.jsonl that the measured models lie in (the model's own folder or up to two above)."""
    runs: list[Path] = []
    for model in results.models:
        folder = Path(model.folder)
        if model.kind in SUBJECTS and model.folder:
            near = [place for place in (folder, *folder.parents[:2]) if (place / "metrics.jsonl").is_file()]
            runs += [place for place in near[:1] if place not in runs]
    return runs


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _examples(folder: Path, task: TaskRecord) -> dict[str, Any] | None:
    path = folder / "examples" / f"{file_name(task.id)}.json"
    return read_json(path) if path.is_file() else None


def _thumbs(folder: Path, examples: dict[str, Any] | None) -> dict[int, str]:
    paths = examples["thumbs"] if examples else {}
    return {int(image): _data_uri((folder / "examples" / path).read_bytes(), "jpeg") for image, path in paths.items()}


def shown_value(entry: Entry) -> tuple[str, str]:
    """Return value and interval as shown in tables: percents, or plain ranks and points; a constant has no interval."""
    factor = 1 if "rank" in entry.metric or entry.metric.endswith(POINTS) else 100
    low, high = f"{factor * entry.low:.1f}", f"{factor * entry.high:.1f}"
    return f"{factor * entry.value:.1f}", "" if entry.low == entry.high == entry.value else f"{low} – {high}"


def shown_metrics(results: Results, task: TaskRecord) -> dict[str, str]:
    """Return the metrics that were measured on a task, in the order of the table, with the names shown: the main one first."""
    found = dict.fromkeys(entry.metric for entry in results.entries if entry.task == task.id)
    known = {metric: label for metric, label in SHOWN_METRICS[task.kind].items() if metric in found}
    return known | {metric: metric for metric in found if task.kind == "generation" and metric not in known}


def _subjects(results: Results) -> list[ModelRecord]:
    return [model for model in results.models if model.kind in SUBJECTS]


def _before(results: Results, task: TaskRecord, metric: str) -> Entry | None:
    """Return what the headline is compared with: the best of the baselines."""
    others = [model.name for model in results.models if model.kind not in SUBJECTS]
    found = [entry for name in others if (entry := results.value(task.id, metric, name))]
    return max(found, key=lambda entry: entry.value) if found else None


def _headline(results: Results, task: TaskRecord) -> dict[str, str] | None:
    metric, label = HEADLINE.get(task.kind) or next(iter(shown_metrics(results, task).items()))
    entry = next((e for model in _subjects(results) if (e := results.value(task.id, metric, model.name))), None)
    if entry is None:
        return None
    unit = "" if metric.endswith(POINTS) else "%"
    before = _before(results, task, metric)
    value, interval = shown_value(entry)
    detail = f"{interval.replace(' – ', ' to ')} ({100 * results.confidence:g}%), n = {entry.n}"
    if before:
        detail += f"; best baseline: {before.model}"
    return {
        "task": task.id, "metric": label, "value": f"{value}{unit}",
        "before": f"{shown_value(before)[0]}{unit}" if before else "", "detail": detail,
    }  # fmt: skip


def _table(results: Results, task: TaskRecord, drawn: Figures) -> dict[str, Any]:
    entries = [entry for entry in results.entries if entry.task == task.id]
    models = [model for model in results.models if any(entry.model == model.name for entry in entries)]
    slug = file_name(task.id)
    names = []
    for title, known in BARS[task.kind].items():
        labels = {metric: name for metric, name in known.items() if any(entry.metric == metric for entry in entries)}
        if len(labels) > (1 if task.kind == "generation" else 0):
            names.append(f"bars-{slug}-{file_name(title)}")
            shown = [entry for entry in entries if entry.metric in labels]
            drawn.add(names[-1], bars, f"{task.id}: {title}", shown, labels, results.models)
    detail = {
        "classification": f"{task.images} images, {task.targets} classes, prompts {task.prompts}",
        "retrieval": f"{task.images} images, {task.targets} captions",
        "generation": f"{task.targets} questions" + (f", each with “{task.prompts}”" if task.prompts else ""),
    }[task.kind]
    return {"task": task, "slug": slug, "models": models, "rows": _rows(results, task, models), "bars": names, "detail": detail}


def _rows(results: Results, task: TaskRecord, models: Sequence[ModelRecord]) -> list[dict[str, Any]]:
    rows = []
    for metric, label in shown_metrics(results, task).items():
        cells = []
        for model in models:
            entry = results.value(task.id, metric, model.name)
            value, interval = shown_value(entry) if entry else ("–", "")
            cells.append({"value": value, "interval": interval, "main": model.kind in SUBJECTS})
        rows.append({"label": label, "cells": cells})
    return rows


def _answers_table(results: Results, tasks: Sequence[TaskRecord]) -> dict[str, Any] | None:
    """Return one table of all generation tasks: most have one metric only."""
    measured = {entry.model for entry in results.entries if entry.task in {task.id for task in tasks}}
    models = [model for model in results.models if model.name in measured]
    parts = [{"task": task, "rows": _rows(results, task, models)} for task in tasks]
    return {"models": models, "parts": parts} if parts else None


def _overview(results: Results, tasks: Sequence[TaskRecord], drawn: Figures) -> None:
    """Draw the main metric of every generation task side by side; a metric on a scale of its own is left out."""
    main = {task.id: next(iter(shown_metrics(results, task).items())) for task in tasks}
    entries = [
        replace(entry, metric=entry.task)
        for entry in results.entries
        if entry.task in main and entry.metric == main[entry.task][0] and not entry.metric.endswith(POINTS)
    ]
    labels = {task: f"{task.replace('_', ' ')}\n{main[task][1]}" for task in dict.fromkeys(entry.metric for entry in entries)}
    if labels:
        drawn.add("bars-generation", bars, "generated answers", entries, labels, results.models)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # the run is being written, or was cut short: what came before stands
    return rows


def _training(runs: Sequence[Path], drawn: Figures) -> list[dict[str, Any]]:
    shown = []
    for number, run in enumerate(runs):
        rows = _read_metrics(run / "metrics.jsonl")
        slug = f"training-{number}" if len(runs) > 1 else "training"
        names = []
        for title, columns in (CURVES[0], ("validation recall", VALIDATION), *CURVES[1:]):
            lines = {}
            for column, label in columns.items():
                points = [(row["step"], row[column]) for row in rows if column in row and "step" in row]
                if points:
                    steps, values = zip(*points, strict=True)
                    lines[label] = (steps, values)
            if lines:
                names.append(f"{slug}-{file_name(title.replace(' ', '-'))}")
                drawn.add(names[-1], curves, title, lines, percent=title == "validation recall")
        if names:
            shown.append({"name": str(run), "figures": names})
    return shown


def _answer(example: Mapping[str, Any], results: Results) -> dict[str, Any] | None:
    """Return an example with the first trained model's `answer` and, if there is one, the rank the untrained one gave."""
    by_model = example["answers"]
    main = next((model.name for model in _subjects(results) if model.name in by_model), None)
    if main is None:
        return None
    other = next((model.name for model in results.models if model.kind == "untrained" and model.name in by_model), None)
    answer = {**by_model[main], "top": by_model[main]["top"][:5]}
    missed = not any(one["right"] for one in answer["top"])
    before = {"name": other, "rank": by_model[other]["rank"]} if other else None
    return {**example, "answer": answer, "missed": missed, "other": before}


def _retrieval(results: Results, task: TaskRecord, examples: dict[str, Any] | None, folder: Path, drawn: Figures) -> dict[str, Any]:
    slug = file_name(task.id)
    for direction, title, targets in (("t2i", "text to image", task.images), ("i2t", "image to text", task.targets)):
        ranks = {}
        for model in results.models:
            if model.kind in ("trained", "untrained") and results.value(task.id, f"{direction}_r@1", model.name):
                answers = load_answers(folder, task.id, model.name)
                ranks[model.name] = answers.filter(np.array(answers["direction"]) == direction)["rank"].to_numpy()
        if ranks:
            drawn.add(f"recall-{slug}-{direction}", recall_curve, f"{task.id}: {title}", ranks, targets, results.models)
    shown: dict[str, Any] = {"id": task.id, "slug": slug, "seed": results.seed, "t2i": [], "i2t": []}
    if examples:
        matrix = examples["matrix"]
        thumbs = [folder / "examples" / examples["thumbs"][str(image)] for image in matrix["images"]]
        known = [model for model in results.models if model.name in matrix["scores"]]
        ordered = sorted(known, key=lambda model: model.kind == "trained")  # before, then after
        scores = {model.name: matrix["scores"][model.name] for model in ordered[-3:]}
        if scores and thumbs:
            drawn.add(f"similarity-{slug}", similarity, matrix["captions"], thumbs, scores)
        for direction in ("t2i", "i2t"):
            shown[direction] = [example for one in examples[direction] if (example := _answer(one, results))]
    return shown


def _classification(results: Results, task: TaskRecord, examples: dict[str, Any] | None, folder: Path, drawn: Figures) -> dict[str, Any]:
    slug = file_name(task.id)
    accuracy = {
        model.name: _class_accuracies(folder, task, model)
        for model in results.models
        if model.kind in ("trained", "untrained") and results.value(task.id, "acc@1", model.name)
    }
    main = next((model for model in _subjects(results) if model.name in accuracy), None)
    if main:
        untrained = [model.name for model in results.models if model.kind == "untrained" and model.name in accuracy]
        before = accuracy[untrained[0]] if untrained else {}
        ordered = sorted(accuracy[main.name].values(), key=lambda row: (-row[2], row[0]))
        half = MOST_CLASSES // 2
        if len(ordered) > MOST_CLASSES:
            values = {name: [row[2] for row in rows.values()] for name, rows in accuracy.items()}
            drawn.add(f"classes-sorted-{slug}", sorted_classes, f"{task.id}: all {len(ordered)} classes", values, results.models)
        parts = {"all": ordered} if len(ordered) <= MOST_CLASSES else {"best": ordered[:half], "worst": ordered[-half:]}
        for part, rows in parts.items():
            title = f"{task.id}: accuracy by class" if part == "all" else f"{task.id}: {part} {half} of {len(ordered)} classes"
            dots = {name: value for name, _, value in before.values()}
            drawn.add(f"classes-{part}-{slug}", _draw_classes, title, rows, dots, main, results.models)
    items = [example for one in (examples["items"] if examples else []) if (example := _answer(one, results))]
    for item in items:
        item["answer"]["top"] = item["answer"]["top"][:3]
    return {"id": task.id, "slug": slug, "seed": results.seed, "classes": task.targets, "items": items}


def _generation(results: Results, task: TaskRecord, examples: dict[str, Any] | None) -> dict[str, Any]:
    items = []
    for one in examples["items"] if examples else []:
        said = [
            {"model": model.name, "main": model.kind in SUBJECTS, "text": given["text"], "score": given["score"]}
            for model in results.models
            if (given := one["answers"].get(model.name))
        ]
        if said:
            items.append({**one, "said": said})
    return {"id": task.id, "slug": file_name(task.id), "seed": results.seed, "items": items}


def _draw_classes(title: str, rows: Any, before: Any, model: ModelRecord, models: Sequence[ModelRecord], theme: Theme) -> bytes:
    return class_bars(title, rows, before, model_color(model, models, theme), theme)


def _class_accuracies(folder: Path, task: TaskRecord, model: ModelRecord) -> dict[int, tuple[str, int, float]]:
    """Return class number -> (name, images, accuracy) of the classes that have images."""
    answers = load_answers(folder, task.id, model.name)
    labels, correct = answers["label"].to_numpy(), answers["rank"].to_numpy() == 1
    names = answers["label_name"].combine_chunks().to_pylist()
    found = {}
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        found[int(label)] = (str(names[rows[0]]), len(rows), float(correct[rows].mean()))
    return found
