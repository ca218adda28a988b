"""Zero-shot classification against a plain loop and hand-worked cases."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from align.common.errors import UsageError
from eval.measures.zeroshot import (
    class_weights,
    classification_chance,
    classification_entries,
    classification_table,
    majority_entries,
    zero_shot_classification,
)


def test_class_weights_are_normalized_means_of_each_class():
    sentences = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    weights = class_weights(sentences, [2, 1])
    assert weights[0].tolist() == pytest.approx([0.5**0.5, 0.5**0.5])
    assert weights[1].tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("counts", [[3, 1], [3, 0], [1, 1]])
def test_every_class_needs_its_sentences(counts):
    with pytest.raises(UsageError):
        class_weights(torch.eye(3), counts)


def test_answers_equal_a_plain_loop_whatever_the_chunk():
    torch.manual_seed(0)
    images, weights = normalize(torch.randn(23, 6), dim=-1), normalize(torch.randn(9, 6), dim=-1)
    labels = torch.arange(23) % 9
    answers = zero_shot_classification(images, weights, labels, chunk=4)
    for n in range(23):
        cosines = [float(images[n] @ weight) for weight in weights]
        order = sorted(range(9), key=lambda c: -cosines[c])
        assert answers.top[n].tolist() == order[:5]
        assert answers.ranks[n] == order.index(int(labels[n])) + 1
        assert answers.top_scores[n].tolist() == pytest.approx([cosines[c] for c in order[:5]], abs=1e-6)


def test_confidence_is_the_softmax_of_scaled_cosines():
    torch.manual_seed(1)
    images, weights = normalize(torch.randn(11, 6), dim=-1), normalize(torch.randn(4, 6), dim=-1)
    answers = zero_shot_classification(images, weights, torch.zeros(11, dtype=torch.int64), chunk=3, scale=20.0)
    expected = torch.softmax(20 * images.double() @ weights.double().T, dim=1).max(dim=1).values
    assert answers.confidence.dtype == np.float32
    assert answers.confidence.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    sure = zero_shot_classification(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), scale=1e6)
    assert sure.confidence.tolist() == [1.0, 1.0], "no overflow"
    unknown = zero_shot_classification(torch.eye(2), torch.eye(2), torch.tensor([0, 1]))
    assert np.isnan(unknown.confidence).all()


def test_a_collapsed_model_gets_no_credit():
    same = torch.ones(4, 3) / 3**0.5
    answers = zero_shot_classification(same, torch.ones(10, 3) / 3**0.5, torch.tensor([0, 1, 2, 3]))
    entries = {e.metric: e.value for e in classification_entries(answers, np.arange(4), 10, "t", "m", np.random.default_rng(0), 0.95)}
    assert entries == {"acc@1": 0.0, "acc@5": 0.0, "mean_per_class": 0.0}


def test_labels_beyond_the_classes_are_refused():
    with pytest.raises(UsageError, match="labels run from 0 to 3"):
        zero_shot_classification(torch.eye(3), torch.eye(3), torch.tensor([0, 3, 1]))


def test_entries_have_the_hand_worked_values_and_intervals():
    labels = np.array([0, 0, 0, 1])
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.7, 0.3]])  # right, right, wrong, wrong
    answers = zero_shot_classification(scores, torch.eye(2), torch.from_numpy(labels))
    entries = classification_entries(answers, labels, 2, "t", "m", np.random.default_rng(0), 0.95)
    found = {entry.metric: entry for entry in entries}
    assert set(found) == {"acc@1", "mean_per_class"}  # acc@5 means nothing with two classes
    assert found["acc@1"].value == 0.5 and found["acc@1"].n == 4
    assert (found["acc@1"].low, found["acc@1"].high) == pytest.approx((0.1500, 0.8500), abs=1e-4)
    assert found["mean_per_class"].value == pytest.approx(1 / 3)
    assert found["mean_per_class"].low <= 1 / 3 <= found["mean_per_class"].high


def test_baselines_of_unbalanced_labels():
    labels = np.array([0] * 6 + [1] * 2 + [2, 3])
    majority = {e.metric: e for e in majority_entries(labels, 20, "t", "majority", 0.95)}
    assert majority["acc@1"].value == 0.6 and majority["acc@5"].value == 1.0
    assert majority["acc@1"].low < 0.6 < majority["acc@1"].high
    assert majority["mean_per_class"].value == 0.25  # right on one of the four classes that occur
    chance = {e.metric: e.value for e in classification_chance(10, 20, "t", "chance")}
    assert chance == {"acc@1": 0.05, "acc@5": 0.25, "mean_per_class": 0.05}
    assert {e.metric for e in classification_chance(10, 4, "t", "chance")} == {"acc@1", "mean_per_class"}


def test_the_table_holds_one_row_an_image():
    labels = np.array([1, 0])
    answers = zero_shot_classification(torch.eye(3)[:2], torch.eye(3), torch.from_numpy(labels), scale=np.log(2))
    table = classification_table(answers, ["a", "b"], labels, ["cat", "dog", "dog"])
    assert table.to_pylist()[0] == {
        "key": "a",
        "label": 1,
        "label_name": "dog",
        "predicted": 0,
        "predicted_name": "cat",
        "rank": 3,  # cosine 0, tied with the third class
        "score": 1.0,
        "confidence": 0.5,  # 2 / (2 + 1 + 1)
        "top": [0, 1, 2],
        "top_scores": [1.0, 0.0, 0.0],
    }
