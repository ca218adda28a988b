"""Retrieval against a plain loop and the protocol's traps: several captions an image, ties, one item."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from eval.measures.retrieval import retrieval_chance, retrieval_entries, retrieval_examples, retrieval_table, retrieve
from eval.results.examples import shown_images


def test_both_directions_equal_a_plain_loop_whatever_the_chunk():
    torch.manual_seed(0)
    counts = [5, 1, 3, 5, 2, 4]
    owner = torch.repeat_interleave(torch.arange(6), torch.tensor(counts))
    images, captions = normalize(torch.randn(6, 8), dim=-1), normalize(torch.randn(20, 8), dim=-1)
    answers = retrieve(images, captions, owner, chunk=3)
    scores = (images @ captions.T).tolist()
    for i in range(6):
        order = sorted(range(20), key=lambda c: -scores[i][c])
        best = min(order.index(c) for c in range(20) if owner[c] == i)
        # other right captions above the best one do not exist, and those below do not matter
        assert answers.i2t_ranks[i] == best + 1
        assert answers.i2t_top[i].tolist() == order[:10]
    for c in range(20):
        order = sorted(range(6), key=lambda i: -scores[i][c])
        assert answers.t2i_ranks[c] == order.index(int(owner[c])) + 1
        assert answers.t2i_top[c].tolist() == order


def test_an_image_hits_if_any_of_its_captions_does():
    images = torch.eye(2)
    captions = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])  # image 0: one bad, one perfect; image 1: two good
    answers = retrieve(images, captions, torch.tensor([0, 0, 1, 1]))
    # image 1: its caption 3 ties with image 0's bad caption, and a tie counts against it
    assert answers.i2t_ranks.tolist() == [1, 2]
    assert answers.t2i_ranks.tolist() == [2, 1, 1, 1]
    found = {e.metric: e for e in retrieval_entries(answers, "t", "m", np.random.default_rng(0), 0.95)}
    assert found["i2t_r@1"].value == 0.5 and found["i2t_r@1"].n == 2
    assert found["t2i_r@1"].value == 0.75 and found["t2i_r@1"].n == 4
    assert found["i2t_median_rank"].value == 1.5
    assert found["t2i_r@1"].low < 0.75 < found["t2i_r@1"].high


def test_text_to_image_intervals_take_the_captions_of_an_image_together():
    torch.manual_seed(0)
    images = normalize(torch.randn(60, 8), dim=-1)
    owner = torch.arange(60).repeat_interleave(5)
    good = torch.arange(60) < 30
    one = torch.where(good[:, None], images, normalize(torch.randn(60, 8), dim=-1))
    answers = retrieve(images, one[owner], owner)  # five equal captions an image: no more is known than from one
    single = retrieve(images, one, torch.arange(60))
    five, alone = ({e.metric: e for e in retrieval_entries(found, "t", "m", np.random.default_rng(0), 0.95)} for found in (answers, single))
    assert five["t2i_r@1"].value == alone["t2i_r@1"].value and five["t2i_r@1"].n == 300
    assert five["t2i_r@1"].low == pytest.approx(alone["t2i_r@1"].low, abs=0.02)
    assert five["t2i_r@1"].high == pytest.approx(alone["t2i_r@1"].high, abs=0.02)
    assert five["t2i_median_rank"].low == alone["t2i_median_rank"].low


def test_a_collapsed_model_ranks_last():
    answers = retrieve(torch.ones(4, 2) / 2**0.5, torch.ones(8, 2) / 2**0.5, torch.arange(4).repeat_interleave(2))
    assert answers.t2i_ranks.tolist() == [4] * 8
    assert answers.i2t_ranks.tolist() == [7] * 4  # six captions of others, then its own


def test_one_image_with_one_caption():
    answers = retrieve(torch.eye(1), torch.eye(1), torch.tensor([0]))
    found = {e.metric: e.value for e in retrieval_entries(answers, "t", "m", np.random.default_rng(0), 0.95)}
    assert found["i2t_r@1"] == found["t2i_r@10"] == found["t2i_median_rank"] == 1.0


def test_chance_counts_all_captions_of_an_image():
    found = {e.metric: e for e in retrieval_chance(np.array([2, 2, 2, 2]), "t", "chance")}
    assert found["t2i_r@1"].value == pytest.approx(1 / 4) and found["t2i_r@1"].n == 8
    assert found["i2t_r@1"].value == pytest.approx(2 / 8) and found["i2t_r@1"].n == 4
    assert found["i2t_r@5"].value == pytest.approx(1 - (6 * 5 * 4 * 3 * 2) / (8 * 7 * 6 * 5 * 4))
    assert found["t2i_r@10"].value == 1.0


def test_as_many_answers_are_kept_as_there_are_and_they_are_the_best_in_any_chunks():
    answers = retrieve(torch.eye(3), torch.eye(3)[[0, 1, 2, 2]], torch.tensor([0, 1, 2, 2]))
    assert answers.i2t_top.shape == answers.i2t_scores.shape == (3, 4) and answers.t2i_top.shape == (4, 3)
    generator = torch.Generator().manual_seed(0)
    images, captions = (torch.nn.functional.normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (37, 74))
    answers = retrieve(images, captions, torch.arange(37).repeat_interleave(2), chunk=5)
    cosines = (images @ captions.T).numpy()
    for row, (numbers, scores) in enumerate(zip(answers.i2t_top, answers.i2t_scores, strict=True)):
        best = sorted(range(74), key=lambda j: -cosines[row, j])[:10]
        assert numbers.tolist() == best and np.allclose(scores, cosines[row, best], atol=1e-6)
    for column, (numbers, scores) in enumerate(zip(answers.t2i_top, answers.t2i_scores, strict=True)):
        best = sorted(range(37), key=lambda i: -cosines[i, column])[:10]
        assert numbers.tolist() == best and np.allclose(scores, cosines[best, column], atol=1e-6)


def test_the_table_holds_one_row_a_query():
    answers = retrieve(torch.eye(2), torch.eye(2)[[0, 1, 1]], torch.tensor([0, 1, 1]))
    rows = retrieval_table(answers, ["a", "b"], np.array([0, 1, 1])).to_pylist()
    assert [(row["direction"], row["key"], row["caption"], row["rank"]) for row in rows] == [
        ("i2t", "a", -1, 1),
        ("i2t", "b", -1, 1),
        ("t2i", "a", 0, 1),
        ("t2i", "b", 1, 1),
        ("t2i", "b", 2, 1),
    ]
    assert rows[0]["top"][0] == 0 and rows[0]["top_scores"][0] == 1.0


def test_the_best_own_caption_is_shown_for_an_image():
    images = torch.eye(2)
    captions = torch.tensor([[0.0, 1.0], [0.8, 0.6], [0.6, 0.8]])  # image 0 owns two, the second is nearer
    owner = torch.tensor([0, 0, 1])
    shown = retrieval_examples(
        {"m": retrieve(images, captions, owner)},
        {"m": (images, captions)},
        ["far", "near", "other"],
        owner.numpy(),
        2,
        np.random.default_rng(0),
    )
    assert {example["image"]: example["answers"]["m"]["best"] for example in shown["i2t"]} == {0: "near", 1: "other"}
    assert sorted(shown_images(shown)) == [0, 1]
