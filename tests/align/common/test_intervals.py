"""Intervals, ranks and correlations against published values, loops over repeated items, and SciPy."""

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from align.common import intervals
from align.common.errors import UsageError
from align.common.intervals import (
    bootstrap,
    bootstrap_weights,
    correlation_interval,
    drawn_groups,
    kind_bootstrap,
    mean_of,
    median_of,
    pearson,
    percentiles,
    spearman,
    wilson_interval,
)

RNG = np.random.default_rng


def test_intervals_need_no_torch():
    code = "import sys, align.common.intervals; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_wilson_interval_equals_published_values():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(0, 20)[0] == 0.0 and wilson_interval(20, 20)[1] == 1.0
    wide, narrow = wilson_interval(5, 10, 0.99), wilson_interval(5, 10, 0.9)
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]


@pytest.mark.parametrize("n", [1, 7, 999])
def test_wilson_interval_is_its_formula(n):
    for successes, confidence in ((0, 0.95), (n // 3, 0.9), (n, 0.99)):
        z = stats.norm.ppf(0.5 + confidence / 2)
        p = successes / n
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        expected = [(p + z * z / (2 * n) + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
        assert wilson_interval(successes, n, confidence) == pytest.approx(expected, abs=1e-14)


def test_wilson_interval_refuses_impossible_counts():
    for successes, n in ((3, 2), (-1, 5), (0, 0)):
        with pytest.raises(UsageError):
            wilson_interval(successes, n)


def test_percentiles_leave_out_what_does_not_exist():
    assert percentiles(np.array([0.0, np.nan, 1.0, 2.0, np.nan]), 0.5) == (0.5, 1.5)
    assert all(map(math.isnan, percentiles(np.full(3, np.nan))))


def test_statistics_of_weights_are_those_of_repeated_values():
    rng = RNG(0)
    values, weights = rng.integers(1, 9, size=7), rng.integers(0, 4, size=(50, 7))
    weights[:, 0] += 1  # never none
    for row, mean, median in zip(weights, mean_of(values)(weights), median_of(values)(weights), strict=True):
        repeated = np.repeat(values, row)
        assert mean == pytest.approx(repeated.mean()) and median == np.median(repeated)


def test_bootstrap_is_the_loop_over_drawn_samples():
    """The order of the draws is part of what is published: all of a resample before the next."""
    values, rng = RNG(1).normal(size=40), RNG(5)
    expected = [values[rng.integers(0, 40, 40)].mean() for _ in range(300)]
    np.testing.assert_allclose(bootstrap(mean_of(values), np.arange(40), RNG(5), 300), expected, rtol=1e-12)
    rng = RNG(5)
    weights = [np.bincount(rng.integers(0, 40, 40), minlength=40) / 40 for _ in range(300)]
    np.testing.assert_array_equal(bootstrap_weights(40, 300, RNG(5)), np.float32(weights))


def test_bootstrap_of_clusters_is_the_loop_over_drawn_clusters():
    clusters = np.array([0, 0, 1, 2, 2, 2, 3])
    values, rng = RNG(1).integers(0, 9, 7), RNG(5)
    expected = [np.median(np.concatenate([values[clusters == c] for c in rng.integers(0, 4, 4)])) for _ in range(200)]
    assert bootstrap(median_of(values), clusters, RNG(5), 200).tolist() == expected


def test_a_bootstrap_is_the_same_in_blocks_of_any_size(monkeypatch):
    def drawn():
        sizes = []

        def statistic(weights):
            sizes.append(len(weights))
            return np.stack([mean_of(np.arange(12))(weights), median_of(np.arange(12))(weights)], axis=1)

        kinds = kind_bootstrap(lambda counts: counts @ np.arange(3), np.array([5, 1, 3]), RNG(1), 50)
        return sizes, bootstrap(statistic, np.arange(12) // 2, RNG(0), 50), kinds, bootstrap_weights(12, 50, RNG(2))

    sizes, *whole = drawn()
    monkeypatch.setattr(intervals, "BLOCK", 100)
    blocks, *pieces = drawn()
    assert sizes == [50] and blocks == [8] * 6 + [2] and whole[0].shape == (50, 2)
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(one, other)


def test_bootstrap_of_a_mean_is_near_the_normal_interval_and_repeats_exactly():
    values = RNG(1).normal(3.0, 2.0, size=400)

    def interval(seed, resamples=1000):
        return percentiles(bootstrap(mean_of(values), np.arange(400), RNG(seed), resamples))

    half = 1.96 * values.std() / 20
    assert interval(0, 4000) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert interval(0) == interval(0) != interval(1)
    kept = percentiles(bootstrap_weights(400, 4000, RNG(0)) @ values.astype(np.float32))
    assert kept == pytest.approx(interval(0, 4000), abs=1e-5)


def test_a_cluster_is_drawn_whole():
    drawn = bootstrap(lambda weights: weights, np.array([0, 0, 1, 1, 1, 1]), RNG(0))
    assert drawn.shape == (1000, 6) and (drawn[:, 0] + drawn[:, 2] == 2).all()
    assert (np.ptp(drawn[:, :2], axis=1) == 0).all() and (np.ptp(drawn[:, 2:], axis=1) == 0).all()
    assert set(drawn[:, 0].tolist()) == {0, 1, 2}


def test_counts_of_kinds_are_those_of_a_bootstrap_over_samples():
    kinds = np.array([30, 0, 10])
    counts = kind_bootstrap(lambda drawn: drawn, kinds, RNG(0), 4000)
    assert (counts.sum(axis=1) == 40).all() and (counts[:, 1] == 0).all()
    single = bootstrap(mean_of(np.repeat([1, 0, 0], kinds)), np.arange(40), RNG(1), 4000)
    assert percentiles(counts[:, 0] / 40) == pytest.approx(percentiles(single), abs=0.03)
    assert counts[:, 0].std() == pytest.approx(math.sqrt(40 * 0.75 * 0.25), rel=0.05)


def test_nothing_to_draw_from_is_an_error():
    with pytest.raises(UsageError, match="no samples"):
        bootstrap(mean_of(np.zeros(0)), np.zeros(0, dtype=np.int64), RNG(0))


def test_correlations_by_hand():
    assert float(pearson(np.array([1, 2, 3]), np.array([1, 2, 4]))) == pytest.approx(3 / math.sqrt(2 * 14 / 3))
    assert float(spearman(np.array([1, 2, 3, 4]), np.array([1, 8, 27, 64]))) == pytest.approx(1)
    assert float(spearman(np.array([1, 2, 3, 4]), np.array([1, 3, 2, 4]))) == pytest.approx(1 - 6 * 2 / (4 * 15))
    tied = np.array([30, 10, 20, 20])  # ranks 4, 1, 2.5, 2.5
    assert float(spearman(tied, np.arange(4))) == pytest.approx(float(pearson(np.array([4, 1, 2.5, 2.5]), np.arange(4))))
    assert math.isnan(float(pearson(np.ones(3), np.arange(3)))) and math.isnan(float(spearman(np.ones(3), np.arange(3))))


def test_correlations_are_scipys_along_the_last_axis():
    x, y = RNG(0).integers(0, 6, (5, 30)), RNG(1).integers(0, 6, (5, 30))  # many ties
    for row, (rho, r) in enumerate(zip(spearman(x, y), pearson(x, y), strict=True)):
        assert rho == pytest.approx(stats.spearmanr(x[row], y[row]).statistic)
        assert r == pytest.approx(stats.pearsonr(x[row], y[row]).statistic)


def test_intervals_of_correlations():
    x = RNG(0).normal(size=60)
    y = x + RNG(1).normal(size=60)
    found, low, high = correlation_interval(x, y, np.arange(60), pearson, RNG(1))
    rng = RNG(1)
    drawn = [stats.pearsonr(x[rows], y[rows]).statistic for rows in (rng.integers(0, 60, 60) for _ in range(1000))]
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975]))) and low < found < high
    assert all(math.isnan(part) for part in correlation_interval(x[:3], x[:3], np.arange(3), pearson, RNG(1)))
    assert correlation_interval(x, x, np.arange(60), spearman, RNG(1)) == pytest.approx((1, 1, 1))
    assert math.isnan(correlation_interval(x, y, np.arange(60) % 3, pearson, RNG(1))[1]), "three groups say nothing of a fourth"


def test_points_of_a_group_are_drawn_together():
    groups = np.array(["a", "b", "a", "c", "d"])
    for rows in drawn_groups(groups, 50, RNG(0)):
        assert (rows == 0).sum() == (rows == 2).sum() and 4 <= len(rows) <= 8
    x = np.repeat(RNG(2).normal(size=8), 10) + RNG(3).normal(size=80) * 0.01  # 8 encoders of 10 layers that hardly differ
    y = np.repeat(RNG(4).normal(size=8), 10)
    together, alone = (correlation_interval(x, y, of, pearson, RNG(1)) for of in (np.repeat(np.arange(8), 10), np.arange(80)))
    assert together[2] - together[1] > 2 * (alone[2] - alone[1])
