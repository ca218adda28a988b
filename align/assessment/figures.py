"""PNG figures of an assessment: a heat map (candidates x scores), scatter plots (each score against probing), curves of worth."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib
import numpy as np

from align.assessment.tables import NAMES, Assessed
from align.assessment.worth import Worth
from align.common.charts import INK, MUTED, SERIES, new_figure, png, style_axes

MARKS = {"cls": "^", "mean": "o", "cls_mean": "s"}
HEAT_ROWS = 64  # more cannot be read
DPI = 110


def heat_map(results: Sequence[Assessed], text: str) -> bytes:
    """Return a PNG of the best 64 vision candidates with one text encoder: scores in percent.

    The shade is the value, from 0 (or the lowest, if that is negative) to the highest of the column: equal scores look equal."""
    group = [result for result in results if result.candidate.text == text]
    group = sorted(group, key=lambda r: -r.scores["probing"].value)[:HEAT_ROWS]
    group.sort(
        key=lambda r: (r.candidate.random, r.candidate.vision, r.candidate.feature, r.candidate.layer)
    )  # a column of the map runs over the layers
    names = [name for name in NAMES if any(name in result.scores for result in group)]
    values = np.array([[result.scores[name].value if name in result.scores else np.nan for name in names] for result in group])
    lowest = np.minimum(np.nanmin(values, axis=0), 0)
    shades = (values - lowest) / np.maximum(np.nanmax(values, axis=0) - lowest, 1e-12)
    figure = new_figure(3.4 + 0.85 * len(names), 1.3 + 0.24 * len(group), dpi=DPI)
    axes = figure.add_subplot()
    axes.imshow(shades, cmap=matplotlib.colormaps["Blues"], vmin=0, vmax=1.15, aspect="auto")
    for row, column in np.argwhere(np.isfinite(values)):
        color = "white" if shades[row, column] > 0.7 else INK
        axes.text(column, row, f"{100 * values[row, column]:.1f}", ha="center", va="center", fontsize=7.5, color=color)
    labels = [f"{r.candidate.vision}  {r.candidate.feature}  {r.candidate.layer}" for r in group]
    axes.set_yticks(range(len(group)), labels, fontsize=7.5, color=INK)
    axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names], fontsize=8, color=INK)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    title = f"with {text} (percent; darker: higher, from 0 to the best of the column)"
    axes.set_title(title, loc="left", fontsize=9.5, color=INK, fontweight="bold")
    return png(figure)


def worth_curves(worths: Sequence[Worth]) -> bytes:
    """Return a PNG with a panel per alignment that has a score: the curve over captioned images, and the height that texts alone reach."""
    figure = new_figure(4.2 * len(worths), 3.2, dpi=DPI)
    for number, worth in enumerate(worths):
        assert worth.score is not None
        axes = figure.add_subplot(1, len(worths), number + 1)
        curve = {int(count): 100 * value for count, value in worth.score.details["curve"].items()}
        axes.plot(list(curve), list(curve.values()), color=SERIES[1], marker="o", markersize=3.5, label="no alignment, captioned images")
        axes.axhline(100 * worth.score.value, color=SERIES[0], label="aligned, texts alone")
        if worth.score.low is not None and worth.score.high is not None:
            axes.axhspan(100 * worth.score.low, 100 * worth.score.high, color=SERIES[0], alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        axes.set_xlabel("captioned images", fontsize=8, color=MUTED)
        axes.set_ylabel("own caption found (mean reciprocal rank, %)", fontsize=8, color=MUTED)
        style_axes(axes, worth.candidate.name + (f"\n{worth.run}" if worth.run else ""), lines="both", size=7.5)
        axes.legend(frameon=False, fontsize=7.5, labelcolor=INK, loc="lower right")
    return png(figure)


def scatter(results: Sequence[Assessed], text: str, target: str, rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a PNG with a panel per score against `target` and a point per vision candidate. `rows` (correlations) give the titles."""
    group = [result for result in results if result.candidate.text == text and target in result.scores]
    panels = [row for row in rows if row["text"] == text and row["target"] == target]
    across = min(4, max(1, len(panels)))
    down = -(-len(panels) // across) or 1
    figure = new_figure(2.75 * across, 2.6 * down + 0.5, dpi=DPI)
    encoders = list(dict.fromkeys(result.candidate.vision for result in group))
    learned = [name for name in encoders if not any(r.candidate.random for r in group if r.candidate.vision == name)]
    colors = {name: SERIES[at % len(SERIES)] for at, name in enumerate(learned)}
    for number, row in enumerate(panels):
        axes = figure.add_subplot(down, across, number + 1)
        for result in group:
            if row["score"] not in result.scores:
                continue
            candidate = result.candidate
            color = colors.get(candidate.vision, MUTED)
            x, y = 100 * result.scores[row["score"]].value, 100 * result.scores[target].value
            face = "none" if candidate.random else color  # hollow: not part of r
            axes.scatter(x, y, s=16, marker=MARKS[candidate.feature], facecolors=face, edgecolors=color, linewidths=0.9, alpha=0.85)
        between = "" if row["r_low"] is None else f" ({row['r_low']:.2f} to {row['r_high']:.2f})"
        r = "r -" if row["r"] is None else f"r {row['r']:.2f}{between}"
        axes.set_title(f"{NAMES[row['score']]}\n{r}", loc="left", fontsize=8.5, color=INK)
        style_axes(axes, lines="both", size=7.5)
        if number % across == 0:
            axes.set_ylabel(NAMES[target], fontsize=8, color=MUTED)
    point = partial(matplotlib.lines.Line2D, [], [], linestyle="", markersize=4.5)
    handles = [point(color=color, marker="o", label=name) for name, color in colors.items()]
    handles += [point(color=MUTED, marker=MARKS[f], label=f) for f in dict.fromkeys(result.candidate.feature for result in group)]
    if any(result.candidate.random for result in group):
        handles.append(point(color=MUTED, marker="o", fillstyle="none", label="random weights"))
    figure.legend(handles=handles, loc="outside lower left", ncols=4, frameon=False, fontsize=7.5, labelcolor=INK)
    figure.suptitle(f"{len(group)} candidates with {text}", x=0.01, ha="left", fontsize=9.5, color=INK, fontweight="bold")
    return png(figure)
