"""The report's sections by kind of task, and the training curves: each function returns what the template shows and adds figures."""

import base64
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from align.common.errors import DamagedError
from align.common.files import atomic_bytes
from align.common.intervals import wilson_interval
from align.runtime.runs import JsonLines
from eval.page import figures
from eval.results.calibration import calibration
from eval.results.compare import class_counts
from eval.results.records import MODEL_KINDS, SUBJECTS, Entry, ModelRecord, Results, TaskRecord, file_name, load_answers

CURVES = (
    ("loss", {"loss": "loss"}),
    ("mean logits", {"positive_logit": "positive pairs", "negative_logit": "negative pairs"}),
    ("scale t", {"scale": "t"}),
    ("bias b", {"bias": "b"}),
    ("learning rate", {"lr": "learning rate"}),
)
VALIDATION = {f"val_{d}_r{k}": f"{name} R@{k}" for d, name in (("i2t", "image→text"), ("t2i", "text→image")) for k in (1, 5, 10)}
MOST_CLASSES = 24  # with more classes, only the best and the worst 12 are shown
ANSWERING = ("trained", "clip", "untrained")  # kinds with stored answers to every sample
ClassRows = dict[int, tuple[str, int, float]]  # class number -> name, images, accuracy or IoU


class Figures:
    """The figures of a page. Light ones are written to `folder`; all are kept as data URIs."""

    def __init__(self, folder: Path, dark: bool) -> None:
        self.folder = folder
        self.themes = [figures.LIGHT, *([figures.DARK] if dark else [])]
        self.uris: dict[str, dict[str, str]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, draw: Any, *arguments: Any, **options: Any) -> None:
        """Draw a figure in every theme: `draw(*arguments, theme=theme, **options)` returns PNG bytes."""
        self.uris[name] = {"dark": ""}
        for theme in self.themes:
            png = draw(*arguments, theme=theme, **options)
            self.uris[name][theme.name] = _data_uri(png, "png")
            if theme is figures.LIGHT:
                atomic_bytes(self.folder / f"{name}.png", png)


def subjects(results: Results, task: TaskRecord | None = None) -> list[ModelRecord]:
    """Return the models that the report is about, of `task` those that were measured on it.

    These are the trained ones and MLLMs. Where there is none, CLIP models, then whatever is no floor.
    """
    measured = {entry.model for entry in results.entries if task is None or entry.task == task.id}
    for kinds in (SUBJECTS, ("clip",), tuple(set(MODEL_KINDS) - {"majority", "chance"})):
        if found := [model for model in results.models if model.kind in kinds and model.name in measured]:
            return found
    return []


def twin_of(results: Results, model: ModelRecord) -> ModelRecord | None:
    """Return the same model with untrained heads, or None: what it was before."""
    names = ("untrained", f"{model.name} untrained")
    return next((other for other in results.models if other.kind == "untrained" and other.name in names), None)


def pictures(folder: Path, examples: Mapping[str, Any] | None) -> dict[int, str]:
    """Return the thumbnails of a task's examples as data URIs, by image number."""
    paths = examples["thumbs"] if examples else {}
    return {int(image): _picture(folder, path) for image, path in paths.items()}


def training(runs: Sequence[Path], drawn: Figures) -> list[dict[str, Any]]:
    """Return the training runs that have curves, with the names of their figures."""
    shown = []
    for number, run in enumerate(runs):
        rows = JsonLines(run / "metrics.jsonl").rows(stepped=True)
        slug = f"training-{number}" if len(runs) > 1 else "training"
        names = []
        for title, columns in (CURVES[0], ("validation recall", VALIDATION), *CURVES[1:]):
            lines = {}
            for column, label in columns.items():
                points = [(row["step"], row[column]) for row in rows if "step" in row and _is_number(row.get(column))]
                if points:
                    steps, values = zip(*points, strict=True)
                    lines[label] = (steps, values)
            if lines:
                names.append(f"{slug}-{file_name(title.replace(' ', '-'))}")
                drawn.add(names[-1], figures.curves, title, lines, percent=title == "validation recall")
        if names:
            shown.append({"name": str(run), "figures": names})
    return shown


def retrieval(results: Results, task: TaskRecord, examples: dict[str, Any] | None, folder: Path, drawn: Figures) -> dict[str, Any]:
    """Return the examples of a retrieval task in both directions; figures: recall at every k, matrix of cosines."""
    slug = file_name(task.id)
    for direction, title, targets in (("t2i", "text to image", task.images), ("i2t", "image to text", task.targets)):
        ranks = {
            model.name: answers.filter(np.array(answers["direction"]) == direction)["rank"].to_numpy()
            for model, answers in _answers(results, task, folder)
        }
        if ranks:
            drawn.add(f"recall-{slug}-{direction}", figures.recall_curve, f"{task.id}: {title}", ranks, targets, results.models)
    shown: dict[str, Any] = {"id": task.id, "slug": slug, "t2i": [], "i2t": []}
    if examples:
        matrix = examples["matrix"]
        thumbs = [folder / "examples" / examples["thumbs"][str(image)] for image in matrix["images"]]
        known = [model for model in results.models if model.name in matrix["scores"]]
        ordered = sorted(known, key=lambda model: ("untrained", "clip", "trained").index(model.kind))  # before, then after
        scores = {model.name: matrix["scores"][model.name] for model in ordered[-3:]}
        if scores and thumbs:
            drawn.add(f"similarity-{slug}", figures.similarity, matrix["captions"], thumbs, scores)
        for direction in ("t2i", "i2t"):
            shown[direction] = [example for one in examples[direction] if (example := _answered(one, results, task))]
    return shown


def classification(results: Results, task: TaskRecord, examples: dict[str, Any] | None, folder: Path, drawn: Figures) -> dict[str, Any]:
    """Return the examples of a classification task; figures: accuracy by class, gains by class, reliability of the confidence."""
    slug = file_name(task.id)
    accuracy, reliable = {}, {}
    for model, answers in _answers(results, task, folder):
        correct = answers["rank"].to_numpy() == 1
        accuracy[model.name] = _class_accuracies(answers, correct)
        sure = answers["confidence"].to_numpy() if "confidence" in answers.column_names else np.array([np.nan])
        if np.isfinite(sure).all():
            reliable[model.name] = calibration(sure, correct)
    gained = _by_class(results, task, accuracy, drawn, "accuracy")
    if reliable:
        drawn.add(f"reliability-{slug}", figures.reliability, f"{task.id}: is it as right as it is sure?", reliable, results.models)
    sure_rows = [
        {
            "model": name,
            "values": [f"{100 * value:.1f}" for value in (one.mean_confidence, one.mean_accuracy, one.error)],
            "main": name in {model.name for model in subjects(results, task)},
        }
        for name, one in reliable.items()
    ]
    items = [example for one in (examples["items"] if examples else []) if (example := _answered(one, results, task, 3))]
    return {"id": task.id, "slug": slug, "classes": task.targets, "items": items, "gains": gained, "calibration": sure_rows}


def compositional(results: Results, task: TaskRecord, examples: dict[str, Any] | None, folder: Path, drawn: Figures) -> dict[str, Any]:
    """Return the example pairs of a compositional task; figure: right pairs by category, if there are several."""
    slug = file_name(task.id)
    of_pairs = any((entry.task, entry.metric) == (task.id, "pair_accuracy") for entry in results.entries)
    column, label = ("image", "pairs") if of_pairs else ("group", "groups")
    entries, names = [], {}
    for model, answers in _answers(results, task, folder):
        categories, right = np.array(answers["category"].to_pylist()), np.array(answers[column])
        for category in sorted(set(categories.tolist()) - {""}):
            hits = right[categories == category]
            low, high = wilson_interval(int(hits.sum()), len(hits), results.confidence)
            entries.append(Entry(task.id, category, float(hits.mean()), low, high, len(hits), model.name))
            names[category] = f"{figures.plain(category, 16)}\n({len(hits)})"
    if len(names) > 1:
        drawn.add(f"categories-{slug}", figures.bars, f"{task.id}: right {label} by category", entries, names, results.models)
    items = []
    for one in examples["items"] if examples else []:
        said = [{"model": model, **given} for model in results.models if (given := one["answers"].get(model.name))]
        if said:
            main = next((given for given in said if given["model"] in subjects(results, task)), said[0])
            items.append({**one, "main": main, "said": said})
    parts = ("image",) if of_pairs else ("text", "image", "group")
    return {"id": task.id, "slug": slug, "items": items, "parts": parts, "many": len(names) > 4}


def segmentation(results: Results, task: TaskRecord, examples: dict[str, Any] | None, folder: Path, drawn: Figures) -> dict[str, Any]:
    """Return the example pictures of a segmentation task with truth and overlays; figures: IoU by class, gains by class."""
    overlap = {}
    for model, answers in _answers(results, task, folder):
        tp, fp, fn = class_counts(answers)
        names = json.loads((answers.schema.metadata or {}).get(b"classes", b"[]")) or [f"class {c}" for c in range(tp.shape[1])]
        union, pictured = (tp + fp + fn).sum(axis=0), ((tp + fn) > 0).sum(axis=0)
        overlap[model.name] = {
            int(c): (str(names[c]), int(pictured[c]), float(tp[:, c].sum() / union[c])) for c in np.flatnonzero(pictured)
        }
    gained = _by_class(results, task, overlap, drawn, "IoU")
    items = []
    for one in examples["items"] if examples else []:
        said = [
            {"model": model.name, "overlay": _picture(folder, given["overlay"]), "right": f"{100 * given['pixel_accuracy']:.0f}%"}
            for model in results.models
            if (given := one["answers"].get(model.name))
        ]
        legend = [{"name": part["name"], "color": _color(part["color"])} for part in one["classes"]]
        items.append({"image": one["image"], "classes": legend, "truth": _picture(folder, one["truth"]), "said": said})
    return {"id": task.id, "slug": file_name(task.id), "items": items, "gains": gained}


BY_KIND = {"retrieval": retrieval, "classification": classification, "compositional": compositional, "segmentation": segmentation}


def generation(results: Results, task: TaskRecord, examples: dict[str, Any] | None) -> dict[str, Any]:
    """Return the questions of a task with what each model answered."""
    items = []
    for one in examples["items"] if examples else []:
        said = [
            {"model": model.name, "main": model in subjects(results, task), "text": given["text"], "score": given["score"]}
            for model in results.models
            if (given := one["answers"].get(model.name))
        ]
        if said:
            items.append({**one, "said": said})
    return {"id": task.id, "slug": file_name(task.id), "items": items}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _picture(folder: Path, path: str) -> str:
    try:
        return _data_uri((folder / "examples" / path).read_bytes(), "jpeg")
    except OSError as error:
        raise DamagedError(f"{folder / 'examples'} lacks a picture of the examples ({error}); measure again") from error


def _color(given: str) -> str:
    """Return a color that is safe inside a style attribute."""
    return given if re.fullmatch(r"#[0-9a-fA-F]{6}", given) else "#808080"


def _answers(results: Results, task: TaskRecord, folder: Path) -> Iterator[tuple[ModelRecord, pa.Table]]:
    """Yield each model with stored answers to a task, and the answers."""
    measured = {entry.model for entry in results.entries if entry.task == task.id}
    for model in results.models:
        if model.kind in ANSWERING and model.name in measured:
            yield model, load_answers(folder, task.id, model.name)


def _answered(example: Mapping[str, Any], results: Results, task: TaskRecord, count: int = 5) -> dict[str, Any] | None:
    """Return an example with the first `count` `answers` of each model that the report is about, and the ranks by all other models."""
    by_model, shown = example["answers"], subjects(results, task)
    answers = []
    for model in shown:
        if given := by_model.get(model.name):
            top = given["top"][:count]
            answers.append({**given, "model": model.name, "top": top, "missed": not any(one["right"] for one in top)})
    others = [{"name": m.name, "rank": by_model[m.name]["rank"]} for m in results.models if m not in shown and m.name in by_model]
    return {**example, "answers": answers, "others": others} if answers else None


def _by_class(results: Results, task: TaskRecord, scores: Mapping[str, ClassRows], drawn: Figures, what: str) -> list[str]:
    """Draw the first trained model's best and worst classes, and its gains over its untrained twin and CLIP; return the gains' figures."""
    slug, models, about = file_name(task.id), results.models, subjects(results, task)
    main = next((model for model in about if model.name in scores), None)
    if main is None:
        return []
    compared = [m for m in models if m != main and (m.kind == "clip" or m == twin_of(results, main))]
    others = sorted((m for m in compared if m.name in scores), key=lambda m: m.kind == "clip")
    before = scores[others[0].name] if others else {}
    ordered = sorted(scores[main.name].values(), key=lambda row: (-row[2], row[0]))
    half = MOST_CLASSES // 2
    if len(ordered) > MOST_CLASSES:
        values = {name: [row[2] for row in rows.values()] for name, rows in scores.items()}
        drawn.add(f"classes-sorted-{slug}", figures.sorted_classes, f"{task.id}: {what}, all {len(ordered)} classes", values, models)
    parts = {"all": ordered} if len(ordered) <= MOST_CLASSES else {"best": ordered[:half], "worst": ordered[-half:]}
    dots = {name: value for name, _, value in before.values()}
    of = f"{task.id}, {main.name}" if len(about) > 1 else task.id
    for part, rows in parts.items():
        title = f"{of}: {what} by class" if part == "all" else f"{of}: {part} {half} of {len(ordered)} classes"
        name = others[0].name if others else ""
        drawn.add(f"classes-{part}-{slug}", figures.class_bars, title, rows, dots, main, models, before_name=name)
    gained = []
    for other in others:
        mine, theirs = scores[main.name], scores[other.name]
        gains = sorted(((name, n, value - theirs[c][2]) for c, (name, n, value) in mine.items()), key=lambda row: (-row[2], row[0]))
        shown = gains if len(gains) <= MOST_CLASSES else [*gains[:half], None, *gains[-half:]]
        gained.append(f"gains-{slug}-{file_name(other.name)}")
        drawn.add(gained[-1], figures.class_gains, f"{what} by class: {main.name} minus {other.name}", shown)
    return gained


def _class_accuracies(answers: pa.Table, correct: np.ndarray) -> ClassRows:
    """Return class number -> (name, images, accuracy) of the classes that have images."""
    labels = answers["label"].to_numpy()
    names = answers["label_name"].combine_chunks().to_pylist()
    found = {}
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        found[int(label)] = (str(names[rows[0]]), len(rows), float(correct[rows].mean()))
    return found
