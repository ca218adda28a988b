"""A linear map from visual features to words, by ridge regression on captioned images, on texts alone, or on both.

METHOD.md section 10. The targets are which words are in a caption, each word on its own scale (standardized, so that rare ones count
as much as frequent ones). Texts and images lie apart in an aligned space: each is centered on its own mean, and images are given the
covariance of the texts (CORAL, Sun et al., arXiv 1511.05547). Text rows then have the coordinates of image rows and join the same
normal equations, with zeros where images have a raw block. How much the texts count and how strong each block's ridge is are chosen
by cross-validation on the captioned images. Shapes: `n` rows, `E` head width, `D` width of all blocks, `V` words.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

FOLDS = 5
LEAST_JUDGED = 20  # captioned images for a choice by cross-validation
MOST_JUDGED = 2_000
# Captioned images that all texts together count as; the first is the default. Captions are judged on their own kind of images, and the
# texts are about more than these: so they never count less than 4,000.
TEXT_WEIGHTS = (16_000.0, 4_000.0, 64_000.0)
RIDGES = ((0.1, 0.01, 1.0), (10.0, 1.0, 0.1, 100.0, 10_000.0))  # of the first block (head or raw alone), and of each block beside it
BESIDE_TEXTS = 10_000.0  # ridge of further blocks at first where there are texts: left out until captions show that they help
SHRINKAGE = 1.0  # of both covariances, relative to their mean eigenvalue
LEAST_SPREAD = 0.3  # of the typical spread: channels that hardly vary (CNNs have many) would drown all others once they do
ROWS = 2_048  # rows whose words are unpacked at a time


class Moments:
    """Sums over rows (x, e) from which means, covariances and normal equations follow: memory O(D (D + V))."""

    def __init__(self, width: int, targets: int, device: torch.device | None = None) -> None:
        self.count = 0
        options = {"dtype": torch.float64, "device": device}
        self.sum, self.target_sum = torch.zeros(width, **options), torch.zeros(targets, **options)  # type: ignore[arg-type]
        self.gram, self.cross = torch.zeros(width, width, **options), torch.zeros(width, targets, **options)  # type: ignore[arg-type]

    def add(self, rows: Tensor, targets: Tensor) -> None:
        """Add rows (n, D) and targets (n, V)."""
        rows, targets = rows.to(self.sum), targets.to(self.sum)
        self.count += len(rows)
        self.sum += rows.sum(0)
        self.target_sum += targets.sum(0)
        self.gram.addmm_(rows.T, rows)
        self.cross.addmm_(rows.T, targets)

    def cpu(self) -> "Moments":
        """Return self, on the CPU."""
        self.sum, self.target_sum, self.gram, self.cross = (each.cpu() for each in (self.sum, self.target_sum, self.gram, self.cross))
        return self

    @property
    def mean(self) -> Tensor:
        """The mean row (D)."""
        return self.sum / self.count

    @property
    def target_mean(self) -> Tensor:
        """The mean target (V)."""
        return self.target_sum / self.count

    def centered(self) -> tuple[Tensor, Tensor]:
        """Return (D, D) and (D, V): gram and cross products of rows and targets around their means."""
        mean = self.mean
        return self.gram - self.count * torch.outer(mean, mean), self.cross - self.count * torch.outer(mean, self.target_mean)


@dataclass(frozen=True)
class Choice:
    """Weight of the texts (captioned images they count as) and ridge of each block, with the score that they reached."""

    text_weight: float
    ridges: tuple[float, ...]
    ranks: Tensor | None = None  # (judged) reciprocal rank of each held-out image's own caption among the judged ones

    @property
    def found(self) -> float:
        """Share of held-out images that are nearest to their own caption."""
        return float((self.ranks == 1).double().mean()) if self.ranks is not None else float("nan")

    def beats(self, other: "Choice") -> bool:
        """Return whether the mean reciprocal rank is higher by more than the standard error of the difference."""
        assert self.ranks is not None and other.ranks is not None
        gain = self.ranks - other.ranks
        return float(gain.mean()) > float(gain.std(correction=0)) / len(gain) ** 0.5


@dataclass
class WordMap:
    """`sum of (block - mean) @ weight` over the blocks: float64 means (D_b) and weights (D_b, V)."""

    means: list[Tensor]
    weights: list[Tensor]
    choice: Choice

    def __call__(self, blocks: list[Tensor]) -> Tensor:
        """Return the words' scores (..., V) for one tensor (..., D_b) a block: about how many standard deviations they are present."""
        moved = (block.to(mean) - mean for block, mean in zip(blocks, self.means, strict=True))
        return torch.stack([block @ weight for block, weight in zip(moved, self.weights, strict=True)]).sum(0)


@dataclass
class Fitting:
    """What there is to fit to: image rows (n, D) of `widths` blocks with their captions' words, unlabelled image rows, text rows of E.

    `shares` (V) are the words' shares of all captions and texts, above 0 and below 1: they give each word its scale.
    """

    widths: list[int]
    images: Tensor  # (n, D) float32
    said: Tensor  # (n, V) bool
    shares: Tensor  # (V)
    unlabelled: Tensor | None = None  # (m, D) float32
    texts: Moments | None = None
    seed: int = 0
    # told often, so that it is never silent for long: (settings tried, of how many)
    progress: Callable[[int, int], None] = field(default=lambda done, total: None)
    _at: tuple[int, int] = field(default=(0, 1), init=False)

    def solve(self) -> WordMap:
        """Return the map that predicts held-out captions best; without enough captions, the defaults."""
        seen = self.images if self.unlabelled is None else torch.cat([self.images, self.unlabelled])
        mean = seen.double().mean(0)
        changes = self._coordinates(seen.double() - mean)
        centered = (self.images.double() - mean).split(self.widths, 1)
        rows = torch.cat([block @ change for block, change in zip(centered, changes, strict=True)], 1)
        choice = self._choose(rows)
        gram, cross = self._with_texts(rows.T @ rows, self._cross(rows, torch.arange(len(rows))), choice)
        solved = torch.cholesky_solve(cross, _factor(gram, choice, self.widths)).split(self.widths)
        return WordMap(list(mean.split(self.widths)), [change @ weight for change, weight in zip(changes, solved, strict=True)], choice)

    @cached_property
    def _center(self) -> Tensor:
        """How often each word is said of an image (V)."""
        if len(self.said) >= LEAST_JUDGED or self.texts is None:
            return self.said.double().mean(0)
        return self.texts.target_mean

    def targets(self, numbers: Tensor) -> Tensor:
        """Return the standardized words (n, V) float64 of some captions."""
        return (self.said[numbers].double() - self._center) / self._scale

    @cached_property
    def _scale(self) -> Tensor:
        """The standard deviation of each word's presence (V)."""
        shares = self.shares.double()
        return (shares * (1 - shares)).sqrt()

    @cached_property
    def _text_products(self) -> tuple[Tensor, Tensor]:
        """Gram (E, E) and cross products (E, V) of the texts around their means."""
        assert self.texts is not None
        return self.texts.centered()

    @cached_property
    def _judged_captions(self) -> Tensor:
        """The captions that held-out images are judged among, at most MOST_JUDGED, of length 1 (n, V) float32."""
        return functional.normalize(self.targets(torch.arange(min(len(self.said), MOST_JUDGED))).float(), dim=1)

    def _coordinates(self, seen: Tensor) -> list[Tensor]:
        """Return, for each block, the matrix that centered image rows are multiplied by before the regression."""
        changes = []
        for number, block in enumerate(seen.split(self.widths, 1)):
            if number == 0 and self.texts is not None:
                texts = self._text_products[0] / self.texts.count
                changes.append(power(block.T @ block / len(block), -0.5) @ power(texts, 0.5))
            else:
                spread = block.square().mean(0).sqrt()
                typical = spread.square().mean().sqrt()
                changes.append(torch.diag(1 / (torch.maximum(spread, LEAST_SPREAD * typical) + 1e-9)))
        return changes

    def _cross(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """Return rows.T @ targets (D, V) of some captions, a block of rows at a time."""
        cross = torch.zeros(rows.shape[1], self.said.shape[1], dtype=torch.float64)
        for some in numbers.split(ROWS):
            self.progress(*self._at)
            cross.addmm_(rows[some].T, self.targets(some))
        return cross

    def _with_texts(self, gram: Tensor, cross: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
        """Return the products of image rows with those of the texts added."""
        if self.texts is None:
            return gram, cross
        gram, cross = gram.clone(), cross.clone()
        text_gram, text_cross = self._text_products
        share = (choice.text_weight if len(self.images) else 1.0) / self.texts.count
        gram[: self.widths[0], : self.widths[0]] += share * text_gram
        cross[: self.widths[0]] += share * text_cross / self._scale
        return gram, cross

    def _choose(self, rows: Tensor) -> Choice:
        """Return the best choice, one setting varied after the other; earlier candidates win ties and what is within the noise."""
        ridges = [RIDGES[min(number, 1)][0] for number in range(len(self.widths))]
        if self.texts is not None:
            ridges[1:] = [BESIDE_TEXTS] * len(ridges[1:])
        best = Choice(TEXT_WEIGHTS[0] if self.texts is not None else 0.0, tuple(ridges))
        if len(rows) < LEAST_JUDGED:
            return best
        tried = list(self._candidates(best))
        steps = len(tried) + 1
        self._at = (0, steps)
        folds = self._folds(rows)
        best = self._judged(best, rows, folds)
        for number, (name, value) in enumerate(tried, 1):
            self._at = (number, steps)
            ridges_now = tuple(value if place == name else ridge for place, ridge in enumerate(best.ridges))
            other = replace(best, text_weight=value) if name == "texts" else replace(best, ridges=ridges_now)
            other = self._judged(other, rows, folds)
            best = other if other.beats(best) else best
        self._at = (steps, steps)
        self.progress(steps, steps)
        return best

    def _candidates(self, start: Choice) -> Iterator[tuple[str | int, float]]:
        """Yield the settings to try: the texts' weight, then each block's ridge, the last block's first."""
        if self.texts is not None:
            yield from (("texts", weight) for weight in TEXT_WEIGHTS[1:])
        for block in reversed(range(len(start.ridges))):
            yield from ((block, ridge) for ridge in RIDGES[min(block, 1)] if ridge != start.ridges[block])

    def _folds(self, rows: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return, for each fold, its row numbers, and the gram and cross products of all other rows."""
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
        parts = [(numbers, rows[numbers].T @ rows[numbers], self._cross(rows, numbers)) for numbers in order.chunk(FOLDS)]
        gram = torch.stack([part[1] for part in parts]).sum(0)
        cross = torch.stack([part[2] for part in parts]).sum(0)
        return [(numbers, gram - own_gram, cross - own_cross) for numbers, own_gram, own_cross in parts]

    def _judged(self, choice: Choice, rows: Tensor, folds: list[tuple[Tensor, Tensor, Tensor]]) -> Choice:
        """Return the choice with its score: how high each held-out image finds its own caption among (MOST_JUDGED of) all."""
        candidates = self._judged_captions
        ranks = torch.zeros(len(candidates), dtype=torch.float64)
        for numbers, own_gram, own_cross in folds:
            self.progress(*self._at)
            held = numbers[numbers < len(candidates)]
            gram, cross = self._with_texts(own_gram, own_cross, choice)
            # (held, D) times the inverse first: fewer columns to solve for than words
            inverse = torch.cholesky_solve(rows[held].T, _factor(gram, choice, self.widths)).T
            ranks[held] = reciprocal_ranks(inverse @ cross, candidates, held)
        return replace(choice, ranks=ranks)


def reciprocal_ranks(scores: Tensor, captions: Tensor, own: Tensor) -> Tensor:
    """Return 1 / the rank of each image's own caption by cosine (n,) float64: scores (n, V), captions of length 1 (C, V), own (n,)."""
    cosines = functional.normalize(scores.float(), dim=1) @ captions.T
    found = cosines[torch.arange(len(own)), own]
    return 1 / ((cosines > found[:, None] + 1e-6).sum(1) + 1).double()  # equal captions are no competitors


def _factor(gram: Tensor, choice: Choice, widths: list[int]) -> Tensor:
    """Return the Cholesky factor of a gram matrix (D, D) with the choice's ridges, relative to each block's mean diagonal."""
    blocks = zip(choice.ridges, gram.diagonal().split(widths), strict=True)
    penalty = torch.cat([(ridge * (block.mean() + 1e-9)).expand(len(block)) for ridge, block in blocks])
    return torch.linalg.cholesky(gram + torch.diag(penalty))


def power(matrix: Tensor, exponent: float) -> Tensor:
    """Return a power of a covariance (E, E) that is shrunk towards a multiple of the identity."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=0) + SHRINKAGE * values.mean() + 1e-12
    return (vectors * values**exponent) @ vectors.T
