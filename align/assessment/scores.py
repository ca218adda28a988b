"""Scores of each candidate (vision encoder, layer, feature, text encoder) with interval and cost, cached on disk.

Shapes: `N` images that all stores share, `F` image feature width, `D` caption feature width, `n` images of a sample.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from align.assessment import similarity
from align.assessment.probing import CaptionedFeatures, Training, linear_probe_correct, probe_alignment, split_rows
from align.common.errors import DataError
from align.common.files import atomic_json, hash_bytes, read_object
from align.common.intervals import bootstrap_weights, percentiles
from align.common.seeds import generator

SCORES = {
    "probing": "alignment probing, mean R@10",
    "knn": "weighted k-NN accuracy",
    "linear_probe": "linear probe accuracy",
    "cka": "CKA, linear, biased",
    "cka_debiased": "CKA, linear, debiased",
    "cka_rbf": "CKA, RBF, debiased",
    "mutual_knn": "mutual k-NN",
    "patch_overlap": "patch neighborhoods",
}
METHODS = {"classes": 2}  # version of a kind of scores (default 1); raise it when the computation changes, to void cached ones
NO_LABELS = "Weighted k-NN and the linear probe need classes: give --labelled a folder of folders to have the two columns."
NO_PATCHES = "Without --patch-images there is no column for patch neighborhoods."
MAX_PATCH_NEIGHBORS = 100
CKA_RESAMPLES = 200  # half-samples; enough for three digits of an interval

Result = TypeVar("Result")


@dataclass(frozen=True)
class Score:
    """A value with its 95% interval, the number `n` of images behind it, and its cost in seconds."""

    value: float
    low: float | None
    high: float | None
    n: int
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """How the scores are computed; part of the cache key."""

    training: Training
    test_rows: int = 1000
    similarity_rows: int = 2000
    neighbors: int = 10  # of mutual k-NN
    class_neighbors: int = 20  # of weighted k-NN
    resamples: int = 1000
    seed: int = 0


def cached(folder: Path, facts: dict[str, Any], compute: Callable[[], dict[str, Score]]) -> dict[str, Score]:
    """Return the scores for `facts` (JSON values; `kind` says which scores) from `folder`; compute and save them if they are missing."""
    method = METHODS.get(facts["kind"], 1)
    path = folder / f"{hash_bytes(repr((method, sorted(facts.items()))).encode())}.json"
    if path.exists():
        return {name: Score(**values) for name, values in read_object(path)["scores"].items()}
    scores = compute()
    folder.mkdir(parents=True, exist_ok=True)
    atomic_json(path, {"facts": facts, "scores": {name: asdict(score) for name, score in scores.items()}})
    return scores


def _timed(compute: Callable[..., Result], *arguments: Any) -> tuple[Result, float]:
    begin = time.perf_counter()
    return compute(*arguments), time.perf_counter() - begin


class TextSide:
    """The captions of one text encoder, and their statistics, computed once for all vision candidates."""

    def __init__(self, captions: np.ndarray, owners: np.ndarray, sample: np.ndarray, device: torch.device) -> None:
        """`captions` (T, D) float16 belong to images `owners` (T,), ascending. `sample` (n,) are the images compared by similarity."""
        self.captions, self.owners, self.device = captions, owners, device
        sums = np.add.reduceat(captions.astype(np.float32), np.searchsorted(owners, np.arange(owners[-1] + 1)))
        self.means = sums / np.bincount(owners)[:, None]  # (N, D): one vector an image
        sampled = torch.from_numpy(self.means[sample]).to(device)
        self.linear, self.rbf = similarity.linear_gram(sampled), similarity.rbf_gram(sampled)  # (n, n) each
        self.cosine = similarity.cosines(sampled)  # (n, n)

    def mean_of(self, rows: np.ndarray) -> Tensor:
        """Return the mean caption (n, D) of each of the images `rows` (n,)."""
        return torch.from_numpy(self.means[rows]).to(self.device)


class Scorer:
    """Computes the scores of candidates, all over the same images, splits and resamples."""

    def __init__(self, settings: Settings, rows: int, device: torch.device) -> None:
        """`rows` is N, the number of shared images. DataError if there are too few to split."""
        self.settings, self.device, seed = settings, device, settings.seed
        self.rows = split_rows(rows, settings.test_rows, seed)
        self.sample = np.sort(generator(seed, 8).permutation(rows)[: settings.similarity_rows])
        self._halves = similarity.half_samples(len(self.sample), min(CKA_RESAMPLES, settings.resamples), generator(seed, 9))
        self._weights: dict[int, np.ndarray] = {}

    def resamples(self, n: int) -> np.ndarray:
        """Return the bootstrap weights (R, n) that all scores over n images share, so that differences between candidates are paired."""
        if n not in self._weights:
            self._weights[n] = bootstrap_weights(n, self.settings.resamples, generator(self.settings.seed, 10, n))
        return self._weights[n]

    def _mean(self, values: np.ndarray | Tensor, seconds: float, details: dict[str, Any] | None = None) -> Score:
        array = np.asarray(values.cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
        interval = percentiles(self.resamples(len(array)) @ array.astype(np.float32))
        return Score(float(np.mean(array)), *interval, len(array), seconds, details or {})

    def with_labels(self, features: np.ndarray, labels: np.ndarray) -> dict[str, Score]:
        """Return `knn` and `linear_probe` of labelled images: features (n, F) float16, labels (n,). Classes of one image are left out."""
        kept = np.bincount(labels)[labels] > 1
        names, labels = np.unique(labels[kept], return_inverse=True)
        if len(names) < 2:
            raise DataError("fewer than two classes of the labelled data have two usable images; give more with --labelled-rows")
        features = features[kept].astype(np.float32)
        images, classes = torch.from_numpy(features).to(self.device), torch.from_numpy(labels).to(self.device)
        nearest, first = _timed(similarity.knn_correct, images, classes, self.settings.class_neighbors)
        linear, second = _timed(linear_probe_correct, features, labels, self.settings.seed)
        return {"knn": self._mean(nearest.double(), first), "linear_probe": self._mean(linear, second)}

    def relations(self, features: np.ndarray, text: TextSide) -> dict[str, Score]:
        """Return the three CKAs and the mutual k-NN of image features (N, F) float16 with the mean captions of the same images."""
        images = torch.from_numpy(features[self.sample]).to(self.device).float()

        def cka(gram: Callable[[Tensor], Tensor], against: Tensor, debiased: bool) -> Score:
            found, seconds = _timed(lambda: similarity.cka_interval(gram(images), against, debiased, self._halves))
            return Score(*found, len(images), seconds)

        scores = {"cka": cka(similarity.linear_gram, text.linear, False), "cka_debiased": cka(similarity.linear_gram, text.linear, True)}
        scores["cka_rbf"] = cka(similarity.rbf_gram, text.rbf, True)
        shared, seconds = _timed(lambda: similarity.neighbor_overlap(similarity.cosines(images), text.cosine, self.settings.neighbors))
        return {**scores, "mutual_knn": self._mean(shared, seconds)}

    def patches(self, patches: np.ndarray, width: int, captions: Tensor) -> dict[str, Score]:
        """Return `patch_overlap` of images with their captions (n, D). An image is its patches side by side: (n, P x width) float16."""
        n = len(patches)
        k = max(1, min(MAX_PATCH_NEIGHBORS, n // 10))
        shared, seconds = _timed(similarity.patch_overlap, torch.from_numpy(patches).to(self.device).reshape(n, -1, width), captions, k)
        return {"patch_overlap": self._mean(shared, seconds, {"neighbors": k})}

    def probing(self, features: np.ndarray, text: TextSide) -> dict[str, Score]:
        """Return `probing` of image features (N, F) float16 with the captions. Its details hold the value of each test image."""
        pairs, how = CaptionedFeatures(features, text.captions, text.owners), self.settings
        probe, seconds = _timed(probe_alignment, pairs, self.rows, how.training, how.seed, self.device)
        return {"probing": self._mean(probe.values, seconds, {**vars(probe), "values": probe.values.tolist()})}
