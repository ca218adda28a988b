"""Calibration of zero-shot scores: are predictions with 80% confidence right 80% of the time?

`N` images. Confidence is the softmax over classes of the model's scale times the cosine. The models were not trained for this.
"""

from dataclasses import dataclass

import numpy as np

from align.common.errors import UsageError

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Bins of equal width, without empty ones: `count`, mean `confidence`, `accuracy`. `error` is the expected calibration error."""

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    error: float

    @property
    def mean_confidence(self) -> float:
        """Mean confidence of all images."""
        return float((self.count * self.confidence).sum() / self.count.sum())

    @property
    def mean_accuracy(self) -> float:
        """Share of images that were classified correctly."""
        return float((self.count * self.accuracy).sum() / self.count.sum())


def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Calibration:
    """Return the calibration of `confidence` (N,) in [0, 1] with `correct` (N,) bool; UsageError for no images or other confidences.

    The error is the mean over images of |accuracy - confidence| of their bin (C. Guo et al., 2017). Bins are (k/bins, (k+1)/bins].
    """
    if len(confidence) == 0 or not ((confidence >= 0) & (confidence <= 1)).all():
        raise UsageError(f"{len(confidence)} confidences, which should be one or more numbers from 0 to 1")
    place = np.clip(np.ceil(np.asarray(confidence, dtype=np.float64) * bins).astype(np.int64) - 1, 0, bins - 1)  # 0 is in bin 0
    count = np.bincount(place, minlength=bins)
    used = count > 0
    sums = [np.bincount(place, weights=np.asarray(values, dtype=np.float64), minlength=bins)[used] for values in (confidence, correct)]
    mean, accuracy = (total / count[used] for total in sums)
    error = float((count[used] * np.abs(accuracy - mean)).sum() / len(confidence))
    return Calibration(count[used], mean, accuracy, error)
