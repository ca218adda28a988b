"""Published numbers of other models, by exact task id and metric, for their own columns in the report; never in results.json."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from align.common.errors import DamagedError
from align.runtime.recipes_yaml import load_yaml, nearest
from eval.results.records import TaskRecord

Prompts = Literal["templates", "sentences", "none"]
PUBLISHED = Path(__file__).with_name("published_numbers.yaml")


@dataclass(frozen=True)
class Anchor:
    """Scores of one published model: `values` maps task id -> metric -> percent as printed; `more` moves it to a fold-out table."""

    name: str
    source: str
    protocol: str
    prompts: Prompts  # how its classes were worded
    values: dict[str, dict[str, float]]
    more: bool = False


@cache
def published_numbers(path: Path = PUBLISHED) -> tuple[Anchor, ...]:
    """Return the published numbers of a YAML file; DamagedError for an unknown or wrong field, or a number outside 0 to 100."""
    content = load_yaml(path)
    if not isinstance(content, list):
        raise DamagedError(f"{path}: expected a list of published models")
    anchors = tuple(_anchor(row, f"{path}: entry {at + 1}") for at, row in enumerate(content))
    if len({anchor.name for anchor in anchors}) < len(anchors):
        raise DamagedError(f"{path}: two entries have the same name")
    return anchors


def anchors_of(task: TaskRecord, metrics: Sequence[str]) -> list[Anchor]:
    """Return the published models that have any of `metrics` on exactly this task id. Those of the fold-out table come last."""
    found = [anchor for anchor in published_numbers() if set(anchor.values.get(task.id, ())) & set(metrics)]
    return sorted(found, key=lambda anchor: anchor.more)


def shown_anchor(anchor: Anchor, task: str, metric: str) -> str:
    """Return a published number as printed, with at least one decimal, or "" if there is none."""
    value = anchor.values.get(task, {}).get(metric)
    return "" if value is None else f"{value:.2f}"[:-1] if f"{value:.2f}".endswith("0") else f"{value:.2f}"


def prompts_note(anchor: Anchor, task: TaskRecord) -> str:
    """Return a warning if the published prompts are of another kind than those of `task`, else ""."""
    ours = "sentences" if task.prompts.startswith("sentences:") else "templates"
    if task.kind != "classification" or anchor.prompts in ("none", ours):
        return ""
    return f"other prompts: published with {_WORDED[anchor.prompts]}, ours with {_WORDED[ours]} ({task.prompts})"


_WORDED = {"templates": "templates", "sentences": "sentences written for each class"}


def _anchor(row: Any, where: str) -> Anchor:
    known = [field.name for field in fields(Anchor)]
    if not isinstance(row, dict) or not set(known[:5]) <= set(row) <= set(known):
        found = ", ".join(map(str, row)) if isinstance(row, dict) else repr(row)
        raise DamagedError(f"{where}: expected the fields {', '.join(known)} (the last may be left out), found {found}")
    texts = {name: row[name] for name in ("name", "source", "protocol", "prompts")}
    if not all(isinstance(text, str) and text for text in texts.values()) or not isinstance(row.get("more", False), bool):
        raise DamagedError(f"{where}: name, source, protocol and prompts should be text, more true or false")
    if row["prompts"] not in get_args(Prompts):
        raise DamagedError(f"{where}: unknown prompts {row['prompts']!r}; {nearest(row['prompts'], get_args(Prompts))}")
    values = row["values"]
    for task, metrics in values.items() if isinstance(values, dict) else [("values", values)]:
        percents = list(metrics.values()) if isinstance(metrics, dict) else [None]
        if not all(isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 100 for value in percents):
            raise DamagedError(f"{where}: {task} should map metrics to percentages, found {metrics!r}")
    return Anchor(**texts, values=values, more=row.get("more", False))
