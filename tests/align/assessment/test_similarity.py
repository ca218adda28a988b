"""Pure scores against hand-worked values, brute-force loops and textbook formulas."""

import itertools
import math

import numpy as np
import pytest
import torch

from align.assessment.similarity import (
    chamfer,
    cka,
    cka_interval,
    cosines,
    half_samples,
    knn_correct,
    knn_votes,
    linear_gram,
    neighbor_overlap,
    neighbors,
    patch_overlap,
    rbf_gram,
    vote_correct,
    whiten,
)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(x, y, gram=linear_gram, debiased=False):
    return float(cka(gram(x), gram(y), debiased)[0])


def rotation(width, seed=5):
    return torch.linalg.qr(noise(width, width, seed=seed))[0]


def test_linear_cka_by_hand():
    # x = (-1, 0, 1), y = (1, -2, 1): both centered and orthogonal -> 0; z = (-1, 0, 1) + 1 * y -> (x.z)^2 / (|x|^2 |z|^2) = 4 / 16
    x, y = torch.tensor([[-1.0], [0.0], [1.0]]), torch.tensor([[1.0], [-2.0], [1.0]])
    assert value(x, y) == pytest.approx(0, abs=1e-12)
    assert value(x, x + y) == pytest.approx(2**2 / (2 * 8))
    assert value(x, 3 * x + 7) == pytest.approx(1)


def test_linear_cka_is_the_formula_over_features():
    x, y = noise(40, 6), noise(40, 9, seed=1) + noise(40, 1)
    a, b = x - x.mean(0), y - y.mean(0)
    expected = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())  # Kornblith et al. 2019, eq. 5
    assert value(x, y) == pytest.approx(float(expected))


def unbiased_hsic(k, l):  # noqa: E741 - the paper's letters
    """Song et al. 2012 as sums over tuples of different items."""
    n, items = len(k), range(len(k))
    first = sum(k[i, j] * l[i, j] for i, j in itertools.permutations(items, 2)) / (n * (n - 1))
    second = sum(k[i, j] * l[q, r] for i, j, q, r in itertools.permutations(items, 4)) / math.perm(n, 4)
    third = sum(k[i, j] * l[i, q] for i, j, q in itertools.permutations(items, 3)) / math.perm(n, 3)
    return float(first + second - 2 * third)


@pytest.mark.parametrize("gram", [linear_gram, rbf_gram])
def test_debiased_cka_is_a_u_statistic(gram):
    x, y = noise(7, 3), noise(7, 2, seed=1) + noise(7, 1)
    k, l = gram(x), gram(y)  # noqa: E741
    expected = unbiased_hsic(k, l) / math.sqrt(unbiased_hsic(k, k) * unbiased_hsic(l, l))
    assert value(x, y, gram, debiased=True) == pytest.approx(expected)


@pytest.mark.parametrize(("gram", "debiased"), [(linear_gram, False), (linear_gram, True), (rbf_gram, False), (rbf_gram, True)])
def test_cka_is_one_with_itself_and_ignores_rotation_scale_and_shift(gram, debiased):
    x, y = noise(50, 8), noise(50, 5, seed=1) + noise(50, 1)
    assert value(x, x, gram, debiased) == pytest.approx(1)
    assert value(x @ rotation(8), x, gram, debiased) == pytest.approx(1)
    assert value(4 * x @ rotation(8) - 3, y, gram, debiased) == pytest.approx(value(x, y, gram, debiased))
    assert value(x, y, gram, debiased) == pytest.approx(value(y, x, gram, debiased))


def test_linear_cka_does_not_ignore_other_linear_maps():
    x = noise(50, 4)
    assert value(x * torch.tensor([10.0, 1, 1, 1]), x) < 0.9


def test_unrelated_wide_features_fool_the_biased_estimator_only():
    biased, debiased = [], []
    for seed in range(20):
        x, y = noise(60, 200, seed=2 * seed), noise(60, 200, seed=2 * seed + 1)
        biased.append(value(x, y))
        debiased.append(value(x, y, debiased=True))
    assert np.mean(biased) > 0.7
    assert abs(np.mean(debiased)) < 0.02


def test_features_that_do_not_vary_score_zero():
    x = noise(20, 3)
    for gram, debiased in itertools.product((linear_gram, rbf_gram), (False, True)):
        assert value(torch.ones(20, 3), x, gram, debiased) == 0
        assert value(torch.ones(20, 3), torch.ones(20, 3), gram, debiased) == 0


def test_cka_over_a_choice_of_items_is_cka_of_those_items():
    x, y = noise(30, 4), noise(30, 5, seed=1) + noise(30, 1)
    rows = half_samples(30, 3, np.random.default_rng(0))
    assert rows.sum(1).tolist() == [15, 15, 15]
    for debiased in (False, True):
        together = cka(linear_gram(x), linear_gram(y), debiased, rows)
        for row, found in zip(rows.bool(), together, strict=True):
            assert float(found) == pytest.approx(value(x[row], y[row], debiased=debiased))


def test_the_interval_is_as_wide_as_repeated_sampling():
    def draw(seed, n=200):
        common = noise(n, 2, seed=seed)
        return common + noise(n, 2, seed=seed + 1), common + noise(n, 2, seed=seed + 2)

    values = [value(*draw(10 * s), debiased=True) for s in range(60)]
    x, y = draw(7001)
    halves = half_samples(200, 300, np.random.default_rng(0))
    found, low, high = cka_interval(linear_gram(x), linear_gram(y), True, halves)
    assert low < found < high
    assert (high - low) / (2 * 1.96) == pytest.approx(np.std(values), rel=0.4)


def test_neighbors_leave_the_item_and_ties_out():
    similar = torch.tensor([[9.0, 3, 2, 1], [3, 9, 2, 2], [2, 2, 9, 2], [1, 2, 2, 9]])
    assert neighbors(similar, 1).tolist() == [
        [False, True, False, False],
        [True, False, False, False],
        [False] * 4,  # three tie for one place
        [False] * 4,
    ]
    assert neighbors(similar, 3).sum(1).tolist() == [3, 3, 3, 3]


def test_neighbor_overlap_by_hand():
    line = torch.tensor([[0.0], [1], [3], [7]])
    first = -(line - line.T).abs()  # nearest two: 0: 1 2; 1: 0 2; 2: 1 0; 3: 2 1
    other = torch.tensor([[0.0], [5], [1], [2]])
    second = -(other - other.T).abs()  # 0: 2 3; 1: 3 2; 2: 0 3 tie at 1 and so both; 3: 2 then 0
    assert neighbor_overlap(first, second, 2).tolist() == [0.5, 0.5, 0.5, 0.5]
    assert neighbor_overlap(first, first, 2).tolist() == [1.0] * 4


def test_overlap_of_unrelated_features_is_chance_and_of_constant_ones_zero():
    shared = neighbor_overlap(cosines(noise(400, 20)), cosines(noise(400, 20, seed=1)), 20)
    assert float(shared.mean()) == pytest.approx(20 / 399, abs=0.01)
    same = cosines(torch.ones(50, 4))
    assert float(neighbor_overlap(same, same, 5).sum()) == 0


def test_whitened_rows_are_uncorrelated_with_variance_one():
    rows = noise(500, 6) @ noise(6, 6, seed=2) + 5
    white = whiten(rows, 4)
    np.testing.assert_allclose(np.cov(white.numpy().T), np.eye(4), atol=1e-4)
    assert whiten(rows[:, :1].repeat(1, 6), 4).shape == (500, 1)  # rank one
    assert whiten(torch.ones(10, 3), 4).abs().sum() == 0


def test_whitening_keeps_the_directions_of_most_variance():
    rows = noise(300, 3) * torch.tensor([1.0, 100.0, 10.0])
    white = whiten(rows, 1)[:, 0].double()
    assert abs(np.corrcoef(white.numpy(), rows[:, 1].numpy())[0, 1]) > 0.999


@pytest.mark.parametrize("block", [1, 2, 8])
def test_chamfer_is_the_loop(block):
    patches = noise(5, 3, 4).float()
    unit = torch.nn.functional.normalize(patches, dim=-1)
    found = chamfer(patches, block)
    for i, j in itertools.product(range(5), repeat=2):
        table = unit[i] @ unit[j].T
        expected = (table.max(0).values.mean() + table.max(1).values.mean()) / 2
        assert float(found[i, j]) == pytest.approx(float(expected), abs=1e-6)


def test_patch_overlap_sees_a_common_neighborhood():
    topic = torch.arange(8).repeat_interleave(20)
    centers = 4 * noise(8, 16)
    patches = centers[topic][:, None] + noise(160, 5, 16, seed=1)
    captions = (4 * noise(8, 12, seed=2))[topic] + noise(160, 12, seed=3)
    assert float(patch_overlap(patches, captions, 16).mean()) > 0.7
    shuffled = captions[torch.randperm(160, generator=torch.Generator().manual_seed(0))]
    assert float(patch_overlap(patches, shuffled, 16).mean()) == pytest.approx(16 / 159, abs=0.05)


def test_votes_by_hand():
    similar = torch.tensor([[0.9, 0.8, 0.7, 0.1]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 1])
    votes = knn_votes(similar, labels, 3, 3, 0.07)[0]
    # relative to the nearest: class 0 one vote, class 1 exp(-0.1 / 0.07) + exp(-0.2 / 0.07) = 0.2397 + 0.0574, class 2 none
    np.testing.assert_allclose(votes.numpy(), [1.0, 0.29706, 0.0], atol=1e-4)
    np.testing.assert_allclose(knn_votes(similar, labels, 3, 3, 1.0)[0].numpy(), [1.0, math.exp(-0.1) + math.exp(-0.2), 0.0])
    assert knn_votes(similar, labels, 3, 1, 0.07)[0].tolist() == [1, 0, 0]


def test_a_tied_vote_is_wrong():
    votes = torch.tensor([[2.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    assert vote_correct(votes, torch.tensor([0, 0, 1])).tolist() == [True, False, False]


def test_knn_leaves_the_item_itself_out():
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [1.0, 0.05]])
    labels = torch.tensor([0, 0, 1, 1, 1])  # the last lies among class 0: with itself it would vote for 1
    assert knn_correct(features, labels, k=1).tolist() == [False, False, True, True, False]
    assert knn_correct(features, labels, k=100).tolist()[:1] == [False]
    assert not knn_correct(torch.ones(4, 2), torch.tensor([0, 0, 1, 1])).any()
