"""Calibration of zero-shot scores: does a class that is named with 80% confidence come out right 80% of the time?

`N` images. Confidence is the softmax over the classes of the model's own scale times the cosine; the models were trained on pairs, not
on this, so being badly calibrated is no mistake, but then the scores are no probabilities either.
"""

from dataclasses import dataclass

import numpy as np

from align.common.errors import UsageError

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Bins of equal width: `count`, mean `confidence` and `accuracy` of each that is not empty; `error` is the expected one."""

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
        """Share of images that were named right."""
        return float((self.count * self.accuracy).sum() / self.count.sum())


def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Calibration:
    """Return the reliability of `confidence` (N,) in [0, 1] given `correct` (N,) bool, and the expected calibration error.

    The error is the mean over images of |accuracy - confidence| of their bin; bin k holds (k/bins, (k+1)/bins], the first one 0 too
    (C. Guo et al., On Calibration of Modern Neural Networks, 2017). UsageError without images or for confidences outside [0, 1].
    """
    if len(confidence) == 0 or not ((confidence >= 0) & (confidence <= 1)).all():
        raise UsageError(f"{len(confidence)} confidences, which should be one or more numbers from 0 to 1")
    place = np.clip(np.ceil(np.asarray(confidence, dtype=np.float64) * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    used = count > 0
    sums = [np.bincount(place, weights=np.asarray(values, dtype=np.float64), minlength=bins)[used] for values in (confidence, correct)]
    mean, accuracy = (total / count[used] for total in sums)
    error = float((count[used] * np.abs(accuracy - mean)).sum() / len(confidence))
    return Calibration(count[used], mean, accuracy, error)
