"""Statistics of two models on the same samples: exact tests, paired bootstrap, correction for many tests. Pure.

Shapes: `N` samples, `G` clusters of samples that belong together (the captions of an image), `R` resamples, `C` classes. A statistic
maps weights (R, N), how often each sample was drawn, to (R,). Weights of one give the plain value.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from align.common.intervals import Statistic, bootstrap

RESAMPLES = 10_000
ROUNDING = 1e-12  # rounding error of summed fractions; smaller differences count as 0


def sign_flip_p(differences: np.ndarray) -> float:
    """Return the exact two-sided p of the sum of `differences` (G,) int, if each sign were a coin toss.

    With one difference of -1, 0 or 1 per sample, this is McNemar's exact test (Q. McNemar, 1947). With sums over clusters it stays right
    if the samples of a cluster are alike; McNemar's test does not.
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    chance = np.ones(1)  # probability of every sum from -total to total
    for size, count in zip(sizes, counts, strict=True):
        logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])  # log k!
        step = np.zeros(2 * size * count + 1)
        step[:: 2 * size] = np.exp(logs[count] - logs - logs[::-1] - count * np.log(2))
        chance = np.convolve(chance, step)
    total = len(chance) // 2
    far = np.abs(np.arange(-total, total + 1)) >= abs(int(differences.sum()))
    return float(min(1.0, chance[far].sum()))


def bootstrap_p(drawn: np.ndarray) -> float:
    """Return the two-sided p of no difference from bootstrapped differences (R,): twice the smaller tail beyond 0, never 0."""
    tail = min(int((drawn <= ROUNDING).sum()), int((drawn >= -ROUNDING).sum()))
    return min(1.0, 2 * (tail + 1) / (len(drawn) + 1))


def paired_bootstrap(
    pairs: Mapping[str, tuple[Statistic, Statistic]], clusters: np.ndarray, generator: np.random.Generator, resamples: int = RESAMPLES
) -> dict[str, np.ndarray]:
    """Return bootstrapped differences (R,), second minus first, of each pair on the same resamples of whole `clusters` (N,), 0..G-1."""

    def differences(weights: np.ndarray) -> np.ndarray:
        return np.stack([second(weights) - first(weights) for first, second in pairs.values()], axis=1)

    return dict(zip(pairs, bootstrap(differences, clusters, generator, resamples).T, strict=True))


def holm(p: Sequence[float]) -> list[float]:
    """Return Holm-adjusted p-values in the given order (S. Holm, 1979). They bound the chance of any false finding."""
    adjusted, highest = [0.0] * len(p), 0.0
    for place, at in enumerate(sorted(range(len(p)), key=lambda at: p[at])):
        highest = max(highest, min(1.0, (len(p) - place) * p[at]))
        adjusted[at] = highest
    return adjusted


def ratio_of(part: np.ndarray, whole: np.ndarray) -> Statistic:
    """Return the statistic sum of `part` / sum of `whole`, both (N,)."""
    over, under = part.astype(np.float64), whole.astype(np.float64)
    return lambda weights: (weights @ over) / (weights @ under)


def mean_per_class_of(correct: np.ndarray, labels: np.ndarray) -> Statistic:
    """Return the statistic mean over the drawn classes of the accuracy, from `correct` (N,) bool and `labels` (N,)."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    hits = np.asarray(correct, dtype=np.float64)[order]

    def mean(weights: np.ndarray) -> np.ndarray:
        sorted_weights = weights[:, order]
        total = np.add.reduceat(sorted_weights, starts, axis=1)  # (R, C)
        return _mean_ratio(np.add.reduceat(sorted_weights * hits, starts, axis=1), total)

    return mean


def mean_ratio_of(part: np.ndarray, whole: np.ndarray) -> Statistic:
    """Return the statistic mean over classes of sum of `part` / sum of `whole`, both (N, C), without classes whose sum is 0."""
    over, under = part.astype(np.float64), whole.astype(np.float64)
    return lambda weights: _mean_ratio(weights @ over, weights @ under)


def _mean_ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    there = whole > 0
    return np.divide(part, whole, out=np.zeros_like(part), where=there).sum(axis=1) / np.maximum(there.sum(axis=1), 1)
