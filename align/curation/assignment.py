"""Greedy assignment of candidates to concepts, rarest first. Shapes: `C` concepts, `M` places in a list, `S` rows of all candidates."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from align.common.errors import DataError
from align.common.files import atomic_path
from align.curation.config import PER_CONCEPT, TOP
from align.curation.pool import CandidatePool
from align.curation.toplists import TopLists

CAPTIONS_A_SAMPLE = 16  # more are not expected
Refusals = dict[str, np.ndarray]  # reason -> positions of the rows passed over for it
Picker = Callable[[np.ndarray, int], tuple[np.ndarray, Refusals]]


@dataclass(frozen=True)
class Assignment:
    """The chosen samples of each concept, by concept number."""

    order: np.ndarray  # (C,) concepts, rarest first
    rows: list[np.ndarray]  # sample numbers, best first
    scores: list[np.ndarray]
    ranks: list[np.ndarray]  # places in the concept's list, from 1
    last_scores: np.ndarray  # (C,) score at rank M: the lower, the rarer
    refused: list[Counter[str]]  # reason -> how many candidates were passed over


def numbers_for(pool: CandidatePool, top: int, per_concept: int, concepts: int) -> tuple[int, int, list[str]]:
    """Return `top` and `per_concept`; defaults are smaller where all candidates could be chosen, with a sentence for each.

    Lists that hold all candidates make each concept as rare as its worst candidate, and so many places for each concept choose nothing.
    Then lists hold a quarter of the samples, and concepts share half of them. `top` does not depend on `per_concept`.
    """
    if len(pool) > CAPTIONS_A_SAMPLE * max(top, per_concept * concepts):  # large: nobody counts
        return top, per_concept, []
    samples, said, asked = pool.samples(), [], (top, per_concept)
    if top == TOP and top >= samples:
        top = max(1, samples // 4)
        said.append(f"--top {TOP} holds all {samples} candidates: lists hold {top}, a quarter of them")
    elif top >= samples:
        said.append(f"--top {top} holds all candidates: rarity then goes by the worst of them; give a --top well below")
    if per_concept == PER_CONCEPT:
        share = samples // (2 * concepts) if per_concept * concepts >= samples else per_concept
        per_concept = max(1, min(share, top))
    if per_concept < asked[1]:
        said.append(f"--per-concept {asked[1]} of {concepts} concepts is more than lists or candidates have: at most {per_concept} each")
    return top, per_concept, said


def refuse_all(assignment: "Assignment", samples: int) -> None:
    """Raise DataError if every sample was chosen: then nothing was."""
    if sum(map(len, assignment.rows)) == samples:
        raise DataError(
            f"all {samples} candidates would be chosen for {len(assignment.rows)} concepts, so nothing was written; train without --keys, "
            "or give more candidates or fewer concepts"
        )


def first_ones(rows: np.ndarray, count: int) -> tuple[np.ndarray, Refusals]:
    """Return the positions of the first `count` of `rows` and no refusals: a picker that takes everything."""
    return np.arange(min(count, len(rows))), {}


def assign(lists: TopLists, per_concept: int, taken: np.ndarray, pick: Picker = first_ones) -> Assignment:
    """Return the greedy assignment: by ascending score at rank M, each concept gets its best samples that are not taken.

    `taken` (S,) bool is False where a sample may be used; it is updated. `pick(rows, count)` chooses up to `count` of a concept's free
    samples, best first, and returns those that it refuses for good. Ties go to the lower concept number. Source: freeze-align.
    """
    last = lists.last_scores()
    order = np.argsort(last, kind="stable")
    rows, scores, ranks = ([np.zeros(0, dtype=np.int64)] * len(lists) for _ in range(3))
    refused: list[Counter[str]] = [Counter() for _ in rows]
    for concept in order.tolist():
        values, candidates = lists.ranked(concept)
        free = np.flatnonzero(~taken[candidates])
        chosen, refusals = pick(candidates[free], per_concept)
        places = free[chosen]
        rows[concept], scores[concept], ranks[concept] = candidates[places], values[places], places + 1
        taken[candidates[places]] = True
        for reason, positions in refusals.items():
            taken[candidates[free[positions]]] = True
            refused[concept][reason] += len(positions)
    return Assignment(order, rows, scores, ranks, last, refused)


def write_chosen(path: Path, candidates: CandidatePool, names: tuple[str, ...], assignment: Assignment, note: str) -> None:
    """Write the chosen samples by concept and rank, as parquet with key, data, store, concept, score and rank."""
    samples, counts = np.concatenate(assignment.rows), [len(rows) for rows in assignment.rows]
    home = pa.array(np.searchsorted(candidates.starts, samples, side="right") - 1)
    table = pa.table(
        {
            "key": pa.array(candidates.keys(samples), pa.string()),
            "data": pa.array([store.header.data for store in candidates.stores]).take(home),
            "store": pa.array([str(store.folder) for store in candidates.stores]).take(home),
            "concept": pa.array(names).take(pa.array(np.repeat(np.arange(len(names)), counts))),
            "score": np.concatenate(assignment.scores),
            "rank": np.concatenate(assignment.ranks),
        }
    )
    with atomic_path(path) as temporary:
        pq.write_table(table.replace_schema_metadata({"note": note}), temporary, compression="zstd")
