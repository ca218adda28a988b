"""Metrics of generated answers: text in, fractions with intervals out. Pure; independent of lmms-eval.

`N` answers. The values of a metric are what `eval.harness.docs` logs per answer: a number, [said, true] or [said, true, group].
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from align.common.errors import DataError, UsageError
from align.common.intervals import bootstrap, kind_bootstrap, mean_of, percentiles, wilson_interval
from eval.results.records import GRADED

ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {
    word: str(number) for number, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
} | {"none": "0"}
# "in the top left", "at the upper left corner" and "top left of the picture" are the same place
_PLACE_WORDS = {"upper": "top", "lower": "bottom", "middle": "center", "centre": "center", "central": "center"}  # codespell:ignore centre
_PLACES = frozenset({"top", "bottom", "left", "right", "center"})
YES_NO = ("precision", "recall", "f1", "yes_ratio")  # metrics whose values are [said, true] or [said, true, group]


def words(text: str) -> list[str]:
    """Return the lower-case words of `text`. Punctuation separates words, apostrophes are dropped, accents and digits stay."""
    plain = unicodedata.normalize("NFKC", text).lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").replace("'", "")
    return re.findall(r"\w+(?:[.,]\d+)*", plain.replace("_", " "))


def normalized(text: str) -> str:
    """Return `text` for exact matching: lower case, no punctuation, no articles, zero to ten as digits."""
    return " ".join(NUMBERS.get(word, word) for word in words(text) if word not in ARTICLES)


def place(text: str) -> str:
    """Return the place that `text` names, for example "left top" for "In the upper left corner", or "" if there is none."""
    found = {_PLACE_WORDS.get(word, word) for word in words(text)} & _PLACES
    return " ".join(sorted(found - {"center"} or found))


def matches(answer: str, truths: str | Sequence[str], kind: str = "") -> bool:
    """Return whether `answer` equals one of `truths` after normalization. Answers of the kind "where" are compared as places."""
    compared = place if kind == "where" else normalized
    said = compared(answer)
    return said != "" and said in {compared(truth) for truth in ([truths] if isinstance(truths, str) else truths)}


def yes_or_no(answer: str) -> str:
    """Return "yes" or "no" if `answer` begins with that word, else ""."""
    first = words(answer)[:1]
    return first[0] if first and first[0] in ("yes", "no") else ""


def pope_yes_or_no(answer: str) -> str:
    """Return POPE's reading of `answer`: "no" if its first sentence contains the word no or not, else "yes"."""
    return "no" if {"no", "not"} & set(words(answer.split(".")[0])) else "yes"


def yes_no_scores(values: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return precision, recall, f1 and yes_ratio (share of yes) of N [said, true] or [said, true, group] values (see POPE).

    An answer that is neither yes nor no counts as not yes. A zero denominator gives 0. Groups are averaged with equal weight.
    """
    counts = _cells(values)
    return {name: float(_yes_no(name, counts)) for name in YES_NO}


def rouge_l(answer: str, truths: Sequence[str]) -> float:
    """Return ROUGE-L of a caption (F with beta 1.2, best reference), computed by pycocoevalcap on `words`."""
    from pycocoevalcap.rouge.rouge import Rouge

    return float(Rouge().calc_score([" ".join(words(answer))], [" ".join(words(truth)) for truth in truths]))


def cider(values: Sequence[Sequence[Any]]) -> np.ndarray:
    """Return (N,) CIDEr-D scores, 0 to 10, of [answer, [reference, ...]] values, computed by pycocoevalcap on `words`."""
    from pycocoevalcap.cider.cider import Cider

    # word weights come from all references, so scores of different sets cannot be compared
    said = {number: [" ".join(words(answer))] for number, (answer, _) in enumerate(values)}
    true = {number: [" ".join(words(text)) for text in truths] for number, (_, truths) in enumerate(values)}
    return np.asarray(Cider().compute_score(true, said)[1], dtype=np.float64)


def estimate(metric: str, values: Sequence[Any], generator: np.random.Generator, confidence: float) -> tuple[float, float, float] | None:
    """Return (value, low, high) of a metric from its N logged values, or None if the metric is not the kit's. Numbers are averaged."""
    if not values:
        raise UsageError(f"{metric} of no answers does not exist; check that the task's data is not empty")
    if metric in YES_NO and all(isinstance(value, list | tuple) and len(value) in (2, 3) for value in values):
        return _yes_no_estimate(metric, values, generator, confidence)
    if metric == "cider":
        scores = cider(values)
    elif all(isinstance(value, int | float) for value in values):
        scores = np.asarray(values, dtype=np.float64)
    else:
        return None
    if not np.isfinite(scores).all():
        raise DataError(f"{metric}: {int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite; the run is unusable")
    if metric not in GRADED and np.isin(scores, (0, 1)).all():  # a rate
        return (float(scores.mean()), *wilson_interval(int(scores.sum()), len(scores), confidence))
    drawn = bootstrap(mean_of(scores), np.arange(len(scores)), generator)
    return (float(scores.mean()), *percentiles(drawn, confidence))


def _cells(values: Sequence[Sequence[str]]) -> np.ndarray:
    """Return (groups, 4) counts of (said, true): (yes, yes), (yes, no), (not yes, yes), (not yes, no)."""
    names = sorted({value[2] if len(value) > 2 else "" for value in values})
    codes = []
    for said, true, *group in values:
        if true not in ("yes", "no"):
            raise DataError(f"the right answer to a yes-no question is {true!r}; expected yes or no")
        codes.append(4 * names.index(group[0] if group else "") + 2 * (said != "yes") + (true == "no"))
    return np.bincount(np.asarray(codes, dtype=np.int64), minlength=4 * len(names)).reshape(-1, 4)


def _yes_no(name: str, counts: np.ndarray) -> np.ndarray:
    """Return a metric (...) of counts (..., groups, 4) in the order of `_cells`, averaged over groups."""
    over, under = _part_and_whole(name, counts)
    return np.divide(over, under, out=np.zeros(over.shape), where=under > 0).mean(axis=-1)


def _part_and_whole(name: str, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    right, wrong, missed, rejected = (counts[..., cell] for cell in range(4))
    return {
        "precision": (right, right + wrong),
        "recall": (right, right + missed),
        "f1": (2 * right, 2 * right + wrong + missed),
        "yes_ratio": (right + wrong, right + wrong + missed + rejected),
    }[name]


def _yes_no_estimate(
    name: str, values: Sequence[Sequence[str]], generator: np.random.Generator, confidence: float
) -> tuple[float, float, float]:
    counts = _cells(values)
    value = float(_yes_no(name, counts))
    if name == "f1" or len(counts) > 1:
        drawn = kind_bootstrap(lambda times: _yes_no(name, times.reshape(-1, *counts.shape)), counts.ravel(), generator)
        return (value, *percentiles(drawn, confidence))
    hits, of = (int(count) for count in _part_and_whole(name, counts[0]))
    return (value, *(wilson_interval(hits, of, confidence) if of else (0.0, 1.0)))
