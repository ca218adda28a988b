"""Metrics and their intervals: arrays in, floats out. Fractions, never percents.

Shapes: `N` samples, `C` classes. Ranks count from 1. A tie counts against the model, as in `align.model.ranking`.
"""

import numpy as np

from align.common.errors import UsageError
from align.common.intervals import bootstrap, kind_bootstrap, mean_of, percentiles, wilson_interval


def label_ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return (N,) int64 ranks, from 1, of each sample's own class in `scores` (N, C). `labels` (N,) are column numbers."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)  # (N, 1)
    return (scores >= own).sum(axis=1)  # its own column counts too, so the best rank is 1


def recall_at(ranks: np.ndarray, k: int) -> float:
    """Return the fraction of `ranks` (N,) that are at most `k`: recall@k of best-positive ranks, accuracy@k of label ranks."""
    _refuse_empty(ranks)
    return float(np.mean(np.asarray(ranks) <= k))


def accuracy_at(ranks: np.ndarray, k: int, classes: int) -> float:
    """Return accuracy@k of label `ranks` (N,); UsageError with fewer than `k` classes, where it is always 1."""
    if k > classes:
        raise UsageError(f"accuracy@{k} means nothing with {classes} classes; leave it out or use a k of at most {classes}")
    return recall_at(ranks, k)


def median_rank(ranks: np.ndarray) -> float:
    """Return the median of `ranks` (N,); for an even N the mean of the middle two."""
    _refuse_empty(ranks)
    return float(np.median(ranks))


def class_accuracy(correct: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Return (C,) float64 accuracy per class of `correct` (N,) bool with `labels` (N,); NaN for a class without samples."""
    count = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels, weights=np.asarray(correct, dtype=np.float64), minlength=classes)
    return np.divide(hits, count, out=np.full(classes, np.nan), where=count > 0)


def mean_per_class(correct: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Return the mean accuracy over the classes that have samples (arguments as in `class_accuracy`)."""
    _refuse_empty(labels)
    return float(np.nanmean(class_accuracy(correct, labels, classes)))


def majority_rates(labels: np.ndarray, classes: int, ks: tuple[int, ...]) -> dict[int, float]:
    """Return, for each k, the accuracy@k of always naming the k most frequent classes of `labels` (N,)."""
    _refuse_empty(labels)
    counts = np.sort(np.bincount(labels, minlength=classes))[::-1]
    return {k: float(counts[:k].sum() / len(labels)) for k in ks}


def chance_recall(targets: int, positives: np.ndarray, k: int) -> float:
    """Return the expected recall@k of a random order of `targets`, averaged over queries with `positives` (N,) right answers each."""
    _refuse_empty(positives)
    # a query misses with probability prod_{i<k} (targets - positives - i) / (targets - i)
    taken = np.arange(min(k, targets))[None, :]
    miss = np.clip((targets - np.asarray(positives)[:, None] - taken) / (targets - taken), 0, None)  # (N, k)
    return float(1 - np.mean(miss.prod(axis=1)))


def clustered_recall_interval(
    hits: np.ndarray, clusters: np.ndarray, generator: np.random.Generator, confidence: float = 0.95
) -> tuple[float, float]:
    """Return (low, high) of the share of `hits` (N,) bool, bootstrapped over `clusters` (N,), such as the captions of one image."""
    _refuse_empty(hits)
    count, share = int(clusters.max()) + 1, float(np.mean(hits))
    if share in (0.0, 1.0) or count == len(hits):  # no width, or each cluster is one query: one trial per cluster
        return wilson_interval(round(share * count), count, confidence)
    return percentiles(bootstrap(mean_of(hits), clusters, generator), confidence)


def mean_per_class_interval(
    correct: np.ndarray, labels: np.ndarray, classes: int, generator: np.random.Generator, confidence: float = 0.95
) -> tuple[float, float]:
    """Return (low, high), the bootstrap interval of `mean_per_class` over samples. A resample's mean is over the classes in it."""
    _refuse_empty(labels)

    def statistic(counts: np.ndarray) -> np.ndarray:  # (R, 2 C)
        wrong, right = counts[:, 0::2], counts[:, 1::2]
        return np.nanmean(np.divide(right, wrong + right, out=np.full(right.shape, np.nan), where=wrong + right > 0), axis=1)

    # a resample is known by how often each kind (class, right or wrong) was drawn
    kinds = np.bincount(labels * 2 + np.asarray(correct, dtype=np.int64), minlength=2 * classes)
    return percentiles(kind_bootstrap(statistic, kinds, generator), confidence)


def _refuse_empty(values: np.ndarray) -> None:
    if len(values) == 0:
        raise UsageError("a metric of no samples does not exist; check that the task's data is not empty")
