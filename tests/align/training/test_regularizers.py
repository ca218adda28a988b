"""FuseMix and STRUCTURE against values worked by hand, a loop over pairs, and finite differences."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from align.common.seeds import generator
from align.training.regularizers import MAX_ROWS, fusemix, neighbourhood_distance, structure


def rows(count, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, width)))


def test_fusemix_mixes_all_sides_with_one_share_and_one_partner_each():
    ones = torch.eye(6, dtype=torch.float64)  # row i of the result shows what was mixed: s at i, 1 - s at its partner
    images, captions, more = fusemix([ones, 10 * ones, ones.half()], 0.5, seed=3, step=7)
    share = generator(3, 5, 7).beta(0.5, 0.5)
    assert torch.allclose(captions, 10 * images) and torch.allclose(more, images.float(), atol=1e-3) and more.dtype == torch.float32
    assert torch.allclose(images.diagonal(), torch.full((6,), share, dtype=torch.float64))
    partners = (images - share * ones).argmax(1).tolist()
    assert all(images[i, p] == pytest.approx(1 - share) for i, p in enumerate(partners)) and torch.allclose(images.sum(1), ones.sum(1))
    at, seen = 0, []
    while at not in seen:
        seen, at = [*seen, at], partners[at]
    assert sorted(seen) == list(range(6))  # one cycle: nobody is its own partner, no two are each other's


def test_fusemix_depends_on_seed_step_and_rank_and_on_nothing_else():
    def mixed(alpha=1.0, **where):
        torch.manual_seed(int(torch.randint(1 << 30, ())))  # whatever the global state is
        return fusemix([torch.eye(64)], alpha, **{"seed": 1, "step": 2, **where})[0]

    first = mixed()
    assert torch.equal(first, mixed(rank=0)) and first.diagonal()[0] == pytest.approx(generator(1, 5, 2).beta(1, 1), abs=1e-6)
    assert not torch.allclose(first, mixed(seed=2)) and not torch.allclose(first, mixed(step=3))
    other = mixed(rank=1)  # other partners, but the same share on all processes
    assert not torch.allclose(first, other) and torch.equal(first.diagonal(), other.diagonal())


def test_the_share_is_drawn_from_beta():
    shares = [float(fusemix([torch.eye(3)], 2.0, seed=0, step=step)[0][0, 0]) for step in range(400)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03) and np.var(shares) == pytest.approx(1 / 20, abs=0.01)  # 1 / (4 (2 alpha + 1))


def markov(points):
    """Write the Markov matrix down entry by entry."""
    points = points.numpy() / np.linalg.norm(points.numpy(), axis=1)[:, None]
    points = points - points.mean(axis=0)
    count, matrix = len(points), []
    for i in range(count):
        cosines = [float(points[i] @ points[j] / np.linalg.norm(points[i]) / np.linalg.norm(points[j])) for j in range(count)]
        weights = [0.0 if i == j else math.exp(cosines[j] / 0.05) for j in range(count)]
        matrix.append([weight / sum(weights) for weight in weights])
    return np.array(matrix)


def divergence(p, q):
    total = 0.0
    for a, b in zip(p, q, strict=True):
        middle = (a + b) / 2
        total += (a * math.log(a / middle) if a > 0 else 0) / 2 + (b * math.log(b / middle) if b > 0 else 0) / 2
    return total


@pytest.mark.parametrize("levels", [1, 3])
def test_the_distance_is_that_of_a_loop_over_rows(levels):
    features, embeddings = rows(7, 5), rows(7, 3, seed=1)
    p, q, expected = markov(features), markov(embeddings), 0.0
    for level in range(1, levels + 1):
        wide_p, wide_q = np.linalg.matrix_power(p, level), np.linalg.matrix_power(q, level)
        expected += np.mean([divergence(wide_p[i], wide_q[i]) for i in range(7)]) / level / levels
    assert float(neighbourhood_distance(features, embeddings, levels)) == pytest.approx(expected, rel=1e-9) and 0 < expected < math.log(2)


def test_kept_neighbourhoods_are_at_distance_zero_and_disjoint_ones_at_ln_2():
    features = rows(20, 6)
    turned = functional.normalize(features, dim=1) @ torch.linalg.qr(rows(6, 6, seed=2)).Q
    assert float(neighbourhood_distance(features, features, 3)) == 0
    assert float(neighbourhood_distance(features, 7 * turned, 3)) == pytest.approx(0, abs=1e-12)
    assert float(neighbourhood_distance(features, features[torch.arange(20).roll(1)])) > 0.1
    angles = torch.tensor([0.0, 0.01, math.pi, math.pi + 0.01])  # 0-1 and 2-3 are neighbors, then 0-2 and 1-3
    points = torch.stack([angles.cos(), angles.sin()], 1).double()
    assert float(neighbourhood_distance(points, points[[0, 2, 1, 3]])) == pytest.approx(math.log(2), abs=1e-6)
    assert float(neighbourhood_distance(points[:1], points[:1])) == 0


def test_its_gradient_is_that_of_finite_differences_and_spares_the_features():
    features, embeddings = rows(6, 5).requires_grad_(), rows(6, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda e: neighbourhood_distance(features.detach(), e, 2), (embeddings,))
    neighbourhood_distance(features, embeddings).backward()
    assert features.grad is None and float(embeddings.grad.abs().max()) > 0
    far = (100 * torch.eye(6, dtype=torch.float32)).requires_grad_()
    neighbourhood_distance(features.detach().float(), far, 2).backward()
    assert torch.isfinite(far.grad).all()


def test_images_count_once_and_captions_their_mean():
    features, embeddings = [rows(9, 5), rows(9, 4, 1), rows(9, 4, 2)], [rows(9, 3, seed) for seed in (3, 4, 5)]
    one = [float(neighbourhood_distance(f, e, 2)) for f, e in zip(features, embeddings, strict=True)]
    assert float(structure(features, embeddings, 2, seed=0, step=0)) == pytest.approx(one[0] + (one[1] + one[2]) / 2)


def test_of_a_large_batch_a_sample_is_looked_at():
    features, embeddings = [rows(MAX_ROWS + 50, 3)] * 2, [rows(MAX_ROWS + 50, 2, 1)] * 2
    found = {where: float(structure(features, embeddings, 1, seed=0, step=where[0], rank=where[1])) for where in ((0, 0), (1, 0), (0, 1))}
    assert len(set(found.values())) == 3 and float(structure(features, embeddings, 1, seed=0, step=0)) == found[0, 0]
    picked = np.sort(generator(0, 6, 0, 0).choice(MAX_ROWS + 50, MAX_ROWS, replace=False))
    assert found[0, 0] == pytest.approx(2 * float(neighbourhood_distance(features[0][picked], embeddings[0][picked])))
