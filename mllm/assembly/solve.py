"""A linear map from visual features to the LLM's word space, by ridge regression on captioned images, on texts alone, or on both.

METHOD.md section 10. Texts and images lie apart in an aligned space: each is centered on its own mean, and images are given the
covariance of the texts (CORAL, Sun et al., arXiv 1511.05547). Text rows then have the coordinates of image rows and join the same
normal equations, with zeros where images have a raw block. How much the texts count and how strong each block's ridge is are chosen
by cross-validation on the captioned images. Shapes: `n` rows, `E` head width, `D` width of all blocks, `H` LLM width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

FOLDS = 5
LEAST_JUDGED = 20  # captioned images for a choice by cross-validation
MOST_JUDGED = 2_000
TEXT_WEIGHTS = (1_000.0, 0.0, 250.0, 4_000.0, 16_000.0)  # captioned images that all texts together count as; the first is the default
RIDGES = ((0.1, 0.01, 1.0), (10.0, 1.0, 0.1, 100.0, 10_000.0))  # of the first block (head or raw alone), and of each block beside it
SHRINKAGE = 1.0  # of both covariances, relative to their mean eigenvalue
LEAST_SPREAD = 0.3  # of the typical spread: channels that hardly vary (CNNs have many) would drown all others once they do


class Moments:
    """Sums over rows (x, e) from which means, covariances and normal equations follow: memory O(D (D + H))."""

    def __init__(self, width: int, targets: int, device: torch.device | None = None) -> None:
        self.count = 0
        options = {"dtype": torch.float64, "device": device}
        self.sum, self.target_sum = torch.zeros(width, **options), torch.zeros(targets, **options)  # type: ignore[arg-type]
        self.gram, self.cross = torch.zeros(width, width, **options), torch.zeros(width, targets, **options)  # type: ignore[arg-type]

    def add(self, rows: Tensor, targets: Tensor) -> None:
        """Add rows (n, D) and targets (n, H)."""
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
        """The mean target (H)."""
        return self.target_sum / self.count

    def centered(self) -> tuple[Tensor, Tensor]:
        """Return (D, D) and (D, H): gram and cross products of rows and targets around their means."""
        mean = self.mean
        return self.gram - self.count * torch.outer(mean, mean), self.cross - self.count * torch.outer(mean, self.target_mean)


@dataclass(frozen=True)
class Choice:
    """Weight of the texts (captioned images they count as) and ridge of each block, with the score that they reached."""

    text_weight: float
    ridges: tuple[float, ...]
    rank: float = 0.0  # mean reciprocal rank of a held-out image's own caption among the judged ones
    found: float = float("nan")  # share of held-out images that are nearest to their own caption


@dataclass
class LinearMap:
    """`offset + sum of (block - mean) @ weight` over the blocks: float64 means (D_b), weights (D_b, H) and offset (H)."""

    means: list[Tensor]
    weights: list[Tensor]
    offset: Tensor
    choice: Choice

    def __call__(self, blocks: list[Tensor]) -> Tensor:
        """Return (..., H) for one tensor (..., D_b) a block."""
        moved = (block.to(self.offset) - mean for block, mean in zip(blocks, self.means, strict=True))
        return self.offset + sum(block @ weight for block, weight in zip(moved, self.weights, strict=True))


@dataclass
class Fitting:
    """What there is to fit to: image rows (n, D) of `widths` blocks with targets (n, H), unlabelled image rows, text rows of E."""

    widths: list[int]
    images: Tensor  # (n, D) float32
    targets: Tensor  # (n, H) float32
    unlabelled: Tensor | None = None  # (m, D) float32
    texts: Moments | None = None
    seed: int = 0
    progress: Callable[[int, int], None] = field(default=lambda done, total: None)

    def solve(self) -> LinearMap:
        """Return the map that predicts held-out captions best; without enough captions, the defaults."""
        seen = self.images if self.unlabelled is None else torch.cat([self.images, self.unlabelled])
        mean = seen.double().mean(0)
        changes = self._coordinates(seen.double() - mean)
        centered = (self.images.double() - mean).split(self.widths, 1)
        rows = torch.cat([block @ change for block, change in zip(centered, changes, strict=True)], 1)
        targets = self.targets.double()
        center = targets.mean(0) if len(rows) >= LEAST_JUDGED or self.texts is None else self.texts.target_mean
        targets = targets - center
        choice = self._choose(rows, targets)
        solved = self._ridge(rows.T @ rows, rows.T @ targets, choice).split(self.widths)
        weights = [change @ weight for change, weight in zip(changes, solved, strict=True)]
        return LinearMap(list(mean.split(self.widths)), weights, center, choice)

    def _coordinates(self, seen: Tensor) -> list[Tensor]:
        """Return, for each block, the matrix that centered image rows are multiplied by before the regression."""
        changes = []
        for number, block in enumerate(seen.split(self.widths, 1)):
            if number == 0 and self.texts is not None:
                texts = self.texts.centered()[0] / self.texts.count
                changes.append(_power(block.T @ block / len(block), -0.5) @ _power(texts, 0.5))
            else:
                spread = block.square().mean(0).sqrt()
                typical = spread.square().mean().sqrt()
                changes.append(torch.diag(1 / (torch.maximum(spread, LEAST_SPREAD * typical) + 1e-9)))
        return changes

    def _ridge(self, gram: Tensor, cross: Tensor, choice: Choice) -> Tensor:
        """Return the matrix (D, H) of the regression on image rows with these products, and on the texts."""
        gram, cross = gram.clone(), cross.clone()
        if self.texts is not None:
            text_gram, text_cross = self.texts.centered()
            share = (choice.text_weight if len(self.images) else 1.0) / self.texts.count
            gram[: self.widths[0], : self.widths[0]] += share * text_gram
            cross[: self.widths[0]] += share * text_cross
        blocks = zip(choice.ridges, gram.diagonal().split(self.widths), strict=True)
        penalty = torch.cat([ridge * (block.mean() + 1e-9).expand(len(block)) for ridge, block in blocks])
        return torch.linalg.solve(gram + torch.diag(penalty), cross)

    def _choose(self, rows: Tensor, targets: Tensor) -> Choice:
        """Return the best choice, one setting varied after the other; earlier candidates win ties."""
        best = Choice(
            TEXT_WEIGHTS[0] if self.texts is not None else 0.0, tuple(RIDGES[min(number, 1)][0] for number in range(len(self.widths)))
        )
        if len(rows) < LEAST_JUDGED:
            return best
        folds = self._folds(rows, targets)
        tried = list(self._candidates(best))
        steps = len(tried) + 1
        best = self._judged(best, folds, targets)
        for number, (name, value) in enumerate(tried, 1):
            self.progress(number, steps)
            ridges = tuple(value if place == name else ridge for place, ridge in enumerate(best.ridges))
            other = replace(best, text_weight=value) if name == "texts" else replace(best, ridges=ridges)
            if other.text_weight == 0 and len(rows) < self.widths[0] // 10 and self.texts is not None:
                continue  # hardly any rows: a fit without texts cannot be judged on so few
            other = self._judged(other, folds, targets)
            best = other if other.rank > best.rank else best
        self.progress(steps, steps)
        return best

    def _candidates(self, start: Choice) -> Iterator[tuple[str | int, float]]:
        """Yield the settings to try: the texts' weight, then each block's ridge, the last block's first."""
        if self.texts is not None:
            yield from (("texts", weight) for weight in TEXT_WEIGHTS[1:])
        for block in reversed(range(len(start.ridges))):
            yield from ((block, ridge) for ridge in RIDGES[min(block, 1)][1:])

    def _folds(self, rows: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Return, for each fold, its row numbers, its rows, and the gram and cross products of all other rows."""
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed)).to(rows.device)
        gram, cross = rows.T @ rows, rows.T @ targets
        folds = []
        for numbers in order.chunk(FOLDS):
            held, wanted = rows[numbers], targets[numbers]
            folds.append((numbers, held, gram - held.T @ held, cross - held.T @ wanted))
        return folds

    def _judged(self, choice: Choice, folds: list[tuple[Tensor, Tensor, Tensor, Tensor]], targets: Tensor) -> Choice:
        """Return the choice with its score: how high each held-out image finds its own caption among (MOST_JUDGED of) all."""
        candidates = functional.normalize(targets[:MOST_JUDGED], dim=1)
        ranks = []
        for numbers, held, gram, cross in folds:
            chosen = numbers < len(candidates)
            predicted = functional.normalize(held[chosen] @ self._ridge(gram, cross, choice), dim=1)
            scores, own = predicted @ candidates.T, (predicted * candidates[numbers[chosen]]).sum(1)
            ranks.append((scores > own[:, None] + 1e-9).sum(1) + 1)  # equal captions are no competitors
        rank = torch.cat(ranks).double()
        return replace(choice, rank=float((1 / rank).mean()), found=float((rank == 1).double().mean()))


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """Return a power of a covariance (E, E) that is shrunk towards a multiple of the identity."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=0) + SHRINKAGE * values.mean() + 1e-12
    return (vectors * values**exponent) @ vectors.T
