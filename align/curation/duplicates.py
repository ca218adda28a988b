"""Pickers that skip near-duplicates and samples of an evaluation set while a concept is served.

Shapes: `n` samples of a block, `D` feature width, `K` samples a concept already has, `X` features to keep away from. Cosines are
compared within one concept only, because all pairs of millions would cost more than the curation: two concepts may take near-duplicates
of each other. Identical features are found across concepts. A skipped sample is not offered again.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import numpy as np
import xxhash

from align.common.fingerprints import compare_fingerprints
from align.curation.assignment import Picker, Refusals, first_ones
from align.curation.pool import CandidatePool

BLOCK = 1024  # rows compared at once: a matrix of at most BLOCK x BLOCK cosines


def unit(features: np.ndarray) -> np.ndarray:
    """Return `features` (n, D) as float32 with norm 1."""
    wide = features.astype(np.float32)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


@dataclass(eq=False)
class Distinct:
    """Picker that skips excluded samples and lower-scored duplicates. Memory: 60 bytes per chosen sample, K x D floats and `excluded`."""

    features: Callable[[np.ndarray], np.ndarray]  # sample numbers (n,) -> (n, D) float16
    _: KW_ONLY
    identical: bool = True  # pass over as `identical`: same features as a chosen sample of any concept
    cosine: float | None = None  # pass over as `near`: at least this cosine with a chosen sample of this concept; None: never
    excluded: np.ndarray | None = None  # (X, D)
    exclude_cosine: float = 0.95  # pass over as `excluded`: at least this cosine with a row of `excluded`

    def __post_init__(self) -> None:
        self.excluded = None if self.excluded is None else unit(self.excluded)
        self._hashes: set[int] = set()

    def __call__(self, rows: np.ndarray, count: int) -> tuple[np.ndarray, Refusals]:
        """Return positions in `rows` (best first) of up to `count` samples, and the skipped positions by reason."""
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
        """Return (n,) bool: whether each row of `vectors` (n, D) is close to an excluded one."""
        found = np.zeros(len(vectors), dtype=bool)
        if self.excluded is not None:
            for start in range(0, len(self.excluded), 8 * BLOCK):
                found |= (vectors @ self.excluded[start : start + 8 * BLOCK].T).max(axis=1) >= self.exclude_cosine
        return found


def picker_for(
    candidates: CandidatePool, images: CandidatePool | None, excluded: CandidatePool | None,
    duplicates: Literal["keep", "identical", "near"], cosine: float, exclude_cosine: float,
) -> tuple[Picker, np.ndarray]:  # fmt: skip
    """Return the picker of a concept, and (S,) bool: True for samples without a row in `images`, which cannot be used.

    Features are compared in `images`, or else in the candidates. Raise FingerprintError if another encoder made `excluded`.
    """
    features: Callable[[np.ndarray], np.ndarray] = candidates.features
    unusable, away = np.zeros(len(candidates), dtype=bool), None
    if duplicates == "keep" and excluded is None:
        return first_ones, unusable
    compared = images or candidates
    if excluded is not None:
        compare_fingerprints(excluded.fingerprint, compared.fingerprint, str(compared.stores[0].folder))
        away = excluded.features(np.arange(len(excluded)))
    if images is not None:
        rows = candidates.rows_in(images)
        features, unusable = lambda samples: compared.features(rows[samples]), rows < 0
    near = cosine if duplicates == "near" else None
    return Distinct(features, identical=duplicates != "keep", cosine=near, excluded=away, exclude_cosine=exclude_cosine), unusable
