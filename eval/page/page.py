"""One HTML page from results on disk: self-contained, offline, readable on a phone and on paper. Text from data is escaped."""

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2

from align.common.files import atomic_bytes
from eval.page import figures, sections
from eval.results.anchors import Anchor, anchors_of, prompts_note, shown_anchor
from eval.results.compare import Comparison, load_comparison, verdict
from eval.results.examples import load_examples
from eval.results.records import SUBJECTS, TASK_KINDS, ModelRecord, Results, TaskRecord, csv_rows, file_name, load_results
from eval.results.tables import POINTS, shown_metrics, shown_value

BARS = {  # kind -> figures: (title, metric -> name below its bars)
    "classification": {"accuracy": {"acc@1": "top-1", "acc@5": "top-5", "mean_per_class": "mean per class"}},
    "retrieval": {
        "text to image": {f"t2i_r@{k}": f"R@{k}" for k in (1, 5, 10)},
        "image to text": {f"i2t_r@{k}": f"R@{k}" for k in (1, 5, 10)},
    },
    "compositional": {
        "which belongs to which": {"text_score": "text", "image_score": "image", "group_score": "group", "pair_accuracy": "right pairs"}
    },
    "segmentation": {"segmentation": {"miou": "mean IoU", "pixel_accuracy": "right pixels", "mean_class_accuracy": "mean per class"}},
    "generation": {
        "yes or no": {"accuracy": "accuracy", "f1": "F1", "precision": "precision", "recall": "recall", "yes_ratio": "says yes"},
        "caption": {"cider": "CIDEr-D", "rouge_l": "ROUGE-L"},
    },
}
HEADLINE = {  # the first that was measured; generation tasks use the first that is shown
    "classification": ("acc@1",),
    "retrieval": ("t2i_r@1",),
    "compositional": ("group_score", "pair_accuracy"),
    "segmentation": ("miou",),
}
KIND_ORDER = ("trained", "mllm", "clip", "untrained", "mllm_random", "mllm_none", "majority", "chance")  # of columns
OF_SECTION = ("classes-", "gains-", "reliability-", "similarity-", "categories-")  # figures of a task's own section
MOST_COLUMNS = 8  # of a table, beside what the rows are called
SECTIONS = {  # kind -> heading of a task's own section
    "retrieval": "What it sees",
    "classification": "What it names",
    "compositional": "What it tells apart",
    "segmentation": "What it outlines",
    "generation": "What it answers",
}


def write_report(
    results_folder: Path, output: Path, train_runs: Sequence[Path] = (), title: str = "What the encoder learned", dark: bool = True
) -> Path:
    """Write report.html, figures/*.png and entries.csv to `output`; return the page's path. `train_runs`: default `found_runs`."""
    results = load_results(results_folder)
    results = replace(
        results,
        models=tuple(sorted(results.models, key=lambda model: KIND_ORDER.index(model.kind))),
        tasks=tuple(sorted(results.tasks, key=lambda task: TASK_KINDS.index(task.kind))),
    )
    examples = {task.id: load_examples(results_folder, task.id) for task in results.tasks}
    drawn = sections.Figures(output / "figures", dark)
    tables = [_table(results, task, drawn) for task in results.tasks]
    generated = [task for task in results.tasks if task.kind == "generation"]
    if len(generated) > 1:
        _overview(results, generated, drawn)
    comparison = load_comparison(results_folder)
    context = {
        "title": title,
        "notes": _notes(results),
        "models": results.models,
        "lead": [(model.name, model.description) for model in sections.subjects(results)],
        "tasks": results.tasks,
        "headlines": [line for task in results.tasks if (line := _headline(results, task))],
        "confidence": f"{100 * results.confidence:g}%",
        "tables": tables,
        "answers": _answers_table(results, generated),
        "clip": _named_clip(results),
        "published": any(table["anchors"] or table["more"] for table in tables),
        "comparison": _compared(comparison, drawn) if comparison and results.created in comparison.created else None,
        "training": sections.training(train_runs or found_runs(results), drawn),
        **_sections(results, examples, results_folder, drawn),
        "sections": SECTIONS,
        "logits": any("mean-logits" in name for name in drawn.uris),
        "bars": any(name.startswith(("bars-", "recall-")) for name in drawn.uris),
        "thumbs": {task.id: sections.pictures(results_folder, examples[task.id]) for task in results.tasks},
        "figures": drawn.uris,
        "command": results.command,
        "created": results.created,
        "seed": results.seed,
        "seconds": ", ".join(f"{name} {value:.0f} s" for name, value in results.seconds.items()),
        "versions": results.versions,
    }
    atomic_bytes(output / "report.html", _rendered("report.html.j2", context))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(csv_rows(results))
    atomic_bytes(output / "entries.csv", text.getvalue().encode())
    return output / "report.html"


def _sections(
    results: Results, examples: dict[str, dict[str, Any] | None], folder: Path, drawn: sections.Figures
) -> dict[str, list[dict[str, Any]]]:
    shown: dict[str, list[dict[str, Any]]] = {kind: [] for kind in TASK_KINDS}
    for task in results.tasks:
        if task.kind == "generation":
            part = sections.generation(results, task, examples[task.id])
        else:
            before = set(drawn.uris)
            part = sections.BY_KIND[task.kind](results, task, examples[task.id], folder, drawn)
            part["drawn"] = any(name.startswith(OF_SECTION) for name in set(drawn.uris) - before)
        if part.get("drawn") or any(part.get(name) for name in ("items", "t2i", "i2t", "calibration")):
            shown[task.kind].append(part)
    return shown


def write_comparison(comparison: Comparison, output: Path, dark: bool = True) -> Path:
    """Write comparison.html and figures/comparison.png into `output` and return the path of the page."""
    drawn = sections.Figures(output / "figures", dark)
    context = {"comparison": _compared(comparison, drawn), "figures": drawn.uris}
    atomic_bytes(output / "comparison.html", _rendered("comparison.html.j2", context))
    return output / "comparison.html"


def _rendered(template: str, context: dict[str, Any]) -> bytes:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(context).encode("utf-8", "replace")


def found_runs(results: Results) -> list[Path]:
    """Return the folders with metrics.jsonl at the measured models' folders, or up to two levels above."""
    runs: list[Path] = []
    for model in results.models:
        folder = Path(model.folder)
        if model.kind in SUBJECTS and model.folder:
            near = [place for place in (folder, *folder.parents[:2]) if (place / "metrics.jsonl").is_file()]
            runs += [place for place in near[:1] if place not in runs]
    return runs


def _named_clip(results: Results) -> str:
    """Return a sentence that names the CLIP columns, or "" without any."""
    names = [model.name for model in results.models if model.kind == "clip"]
    verb = "are" if len(names) > 1 else "is"
    return f"{', '.join(names)} {verb} trained on image-caption pairs from scratch, to compare with" if names else ""


def _headline(results: Results, task: TaskRecord) -> dict[str, Any] | None:
    """Return the card of a task: its main metric of each model that the report is about, beside what the others reach."""
    metrics, about = shown_metrics(results, task), sections.subjects(results, task)
    metric = next((name for name in HEADLINE.get(task.kind, ()) if name in metrics), next(iter(metrics), ""))
    found = {model.name: entry for model in results.models if (entry := results.value(task.id, metric, model.name))}
    unit = "" if metric.endswith(POINTS) else "%"
    shown = {name: f"{shown_value(entry)[0]}{unit}" for name, entry in found.items()}
    numbers, before = [], set()
    for model in about:
        if model.name in found:
            twin = sections.twin_of(results, model)
            before |= {twin.name} if twin else set()
            detail = f"{shown_value(found[model.name])[1].replace(' – ', ' to ') or 'constant'}, n = {found[model.name].n}"
            was = shown.get(twin.name, "") if twin and twin != model else ""
            numbers.append({"name": model.name, "value": shown[model.name], "before": was, "detail": detail})
    others = [model for model in results.models if model.name in shown and model not in about and model.name not in before]
    against = [{"name": model.name, "value": shown[model.name], "clip": model.kind == "clip"} for model in others]
    card = {"task": task.id, "slug": file_name(task.id), "metric": metrics.get(metric), "numbers": numbers, "against": against}
    return card if numbers else None


def _table(results: Results, task: TaskRecord, drawn: sections.Figures) -> dict[str, Any]:
    entries = [entry for entry in results.entries if entry.task == task.id]
    models = [model for model in results.models if any(entry.model == model.name for entry in entries)]
    slug = file_name(task.id)
    names = []
    for title, known in BARS[task.kind].items():
        labels = {metric: name for metric, name in known.items() if any(entry.metric == metric for entry in entries)}
        if len(labels) > (1 if task.kind == "generation" else 0):
            names.append(f"bars-{slug}-{file_name(title)}")
            shown = [entry for entry in entries if entry.metric in labels]
            drawn.add(names[-1], figures.bars, f"{task.id}: {title}", shown, labels, results.models)
    detail = {
        "classification": f"{task.images} images, {task.targets} classes, prompts {task.prompts}",
        "retrieval": f"{task.images} images, {task.targets} captions",
        "compositional": f"{task.images} images, {task.targets} captions, in pairs that differ in little",
        "segmentation": f"{task.images} images, {task.targets} classes, prompts {task.prompts}",
        "generation": f"{task.targets} questions" + (f", each with “{task.prompts}”" if task.prompts else ""),
    }[task.kind]
    anchors = anchors_of(task, list(shown_metrics(results, task)))
    columns = [_column(anchor, prompts_note(anchor, task)) for anchor in anchors]
    return {
        "task": task, "slug": slug, "rows": (rows := _rows(results, task, models, anchors)), "bars": names, "detail": detail,
        "anchors": (told := [column for column in columns if not column["more"]]),
        "more": [column for column in columns if column["more"]], "blocks": _blocks(models, told, [(None, row) for row in rows]),
    }  # fmt: skip


def _blocks(models: Sequence[ModelRecord], anchors: Sequence[dict[str, Any]], rows: Sequence[tuple[Any, Any]]) -> list[dict[str, Any]]:
    """Return a table of (head, row) `rows` cut into tables of at most `MOST_COLUMNS` columns, so that none is wider than the page."""
    width = len(models) + len(anchors)
    count = max(1, -(-width // MOST_COLUMNS))
    edges = [round(width * part / count) for part in range(count + 1)]
    blocks = []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        own, told = slice(start, min(stop, len(models))), slice(max(0, start - len(models)), max(0, stop - len(models)))
        kept = [(head, {**row, "cells": row["cells"][own], "published": row["published"][told]}) for head, row in rows]
        blocks.append({"models": models[own], "anchors": anchors[told], "rows": kept})
    return blocks


def _notes(results: Results) -> list[str]:
    """Return each note once, with the ids of its tasks unless all tasks have it."""
    of_note: dict[str, list[str]] = {}
    for task in results.tasks:
        if task.note:
            of_note.setdefault(task.note, []).append(task.id)
    return [note if len(ids) == len(results.tasks) else f"{', '.join(ids)}: {note}" for note, ids in of_note.items()]


def _column(anchor: Anchor, note: str) -> dict[str, Any]:
    told = f"{anchor.source}; {anchor.protocol}{f'; {note}' if note else ''}"
    return {"name": anchor.name, "told": told, "more": anchor.more, "other_prompts": bool(note)}


def _rows(results: Results, task: TaskRecord, models: Sequence[ModelRecord], anchors: Sequence[Anchor]) -> list[dict[str, Any]]:
    """Return a row per metric: our cells, and separately the published numbers in the order of `anchors`."""
    rows, about = [], sections.subjects(results, task)
    for metric, label in shown_metrics(results, task).items():
        cells = []
        for model in models:
            entry = results.value(task.id, metric, model.name)
            value, interval = shown_value(entry) if entry else ("–", "")
            cells.append({"value": value, "interval": interval, "main": model in about})
        told: dict[bool, list[str]] = {False: [], True: []}
        for anchor in anchors:
            told[anchor.more].append(shown_anchor(anchor, task.id, metric))
        rows.append({"label": label, "cells": cells, "published": told[False], "more": told[True]})
    return rows


def _answers_table(results: Results, tasks: Sequence[TaskRecord]) -> dict[str, Any] | None:
    """Return one table of all generation tasks, because most have only one metric."""
    measured = {entry.model for entry in results.entries if entry.task in {task.id for task in tasks}}
    models = [model for model in results.models if model.name in measured]
    known = {anchor.name: anchor for task in tasks for anchor in anchors_of(task, list(shown_metrics(results, task)))}
    anchors = list(known.values())
    rows: list[tuple[TaskRecord | None, dict[str, Any]]] = []
    for task in tasks:
        rows += [(None if at else task, row) for at, row in enumerate(_rows(results, task, models, anchors))]
    columns = [_column(anchor, "") for anchor in anchors]
    return {"anchors": columns, "blocks": _blocks(models, columns, rows)} if rows else None


def _overview(results: Results, tasks: Sequence[TaskRecord], drawn: sections.Figures) -> None:
    """Draw the main metric of all generation tasks side by side, except metrics with their own scale."""
    main = {task.id: next(iter(shown_metrics(results, task).items())) for task in tasks}
    entries = [
        replace(entry, metric=entry.task)
        for entry in results.entries
        if entry.task in main and entry.metric == main[entry.task][0] and not entry.metric.endswith(POINTS)
    ]
    labels = {task: f"{task.replace('_', ' ')}\n{main[task][1]}" for task in dict.fromkeys(entry.metric for entry in entries)}
    if labels:
        drawn.add("bars-generation", figures.bars, "generated answers", entries, labels, results.models)


def _compared(comparison: Comparison, drawn: sections.Figures) -> dict[str, Any]:
    """Return the rows of a comparison and draw its differences. Ranks are only in the rows, because they have another scale."""
    points = [one for one in comparison.differences if one.unit == "points"]
    if points:
        rows = [(f"{one.task} {one.metric}", one.difference, one.low, one.high, comparison.shown(one)) for one in points]
        drawn.add("comparison", figures.forest, rows)
    rows_shown = []
    for one in comparison.differences:
        factor = 1 if one.unit == "ranks" else 100
        shown = comparison.shown(one)
        values = [f"{factor * value:.1f}" for value in (one.a, one.b)]
        samples = f"{one.n}" if one.clusters == one.n else f"{one.n}, of {one.clusters} images"
        rows_shown.append({"one": one, "values": values, "shown": shown, "samples": samples, "verdict": verdict(one, shown)})
    return {
        "a": comparison.a, "b": comparison.b, "rows": rows_shown, "skipped": comparison.skipped, "created": comparison.created,
        "seed": comparison.seed, "confidence": f"{100 * comparison.confidence:g}%",
    }  # fmt: skip
