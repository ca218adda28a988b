"""Compositional matching by hand, against plain loops and against the enumeration of all orders; ties, one group, categories."""

import itertools
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from align.common.errors import UsageError
from eval.measures.compositional import (
    CompositionalAnswers,
    compositional,
    compositional_chance,
    compositional_entries,
    compositional_examples,
    compositional_table,
)

# by hand: scores[image][caption], then text, image, group
CASES = {
    "all right": ([[0.9, 0.1], [0.2, 0.8]], True, True, True),
    "image 1 is closer to everything": ([[0.5, 0.4], [0.7, 0.8]], True, False, False),
    "caption 1 is closer to everything": ([[0.5, 0.7], [0.4, 0.8]], False, True, False),
    "all wrong": ([[0.1, 0.9], [0.8, 0.2]], False, False, False),
    "one image wrong, one caption wrong": ([[0.3, 0.4], [0.1, 0.2]], False, False, False),
    "right on the sum only": ([[0.9, 0.1], [0.3, 0.2]], False, True, False),
    "all equal": ([[0.5, 0.5], [0.5, 0.5]], False, False, False),
    "captions tie for image 0": ([[0.5, 0.5], [0.1, 0.6]], False, True, False),
    "images tie for caption 1": ([[0.9, 0.4], [0.1, 0.4]], True, False, False),
    "negative cosines": ([[-0.1, -0.2], [-0.9, 0.0]], True, True, True),
}


def answers_of(*scores):
    return CompositionalAnswers(np.array(scores, dtype=np.float32))


def plain(scores):
    """Winoground's formulas as published, and MMVP's, one group at a time."""
    c0_i0, c1_i0, c0_i1, c1_i1 = scores[0][0], scores[0][1], scores[1][0], scores[1][1]
    text = 1 if c0_i0 > c1_i0 and c1_i1 > c0_i1 else 0
    image = 1 if c0_i0 > c0_i1 and c1_i1 > c1_i0 else 0
    chosen = [0 if scores[0][c] > scores[1][c] else 1 if scores[1][c] > scores[0][c] else None for c in (0, 1)]
    return {"text_score": text, "image_score": image, "group_score": text * image, "pair_accuracy": int(chosen == [0, 1])}


def values(entries):
    return {entry.metric: entry.value for entry in entries}


def random_embeddings(groups, width=6, steps=None):
    generator = torch.Generator().manual_seed(groups)
    drawn = torch.randn(2, 2 * groups, width, generator=generator)
    return normalize(drawn if steps is None else (drawn * steps).round() + 0.5, dim=-1)


@pytest.mark.parametrize(("scores", "text", "image", "group"), CASES.values(), ids=CASES)
def test_by_hand(scores, text, image, group):
    answers = answers_of(scores)
    assert (answers.text.tolist(), answers.image.tolist(), answers.group.tolist()) == ([text], [image], [group])
    found = values(compositional_entries(answers, "winoground", "t", "m", 0.95))
    assert found == {"text_score": text, "image_score": image, "group_score": group}
    assert values(compositional_entries(answers, "mmvp", "t", "m", 0.95)) == {"pair_accuracy": image}


def test_shares_by_hand():
    answers = answers_of(*(case[0] for case in CASES.values()))
    assert values(compositional_entries(answers, "winoground", "t", "m", 0.95)) == {
        "text_score": 0.4,
        "image_score": 0.5,
        "group_score": 0.2,
    }


@pytest.mark.parametrize("steps", [None, 1], ids=["no ties", "ties"])
def test_the_metrics_equal_the_published_formulas(steps):
    images, captions = random_embeddings(300, width=2 if steps else 6, steps=steps)
    answers = compositional(images, captions)
    cosines = [[[float((images[2 * g + i] * captions[2 * g + c]).double().sum()) for c in (0, 1)] for i in (0, 1)] for g in range(300)]
    np.testing.assert_allclose(answers.scores, cosines, atol=1e-6)
    each = [plain(group) for group in answers.scores.tolist()]
    tied = sum(len(set(group.ravel().tolist())) < 4 for group in answers.scores)
    assert tied > 30 if steps else tied == 0
    found = {
        entry.metric: entry for protocol in ("winoground", "mmvp") for entry in compositional_entries(answers, protocol, "t", "m", 0.9)
    }
    assert list(found) == ["text_score", "image_score", "group_score", "pair_accuracy"]
    for metric, entry in found.items():
        right = sum(one[metric] for one in each)
        assert (entry.value, entry.n, entry.task, entry.model) == (right / 300, 300, "t", "m")
        assert 0 < right < 300 and entry.low < entry.value < entry.high
        for bound in (entry.low, entry.high):  # Wilson: the shares whose 90 % interval just reaches the measured one
            assert abs(entry.value - bound) / (bound * (1 - bound) / 300) ** 0.5 == pytest.approx(NormalDist().inv_cdf(0.95))


def test_swapping_images_with_captions_swaps_text_with_image_score():
    images, captions = random_embeddings(50)
    one, other = compositional(images, captions), compositional(captions, images)
    assert (one.text == other.image).all() and (one.image == other.text).all() and (one.group == other.group).all()
    assert one.text.any() and not one.text.all()


def test_a_text_encoder_without_word_order_scores_nothing():
    """Both captions of a group have the same words; their cosines must tie exactly, whatever the rounding."""
    images, captions = random_embeddings(500, width=67)
    captions = captions[::2].repeat_interleave(2, dim=0)
    answers = compositional(images, captions)
    assert (answers.scores[:, :, 0] == answers.scores[:, :, 1]).all()
    assert not answers.text.any() and not answers.image.any() and not answers.group.any()


def test_chance_is_the_share_among_all_orders():
    orders = [plain([order[:2], order[2:]]) for order in itertools.permutations(range(4))]
    for protocol, expected in (
        ("winoground", {"text_score": 1 / 4, "image_score": 1 / 4, "group_score": 1 / 6}),
        ("mmvp", {"pair_accuracy": 1 / 4}),
    ):
        entries = compositional_chance(400, protocol, "t", "chance")
        assert values(entries) == expected
        assert expected == pytest.approx({metric: sum(one[metric] for one in orders) / 24 for metric in expected})
        assert all(entry.low == entry.value == entry.high and entry.n == 400 and entry.model == "chance" for entry in entries)


def test_the_table_holds_every_cosine():
    answers = answers_of(*(case[0] for case in CASES.values()))
    keys = [str(number // 2) for number in range(20)]
    kinds = ["order" if number // 2 < 4 else "count" for number in range(20)]
    table = compositional_table(answers, keys, kinds)
    assert table.column_names == ["key", "category", "s00", "s01", "s10", "s11", "text", "image", "group"] and table.num_rows == 10
    third = table.slice(2, 1).to_pylist()[0]
    cosines = {"s00": 0.5, "s01": np.float32(0.7), "s10": np.float32(0.4), "s11": np.float32(0.8)}
    assert third == {"key": "2", "category": "order", "text": False, "image": True, "group": False, **cosines}


def test_examples_are_drawn_and_say_what_the_models_said():
    images, captions = random_embeddings(5)
    models = {"one": compositional(images, captions), "other": compositional(images, images)}
    keys, kinds = [str(number // 2) for number in range(10)], ["order"] * 10
    texts = [f"caption {number}" for number in range(10)]

    def drawn(count, seed=0):
        return compositional_examples(models, keys, kinds, texts, count, np.random.default_rng(seed))["items"]

    items = drawn(9)
    assert sorted(item["key"] for item in items) == list("01234"), "each group once"
    for item in items:
        group = int(item["key"])
        assert item["images"] == [2 * group, 2 * group + 1] and item["category"] == "order"
        assert item["captions"] == [f"caption {2 * group}", f"caption {2 * group + 1}"]
        for name, said in item["answers"].items():
            np.testing.assert_allclose(said["scores"], models[name].scores[group], atol=6e-5)
            assert (said["text"], said["image"]) == (models[name].text[group], models[name].image[group])
            assert said["group"] == (said["text"] and said["image"]) and type(said["group"]) is bool
        assert item["answers"]["other"]["group"] is True, "an image is closest to itself"
    assert len(drawn(2)) == 2 and drawn(2) == drawn(2) and drawn(0) == []
    assert any(drawn(5, seed) != items for seed in range(1, 4))


def test_wrong_shapes_and_names_are_refused():
    with pytest.raises(UsageError, match="two images and two captions a group"):
        compositional(torch.eye(3), torch.eye(3))
    with pytest.raises(UsageError, match=r"\(4, 4\) images and \(2, 4\) captions"):
        compositional(torch.eye(4), torch.eye(4)[:2])
    one = answers_of(CASES["all right"][0])
    with pytest.raises(UsageError, match="'winogrand'; known: winoground, mmvp"):
        compositional_entries(one, "winogrand", "t", "m", 0.95)
    with pytest.raises(UsageError, match="follow one another"):
        compositional_table(one, ["a", "b"], ["", ""])
    with pytest.raises(UsageError, match="follow one another"):
        compositional_table(one, ["a", "a"], ["left of", "above"])
