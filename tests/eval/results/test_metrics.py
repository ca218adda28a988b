"""Metrics against cases worked out by hand."""

import numpy as np
import pytest

from align.common.errors import UsageError
from align.common.intervals import wilson_interval
from eval.results.metrics import (
    accuracy_at,
    chance_recall,
    class_accuracy,
    clustered_recall_interval,
    label_ranks,
    majority_rates,
    mean_per_class,
    mean_per_class_interval,
    median_rank,
    recall_at,
)


def test_label_ranks_count_better_classes_and_ties_against_the_model():
    scores = np.array([[0.1, 0.9, 0.5], [0.7, 0.2, 0.7], [0.3, 0.3, 0.3]])
    assert label_ranks(scores, np.array([1, 0, 2])).tolist() == [1, 2, 3]  # clear win; tie with one; all equal: last
    assert label_ranks(scores, np.array([0, 1, 0])).tolist() == [3, 3, 3]


def test_one_item_of_one_class():
    assert label_ranks(np.array([[0.4]]), np.array([0])).tolist() == [1]
    assert recall_at(np.array([1]), 1) == 1.0
    assert median_rank(np.array([7])) == 7.0


def test_accuracy_at_5_with_fewer_than_5_classes_is_refused():
    ranks = np.array([1, 2, 5, 6])
    assert accuracy_at(ranks, 1, 10) == 0.25
    assert accuracy_at(ranks, 5, 10) == 0.75
    assert accuracy_at(np.array([1, 5]), 5, 5) == 1.0
    with pytest.raises(UsageError, match="4 classes"):
        accuracy_at(np.array([1, 4]), 5, 4)


def test_median_rank_of_an_even_number_is_the_mean_of_the_two_in_the_middle():
    assert median_rank(np.array([1, 9, 2, 4])) == 3.0


def test_mean_per_class_weighs_classes_not_images():
    labels = np.array([0, 0, 0, 0, 2])
    correct = np.array([True, True, True, False, False])
    per_class = class_accuracy(correct, labels, 3)
    assert per_class[0] == 0.75 and np.isnan(per_class[1]) and per_class[2] == 0.0
    assert mean_per_class(correct, labels, 3) == 0.375  # the class without images does not count
    assert correct.mean() == 0.6


def test_majority_names_the_most_frequent_classes():
    labels = np.array([3, 3, 3, 1, 1, 0])
    assert majority_rates(labels, 5, (1, 2, 5)) == {1: 0.5, 2: 5 / 6, 5: 1.0}


def test_chance_recall_equals_the_count_of_all_orders():
    from itertools import permutations

    targets, positives = 5, 2
    for k in (1, 2, 3, 4, 5):
        orders = list(permutations(range(targets)))
        hits = sum(any(item < positives for item in order[:k]) for order in orders)
        assert chance_recall(targets, np.array([positives]), k) == pytest.approx(hits / len(orders))
    assert chance_recall(10, np.array([1]), 5) == pytest.approx(0.5)
    assert chance_recall(3, np.array([1, 3]), 1) == pytest.approx((1 / 3 + 1) / 2)
    assert chance_recall(4, np.array([1]), 10) == 1.0


def test_mean_per_class_interval_equals_the_bootstrap_over_samples():
    rng = np.random.default_rng(2)
    labels = np.repeat(np.arange(6), [100, 10, 10, 10, 10, 10])
    correct = rng.random(150) < np.where(labels == 0, 0.05, 0.8)
    drawn = [mean_per_class(correct[rows], labels[rows], 6) for rows in np.random.default_rng(3).integers(0, 150, (2000, 150))]
    fast = mean_per_class_interval(correct, labels, 6, np.random.default_rng(4))
    assert fast == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.015)
    assert fast[0] < mean_per_class(correct, labels, 6) < fast[1]


@pytest.mark.parametrize("metric", [lambda x: recall_at(x, 1), median_rank, lambda x: majority_rates(x, 2, (1,))])
def test_no_samples_is_an_error_not_a_nan(metric):
    with pytest.raises(UsageError, match="no samples"):
        metric(np.zeros(0, dtype=np.int64))


def test_captions_of_an_image_that_agree_widen_the_interval():
    rng = np.random.default_rng(0)
    hit = rng.random(200) < 0.5
    clusters = np.repeat(np.arange(200), 5)
    low, high = clustered_recall_interval(np.repeat(hit, 5), clusters, np.random.default_rng(1))
    of_images = wilson_interval(int(hit.sum()), 200)
    assert low == pytest.approx(of_images[0], abs=0.01) and high == pytest.approx(of_images[1], abs=0.01)
    naive = wilson_interval(5 * int(hit.sum()), 1000)
    assert high - low > 2 * (naive[1] - naive[0])
    # captions that have nothing to do with each other: as many trials as captions
    hits = rng.random(1000) < 0.5
    low, high = clustered_recall_interval(hits, clusters, np.random.default_rng(1))
    naive = wilson_interval(int(hits.sum()), 1000)
    assert high - low == pytest.approx(naive[1] - naive[0], rel=0.15)


def test_recall_intervals_of_all_none_and_single_queries_are_wilson():
    clusters = np.array([0, 0, 1, 1, 2])
    rng = np.random.default_rng(0)
    assert clustered_recall_interval(np.ones(5, dtype=bool), clusters, rng) == wilson_interval(3, 3)
    assert clustered_recall_interval(np.zeros(5, dtype=bool), clusters, rng) == wilson_interval(0, 3)
    assert clustered_recall_interval(np.array([True, False, True]), np.arange(3), rng) == wilson_interval(2, 3)
