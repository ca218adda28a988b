"""Worth in captioned images: the crossing of two curves, found where it is known, and nothing for heads that align nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from align.assessment.candidates import Candidate
from align.assessment.probing import CaptionedFeatures
from align.assessment.worth import Named, Worth, captioned, closed_form_maps, compared, crossing, measured, plan_of, texts_alone
from align.common.intervals import bootstrap_weights
from align.runtime.console import Progress

SIZE, FIT = 900, 700
ROWS = np.arange(FIT), np.arange(FIT, SIZE)
WEIGHTS = bootstrap_weights(SIZE - FIT, 200, np.random.default_rng(0))


def named(heard=20):
    """Pictures of 24 meanings, noisily seen, of which captions hear the first `heard`; words are said of all of them."""
    random = np.random.default_rng(0)
    meaning = random.normal(size=(SIZE, 24))
    images = meaning @ random.normal(size=(24, 60)) + 4.0 * random.normal(size=(SIZE, 60))
    captions = (meaning * (np.arange(24) < heard)) @ random.normal(size=(24, 40)) + 0.1 * random.normal(size=(SIZE, 40))
    words = torch.from_numpy(meaning @ random.normal(size=(24, 60)) > 0.8 * 24**0.5)
    pairs = CaptionedFeatures(images.astype(np.float16), captions.astype(np.float16), np.arange(SIZE))
    return Named(pairs, words, words[:FIT].double().mean(0), np.arange(SIZE))


def test_curves_cross_where_they_meet_in_the_logarithm():
    curve = np.array([[0.1, 0.3, 0.5]])
    cross = lambda score: crossing(np.array([score]), curve, (10, 1_000, 100_000))[0]  # noqa: E731
    assert cross(0.05) == 0 and cross(0.1) == 0, "less than the first"
    assert cross(0.2) == pytest.approx(100) and cross(0.3) == pytest.approx(1_000) and cross(0.4) == pytest.approx(10_000)
    assert cross(0.6) == np.inf, "more than the last"
    uneven = crossing(np.array([0.25, 0.25]), np.array([[0.1, 0.3, 0.2], [0.1, 0.2, 0.3]]), (10, 1_000, 100_000))
    assert uneven.tolist() == pytest.approx([10**2.5, 10**4]), "the first time that it is reached"


def test_the_interval_comes_from_images_and_draws_and_is_open_where_a_curve_does_not_reach():
    aligned, low = np.full(200, 0.4), np.full(200, 0.2)
    middle = np.random.default_rng(0).random(200)
    middle += 0.395 - middle.mean()
    found = compared(aligned, {50: [low, low], 500: [middle, middle + 0.01]}, WEIGHTS).details
    assert found["low"] < 500 and found["high"] is None and found["curve"]["50"] == pytest.approx(0.2)
    sure = compared(aligned, {50: [low], 500: [low + 0.4]}, WEIGHTS).details
    assert [sure["low"], sure["worth"], sure["high"]] == pytest.approx([50 * 10**0.5] * 3)
    draws = compared(aligned, {50: [low], 500: [low + 0.3, low + 0.5]}, WEIGHTS).details
    assert draws["low"] == pytest.approx(50 * 10**0.4) and draws["high"] == pytest.approx(50 * 10 ** (2 / 3))


def test_an_alignment_that_hears_most_is_worth_some_captioned_images_and_fewer_if_it_hears_less():
    def worth(heard):
        world = named(heard)
        return measured(world, closed_form_maps(world.pairs, ROWS[0]), ROWS, WEIGHTS, 0, Progress()).details

    most, some = worth(20), worth(12)
    assert 50 < most["low"] <= most["worth"] <= (most["high"] or np.inf), "images see what texts cannot say, so the curve crosses"
    assert most["worth"] is not None and (some["worth"] or 0) < most["worth"] / 2
    assert list(most["curve"]) == ["50", "100", "200", "500", "700"]


def test_random_heads_are_worth_nothing():
    world = named()
    torch.manual_seed(0)
    image, caption = torch.randn(60, 16), torch.randn(40, 16)
    found = measured(world, (lambda rows: rows.float() @ image, lambda rows: rows.float() @ caption), ROWS, WEIGHTS, 0, Progress())
    assert found.details["worth"] == found.details["high"] == 0 and found.value < 0.1
    said = Worth(Candidate("v", 1, "mean", "t"), "", found).sentence()
    assert "aligned in closed form, is worth less than 50 captioned images. " in said


def test_images_that_show_nothing_need_more_captions_than_there_are():
    """Images see little, texts reach images through what they share: a worth beyond the data is said as such."""
    aligned, curve = np.full(200, 0.5), {50: [np.full(200, 0.1)], 700: [np.full(200, 0.2)]}
    said = Worth(Candidate("v", 1, "mean", "t"), "runs/a", compared(aligned, curve, WEIGHTS)).sentence()
    assert "aligned by runs/a, is worth more than 700 captioned images. With texts alone" in said
    assert "cannot be told" in Worth(Candidate("v", 1, "mean", "t"), "runs/a", None).sentence()


def test_texts_alone_see_no_words_of_any_image_that_is_held_out_or_fitted():
    """Presence of words belongs to captions: only those of the images to fit to are read, whatever held-out captions say."""
    world = named()
    maps = closed_form_maps(world.pairs, ROWS[0])
    changed = replace(world, presence=torch.cat([world.presence[:FIT], torch.zeros_like(world.presence[FIT:])]))
    judged = Named.judged
    try:
        Named.judged = lambda self, test: judged(world, test)
        assert np.array_equal(texts_alone(world, maps, ROWS), texts_alone(changed, maps, ROWS))
        assert np.array_equal(*(captioned(one, ROWS[0][:60], ROWS[1], 0, lambda done, total: None) for one in (world, changed)))
    finally:
        Named.judged = judged


def test_every_number_is_fitted_twice_and_all_once(monkeypatch):
    assert plan_of(120) == [(50, 0), (50, 1), (100, 0), (100, 1), (120, 0)]
    assert plan_of(30) == [(30, 0)] and plan_of(10**9)[-1] == (10_000, 0)
