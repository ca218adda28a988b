"""Comparing two runs: exact tests and bootstrap against brute force and scipy, pairing by key, and what is refused."""

import csv
import itertools
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import binomtest

from align.common.errors import DamagedError, UsageError
from align.common.intervals import mean_of
from eval.measures.config import EvalConfig
from eval.measures.segmentation import segmentation_metrics
from eval.page.page import write_comparison, write_report
from eval.results.compare import BOOTSTRAP, FLIPS, MCNEMAR, Difference, compare, comparison_table, load_comparison, save_comparison, verdict
from eval.results.metrics import mean_per_class
from eval.results.paired import (
    bootstrap_p,
    holm,
    mean_per_class_of,
    mean_ratio_of,
    paired_bootstrap,
    ratio_of,
    sign_flip_p,
)
from eval.results.records import Entry, TaskRecord, load_answers, load_results, save_answers, save_results
from tests.support.synthetic_results import make_results


@pytest.mark.parametrize(("better", "worse", "same"), [(8, 2, 5), (5, 0, 0), (3, 3, 9), (0, 0, 4), (1, 0, 2), (120, 80, 0)])
def test_one_sample_a_cluster_is_mcnemars_exact_test(better, worse, same):
    differences = np.array([1] * better + [-1] * worse + [0] * same)
    expected = binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert sign_flip_p(differences) == pytest.approx(expected, rel=1e-9)


def test_sign_flips_of_clusters_equal_all_permutations():
    rng = np.random.default_rng(0)
    for _ in range(20):
        differences = rng.integers(-3, 4, size=9)
        sums = [abs(sum(sign * d for sign, d in zip(signs, differences, strict=True))) for signs in itertools.product((1, -1), repeat=9)]
        assert sign_flip_p(differences) == pytest.approx(np.mean(np.array(sums) >= abs(differences.sum())))


def test_alike_captions_of_an_image_do_not_count_as_many():
    images = np.array([5, 5, 5, -5, 5])  # five captions each, all won or all lost together
    assert sign_flip_p(images) == pytest.approx(binomtest(4, 5).pvalue)
    assert sign_flip_p(np.repeat(np.sign(images), 5)) < 0.01, "what McNemar's test on captions would claim"


def test_many_discordant_samples_neither_overflow_nor_vanish():
    assert sign_flip_p(np.array([1] * 3000 + [-1] * 2900)) == pytest.approx(binomtest(3000, 5900).pvalue, rel=1e-6)
    assert 0 <= sign_flip_p(np.ones(5000, dtype=np.int64)) < 1e-300


def test_bootstrap_agrees_with_all_resamples_of_a_tiny_set():
    a, b = np.array([0.1, 0.9, 0.4, 0.3]), np.array([0.3, 0.8, 0.9, 0.4])
    exact = np.array([np.mean(b[list(at)]) - np.mean(a[list(at)]) for at in itertools.product(range(4), repeat=4)])
    pairs = {"mean": (mean_of(a), mean_of(b))}
    drawn = paired_bootstrap(pairs, np.arange(4), np.random.default_rng(0), resamples=20_000)["mean"]
    assert drawn.mean() == pytest.approx(exact.mean(), abs=0.005) and drawn.std() == pytest.approx(exact.std(), rel=0.03)
    below = (exact <= 1e-12).mean()
    assert 0.05 < below < 0.07 and bootstrap_p(drawn) == pytest.approx(2 * below, abs=0.01), "rounding must not hide a tie"


def test_bootstrap_draws_whole_clusters_and_the_same_for_both():
    clusters = np.array([0, 0, 1, 1, 1])
    values = np.array([1.0, 1.0, 0.0, 0.0, 0.0])
    pairs = {"same": (mean_of(values), mean_of(values + 2)), "mean": (mean_of(np.zeros(5)), mean_of(values))}
    drawn = paired_bootstrap(pairs, clusters, np.random.default_rng(0), resamples=400)
    assert drawn["same"] == pytest.approx(np.full(400, 2.0)), "a constant shift has no spread when resamples are shared"
    assert set(np.round(drawn["mean"], 6)) == {0.0, 0.4, 1.0}, "none, one or both draws are of the cluster of two"


def test_bootstrap_p_is_twice_the_smaller_tail_and_never_0():
    assert bootstrap_p(np.array([1.0] * 97 + [-1.0] * 2)) == pytest.approx(2 * 3 / 100)
    assert bootstrap_p(np.ones(99)) == pytest.approx(0.02)
    assert bootstrap_p(np.zeros(9)) == 1.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0] and holm([]) == []


def test_statistics_of_weights_equal_those_of_repeated_samples():
    rng = np.random.default_rng(1)
    weights = rng.integers(0, 4, size=(6, 12))
    labels, correct = rng.integers(0, 3, 12), rng.random(12) < 0.5
    tp, fp, fn = (rng.integers(0, 5, (12, 4)) for _ in range(3))
    fp[:, 3] = tp[:, 3] = 0
    for row, w in enumerate(weights):
        times = np.repeat(np.arange(12), w)
        assert mean_per_class_of(correct, labels)(weights.astype(float))[row] == pytest.approx(
            mean_per_class(correct[times], labels[times], 3)
        )
        found = segmentation_metrics(*(count[times].sum(axis=0) for count in (tp, fp, fn)))
        assert mean_ratio_of(tp, tp + fp + fn)(weights)[row] == pytest.approx(found["miou"])
        assert mean_ratio_of(tp, tp + fn)(weights)[row] == pytest.approx(found["mean_class_accuracy"])
        assert ratio_of(tp.sum(axis=1), (tp + fn).sum(axis=1))(weights)[row] == pytest.approx(found["pixel_accuracy"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs on the same samples, the second one worse."""
    folder = tmp_path_factory.mktemp("runs")
    make_results(folder / "good", images=60, whole=True)
    make_results(folder / "bad", images=60, seed=7, noise=2.2, whole=True)
    return folder / "good" / "eval", folder / "bad" / "eval"


def compared(a, b, seed=0):
    return compare(str(a), str(b), np.random.default_rng(seed), seed, 0.95)


@pytest.fixture(scope="module")
def result(runs):
    return compared(runs[1], runs[0])


def test_every_metric_is_compared_with_the_test_that_fits(runs, result):
    found = {(one.task, one.metric): one for one in result.differences}
    assert {metric for task, metric in found if task == "scenes"} == {
        f"{d}_{m}" for d in ("i2t", "t2i") for m in ("r@1", "r@5", "r@10", "median_rank")
    }
    assert {metric for task, metric in found if task == "things"} == {"acc@1", "acc@5", "mean_per_class"}
    assert {metric for task, metric in found if task == "swaps"} == {"text_score", "image_score", "group_score"}
    assert {metric for task, metric in found if task == "outlines"} == {"miou", "pixel_accuracy", "mean_class_accuracy"}
    assert found["things", "acc@1"].test == MCNEMAR and found["scenes", "i2t_r@1"].test == MCNEMAR
    assert found["scenes", "t2i_r@1"].test == FLIPS and (found["scenes", "t2i_r@1"].n, found["scenes", "t2i_r@1"].clusters) == (120, 60)
    assert found["outlines", "miou"].test == found["things", "mean_per_class"].test == BOOTSTRAP
    good, bad = (load_results(folder) for folder in runs)
    for one in result.differences:
        assert one.a == bad.value(one.task, one.metric, "trained").value and one.b == good.value(one.task, one.metric, "trained").value
        assert one.difference == one.b - one.a and one.low <= one.difference + 1e-9 and one.difference <= one.high + 1e-9
        assert one.p_holm >= one.p


def test_the_p_of_accuracy_is_scipys(runs, result):
    good, bad = (load_answers(folder, "things", "trained").sort_by("key")["rank"].to_numpy() == 1 for folder in runs)
    expected = binomtest(int((good & ~bad).sum()), int((good != bad).sum())).pvalue
    assert next(one for one in result.differences if one.metric == "acc@1").p == pytest.approx(expected)


def test_pairing_is_by_key_not_by_row(runs, result, tmp_path):
    for task in ("scenes", "things", "swaps", "outlines"):
        table = load_answers(runs[0], task, "trained")
        save_answers(tmp_path, task, "trained", table.take(np.random.default_rng(3).permutation(len(table))))
    save_results(tmp_path, load_results(runs[0]))
    shuffled = compared(runs[1], tmp_path)
    assert [(one.metric, one.p, one.low) for one in shuffled.differences] == [(one.metric, one.p, one.low) for one in result.differences]


def test_a_run_against_itself_shows_nothing_and_models_can_be_named(runs):
    with pytest.raises(UsageError, match="the same model"):
        compared(runs[0], runs[0])
    found = compared(f"{runs[0]}:untrained", f"{runs[0]}:CLIP")
    assert all(one.model_a == "untrained" and one.model_b == "CLIP" for one in found.differences)
    with pytest.raises(UsageError, match="no model 'other'; it has trained"):
        compared(f"{runs[0]}:other", runs[0])
    with pytest.raises(UsageError, match="no answers of majority"):
        compared(f"{runs[0]}:majority", runs[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [({"digest": "other"}, "other data"), ({"prompts": "sentences:mine.json@12345678"}, "numbers of different prompts are never compared")],
)
def test_other_data_and_other_prompts_are_left_out_with_the_reason(runs, tmp_path, change, says):
    results = load_results(runs[0])
    tasks = tuple(replace(task, **change) if task.id == "things" else task for task in results.tasks)
    save_results(tmp_path, replace(results, tasks=tasks))
    (tmp_path / "answers").symlink_to(runs[0] / "answers")
    found = compared(runs[1], tmp_path)
    assert "things" not in {one.task for one in found.differences}
    assert [task for task, reason in found.skipped if says in reason] == ["things"]


def test_other_samples_and_answers_that_contradict_the_results(runs, tmp_path):
    save_results(tmp_path, load_results(runs[0]))
    for task in ("scenes", "things", "swaps", "outlines"):
        save_answers(tmp_path, task, "trained", load_answers(runs[0], task, "trained").slice(1 if task == "things" else 0))
    assert ("things", "the two runs left out different samples, so their answers do not pair") in compared(runs[1], tmp_path).skipped
    table = load_answers(runs[0], "things", "trained")
    save_answers(tmp_path, "things", "trained", table.set_column(5, "rank", pa.array([1] * len(table), pa.int32())))
    with pytest.raises(DamagedError, match=r"acc@1 1, its results say .*measure again"):
        compared(runs[1], tmp_path)


def with_questions(folder, scores, metric="accuracy", value=None):
    """Write results of one task of generated answers with the given score each."""
    results = make_results(folder, images=12, classes=6)
    value = float(np.mean(scores)) if value is None else value
    task = TaskRecord("asked", "generation", len(scores), len(scores), "Answer briefly.", "99aa", "", "", {})
    entries = (Entry("asked", metric, value, value, value, len(scores), "trained"),)
    save_results(folder / "eval", replace(results, tasks=(task,), entries=entries, models=results.models[:1]))
    table = pa.table({"key": [str(n) for n in range(len(scores))], "score": pa.array(scores, pa.float64())})
    save_answers(folder / "eval", "asked", "trained", table)
    return folder / "eval"


def test_generated_answers_are_paired_by_question(tmp_path):
    a = with_questions(tmp_path / "a", [0.0] * 8 + [1.0] * 4)
    b = with_questions(tmp_path / "b", [1.0] * 10 + [0.0] * 2)
    (one,) = compared(a, b).differences
    assert (one.metric, one.test) == ("accuracy", MCNEMAR) and one.p == pytest.approx(binomtest(8, 10).pvalue)
    c = with_questions(tmp_path / "c", [0.5] * 12, "rouge_l")
    d = with_questions(tmp_path / "d", [1.0] * 12, "rouge_l")
    (graded,) = compared(c, d).differences
    assert graded.test == BOOTSTRAP and graded.difference == 0.5
    with pytest.raises(UsageError, match="asked: its answers have no score"):
        compared(with_questions(tmp_path / "e", [None] * 12, "cider", 0.4), with_questions(tmp_path / "f", [None] * 12, "cider", 0.4))
    with pytest.raises(UsageError, match="asked: no metric that is known"):
        compared(c, a)


def difference(**changes):
    values = {"task": "t", "metric": "acc@1", "unit": "points", "model_a": "m", "model_b": "n", "a": 0.5, "b": 0.531, "difference": 0.031}
    rest = {"low": 0.0101, "high": 0.0519, "n": 9, "clusters": 9, "test": MCNEMAR, "p": 0.001, "p_holm": 0.003}
    return Difference(**{**values, **rest, **changes})


def test_verdicts_in_words():
    assert verdict(difference(), True) == "B is better by 3.1 points (1.0 to 5.2), p = 0.003"
    assert verdict(difference(difference=-0.031, low=-0.0519, high=-0.0101), True) == "A is better by 3.1 points (1.0 to 5.2), p = 0.003"
    ranks = difference(metric="t2i_median_rank", unit="ranks", difference=-2.0, low=-3.0, high=-1.0, p_holm=0.0002)
    assert verdict(ranks, True) == "B is better by 2.0 ranks (1.0 to 3.0), p < 0.001"
    nothing = difference(difference=0.004, low=-0.012, high=0.02, p_holm=0.483)
    assert verdict(nothing, False) == "no difference shown: B - A is +0.4 points (-1.2 to 2.0), p = 0.48"


def test_a_comparison_is_saved_shown_and_loaded(runs, result, tmp_path):
    save_comparison(tmp_path, result)
    assert load_comparison(tmp_path) == result and load_comparison(tmp_path / "nowhere") is None
    rows = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    assert [(row["task"], float(row["p_holm"])) for row in rows] == [(one.task, one.p_holm) for one in result.differences]
    assert rows[0]["verdict"] == verdict(result.differences[0], result.shown(result.differences[0]))
    assert comparison_table(result).row_count == len(result.differences)
    page = write_comparison(result, tmp_path, dark=False).read_text()
    assert (tmp_path / "figures" / "comparison.png").is_file() and "<script" not in page and "://" not in page
    for one in result.differences:
        assert verdict(one, result.shown(one)) in page.replace("&lt;", "<")
    content = json.loads((tmp_path / "comparison.json").read_text())
    del content["differences"][0]["p"]
    (tmp_path / "comparison.json").write_text(json.dumps(content))
    with pytest.raises(DamagedError, match="compare again"):
        load_comparison(tmp_path)


def test_the_report_shows_a_comparison_of_these_results_only(runs, result, tmp_path):
    whole = load_results(runs[0])
    part = tuple(task for task in whole.tasks if task.id == "outlines")
    results = replace(whole, tasks=part, entries=tuple(entry for entry in whole.entries if entry.task == "outlines"))
    (tmp_path / "answers").symlink_to(runs[0] / "answers")
    save_comparison(tmp_path, result)
    save_results(tmp_path, replace(results, created="2031-05-05T00:00:00Z"))
    assert 'id="comparison"' not in write_report(tmp_path, tmp_path / "out", dark=False).read_text(), "measured again since"
    save_results(tmp_path, results)
    assert 'id="comparison"' in write_report(tmp_path, tmp_path / "out", dark=False).read_text()


def test_two_results_are_needed_to_compare():
    assert EvalConfig(compare=("a", "b")).compare == ("a", "b")
    with pytest.raises(UsageError, match="two results"):
        EvalConfig(compare=("a",))
