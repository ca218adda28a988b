"""Lists and assignment against brute force and by hand: ties, chunks, merges, and who gets which sample."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from align.common.errors import DataError, FingerprintError, UsageError
from align.curation.assignment import assign
from align.curation.coverage import effective_number
from align.curation.duplicates import Distinct, unit
from align.curation.pool import CandidatePool
from align.curation.scoring import score_shard, scored_chunks
from align.curation.toplists import TopLists, best


def filled(scores, places, chunk, slack=None):
    """Lists of scores (S, C), streamed in chunks; sample n is number 3 n."""
    lists = TopLists(scores.shape[1], places, chunk)
    for start in range(0, len(scores), chunk):
        part = scores[start : start + chunk]
        lists.add(part, 3 * np.arange(start, start + len(part)))
    return lists


def brute_top(scores, places):
    """For each concept its `places` best (score, number) of scores (S, C), by sorting everything."""
    ranked = [sorted(range(len(scores)), key=lambda n: (-scores[n, c], n))[:places] for c in range(scores.shape[1])]
    return [([scores[n, c] for n in order], [3 * n for n in order]) for c, order in enumerate(ranked)]


@pytest.mark.parametrize("places", [1, 7, 40, 500])
@pytest.mark.parametrize("chunk", [1, 13, 64, 300])
def test_lists_are_those_of_a_full_sort_with_many_ties_however_the_stream_is_cut(places, chunk):
    scores = np.random.default_rng(places).integers(-4, 5, (300, 6)).astype(np.float32) / 4
    scores[:, 5] = 0.25  # all tie
    lists = filled(scores, places, chunk)
    expected = brute_top(scores, places)
    for concept in range(6):
        values, rows = lists.ranked(concept)
        assert (values.tolist(), rows.tolist()) == expected[concept]
    assert lists.last_scores().tolist() == [values[-1] for values, _ in expected]


def test_rising_scores_replace_everything_again_and_again():
    scores = np.arange(1000, dtype=np.float32)[:, None]
    values, rows = filled(scores, 10, 8).ranked(0)
    assert values.tolist() == list(range(999, 989, -1)) and rows.tolist() == [3 * n for n in range(999, 989, -1)]


@pytest.mark.parametrize("places", [5, 30, 200])
def test_lists_of_parts_merge_to_those_of_the_whole_in_any_order(places):
    scores = np.random.default_rng(1).integers(0, 6, (240, 4)).astype(np.float32)
    shards = np.arange(240) // 20

    def part(number, parts):
        lists = TopLists(4, places, 20)
        for shard in range(number, 12, parts):
            lists.add(scores[shards == shard], 3 * np.flatnonzero(shards == shard))
        return lists

    for order in ((0, 1, 2), (2, 0, 1)):
        merged = part(order[0], 3)
        for number in order[1:]:
            merged.merge(part(number, 3))
        for concept, expected in enumerate(brute_top(scores, places)):
            values, rows = merged.ranked(concept)
            assert (values.tolist(), rows.tolist()) == expected
    merged.add(np.full((1, 4), 9, np.float32), np.array([999]))
    assert all(merged.ranked(concept)[1][0] == 999 for concept in range(4)), "merged lists go on"


def test_saved_lists_go_on_as_if_nothing_happened():
    scores = np.random.default_rng(2).normal(size=(200, 3)).astype(np.float32)
    straight = filled(scores, 11, 10)
    first = filled(scores[:90], 11, 10)
    second = TopLists(3, 11, 10)
    second.load_state({name: array.copy() for name, array in first.state().items()})
    for start in range(90, 200, 10):
        second.add(scores[start : start + 10], 3 * np.arange(start, start + 10))
    for concept in range(3):
        assert all(np.array_equal(a, b) for a, b in zip(straight.ranked(concept), second.ranked(concept), strict=True))


def test_memory_is_that_of_the_places_and_an_eighth_more():
    assert TopLists.nbytes(2754, 50_000, 1000) == 12 * 2754 * 56_250
    lists = TopLists(4, 80, 4)
    assert lists.scores.nbytes + lists.rows.nbytes == TopLists.nbytes(4, 80, 4) == 12 * 4 * 90


def test_best_takes_the_first_of_equals():
    values = np.array([1, 3, 2, 3, 2, 2], np.float32)
    assert best(values, 3).tolist() == [False, True, True, True, False, False]
    assert best(values, 4).tolist() == [False, True, True, True, True, False]
    assert best(values, 9).all() and not best(values[:0], 2).any()


def three_concepts():
    """Six samples, three concepts, lists of three.

    sample     0    1    2    3    4    5        list of three           last
    dog      0.9  0.8  0.7  0.6  0.1  0.0        0 (.9) 1 (.8) 2 (.7)     0.7
    puppy    0.8  0.9  0.2  0.5  0.0  0.1        1 (.9) 0 (.8) 3 (.5)     0.5
    unicorn  0.3  0.3  0.1  0.2  0.1  0.4        5 (.4) 0 (.3) 1 (.3)     0.3
    """
    scores = np.array(
        [[0.9, 0.8, 0.7, 0.6, 0.1, 0.0], [0.8, 0.9, 0.2, 0.5, 0.0, 0.1], [0.3, 0.3, 0.1, 0.2, 0.1, 0.4]], np.float32
    )  # fmt: skip
    lists = TopLists(3, 3, 6)
    lists.add(np.ascontiguousarray(scores.T), np.arange(6))
    return lists


def test_assignment_by_hand():
    # unicorn is rarest: 5, then 0 (ties with 1, lower number); puppy: 1, then 3, as 0 is gone; dog: 2 is all that is left of its list
    result = assign(three_concepts(), 2, np.zeros(6, bool))
    assert result.order.tolist() == [2, 1, 0]
    assert [rows.tolist() for rows in result.rows] == [[2], [1, 3], [5, 0]]
    assert [ranks.tolist() for ranks in result.ranks] == [[3], [1, 3], [1, 2]]
    assert np.allclose(result.scores[1], [0.9, 0.5]) and np.allclose(result.last_scores, [0.7, 0.5, 0.3])
    one = assign(three_concepts(), 1, np.zeros(6, bool))
    assert [rows.tolist() for rows in one.rows] == [[0], [1], [5]]


def test_what_is_taken_beforehand_or_refused_is_nobodys():
    taken = np.zeros(6, bool)
    taken[5] = True
    result = assign(three_concepts(), 2, taken)
    assert [rows.tolist() for rows in result.rows] == [[2], [3], [0, 1]]
    refuse_zero = lambda rows, count: (np.flatnonzero(rows != 0)[:count], {"odd": np.flatnonzero(rows == 0)})  # noqa: E731
    result = assign(three_concepts(), 2, np.zeros(6, bool), refuse_zero)
    assert [rows.tolist() for rows in result.rows] == [[2], [3], [5, 1]]
    assert [dict(+refused) for refused in result.refused] == [{}, {}, {"odd": 1}], "refused once, then out of everyone's sight"


def test_concepts_that_tie_are_served_by_number_and_short_lists_use_what_there_is():
    lists = TopLists(2, 50, 4)
    lists.add(np.array([[0.5, 0.5], [0.4, 0.4], [0.3, 0.3]], np.float32), np.arange(3))
    result = assign(lists, 2, np.zeros(3, bool))
    assert result.order.tolist() == [0, 1] and [rows.tolist() for rows in result.rows] == [[0, 1], [2]]


def brute_assignment(scores, places, per_concept):
    """The method in plain loops: scores (S, C) -> rows of each concept."""
    lists = [sorted(range(len(scores)), key=lambda n: (-scores[n, c], n))[:places] for c in range(scores.shape[1])]
    order = sorted(range(scores.shape[1]), key=lambda c: (scores[lists[c][-1], c], c))
    taken, given = set(), [[] for _ in lists]
    for concept in order:
        for sample in lists[concept]:
            if len(given[concept]) < per_concept and sample not in taken:
                given[concept].append(sample)
                taken.add(sample)
    return given


@pytest.mark.parametrize("seed", range(6))
def test_stream_and_assignment_equal_brute_force(seed):
    random = np.random.default_rng(seed)
    scores = (random.integers(-8, 9, (180, 9)) / 8).astype(np.float32)
    lists = TopLists(9, 25, 17)
    for start in range(0, 180, 17):
        lists.add(scores[start : start + 17], np.arange(start, min(180, start + 17)))
    result = assign(lists, 10, np.zeros(180, bool))
    assert [rows.tolist() for rows in result.rows] == brute_assignment(scores, 25, 10)
    everything = np.concatenate(result.rows)
    assert len(np.unique(everything)) == len(everything)


def test_effective_number_of_concepts():
    assert effective_number([5, 5, 5, 5]) == pytest.approx(4)
    assert effective_number([7, 0, 0]) == pytest.approx(1) and effective_number([0, 0]) == 0
    assert effective_number([1, 3]) == pytest.approx(np.exp(-(0.25 * np.log(0.25) + 0.75 * np.log(0.75))))


def at_angles(*degrees):
    """Unit vectors in a plane; cosine of two is that of the angle between them."""
    return np.array([[np.cos(np.deg2rad(d)), np.sin(np.deg2rad(d))] for d in degrees], np.float16)


def test_duplicates_by_hand_the_better_scoring_one_stays():
    vectors = at_angles(0, 5, 90, 10, 90, 40)  # cos 5 = 0.996, cos 10 = 0.985
    distinct = Distinct(lambda rows: vectors[rows], cosine=0.99)
    chosen, refused = distinct(np.arange(6), 4)
    # 5 degrees is near 0; 10 degrees is near 5, but 5 is not taken, and not near 0; the second 90 is identical
    assert chosen.tolist() == [0, 2, 3, 5] and {k: v.tolist() for k, v in refused.items()} == {"near": [1], "identical": [4]}
    # another concept: near is judged among its own, identical among all
    chosen, refused = distinct(np.array([4, 1]), 2)
    assert chosen.tolist() == [1] and {k: v.tolist() for k, v in refused.items()} == {"identical": [0]}


def test_what_comes_after_the_last_pick_is_not_looked_at():
    vectors = at_angles(0, 1, 2, 90)
    chosen, refused = Distinct(lambda rows: vectors[rows], cosine=0.99)(np.arange(4), 1)
    assert chosen.tolist() == [0] and not refused
    none, refused = Distinct(lambda rows: vectors[rows], cosine=0.99)(np.arange(0), 3)
    assert len(none) == 0 and not refused


def test_excluded_features_are_kept_away_from():
    vectors = at_angles(0, 30, 60, 91)
    distinct = Distinct(lambda rows: vectors[rows], identical=False, excluded=at_angles(32, 90), exclude_cosine=0.99)
    chosen, refused = distinct(np.arange(4), 4)
    assert chosen.tolist() == [0, 2] and refused["excluded"].tolist() == [1, 3]


def test_near_duplicates_over_blocks_equal_a_plain_loop(monkeypatch):
    monkeypatch.setattr("align.curation.duplicates.BLOCK", 16)
    vectors = np.random.default_rng(0).normal(size=(150, 4)).astype(np.float16)
    order = np.random.default_rng(1).permutation(150)
    chosen, _ = Distinct(lambda rows: vectors[rows], identical=False, cosine=0.9)(order, 1000)
    wide, kept = unit(vectors), []
    for place, row in enumerate(order):
        if all(wide[row] @ wide[order[other]] < 0.9 for other in kept):
            kept.append(place)
    assert chosen.tolist() == kept and len(kept) < 100


SIGNS = np.random.default_rng(5).choice([-1.0, 1.0], (90, 16))  # norm 4 and dot products in sixteenths: no rounding anywhere


def sign_store(make_store, folder, rows, shard_rows=25, **more):
    return make_store(folder, [rows[at : at + shard_rows] for at in range(0, len(rows), shard_rows)], width=16, **more)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_scores_of_stores_equal_a_full_matrix_over_shards_stores_and_chunks(tmp_path, make_store, monkeypatch, size):
    monkeypatch.setattr("align.curation.scoring.chunk_rows", lambda concepts: size)
    stores = [
        sign_store(make_store, tmp_path / name, [(f"k{n}", 0, SIGNS[n]) for n in span], data=name)
        for name, span in (("a", range(60)), ("b", range(60, 90)))
    ]
    candidates = CandidatePool(stores)
    prototypes = normalize(torch.from_numpy(SIGNS[:5]).float())
    lists, best_of = TopLists(5, 20, size), np.zeros(5, int)
    for shard in range(len(candidates.shards)):
        best_of += score_shard(candidates, shard, prototypes, normalize, lists)
    full = (SIGNS @ SIGNS[:5].T / 16).astype(np.float32)
    for concept, (values, rows) in enumerate(brute_top(full, 20)):
        got = lists.ranked(concept)
        assert (got[0].tolist(), got[1].tolist()) == (values, [row // 3 for row in rows])
    assert best_of.tolist() == np.bincount(full.argmax(axis=1), minlength=5).tolist()
    assert candidates.keys(np.array([61, 3, 89, 0])) == ["k61", "k3", "k89", "k0"]


@pytest.mark.parametrize("size", [2, 4, 1000])
def test_a_sample_with_several_captions_counts_once_with_its_best(tmp_path, make_store, monkeypatch, size):
    monkeypatch.setattr("align.curation.scoring.chunk_rows", lambda concepts: size)
    owners = [0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4]
    items = [0, 1, 2, 0, 0, 1, 0, 1, 2, 3, 0]
    rows = [(f"k{owner}", item, SIGNS[n]) for n, (owner, item) in enumerate(zip(owners, items, strict=True))]
    candidates = CandidatePool([make_store(tmp_path / "c", [rows[:6], rows[6:]], kind="caption", width=16)])
    prototypes = normalize(torch.from_numpy(SIGNS[:3]).float())
    parts = [part for shard in (0, 1) for part in scored_chunks(candidates, shard, prototypes, normalize)]
    scores, samples = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    full = SIGNS[:11] @ SIGNS[:3].T / 16
    assert samples.tolist() == [0, 3, 4, 6, 10]
    assert np.array_equal(scores, [full[np.array(owners) == owner].max(axis=0) for owner in range(5)])
    only = np.zeros(11, bool)
    only[[3, 6]] = True
    parts = [part for shard in (0, 1) for part in scored_chunks(candidates, shard, prototypes, normalize, only)]
    assert np.concatenate([part[1] for part in parts]).tolist() == [3, 6]
    assert np.array_equal(np.concatenate([part[0] for part in parts]), scores[[1, 3]])


def test_rows_in_another_store_go_by_key_within_the_same_data(tmp_path, make_store):
    captions = [(f"k{n}", item, SIGNS[n]) for n in range(6) for item in (0, 1)]
    images = [(f"k{n}", 0, SIGNS[n]) for n in (5, 4, 3, 1, 0)]  # k2 has no image
    ours = CandidatePool([make_store(tmp_path / "c", [captions[:6], captions[6:]], kind="caption", width=16)])
    theirs = CandidatePool([make_store(tmp_path / "i", [images[3:], images[:3]], width=16)])
    assert ours.rows_in(theirs).tolist() == [1, 1, 0, 0, -1, -1, 4, 4, 3, 3, 2, 2]
    other = CandidatePool([make_store(tmp_path / "o", [images[3:], images[:3]], width=16, data="plan-2")])
    with pytest.raises(UsageError, match="not encoded from the same data"):
        ours.rows_in(other)


def test_stores_of_other_encoders_or_kinds_are_refused(tmp_path, make_store):
    one = sign_store(make_store, tmp_path / "a", [("k1", 0, SIGNS[0])])
    other = sign_store(make_store, tmp_path / "b", [("k2", 0, SIGNS[1])], fingerprint={"encoder": "tiny", "layer": 3})
    texts = sign_store(make_store, tmp_path / "c", [("k3", 0, SIGNS[2])], kind="caption")
    with pytest.raises(FingerprintError, match="layer"):
        CandidatePool([one, other])
    with pytest.raises(UsageError, match="one kind"):
        CandidatePool([one, texts])
    with pytest.raises(UsageError, match="no candidates"):
        CandidatePool([make_store(tmp_path / "d", [[]], width=16)])


def test_shots_become_the_mean_of_their_normalised_rows(tmp_path, make_store):
    import pyarrow as pa

    from align.curation.concepts import shot_prototypes

    rows = [("a", 0, [2.0, 0.0]), ("b", 0, [0.0, 8.0]), ("c", 0, [-1.0, 0.0]), ("d", 0, [5.0, 5.0])]
    shots = CandidatePool([make_store(tmp_path / "s", [rows[:2], rows[2:]], width=2)])
    labels = pa.table({"key": ["c", "a", "b"], "label": ["left", "up right", "up right"]})
    names, prototypes = shot_prototypes(shots, labels, normalize)
    assert names == ("left", "up right")
    assert torch.allclose(prototypes, torch.tensor([[-1.0, 0.0], [2**-0.5, 2**-0.5]]))
    with pytest.raises(DataError, match="'cow'"):
        shot_prototypes(shots, pa.table({"key": ["a", "x"], "label": ["left", "cow"]}), normalize)
