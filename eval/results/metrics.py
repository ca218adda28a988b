"""Pure metrics: arrays in, floats out. Fractions, never percents.

Shapes: `N` samples, `C` classes, `R` resamples. Ranks count from 1. Ties are settled against the model, as in `align.model.ranking`:
a model whose scores are all equal gets the last rank, not the first.
"""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

from align.common.errors import UsageError


def label_ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return (N,) int64 ranks, from 1, of each sample's own class among `scores` (N, C); `labels` (N,) are column numbers."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)  # (N, 1)
    return (scores >= own).sum(axis=1)  # its own column counts too, so the best rank is 1


def recall_at(ranks: np.ndarray, k: int) -> float:
    """Return the fraction of `ranks` (N,) that are at most `k`: recall@k of best-positive ranks, accuracy@k of label ranks."""
    _refuse_empty(ranks)
    return float(np.mean(np.asarray(ranks) <= k))


def accuracy_at(ranks: np.ndarray, k: int, classes: int) -> float:
    """Return accuracy@k of label `ranks` (N,); UsageError if there are fewer than `k` classes, where it is 1 by definition."""
    if k > classes:
        raise UsageError(f"accuracy@{k} means nothing with {classes} classes; leave it out or use a k of at most {classes}")
    return recall_at(ranks, k)


def median_rank(ranks: np.ndarray) -> float:
    """Return the median of `ranks` (N,); with an even N the mean of the two in the middle."""
    _refuse_empty(ranks)
    return float(np.median(ranks))


def class_accuracy(correct: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Return (C,) float64 accuracy of each class from `correct` (N,) bool and `labels` (N,); NaN for a class without samples."""
    count = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels, weights=np.asarray(correct, dtype=np.float64), minlength=classes)
    return np.divide(hits, count, out=np.full(classes, np.nan), where=count > 0)


def mean_per_class(correct: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Return the mean over the classes that have samples of each one's accuracy (arguments as in `class_accuracy`)."""
    _refuse_empty(labels)
    return float(np.nanmean(class_accuracy(correct, labels, classes)))


def majority_rates(labels: np.ndarray, classes: int, ks: tuple[int, ...]) -> dict[int, float]:
    """Return, for each k, the accuracy@k of always naming the k most frequent classes of `labels` (N,)."""
    _refuse_empty(labels)
    counts = np.sort(np.bincount(labels, minlength=classes))[::-1]
    return {k: float(counts[:k].sum() / len(labels)) for k in ks}


def chance_recall(targets: int, positives: np.ndarray, k: int) -> float:
    """Return the expected recall@k of a random order of `targets`, averaged over queries with `positives` (N,) right ones each.

    A query misses if none of its positives is among the first k: prod_{i<k} (targets - positives - i) / (targets - i).
    """
    _refuse_empty(positives)
    taken = np.arange(min(k, targets))[None, :]
    miss = np.clip((targets - np.asarray(positives)[:, None] - taken) / (targets - taken), 0, None)  # (N, k)
    return float(1 - np.mean(miss.prod(axis=1)))


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return (low, high), the Wilson score interval of a proportion of `successes` among `n` independent trials.

    Source: E. B. Wilson, 1927. Unlike the normal interval it stays inside [0, 1] and is not empty at 0 or n successes.
    """
    if not 0 <= successes <= n or n == 0:
        raise UsageError(f"{successes} successes in {n} trials: expected 0 <= successes <= n and n >= 1")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # the ends are exactly 0 and 1 at 0 and n successes; rounding may miss them by an ulp
    return (0.0 if successes == 0 else center - half, 1.0 if successes == n else center + half)


def bootstrap_interval(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    generator: np.random.Generator,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Return (low, high), the percentile bootstrap interval of a statistic of `values` (N,).

    `statistic` maps resampled values (R, N) to (R,). Resamples are drawn in blocks, so memory is about 32 MiB whatever N is.
    """
    _refuse_empty(values)
    n = len(values)
    block = max(1, min(resamples, (1 << 22) // n))
    drawn = [statistic(values[generator.integers(0, n, size=(min(block, resamples - start), n))]) for start in range(0, resamples, block)]
    return _percentiles(np.concatenate(drawn), confidence)


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return (R,) means of `values` (N,), each value counted `weights` (R, N) times."""
    return weights @ values / weights.sum(axis=1)


def weighted_median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return (R,) medians of `values` (N,), each value counted `weights` (R, N) whole times; of an even number, the mean of the middle."""
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weights[:, order], axis=1)  # (R, N) values up to and with this one
    total = below[:, -1:]
    middle = [(below <= half).sum(axis=1) for half in ((total - 1) // 2, total // 2)]
    return (values[order[middle[0]]] + values[order[middle[1]]]) / 2


def cluster_interval(
    values: np.ndarray,
    clusters: np.ndarray,
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray],
    generator: np.random.Generator,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Return (low, high), the percentile bootstrap interval of a statistic of `values` (N,) that resamples whole clusters.

    `clusters` (N,) are numbers from 0 without gaps: values of one cluster are drawn together, as they are not independent.
    `statistic` maps (values, weights (R, N)) to (R,), like `weighted_mean`. Memory is about 32 MiB whatever N is.
    """
    _refuse_empty(values)
    count = int(clusters.max()) + 1
    block = max(1, min(resamples, (1 << 22) // len(values)))
    drawn = []
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        picked = generator.integers(0, count, size=(size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(picked.ravel(), minlength=size * count).reshape(size, count)  # how often each cluster was drawn
        drawn.append(statistic(values, times[:, clusters]))
    return _percentiles(np.concatenate(drawn), confidence)


def clustered_recall_interval(
    hits: np.ndarray, clusters: np.ndarray, generator: np.random.Generator, confidence: float = 0.95
) -> tuple[float, float]:
    """Return (low, high) of the share of `hits` (N,) bool whose queries come in clusters, such as the captions of one image.

    Percentile bootstrap over clusters. Where that has no width, as all or none hit, and where every cluster is one query, it is the
    Wilson interval of as many trials as there are clusters.
    """
    _refuse_empty(hits)
    count, share = int(clusters.max()) + 1, float(np.mean(hits))
    if share in (0.0, 1.0) or count == len(hits):
        return wilson_interval(round(share * count), count, confidence)
    return cluster_interval(np.asarray(hits, dtype=np.float64), clusters, weighted_mean, generator, confidence=confidence)


def mean_per_class_interval(
    correct: np.ndarray,
    labels: np.ndarray,
    classes: int,
    generator: np.random.Generator,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Return (low, high), the percentile bootstrap interval of `mean_per_class`, resampling samples.

    A resample is known by how often each (class, right or wrong) cell was drawn, and those counts are multinomial: the exact
    bootstrap costs O(R C), not O(R N). Classes absent from a resample are left out of its mean.
    """
    _refuse_empty(labels)
    cells = np.bincount(labels * 2 + np.asarray(correct, dtype=np.int64), minlength=2 * classes)
    counts = generator.multinomial(len(labels), cells / len(labels), size=resamples).reshape(resamples, classes, 2)
    total = counts.sum(axis=2)  # (R, C)
    accuracy = np.divide(counts[:, :, 1], total, out=np.full(total.shape, np.nan), where=total > 0)
    return _percentiles(np.nanmean(accuracy, axis=1), confidence)


def _percentiles(drawn: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def _refuse_empty(values: np.ndarray) -> None:
    if len(values) == 0:
        raise UsageError("a metric of no samples does not exist; check that the task's data is not empty")
