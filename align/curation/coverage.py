"""Coverage of `C` concepts before and after curation: a table with one row per concept, a figure and totals."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from align.common.charts import MUTED, SERIES, new_figure, png, style_axes
from align.common.files import atomic_bytes, atomic_json
from align.curation.assignment import Assignment


def coverage_table(names: tuple[str, ...], before: np.ndarray, after: np.ndarray, assignment: Assignment) -> pa.Table:
    """Return one row per concept, in the order of `names`.

    `before` and `after` (C,) count the candidates and the chosen samples by their best concept; `chosen` counts those taken for the
    concept. `rarity` is the order of serving, from 1, by `score_at_last_rank`. The last columns count refused samples by reason.
    """
    reasons = sorted({reason for refused in assignment.refused for reason in refused})
    return pa.table(
        {
            "concept": list(names), "rarity": np.argsort(assignment.order) + 1, "best_before": before, "best_after": after,
            "chosen": [len(rows) for rows in assignment.rows],
            "score_at_last_rank": assignment.last_scores,
            "best_score": [float(scores[0]) if len(scores) else None for scores in assignment.scores],
            "lowest_score": [float(scores[-1]) if len(scores) else None for scores in assignment.scores],
            **{reason: [refused[reason] for refused in assignment.refused] for reason in reasons},
        }
    )  # fmt: skip


def shown_coverage(values: dict[str, Any]) -> str:
    """Return the totals of `write_coverage` as a sentence."""
    passed = ", ".join(f"{count} {reason}" for reason, count in values["passed_over"].items()) or "none"
    effective = f"{values['effective_concepts_before']:.1f} -> {values['effective_concepts_after']:.1f} of {values['concepts']}"
    return (
        f"chosen {values['chosen']} of {values['candidates']} samples (passed over: {passed}; without an image: "
        f"{values['without_image']}); effective concepts {effective}; "
        f"concepts that are nobody's best {values['concepts_without_candidates']} -> {values['concepts_without_chosen']}"
    )


def coverage_figure(table: pa.Table, note: str = "") -> bytes:
    """Return a PNG of each concept's candidates before and samples after, sorted from most to fewest candidates."""
    before, after, chosen = (table[name].to_numpy() for name in ("best_before", "best_after", "chosen"))
    order = np.argsort(-before, kind="stable")
    figure = new_figure(7.2, 4.5 if note else 4.0)
    axes = figure.add_subplot()
    counts = f"{effective_number(before):.0f} -> {effective_number(after):.0f} effective concepts of {len(order)}"
    style_axes(axes, f"Coverage before and after curation: {counts}")
    places = np.arange(1, len(order) + 1)
    axes.plot(places, before[order], color=MUTED, label="candidates whose best concept it is")
    axes.plot(places, after[order], ".", markersize=3.5, color=SERIES[0], label="chosen samples whose best concept it is")
    axes.plot(places, chosen[order], color=SERIES[1], linewidth=1, label="chosen for it")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("concepts, by number of candidates")
    axes.set_ylabel("samples")
    axes.legend(frameon=False, fontsize=8)
    if note:
        figure.supxlabel(note, fontsize=7, color="#b42318", wrap=True, parse_math=False)
    return png(figure)


def effective_number(counts: Sequence[int] | np.ndarray) -> float:
    """Return exp(entropy) of the shares of `counts` (C,): C if all are equal, 1 if one has everything, 0 if all are zero."""
    shares = np.asarray(counts, dtype=np.float64)
    shares = shares[shares > 0] / max(shares.sum(), 1)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def write_coverage(folder: Path, table: pa.Table, facts: dict[str, Any]) -> dict[str, Any]:
    """Write coverage.csv, coverage.json and coverage.png (with the `note` of `facts`). Return the JSON: `facts` and totals."""
    before, after, chosen = (table[name].to_numpy() for name in ("best_before", "best_after", "chosen"))
    reasons = table.column_names[table.column_names.index("lowest_score") + 1 :]
    values = {
        **facts,
        "concepts": len(table),
        "chosen": int(chosen.sum()),
        "concepts_without_candidates": int((before == 0).sum()),
        "concepts_without_chosen": int((after == 0).sum()),
        "effective_concepts_before": round(effective_number(before), 2),
        "effective_concepts_after": round(effective_number(after), 2),
        "passed_over": {reason: int(sum(table[reason].to_pylist())) for reason in reasons},
    }
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(table, buffer)
    atomic_bytes(folder / "coverage.csv", buffer.getvalue())
    atomic_bytes(folder / "coverage.png", coverage_figure(table, facts["note"]))
    atomic_json(folder / "coverage.json", values)
    return values
