"""Probes: what they find where there is something to be found, and nothing where there is not."""

import numpy as np
import pytest
import torch

from align.assessment.probing import (
    CaptionedFeatures,
    Training,
    _recalled,
    fold_numbers,
    linear_probe_correct,
    probe_alignment,
    split_rows,
)
from align.common.errors import DataError
from align.model.dual_encoder import SailConfig, SailModel

CPU = torch.device("cpu")
QUICK = Training(width=32, batch_size=64, lr=3e-3, steps=200, every=10, patience=3)


def captioned(n, related=True, seed=0, each=2):
    random = np.random.default_rng(seed)
    meaning = random.normal(size=(n, 8))
    images = meaning @ random.normal(size=(8, 16))
    captions = np.repeat(meaning if related else random.permutation(meaning), each, axis=0) @ random.normal(size=(8, 12))
    owners = np.repeat(np.arange(n), each)
    return CaptionedFeatures(images.astype(np.float16), (captions + 0.3 * random.normal(size=captions.shape)).astype(np.float16), owners)


def test_the_split_is_disjoint_and_does_not_depend_on_the_candidate():
    rows = split_rows(1000, 100, 3)
    assert [len(part) for part in rows] == [850, 50, 100]
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(1000))
    assert all(np.array_equal(a, b) for a, b in zip(rows, split_rows(1000, 100, 3), strict=True))
    assert not np.array_equal(rows[2], split_rows(1000, 100, 4)[2])
    assert len(split_rows(1000, 900, 3)[2]) == 250
    with pytest.raises(DataError, match="too few"):
        split_rows(60, 1000, 0)


def test_only_keeps_the_captions_of_the_chosen_images():
    pairs = CaptionedFeatures(np.arange(3.0)[:, None], np.arange(6.0)[:, None], np.array([0, 1, 1, 1, 2, 2]))
    chosen = pairs.only(np.array([2, 1]))
    assert chosen.images[:, 0].tolist() == [2, 1]
    assert chosen.captions[:, 0].tolist() == [4, 5, 1, 2, 3] and chosen.owners.tolist() == [0, 0, 1, 1, 1]


def test_a_batch_draws_one_of_the_images_own_captions():
    pairs = CaptionedFeatures(np.arange(3.0)[:, None], np.arange(6.0)[:, None], np.array([0, 1, 1, 1, 2, 2]))
    drawn = [pairs.batch(np.array([1, 0]), 0, step).captions[0][:, 0].tolist() for step in range(60)]
    assert {row[1] for row in drawn} == {0} and {row[0] for row in drawn} == {1, 2, 3}
    assert drawn == [pairs.batch(np.array([1, 0]), 0, step).captions[0][:, 0].tolist() for step in range(60)]


def test_probing_finds_a_linear_relation_and_only_that():
    rows = split_rows(400, 100, 0)
    found = probe_alignment(captioned(400), rows, QUICK, 0, CPU)
    assert found.values.mean() > 0.9 and found.values.shape == (100,)
    assert (found.image_to_text + found.text_to_image) / 2 == pytest.approx(found.values.mean())
    nothing = probe_alignment(captioned(400, related=False), rows, QUICK, 0, CPU)
    assert nothing.values.mean() < 0.2  # chance is 0.1


def test_probing_is_a_pure_function_of_the_seed():
    rows = split_rows(200, 50, 0)
    first, again, other = (probe_alignment(captioned(200), rows, QUICK, seed, CPU) for seed in (0, 0, 1))
    assert np.array_equal(first.values, again.values) and first.history == again.history != other.history


def test_it_stops_when_the_validation_split_says_so_and_keeps_the_best_weights():
    rows = split_rows(200, 50, 0)
    found = probe_alignment(captioned(200), rows, QUICK, 0, CPU)
    assert found.converged and found.history[-1][0] < QUICK.steps
    best = max(found.history, key=lambda look: (look[1], -look[0]))
    assert found.steps == best[0] and found.history[-1][0] - found.steps == QUICK.patience * QUICK.every
    short = probe_alignment(captioned(200), rows, Training(width=32, batch_size=64, lr=1e-5, steps=7, every=5), 0, CPU)
    assert not short.converged and [step for step, _ in short.history] == [5, 7]


def test_recall_values_are_the_mean_of_both_ways_and_each_caption_counts_the_same():
    model = SailModel(SailConfig(vision_width=4, text_width=4, width=8, head="linear")).initialize(0)
    random = np.random.default_rng(0)
    owners = np.sort(np.concatenate([np.arange(30), random.integers(0, 30, 40)]))
    pairs = CaptionedFeatures(random.normal(size=(30, 4)).astype(np.float16), random.normal(size=(70, 4)).astype(np.float16), owners)
    values, image_to_text, text_to_image = _recalled(model, pairs)
    with torch.no_grad():
        scores = model.project_image(torch.from_numpy(pairs.images)) @ model.project_text(torch.from_numpy(pairs.captions)).T
    found = [any(owners[j] == i for j in scores[i].argsort(descending=True)[:10].tolist()) for i in range(30)]
    finding = [owners[j] in scores[:, j].argsort(descending=True)[:10].tolist() for j in range(70)]
    # with several right captions the best one counts, and wrong ones only are before it
    assert image_to_text == pytest.approx(np.mean(found)) and text_to_image == pytest.approx(np.mean(finding))
    assert values.mean() == pytest.approx((np.mean(found) + np.mean(finding)) / 2)


def test_folds_deal_out_every_class():
    labels = np.array([0] * 10 + [1] * 5 + [2] * 2)
    folds = fold_numbers(labels, 5, 0)
    assert np.bincount(folds[labels == 0]).tolist() == [2] * 5 and sorted(folds[labels == 1]) == list(range(5))
    assert len(set(folds[labels == 2])) == 2


def test_linear_probe_by_cross_validation():
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 25)
    corners = np.eye(4)[labels] * 6 + random.normal(size=(100, 4))
    assert linear_probe_correct(corners, labels, 0).mean() > 0.95
    wide = random.normal(size=(100, 300))  # separable in training, by chance
    assert linear_probe_correct(wide, labels, 0).mean() < 0.45
    assert not linear_probe_correct(np.ones((100, 3)), labels, 0).any()  # all classes tie
    assert linear_probe_correct(corners[:50], labels[:50], 0).mean() > 0.95  # two classes


def test_the_linear_probe_minimizes_cross_entropy_and_half_the_squared_weights():
    random, classes = np.random.default_rng(0), 5
    labels = np.arange(150) % classes
    features = random.normal(size=(150, 12)) + 2 * np.eye(classes, 12)[labels]
    features[:, 3] *= 100  # columns of other scales count the same
    numbers, expected = fold_numbers(labels, 5, 0), np.zeros(150, dtype=bool)
    for fold in range(5):
        inside = numbers != fold
        standard = torch.from_numpy((features - features[inside].mean(0)) / features[inside].std(0))
        weight, bias = torch.zeros(classes, 12).double().requires_grad_(), torch.zeros(classes).double().requires_grad_()
        targets = torch.from_numpy(labels[inside])
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

        def closure(rows=standard[inside], targets=targets, weight=weight, bias=bias, optimizer=optimizer):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(rows @ weight.T + bias, targets, reduction="sum") + weight.square().sum() / 2
            loss.backward()
            return loss

        optimizer.step(closure)
        expected[~inside] = (standard[~inside] @ weight.T + bias).argmax(1).numpy() == labels[~inside]
    assert 0.3 < expected.mean() < 0.95
    np.testing.assert_array_equal(linear_probe_correct(features, labels, 0), expected)
