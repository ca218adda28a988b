"""Each concept's best candidates, kept while scores stream by.

Shapes: `C` concepts, `M` places in a concept's list, `n` samples of a chunk. A sample's number is its first row. Samples arrive in
ascending order, so ties go to the lower number however the stream is cut.
"""

from collections.abc import Mapping

import numpy as np

SLACK_SHARE = 8  # new entries wait in M / 8 extra places and are sorted in when these are full


class TopLists:
    """The M best samples of each of C concepts, by score, then by lower number. Memory: 12 bytes per place, M / 8 places of slack.

    Until ranked, a list is in ascending order of sample number. A new sample has the highest number, so it enters only if it beats the
    threshold, the concept's M-th best score so far.
    """

    def __init__(self, concepts: int, places: int, chunk: int) -> None:
        """Make empty lists of `places` (M) that accept up to `chunk` samples at once."""
        assert concepts >= 1 and places >= 1 and chunk >= 1
        self.places, self.chunk = places, chunk
        room = places + max(chunk, places // SLACK_SHARE)
        self.scores = np.zeros((concepts, room), dtype=np.float32)
        self.rows = np.zeros((concepts, room), dtype=np.int64)
        self.held = np.zeros(concepts, dtype=np.int64)
        self.threshold = np.full(concepts, -np.inf, dtype=np.float32)

    @staticmethod
    def nbytes(concepts: int, places: int, chunk: int) -> int:
        """Return the memory in bytes of such lists."""
        return 12 * concepts * (places + max(chunk, places // SLACK_SHARE))

    def __len__(self) -> int:
        return len(self.held)

    def add(self, scores: np.ndarray, rows: np.ndarray) -> None:
        """Add scores (n, C) float32 of the samples `rows` (n,) int64, which are ascending and above all earlier ones."""
        assert scores.shape == (len(rows), len(self)) and len(rows) <= self.chunk, (scores.shape, len(rows))
        flat = scores.reshape(-1)
        winners = np.flatnonzero(scores > self.threshold)
        samples, concepts = np.divmod(winners, len(self))
        counts = np.bincount(concepts, minlength=len(self))
        full = np.flatnonzero(self.held + counts > self.scores.shape[1])
        if len(full):
            for concept in full.tolist():
                self._cut(concept)
            still = flat[winners] > self.threshold[concepts]
            winners, samples, concepts = winners[still], samples[still], concepts[still]
            counts = np.bincount(concepts, minlength=len(self))
        order = np.argsort(concepts, kind="stable")  # by concept, and within one still ascending
        concepts = concepts[order]
        places = self.held[concepts] + np.arange(len(concepts)) - (np.cumsum(counts) - counts)[concepts]
        self.scores[concepts, places] = flat[winners[order]]
        self.rows[concepts, places] = rows[samples[order]]
        self.held += counts

    def _cut(self, concept: int) -> None:
        """Keep the M best of a list, in their order, and raise the threshold to the worst of them."""
        held = int(self.held[concept])
        if held < self.places:
            return
        values = self.scores[concept, :held]
        kept = best(values, self.places)
        self.threshold[concept] = values[kept].min()
        self.scores[concept, : self.places] = values[kept]
        self.rows[concept, : self.places] = self.rows[concept, :held][kept]
        self.held[concept] = self.places

    def merge(self, other: "TopLists") -> None:
        """Add the lists of other samples. The result equals that of one stream of both."""
        assert (len(other), other.places) == (len(self), self.places)
        for concept in range(len(self)):
            rows = np.concatenate([part.rows[concept, : part.held[concept]] for part in (self, other)])
            scores = np.concatenate([part.scores[concept, : part.held[concept]] for part in (self, other)])
            order = np.argsort(rows, kind="stable")
            kept = order[best(scores[order], self.places)]
            self.scores[concept, : len(kept)], self.rows[concept, : len(kept)] = scores[kept], rows[kept]
            self.held[concept] = len(kept)
            self.threshold[concept] = scores[kept].min() if len(kept) == self.places else -np.inf

    def ranked(self, concept: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and sample numbers (up to M each) of a concept, best first, ties by lower number."""
        self._cut(concept)
        scores = self.scores[concept, : self.held[concept]]
        order = np.argsort(-scores, kind="stable")
        return scores[order], self.rows[concept, : self.held[concept]][order]

    def last_scores(self) -> np.ndarray:
        """Return (C,) float32: each list's score at rank M, or at its last rank if shorter (+inf if empty)."""
        for concept in range(len(self)):
            self._cut(concept)
        lists = zip(self.scores, self.held.tolist(), strict=True)
        return np.array([scores[:held].min(initial=np.inf) for scores, held in lists], dtype=np.float32)

    def state(self) -> dict[str, np.ndarray]:
        """Return the arrays of the state, not copied."""
        return {"scores": self.scores, "rows": self.rows, "held": self.held, "threshold": self.threshold}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Use the arrays of the state of lists of the same size, not copied."""
        for name, own in self.state().items():
            assert own.shape == state[name].shape and own.dtype == state[name].dtype, name
            setattr(self, name, state[name])


def best(values: np.ndarray, count: int) -> np.ndarray:
    """Return (n,) bool: True for the `count` highest of `values` (n,), the first ones in a tie; all True if there are no more."""
    if len(values) <= count:
        return np.ones(len(values), dtype=bool)
    last = np.partition(values, len(values) - count)[len(values) - count]
    kept = values > last
    kept[np.flatnonzero(values == last)[: count - int(kept.sum())]] = True
    return kept
