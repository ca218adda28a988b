"""Figures of the report: data in, PNG bytes out, in a light and a dark theme. Labels from data are drawn as plain text."""

import textwrap
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from align.common.charts import GRID, INK, MUTED, SERIES, new_figure, png, style_axes
from eval.results.calibration import Calibration
from eval.results.records import SUBJECTS, Entry, ModelRecord

LEAST_RANGE = 0.25  # of the y axis of a curve, divided by its largest value


@dataclass(frozen=True)
class Theme:
    """Colors of a figure: `series` for the models that the report is about, `baselines` for the others, by kind. Both are cycled."""

    name: str
    background: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]
    baselines: Mapping[str, tuple[str, ...]]
    heat: str


LIGHT = Theme(
    "light", "#ffffff", INK, MUTED, GRID, SERIES[:4],
    {
        "clip": ("#b4467c", "#d48bae", "#7d2c56"), "untrained": ("#98a2b3", "#b9c1cd"), "majority": ("#d8b365",),
        "chance": ("#d0d5dd",), "mllm_random": ("#98a2b3", "#b9c1cd"), "mllm_none": ("#7f9c9c",),
    }, "Blues",
)  # fmt: skip
DARK = Theme(
    "dark", "#171c24", "#e6e9ef", "#98a2b3", "#2c3440", ("#6ea8e8", "#e8965f", "#66c08f", "#b792dd"),
    {
        "clip": ("#e286b3", "#b45a86", "#f2b8d4"), "untrained": ("#7b8494", "#5b6472"), "majority": ("#b08f45",),
        "chance": ("#4b5563",), "mllm_random": ("#7b8494", "#5b6472"), "mllm_none": ("#5d7a7a",),
    }, "cividis",
)  # fmt: skip
THEMES = {theme.name: theme for theme in (LIGHT, DARK)}


def plain(text: str, width: int = 0, lines: int = 3) -> str:
    """Return `text` without control characters and lone surrogates, wrapped to `width` characters unless that is 0."""
    clean = "".join(" " if unicodedata.category(c)[0] == "C" else c for c in text.encode("utf-8", "replace").decode())
    if not width:
        return clean
    return "\n".join(textwrap.wrap(clean, width, max_lines=lines, placeholder=" ...") or [""])


def _chart(theme: Theme, title: str = "", x_label: str = "", width: float = 4.6, height: float = 3.3) -> tuple[Figure, Axes]:
    figure = new_figure(width, height, theme.background)
    axes = figure.add_subplot(facecolor=theme.background)
    style_axes(axes, "\n".join(map(plain, title.splitlines())), ink=theme.ink, muted=theme.muted, grid=theme.grid)
    axes.set_xlabel(x_label, fontsize=8.5, color=theme.muted)
    return figure, axes


def _model_lines(values: Mapping[str, Any], models: Sequence[ModelRecord], theme: Theme) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield each model's value with the color and the label of its line."""
    by_name = {model.name: model for model in models}
    for name, value in values.items():
        yield value, {"color": model_color(by_name[name], models, theme), "label": plain(name)}


def _percent(axes: Axes, axis: str = "y") -> None:
    (axes.yaxis if axis == "y" else axes.xaxis).set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))


def _legend(axes: Axes, theme: Theme, **options: Any) -> None:
    axes.legend(frameon=False, fontsize=8.5, labelcolor=theme.ink, handlelength=1.6, **options)


def model_color(model: ModelRecord, models: Sequence[ModelRecord], theme: Theme) -> str:
    """Return the color of `model` in every figure of the report."""
    colors = theme.series if model.kind in SUBJECTS else theme.baselines[model.kind]
    alike = [other.name for other in models if other.kind == model.kind]
    return colors[alike.index(model.name) % len(colors)]


def curves(title: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], theme: Theme, percent: bool = False) -> bytes:
    """Return a small line chart. `lines` maps a label to (steps, values). With six lines or more, the second half is dashed."""
    figure, axes = _chart(theme, title, "step", 4.0, 3.0)
    many = len(lines) > 5
    for number, (label, (steps, values)) in enumerate(lines.items()):
        color = theme.series[number % (3 if many else len(theme.series))]
        style = "--" if many and number >= len(lines) / 2 else "-"
        mark = "o" if len(steps) < 25 and (len(lines) > 1 or len(steps) == 1) else None
        axes.plot(steps, values, color=color, linewidth=1.7, linestyle=style, marker=mark, markersize=2.5, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    reached = np.concatenate([np.asarray(values, dtype=float) for _, values in lines.values()])
    least = LEAST_RANGE * float(np.abs(reached).max())  # a value that hardly moves is drawn as a flat line
    if np.ptp(reached) < least:
        middle = (reached.max() + reached.min()) / 2
        axes.set_ylim(middle - least / 2, middle + least / 2)
    if percent:
        axes.set_ylim(0, 1)
        _percent(axes)
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if len(lines) > 1:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 2} if len(lines) > 4 else {}
        _legend(axes, theme, **below)
    return png(figure)


def bars(title: str, entries: Sequence[Entry], labels: Mapping[str, str], models: Sequence[ModelRecord], theme: Theme) -> bytes:
    """Return grouped bars with intervals: one group per metric of `labels` (metric -> shown name), one bar per model."""
    shown = [model for model in models if any(entry.model == model.name for entry in entries)]
    longest = max(len(line) for label in labels.values() for line in label.splitlines())
    figure, axes = _chart(theme, title, width=max(4.6, 0.32 * len(labels) * len(shown), 0.085 * longest * len(labels)))
    width = 0.8 / len(shown)
    for number, model in enumerate(shown):
        found = {entry.metric: entry for entry in entries if entry.model == model.name}
        places = [at + (number - (len(shown) - 1) / 2) * width for at, metric in enumerate(labels) if metric in found]
        rows = [found[metric] for metric in labels if metric in found]
        values = np.array([row.value for row in rows])
        spread = np.clip([values - [row.low for row in rows], [row.high for row in rows] - values], 0, None)
        axes.bar(places, values, width * 0.9, color=model_color(model, models, theme), label=plain(model.name))
        axes.errorbar(places, values, yerr=spread, fmt="none", ecolor=theme.ink, elinewidth=0.9, capsize=2, alpha=0.75)
        for place, row in zip(places, rows, strict=True):
            if (row.low, row.high) == (0, 1):  # nothing was counted, such as the precision of a model that never says yes
                continue
            if model.kind not in ("majority", "chance") or len(shown) < 3:
                axes.annotate(
                    f"{100 * row.value:.1f}", (place, max(row.high, row.value)), xytext=(0, 3), textcoords="offset points",
                    ha="center", fontsize=7.5, color=theme.ink if model.kind in SUBJECTS else theme.muted,
                )  # fmt: skip
    axes.set_xticks(range(len(labels)), list(labels.values()))
    axes.tick_params(axis="x", labelcolor=theme.ink)
    tallest = max(entry.high for entry in entries)
    axes.set_ylim(0, 1.09 if tallest > 0.6 else 1.15 * tallest or 1)
    if tallest > 0.6:
        axes.set_yticks(np.linspace(0, 1, 6))
    _percent(axes)
    lines = max(label.count("\n") for label in labels.values())
    fits = sum(len(model.name) + 6 for model in shown) < 14 * figure.get_figwidth()
    columns = len(shown) if fits else (len(shown) + 1) // 2
    _legend(axes, theme, loc="upper left", bbox_to_anchor=(0, -0.14 - 0.06 * lines), ncols=columns, columnspacing=1.2)
    return png(figure)


def recall_curve(title: str, ranks: Mapping[str, np.ndarray], targets: int, models: Sequence[ModelRecord], theme: Theme) -> bytes:
    """Return recall@k for every k on a log axis, one line per model, and the line of a random order."""
    figure, axes = _chart(theme, title, "k (answers looked at)")
    ks = np.unique(np.round(np.geomspace(1, targets, 120)).astype(int))
    for found, line in _model_lines(ranks, models, theme):
        axes.plot(ks, np.searchsorted(np.sort(found), ks, side="right") / len(found), linewidth=1.9, **line)
    axes.plot(ks, ks / targets, color=theme.muted, linewidth=1, linestyle=":", label="random order")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(0, 1.02)
    _percent(axes)
    _legend(axes, theme, loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2)
    return png(figure)


def similarity(captions: Sequence[str], thumbs: Sequence[Path], scores: Mapping[str, Sequence[Sequence[float]]], theme: Theme) -> bytes:
    """Return a heat map of each model's `scores` (captions, images), cosines, on one color scale. Right pairs are framed."""
    count = len(captions)
    matrices = {name: np.asarray(matrix, dtype=np.float64) for name, matrix in scores.items()}
    low, high = min(m.min() for m in matrices.values()), max(m.max() for m in matrices.values())
    figure = new_figure(2.6 + (0.52 * count + 0.4) * len(matrices), 0.52 * count + 1.5, theme.background)
    grid = figure.add_gridspec(2, len(matrices) + 1, height_ratios=[1, count], width_ratios=[*[count] * len(matrices), 0.35])
    for column, (name, matrix) in enumerate(matrices.items()):
        strip, axes = figure.add_subplot(grid[0, column]), figure.add_subplot(grid[1, column])
        strip.set_ylim(-0.5, 0.5)
        strip.axis("off")
        strip.set_title(plain(name), fontsize=10.5, color=theme.ink, parse_math=False)
        for at, thumb in enumerate(thumbs):
            with Image.open(thumb) as image:
                strip.imshow(np.asarray(image.convert("RGB")), extent=(at - 0.46, at + 0.46, -0.46, 0.46), aspect="auto")
        strip.set_xlim(-0.5, count - 0.5)
        drawn = axes.imshow(matrix, cmap=matplotlib.colormaps[theme.heat], vmin=low, vmax=high, aspect="auto")
        for row in range(count):
            corner = (row - 0.5, row - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=theme.series[1], linewidth=1.6, clip_on=False))
            for other in range(count):
                red, green, blue, _ = drawn.cmap(drawn.norm(matrix[row, other]))
                color = "#fff" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "#111"
                axes.text(other, row, f"{matrix[row, other]:.2f}", ha="center", va="center", fontsize=6.5, color=color)
        axes.tick_params(length=0, labelsize=7.5, colors=theme.ink)
        axes.set_xticks([])
        axes.set_yticks(range(count), [plain(text, 34) for text in captions] if column == 0 else [""] * count)
        for label in axes.get_yticklabels():
            label.set_parse_math(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
    bar = figure.colorbar(drawn, cax=figure.add_subplot(grid[1, len(matrices)]))
    bar.ax.tick_params(labelsize=7.5, colors=theme.muted, length=0)
    bar.outline.set_visible(False)
    bar.set_label("cosine", fontsize=8, color=theme.muted)
    return png(figure)


def sorted_classes(title: str, accuracy: Mapping[str, Sequence[float]], models: Sequence[ModelRecord], theme: Theme) -> bytes:
    """Return each model's accuracies per class, sorted from its best to its worst class."""
    figure, axes = _chart(theme, title, "classes, each model's best first")
    for values, line in _model_lines(accuracy, models, theme):
        axes.step(np.arange(1, len(values) + 1), np.sort(np.asarray(values))[::-1], linewidth=1.9, **line)
    axes.set_ylim(-0.02, 1.02)
    _percent(axes)
    _legend(axes, theme)
    return png(figure)


def class_bars(
    title: str,
    rows: Sequence[tuple[str, int, float]],
    before: Mapping[str, float],
    model: ModelRecord,
    models: Sequence[ModelRecord],
    theme: Theme,
    before_name: str = "untrained",
) -> bytes:
    """Return a model's bars for `rows` of (class, images, accuracy or IoU), the first on top. Dots mark the values in `before`."""
    figure, axes = _chart(theme, title, height=0.24 * len(rows) + 1.0)
    places = np.arange(len(rows))[::-1]
    axes.barh(places, [row[2] for row in rows], height=0.68, color=model_color(model, models, theme))
    if before:
        axes.scatter([before[row[0]] for row in rows], places, s=16, color=theme.ink, zorder=3, label=plain(before_name))
        _legend(axes, theme, loc="upper left", bbox_to_anchor=(-0.02, -0.22 * 7 / (len(rows) + 3)))
    _named_rows(axes, [f"{plain(name, 26, 1)} ({n})" for name, n, _ in rows], theme)
    axes.set_xlim(-0.01, 1.01)
    _percent(axes, "x")
    return png(figure)


def class_gains(title: str, rows: Sequence[tuple[str, int, float] | None], theme: Theme) -> bytes:
    """Return horizontal bars, to either side of 0, for `rows` of (class, images, gain), the first on top. None leaves a gap."""
    figure, axes = _chart(theme, plain(title, 34, 2), "gain in points", height=0.24 * len(rows) + 1.2)
    gains = np.array([row[2] if row else 0.0 for row in rows])
    places = np.arange(len(rows))[::-1]
    axes.barh(places, gains, height=0.68, color=[theme.series[0] if gain >= 0 else theme.series[1] for gain in gains])
    axes.axvline(0, color=theme.muted, linewidth=0.9)
    reach = max(float(np.abs(gains).max()), 0.05)
    for place, row in zip(places, rows, strict=True):
        if row:
            side = 1 if row[2] >= 0 else -1
            axes.annotate(
                f"{100 * row[2]:+.0f}", (row[2], place), xytext=(3 * side, 0), textcoords="offset points", fontsize=7,
                color=theme.muted, va="center", ha="left" if side > 0 else "right",
            )  # fmt: skip
    _named_rows(axes, [f"{plain(row[0], 26, 1)} ({row[1]})" if row else "..." for row in rows], theme)
    axes.set_xlim(min(0.0, float(gains.min())) - 0.14 * reach, max(0.0, float(gains.max())) + 0.14 * reach)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+g}" if value else "0"))
    return png(figure)


def forest(rows: Sequence[tuple[str, float, float, float, bool]], theme: Theme, title: str = "B minus A, in points") -> bytes:
    """Return (name, difference, low, high, shown) `rows` as points with intervals. Differences that are not shown are hollow and gray."""
    figure, axes = _chart(theme, title, "A is better  |  B is better", 9.0, 0.24 * len(rows) + 1.1)
    for place, (_, value, low, high, shown) in zip(range(len(rows) - 1, -1, -1), rows, strict=True):
        color = theme.muted if not shown else theme.series[0] if value > 0 else theme.series[1]
        axes.plot([100 * low, 100 * high], [place, place], color=color, linewidth=1.6, solid_capstyle="round")
        axes.plot([100 * value], [place], "o", color=color, markersize=5, markerfacecolor=color if shown else theme.background)
    axes.axvline(0, color=theme.muted, linewidth=0.9)
    _named_rows(axes, [plain(name, 44, 1) for name, *_ in rows], theme)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    return png(figure)


def reliability(title: str, found: Mapping[str, Calibration], models: Sequence[ModelRecord], theme: Theme) -> bytes:
    """Return accuracy against confidence, one line per model. The area of a dot is its bin's share of the images."""
    figure, axes = _chart(theme, title, "confidence", height=4.2)
    axes.plot([0, 1], [0, 1], color=theme.muted, linewidth=1, linestyle=":", label="as sure as right")
    for one, line in _model_lines(found, models, theme):
        axes.plot(one.confidence, one.accuracy, linewidth=1.4, marker="o", markersize=3, **line)
        axes.scatter(one.confidence, one.accuracy, s=8 + 160 * one.count / one.count.sum(), color=line["color"], zorder=3)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("accuracy", fontsize=8.5, color=theme.muted)
    _percent(axes)
    _percent(axes, "x")
    _legend(axes, theme, loc="upper left", bbox_to_anchor=(0, -0.15), ncols=2)
    return png(figure)


def _named_rows(axes: Axes, names: Sequence[str], theme: Theme) -> None:
    """Label the rows of a horizontal chart, the first on top, and draw only the vertical grid."""
    axes.set_yticks(np.arange(len(names))[::-1], list(names))
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.tick_params(axis="y", labelcolor=theme.ink, labelsize=8)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=theme.grid, linewidth=0.8)
    axes.set_ylim(-0.6, len(names) - 0.4)
