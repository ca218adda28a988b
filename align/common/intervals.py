"""Uncertainty of numbers: percentile bootstrap, Wilson interval, ranks and correlations. Arrays in, floats out.

Shapes: `N` samples, `G` clusters of samples (such as the captions of an image), `R` resamples, `r` resamples of a block. A statistic is
a function of weights (r, N), how often each sample was drawn; weights of one give the plain value. Draws do not depend on the block
size, so published intervals can be reproduced.
"""

from collections.abc import Callable, Iterator

import numpy as np
from scipy import stats

from align.common.errors import UsageError

BLOCK = 1 << 22  # weights held at once: 32 MiB
LEAST_GROUPS = 4  # with fewer, their resamples say nothing of other groups
Statistic = Callable[[np.ndarray], np.ndarray]
Correlation = Callable[[np.ndarray, np.ndarray], np.ndarray]  # pearson or spearman


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return (low, high), Wilson's (1927) interval of `successes` in `n` trials. It stays in [0, 1], and is not empty at 0 or n."""
    if not 0 <= successes <= n or n == 0:
        raise UsageError(f"{successes} successes in {n} trials: expected 0 <= successes <= n and n >= 1")
    low, high = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(low), float(high)


def percentiles(drawn: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Return (low, high), the percentile interval of bootstrap values (R,). NaN is ignored; if all are NaN, both are NaN."""
    known = drawn[~np.isnan(drawn)]
    if len(known) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(known, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def bootstrap(statistic: Statistic, clusters: np.ndarray, generator: np.random.Generator, resamples: int = 1000) -> np.ndarray:
    """Return values (R, ...) of a statistic in resamples of whole clusters. `clusters` (N,) are numbers from 0 without gaps."""
    if len(clusters) == 0:
        raise UsageError("no samples to draw from; check that the data is not empty")
    blocks = _drawn(int(clusters.max()) + 1, resamples, generator, len(clusters))
    return np.concatenate([statistic(times[:, clusters].astype(np.float64)) for times in blocks])


def kind_bootstrap(statistic: Statistic, kinds: np.ndarray, generator: np.random.Generator, resamples: int = 1000) -> np.ndarray:
    """Return the exact bootstrap (R, ...) of a statistic of counts `kinds` (K,). Resampled counts are multinomial: cost O(R K)."""
    n = int(kinds.sum())
    block = max(1, BLOCK // len(kinds))
    sizes = (min(block, resamples - start) for start in range(0, resamples, block))
    return np.concatenate([statistic(generator.multinomial(n, kinds / n, size=size).astype(np.float64)) for size in sizes])


def bootstrap_weights(n: int, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Return (R, n) float32 weights of n items in R resamples: how often each was drawn, divided by n. Compute once, use many times."""
    return np.concatenate([times.astype(np.float32) for times in _drawn(n, resamples, generator, n)]) / n


def _drawn(groups: int, resamples: int, generator: np.random.Generator, width: int) -> Iterator[np.ndarray]:
    """Yield (r, G) int64, how often each group was drawn, in blocks of as many resamples as fit with `width` values each."""
    block = max(1, BLOCK // width)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = generator.integers(0, groups, size=(size, groups)) + groups * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * groups).reshape(size, groups)


def mean_of(values: np.ndarray) -> Statistic:
    """Return the mean of `values` (N,) as a statistic."""
    numbers = values.astype(np.float64)
    return lambda weights: weights @ numbers / weights.sum(axis=1)


def median_of(values: np.ndarray) -> Statistic:
    """Return the median of `values` (N,) as a statistic. For an even number of draws it is the mean of the middle two."""
    order = np.argsort(values, kind="stable")
    ascending = np.asarray(values, dtype=np.float64)[order]

    def median(weights: np.ndarray) -> np.ndarray:
        reached = np.cumsum(weights[:, order], axis=1)  # (r, N)
        half = reached[:, -1:] / 2
        lower, upper = (reached >= half).argmax(axis=1), (reached > half).argmax(axis=1)
        return (ascending[lower] + ascending[upper]) / 2

    return median


def pearson(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return Pearson correlations along the last axis of two arrays (..., n); NaN where one is constant."""
    a, b = (values - values.mean(-1, keepdims=True) for values in (np.asarray(first, float), np.asarray(second, float)))
    scale = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.divide((a * b).sum(-1), scale, out=np.full(np.shape(scale), np.nan), where=scale > 1e-12)


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return Spearman correlations along the last axis of two arrays (..., n). Ties get their mean rank; NaN where one is constant."""
    return pearson(stats.rankdata(first, axis=-1), stats.rankdata(second, axis=-1))


def drawn_groups(groups: np.ndarray, resamples: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Return the positions of each resample of whole groups; `groups` (n,) are their names. An empty list for fewer than 4 groups.

    Points of a group, such as the layers of one encoder, resemble each other: drawn one by one they would give too narrow an interval.
    """
    members = [np.flatnonzero(groups == name) for name in dict.fromkeys(groups.tolist())]
    if len(members) < LEAST_GROUPS:
        return []
    return [np.concatenate([members[group] for group in row]) for row in generator.integers(0, len(members), (resamples, len(members)))]


def correlation_interval(
    first: np.ndarray, second: np.ndarray, groups: np.ndarray, correlation: Correlation, generator: np.random.Generator,
    resamples: int = 1000,
) -> tuple[float, float, float]:  # fmt: skip
    """Return (value, low, high) of a correlation of two arrays (n,); the interval resamples whole `groups` (n,).

    The value is NaN for fewer than 4 points, the interval for fewer than 4 groups.
    """
    if len(first) < 4:
        return (float("nan"),) * 3
    drawn = [float(correlation(first[rows], second[rows])) for rows in drawn_groups(groups, resamples, generator)]
    return float(correlation(first, second)), *percentiles(np.array(drawn))
