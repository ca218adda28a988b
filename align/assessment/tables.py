"""Results of an assessment as tables and sentences: correlations between scores, and a recommendation. Nothing is printed here."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from align.assessment.candidates import Candidate
from align.assessment.scores import SCORES, Score
from align.common.errors import UsageError
from align.common.files import read_json
from align.common.intervals import LEAST_GROUPS, correlation_interval, drawn_groups, pearson, percentiles, spearman
from align.common.seeds import generator
from align.runtime.recipes_yaml import load_yaml
from align.runtime.runs import JsonLines

NAMES = {**SCORES, "trained": "R@10 after full training"}
CHEAP = tuple(name for name in SCORES if name != "probing")
CLEAR, LIKELY = 0.95, 0.7  # share of resamples that the best candidate wins


@dataclass(frozen=True)
class Assessed:
    """A candidate, its scores by name, and the fingerprints of its features if stores hold exactly these features."""

    candidate: Candidate
    scores: Mapping[str, Score]
    fingerprints: tuple[dict[str, Any], dict[str, Any]] | None = None  # of images and captions


def table_csv(results: Sequence[Assessed]) -> str:
    """Return all results as CSV: one row per candidate, four columns per score (value, low, high, seconds)."""
    names = [name for name in NAMES if any(name in result.scores for result in results)]
    columns = [*asdict(results[0].candidate), "probing_steps", "probing_converged"]
    columns += [f"{name}{part}" for name in names for part in ("", "_low", "_high", "_seconds")]
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    for result in results:
        details = result.scores["probing"].details
        row = {**asdict(result.candidate), "probing_steps": details["steps"], "probing_converged": details["converged"]}
        for name, score in result.scores.items():
            values = {"": score.value, "_low": score.low, "_high": score.high, "_seconds": score.seconds}
            row |= {f"{name}{part}": "" if value is None else round(value, 5) for part, value in values.items()}
        writer.writerow(row)
    return file.getvalue()


def shown(results: Sequence[Assessed], rows: int) -> Table:
    """Return a terminal table of the best `rows` candidates by probing, in percent, with half the width of the 95% interval."""
    ordered = sorted(results, key=lambda result: -result.scores["probing"].value)[:rows]
    names = [name for name in NAMES if any(name in result.scores for result in ordered)]
    title = f"{len(ordered)} of {len(results)} candidates, best probing first (percent, and half the width of the 95% interval)"
    table = Table(title=title, title_justify="left")
    table.add_column("vision encoder, layer, feature + text", no_wrap=True)
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for result in ordered:
        table.add_row(result.candidate.name, *(_percent(result.scores.get(name)) for name in names))
    table.add_section()
    seconds = [[result.scores[name].seconds for result in results if name in result.scores] for name in names]
    table.add_row("seconds a candidate", *(f"{np.mean(spent):.1f}" if sum(spent) else "" for spent in seconds))
    return table


def _percent(score: Score | None, wide: bool = False) -> str:
    """Return a score in percent with half the width of its interval; `wide` shows both ends instead."""
    if score is None:
        return "-"
    value = f"{100 * score.value:.1f}"
    if score.low is None or score.high is None:
        return value
    return f"{value} ({100 * score.low:.1f} to {100 * score.high:.1f})" if wide else f"{value} ±{50 * (score.high - score.low):.1f}"


def correlations(results: Sequence[Assessed], target: str, seed: int, resamples: int = 2000) -> list[dict[str, Any]]:
    """Return how well each score predicts `target` over the vision candidates, separately for each text encoder (as in SAIL).

    A row has text, score, n, r (Pearson) and rho (Spearman) with bootstrap intervals; fewer than 4 candidates give no row.
    Intervals resample vision encoders with all their layers; below 4 encoders there is none. Random weights are left out: two distant
    groups of points correlate, whatever lies within them.
    """
    rows = []
    for text, group in _by_text(results).items():
        for name in (*CHEAP, "probing"):
            both = [r for r in group if name in r.scores and target in r.scores]
            if name == target or len(both) < 4:
                continue
            x, y = (np.array([r.scores[which].value for r in both]) for which in (name, target))
            encoders = np.array([r.candidate.vision for r in both])
            row: dict[str, Any] = {"text": text, "score": name, "target": target, "n": len(both)}
            for label, how in (("r", pearson), ("rho", spearman)):
                found = correlation_interval(x, y, encoders, how, generator(seed, 11), resamples)
                row |= {f"{label}{part}": _finite(value) for part, value in zip(("", "_low", "_high"), found, strict=True)}
            rows.append(row)
    return rows


def rank_matrix(results: Sequence[Assessed], text: str) -> dict[str, dict[str, float | None]]:
    """Return the Spearman correlations between all scores over the vision candidates of one text encoder."""
    group = _by_text(results)[text]
    names = [name for name in NAMES if all(name in result.scores for result in group)]
    values = {name: np.array([result.scores[name].value for result in group]) for name in names}
    return {a: {b: _finite(float(spearman(values[a], values[b]))) for b in names} for a in names}


def follows(results: Sequence[Assessed], seed: int, resamples: int = 2000) -> list[dict[str, Any]]:
    """Return, per text encoder, whether alignment follows weighted k-NN more than the linear probe (SAIL: r 0.991 and 0.847)."""
    rows = []
    for text, group in _by_text(results).items():
        labelled = [r for r in group if "knn" in r.scores]
        if len(labelled) < 4:
            continue
        knn, linear, probing = (np.array([r.scores[name].value for r in labelled]) for name in ("knn", "linear_probe", "probing"))
        encoders = np.array([r.candidate.vision for r in labelled])
        picks = drawn_groups(encoders, resamples, generator(seed, 12))
        drawn = [float(pearson(knn[rows], probing[rows]) - pearson(linear[rows], probing[rows])) for rows in picks]
        low, high = percentiles(np.array(drawn))
        r_knn, r_linear = float(pearson(knn, probing)), float(pearson(linear, probing))
        answer = "yes" if low > 0 else "no, the other way round" if high < 0 else "open: the interval holds 0"
        if not picks:
            answer = f"open: an interval needs {LEAST_GROUPS} vision encoders"
        if not math.isfinite(r_knn - r_linear):
            answer = "unknown: a score is the same for all candidates"
        numbers = {"r_knn": r_knn, "r_linear_probe": r_linear, "difference": r_knn - r_linear, "low": low, "high": high}
        finite = {name: _finite(value) for name, value in numbers.items()}
        rows.append({"text": text, "n": len(labelled), **finite, "answer": answer})
    return rows


def shown_correlations(rows: Sequence[Mapping[str, Any]], target: str) -> Table:
    """Return a terminal table of the correlations with `target`."""
    table = Table(title=f"How well each score predicts: {NAMES[target]} (95% intervals over vision encoders)", title_justify="left")
    for head in ("text", "score", "candidates", "Pearson r", "Spearman"):
        table.add_column(head, justify="right" if head == "candidates" else "left")
    for row in sorted(rows, key=lambda row: (row["text"], -(row["rho"] or -1))):
        table.add_row(row["text"], NAMES[row["score"]], str(row["n"]), _interval(row, "r"), _interval(row, "rho"))
    return table


def shown_follows(row: Mapping[str, Any]) -> str:
    """Return one row of `follows` as a sentence."""
    said = f"Does alignment with {row['text']} follow weighted k-NN more than the linear probe? {row['answer']}"
    if row["difference"] is None:
        return f"{said}."
    between = "" if row["low"] is None else f", difference {row['low']:.2f} to {row['high']:.2f}"
    return f"{said} (r {row['r_knn']:.2f} against {row['r_linear_probe']:.2f}{between})."


def _interval(row: Mapping[str, Any], label: str) -> str:
    value, low, high = (row[f"{label}{part}"] for part in ("", "_low", "_high"))
    if value is None:
        return "-"
    return f"{value:.2f}" + (f" ({low:.2f} to {high:.2f})" if low is not None else "")


def ranked(results: Sequence[Assessed]) -> list[Assessed]:
    """Return the candidates as probing puts them, the best first; random weights are left out."""
    learned = [result for result in results if not result.candidate.random]
    return sorted(learned, key=lambda result: -result.scores["probing"].value)


def recommend(results: Sequence[Assessed], weights: np.ndarray) -> list[str]:
    """Return sentences that name the best pair, layer and feature, and how sure this is. `weights` (R, n) are the bootstrap weights."""
    learned = [result for result in results if not result.candidate.random]
    values = np.array([result.scores["probing"].details["values"] for result in learned])  # (candidates, n)
    drawn = values @ weights.T.astype(np.float64)  # (candidates, R)
    order = np.argsort(-values.mean(1), kind="stable")
    first = np.bincount(drawn.argmax(0), minlength=len(learned)) / drawn.shape[1]  # share of the resamples won
    best = learned[order[0]]
    score, share = best.scores["probing"], float(first[order[0]])
    sure = "clear" if share >= CLEAR else "likely, not certain" if share >= LIKELY else "open"
    said = [f"Take {best.candidate.name}: R@10 {_percent(score, wide=True)} on {score.n} held-out images."]
    others = [(learned[at], first[at]) for at in np.argsort(-first, kind="stable") if at != order[0] and first[at] >= 0.02][:4]
    if len(learned) > 1:
        ranked = "".join(f"; {other.candidate.name} in {100 * part:.0f}%" for other, part in others)
        said.append(f"How sure: {sure}. It came first in {100 * share:.0f}% of the resamples of these images{ranked}.")
    if share < LIKELY and others:
        said.append("Take the cheapest of these, or repeat with more --rows: the images at hand do not tell them apart.")
    said += _compared(learned, drawn, int(order[0]))
    floors = [result for result in results if result.candidate.random]
    if floors:
        floor = max(floors, key=lambda result: result.scores["probing"].value)
        said.append(f"Floor: random weights reach R@10 {_percent(floor.scores['probing'], wide=True)} ({floor.candidate.vision}).")
    unfinished = sum(not result.scores["probing"].details["converged"] for result in results)
    if unfinished:
        said.append(f"{unfinished} of {len(results)} probes still improved when the steps ran out: raise --probe-steps.")
    said.append("The intervals cover the draw of the test images, not that of the training images or the probe's seed.")
    return said


def _compared(learned: Sequence[Assessed], drawn: np.ndarray, best: int) -> list[str]:
    """Return sentences: the gain of the best layer over the last, and of the best text encoder over the others; `drawn` (candidates, R)."""
    chosen = learned[best].candidate
    place = {result.candidate: at for at, result in enumerate(learned)}
    said = []
    siblings = [c for c in place if (c.vision, c.feature, c.text) == (chosen.vision, chosen.feature, chosen.text)]
    last = max(siblings, key=lambda c: c.layer)
    if last != chosen:
        said.append(f"Layer {chosen.layer} instead of {last.layer}: {_gain(learned, drawn, [best], [place[last]])}.")
    for text in sorted({c.text for c in place} - {chosen.text}):
        twins = {place[c]: place.get(replace(c, text=text), -1) for c in place if c.text == chosen.text}
        pairs = {at: twin for at, twin in twins.items() if twin >= 0}
        if pairs:
            gain = _gain(learned, drawn, list(pairs), list(pairs.values()))
            said.append(f"{chosen.text} instead of {text}, mean of {len(pairs)} candidates: {gain}.")
    return said


def _gain(learned: Sequence[Assessed], drawn: np.ndarray, first: list[int], second: list[int]) -> str:
    means = np.array([result.scores["probing"].value for result in learned])
    low, high = percentiles(drawn[first].mean(0) - drawn[second].mean(0))
    return f"{100 * (means[first].mean() - means[second].mean()):+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"


def trained_scores(runs: Sequence[str], results: Sequence[Assessed]) -> list[Assessed]:
    """Return the results, with a score `trained` for candidates whose exact features a run of align/train.py was trained on.

    Runs are matched by the fingerprints of both encoders. The value is the mean R@10 of both directions at the best validation,
    averaged over a candidate's runs. UsageError for a folder that is no run or matches no candidate.
    """
    found: dict[Candidate, list[float]] = {}
    for run in runs:
        config = Path(run) / "best" / "config.json"
        rows = [row for row in JsonLines(Path(run) / "metrics.jsonl").rows() if "val_mean_recall" in row]
        if not config.exists() or not rows:
            raise UsageError(f"{run} is not a validated run of align/train.py (best/config.json, metrics.jsonl with validations)")
        stored = read_json(config)
        prints = (stored["vision_fingerprint"], stored["text_fingerprint"])
        matching = [result.candidate for result in results if result.fingerprints == prints]
        if not matching:
            images = load_yaml(Path(run) / "config.yaml")["train"]["images"]
            raise UsageError(f"{run} was trained on none of the candidates' features ({images})")
        best = max(rows, key=lambda row: row["val_mean_recall"])
        found.setdefault(matching[0], []).append((best["val_i2t_r10"] + best["val_t2i_r10"]) / 2)
    trained = {candidate: {"trained": Score(float(np.mean(values)), None, None, 0, 0.0)} for candidate, values in found.items()}
    return [replace(result, scores={**result.scores, **trained.get(result.candidate, {})}) for result in results]


def _by_text(results: Sequence[Assessed]) -> dict[str, list[Assessed]]:
    learned = [result for result in results if not result.candidate.random]
    texts = dict.fromkeys(result.candidate.text for result in learned)
    return {text: [result for result in learned if result.candidate.text == text] for text in texts}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
