"""Near-duplicates among what is chosen, and samples that an evaluation set holds: passed over while a concept is served.

Shapes: `n` samples of a block, `D` feature width, `K` samples a concept already has, `X` features to keep away from.

Limits, on purpose: cosines are compared within one concept's picks only (all pairs of millions would cost more than the curation), so
two near-duplicates may be taken by two concepts; identical features are found across all concepts. Each pick is compared with every
excluded feature. What is passed over for one concept is not offered to the next.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import xxhash

from align.common.fingerprints import compare_fingerprints
from align.curation.assignment import Picker, Refusals, first_ones
from align.curation.pool import CandidatePool

BLOCK = 1024  # rows compared at once: a matrix of at most BLOCK x BLOCK cosines


def unit(features: np.ndarray) -> np.ndarray:
    """Return `features` (n, D) as float32 of norm 1."""
    wide = features.astype(np.float32)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


class Distinct:
    """A picker for `assign` that passes over duplicates and excluded samples; the one that scores better is kept.

    `features` gives (n, D) float16 of sample numbers (n,). Reasons: `identical` (the very features of a chosen sample of any concept),
    `near` (cosine of at least `cosine` with a chosen one of this concept; None: not looked at), `excluded` (cosine of at least
    `exclude_cosine` with one of `excluded` (X, D)). Memory: 8 bytes of hash (about 60 as Python holds them) a chosen sample,
    K x D floats and the excluded features.
    """

    def __init__(
        self,
        features: Callable[[np.ndarray], np.ndarray],
        *,
        identical: bool = True,
        cosine: float | None = None,
        excluded: np.ndarray | None = None,
        exclude_cosine: float = 0.95,
    ) -> None:
        self.features, self.identical, self.cosine, self.exclude_cosine = features, identical, cosine, exclude_cosine
        self.excluded = None if excluded is None else unit(excluded)
        self._hashes: set[int] = set()

    def __call__(self, rows: np.ndarray, count: int) -> tuple[np.ndarray, Refusals]:
        """Return positions in `rows` (best first) of up to `count` samples, and by reason those passed over on the way."""
        chosen: list[int] = []
        refused: dict[str, list[int]] = {}
        kept = np.empty((0, 0), dtype=np.float32)
        for start in range(0, len(rows), BLOCK):
            raw = self.features(rows[start : start + BLOCK])
            vectors = unit(raw)
            outside = self._near_excluded(vectors)
            near = (vectors @ kept.T).max(axis=1) >= self.cosine if self.cosine is not None and len(kept) else np.zeros(len(raw), bool)
            alike = vectors @ vectors.T >= self.cosine if self.cosine is not None else None  # (n, n)
            taken: list[int] = []
            for place in range(len(raw)):
                digest = xxhash.xxh3_64_intdigest(raw[place].tobytes()) if self.identical else 0
                if outside[place]:
                    reason = "excluded"
                elif digest in self._hashes:
                    reason = "identical"
                elif near[place] or (alike is not None and alike[place, taken].any()):
                    reason = "near"
                else:
                    taken.append(place)
                    if self.identical:
                        self._hashes.add(digest)
                    if len(chosen) + len(taken) == count:
                        break
                    continue
                refused.setdefault(reason, []).append(start + place)
            chosen += [start + place for place in taken]
            if len(chosen) == count:
                break
            kept = np.concatenate([kept.reshape(-1, vectors.shape[1]), vectors[taken]]) if self.cosine is not None else kept
        return np.array(chosen, dtype=np.int64), {reason: np.array(places) for reason, places in refused.items()}

    def _near_excluded(self, vectors: np.ndarray) -> np.ndarray:
        """Return (n,) bool: whether a row of `vectors` (n, D) is a near-duplicate of an excluded one."""
        found = np.zeros(len(vectors), dtype=bool)
        if self.excluded is not None:
            for start in range(0, len(self.excluded), 8 * BLOCK):
                found |= (vectors @ self.excluded[start : start + 8 * BLOCK].T).max(axis=1) >= self.exclude_cosine
        return found


def _features_at(images: CandidatePool, rows: np.ndarray, samples: np.ndarray) -> np.ndarray:
    return images.features(rows[samples])


def picker_for(
    candidates: CandidatePool, images: CandidatePool | None, excluded: CandidatePool | None,
    duplicates: Literal["keep", "identical", "near"], cosine: float, exclude_cosine: float,
) -> tuple[Picker, np.ndarray]:  # fmt: skip
    """Return how a concept picks, and (S,) bool which samples cannot be used, as they have no row in `images`.

    Features are compared in `images`, or in the candidates themselves; FingerprintError if `excluded` were made by another encoder.
    """
    unusable = np.zeros(len(candidates), dtype=bool)
    if duplicates == "keep" and excluded is None:
        return first_ones, unusable
    compared = images or candidates
    if excluded is not None:
        compare_fingerprints(excluded.fingerprint, compared.fingerprint, str(compared.stores[0].folder))
    features = candidates.features
    if images is not None:
        rows = candidates.rows_in(images)
        unusable = rows < 0
        features = partial(_features_at, images, rows)
    away = None if excluded is None else excluded.features(np.arange(len(excluded)))
    near = cosine if duplicates == "near" else None
    return Distinct(features, identical=duplicates != "keep", cosine=near, excluded=away, exclude_cosine=exclude_cosine), unusable
