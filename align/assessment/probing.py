"""Probes: small heads trained on frozen features to measure what the features contain.

Alignment probing (SAIL, section 3) trains linear heads on both sides with the sigmoid loss and a constant learning rate until the
validation recall converges. The score is the mean of image-to-text and text-to-image R@10. The linear probe is multinomial logistic
regression.

Shapes: `N` images, `F` image feature width, `T` captions, `D` caption feature width, `n` held-out images, `C` classes.
"""

import copy
from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from align.assessment.similarity import vote_correct
from align.common.errors import DataError
from align.common.seeds import generator
from align.model.dual_encoder import SailConfig, SailModel
from align.model.ranking import best_ranks
from align.training.pairs import BatchOrder, PairBatch
from align.training.step import Objective, Schedule, Stepper, build_optimizer

RECALL_AT = 10
GRADIENT = 1e-5  # gradient tolerance of the linear probe; at scikit-learn's 1e-4 it has not converged


@dataclass(frozen=True)
class CaptionedFeatures:
    """Images (N, F) and all their captions (T, D), float16. `owners` (T,) int64 are the captions' image numbers, ascending."""

    images: np.ndarray
    captions: np.ndarray
    owners: np.ndarray

    def __post_init__(self) -> None:
        assert len(self.owners) == len(self.captions) and np.all(np.diff(self.owners) >= 0)
        assert np.array_equal(np.unique(self.owners), np.arange(len(self.images))), "every image needs a caption"

    def only(self, rows: np.ndarray) -> "CaptionedFeatures":
        """Return the images `rows` (n,) with their captions."""
        place = np.full(len(self.images), -1)
        place[rows] = np.arange(len(rows))
        owners = place[self.owners]
        order = owners.argsort(kind="stable")[np.count_nonzero(owners < 0) :]  # drops the captions of other images
        return CaptionedFeatures(self.images[rows], self.captions[order], owners[order])

    def batch(self, rows: np.ndarray, seed: int, step: int) -> PairBatch:
        """Return a batch of the images `rows` (b,), each with one caption drawn by (seed, step)."""
        first = np.searchsorted(self.owners, rows)
        count = np.searchsorted(self.owners, rows, side="right") - first
        drawn = first + (generator(seed, 2, step).random(len(rows)) * count).astype(np.int64)
        return PairBatch(self.images[rows], [self.captions[drawn]])


@dataclass(frozen=True)
class Training:
    """Settings of a probe. Its length is in steps, not epochs: 100 epochs of 2,000 pairs at batch 32k stay at chance level."""

    width: int = 2048
    batch_size: int = 512
    lr: float = 1e-3
    steps: int = 600  # at most
    every: int = 20  # steps between validations
    patience: int = 4  # validations without a better recall before it counts as converged
    precision: str = "fp32"


@dataclass(frozen=True)
class Probe:
    """Result of alignment probing, in fractions. `values` (n,) has one value per test image; their mean is the score."""

    values: np.ndarray
    image_to_text: float
    text_to_image: float
    steps: int  # step of the kept weights
    converged: bool  # False: still improving when the steps ran out
    history: list[tuple[int, float]] = field(default_factory=list)  # (step, validation recall)


def split_rows(rows: int, test_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return image numbers for training, validation and test. Test has at most a quarter, validation half of that; DataError if too few."""
    test = min(test_rows, rows // 4)
    validation = test // 2
    if validation <= RECALL_AT:
        needed = f"R@{RECALL_AT} needs more than {RECALL_AT} validation images"
        raise DataError(f"{rows} pairs are too few for probing: {needed}; give 100 or more")
    order = generator(seed, 5).permutation(rows)
    return np.sort(order[test + validation :]), np.sort(order[test : test + validation]), np.sort(order[:test])


def probe_alignment(
    pairs: CaptionedFeatures, rows: tuple[np.ndarray, np.ndarray, np.ndarray], how: Training, seed: int, device: torch.device
) -> Probe:
    """Return the result of alignment probing on `pairs`. `rows` are the image numbers for (training, validation, test).

    The validation recall is measured every `how.every` steps. After `how.patience` validations without improvement, training stops
    and the best weights are scored on the test images.
    """
    training, validation, test = rows[0], pairs.only(rows[1]), pairs.only(rows[2])
    settings = SailConfig(vision_width=pairs.images.shape[1], text_width=pairs.captions.shape[1], width=how.width, head="linear")
    model = SailModel(settings).initialize(seed).to(device)  # type: ignore[arg-type]
    optimizer = build_optimizer(model, "adamw", how.lr, (0.9, 0.99), 1e-4)
    schedule = Schedule(how.lr, how.steps, warmup=min(1.0, 10 / how.steps), min_lr=how.lr)  # constant, as the last step is not known
    stepper = Stepper(model, optimizer, schedule, Objective(reduction="sum_over_batch", tile=1024), seed=seed, precision=how.precision)
    order = BatchOrder(len(training), min(how.batch_size, len(training)), seed)
    history: list[tuple[int, float]] = []
    best, best_step, weights = -1.0, 0, copy.deepcopy(model.state_dict())
    for step in range(how.steps):
        stepper.step(pairs.batch(training[order.indices(step)], seed, step), step)
        if (step + 1) % how.every and step + 1 < how.steps:
            continue
        recall = float(np.mean(_recalled(model, validation)[0]))
        history.append((step + 1, recall))
        if recall > best:
            best, best_step, weights = recall, step + 1, copy.deepcopy(model.state_dict())
        elif step + 1 - best_step >= how.patience * how.every:
            break
    model.load_state_dict(weights)
    values, image_to_text, text_to_image = _recalled(model, test)
    converged = history[-1][0] - best_step >= how.patience * how.every
    return Probe(values, image_to_text, text_to_image, best_step, converged, history)


@torch.no_grad()
def _recalled(model: SailModel, pairs: CaptionedFeatures) -> tuple[np.ndarray, float, float]:
    """Return a value (N,) per image (half its own hit, half its captions' hits; captions weigh the same), and R@10 of both directions."""
    model.eval()
    images = model.project_image(torch.from_numpy(pairs.images).to(model.device))
    captions = model.project_text(torch.from_numpy(pairs.captions).to(model.device))
    ids, owners = torch.arange(len(images), device=model.device), torch.from_numpy(pairs.owners).to(model.device)
    found = (best_ranks(images, captions, ids, owners) <= RECALL_AT).double().cpu().numpy()
    finding = (best_ranks(captions, images, owners, ids) <= RECALL_AT).double().cpu().numpy()
    by_image = np.bincount(pairs.owners, weights=finding, minlength=len(images)) * len(images) / len(pairs.owners)
    return (found + by_image) / 2, float(found.mean()), float(finding.mean())


def fold_numbers(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return the fold (N,) int64 of each item, stratified: each class is spread evenly over the folds in random order."""
    order = generator(seed, 6).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    numbers = np.empty(len(labels), dtype=np.int64)
    numbers[order] = (np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])) % folds
    return numbers


def linear_probe_correct(features: np.ndarray, labels: np.ndarray, seed: int, folds: int = 5) -> np.ndarray:
    """Return (N,) bool: whether logistic regression trained on the other folds predicts each item's class; features (N, F) float32."""
    folds = min(folds, int(np.bincount(labels).min()))
    numbers, correct = fold_numbers(labels, folds, seed), np.zeros(len(labels), dtype=bool)
    for fold in range(folds):
        held_out = numbers == fold
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, tol=GRADIENT, max_iter=1000))
        chances = probe.fit(features[~held_out], labels[~held_out]).predict_proba(features[held_out])  # (n, C)
        correct[held_out] = vote_correct(torch.from_numpy(chances), torch.from_numpy(labels[held_out])).numpy()
    return correct
