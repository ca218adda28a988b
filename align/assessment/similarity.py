"""Similarity scores of two sets of features, as pure functions: arrays in, floats out.

Shapes: `n` items in both sets, `F` width, `P` patches, `C` classes, `R` resamples, `k` neighbors. Ties count as misses: items tied
at rank k are dropped, and a tied class is wrong. So constant features score 0.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from align.common.intervals import percentiles

PCA_ROWS = 10_000  # rows to fit the whitening on; more do not change 128 directions


def linear_gram(features: Tensor) -> Tensor:
    """Return the (n, n) float64 Gram matrix `X X^T` of features (n, F) with centered columns (centering does not change CKA)."""
    centered = features.double() - features.double().mean(0)
    return centered @ centered.T


def rbf_gram(features: Tensor) -> Tensor:
    """Return the (n, n) float64 kernel `exp(-d^2 / (2 sigma^2))` of features (n, F); sigma is the median distance d."""
    centered = features.double() - features.double().mean(0)
    square = (centered * centered).sum(1)
    distances = (square[:, None] + square[None, :] - 2 * centered @ centered.T).clamp_(min=0)  # squared
    above = distances[torch.triu(torch.ones_like(distances, dtype=torch.bool), 1)]
    width = above.median()  # sigma^2
    return torch.exp(-distances / (2 * width)) if width > 0 else torch.ones_like(distances)


def cka(first: Tensor, second: Tensor, debiased: bool = False, weights: Tensor | None = None) -> Tensor:
    """Return (R,) float64 centered kernel alignments (CKA) of two Gram matrices (n, n), one for each row of `weights` (R, n).

    `weights` are zeros and ones that select items; None: one row, all items. Biased CKA (Kornblith et al. 2019, eq. 3) lies in
    0..1, and is near 1 for any features as wide as there are items. Debiased CKA (Song et al. 2012) is 0 on average for unrelated
    features and needs 4 items. Without variance the result is 0.
    """
    if weights is None:
        weights = torch.ones(1, len(first), dtype=first.dtype, device=first.device)
    cross, own, other = (_hsic(a, b, weights, debiased) for a, b in ((first, second), (first, first), (second, second)))
    varies = (own > 0) & (other > 0)
    return torch.where(varies, cross / torch.where(varies, own * other, 1.0).sqrt(), 0.0)


def _hsic(first: Tensor, second: Tensor, weights: Tensor, debiased: bool) -> Tensor:
    """Return (R,) biased or unbiased estimates of the Hilbert-Schmidt independence criterion, up to a factor that cancels in CKA."""
    if debiased:
        first, second = (gram - torch.diag(gram.diagonal()) for gram in (first, second))
    count = weights.sum(1)
    joint = ((weights @ (first * second)) * weights).sum(1)  # tr(K L)
    rows, others = weights @ first, weights @ second  # row sums of K and L over the selected items
    crossed = (weights * rows * others).sum(1)  # 1^T K L 1
    total = (rows * weights).sum(1) * (others * weights).sum(1)  # (1^T K 1)(1^T L 1)
    if debiased:
        return joint + total / ((count - 1) * (count - 2)) - 2 * crossed / (count - 2)
    return joint + total / count**2 - 2 * crossed / count


def half_samples(n: int, resamples: int, generator: np.random.Generator) -> Tensor:
    """Return (R, n) float64 zeros and ones; each row selects n // 2 items without repeats: a repeated item would be its own neighbor.

    Half-samples spread about their mean as the full sample does (variance s^2 (2/n - 1/n)).
    """
    order = generator.random((resamples, n)).argsort(axis=1)
    return torch.from_numpy((order < n // 2).astype(np.float64))


def cka_interval(first: Tensor, second: Tensor, debiased: bool, halves: Tensor) -> tuple[float, float, float]:
    """Return (value, low, high) of the CKA of two Gram matrices (n, n). `halves` (R, n) are from `half_samples`."""
    value = float(cka(first, second, debiased)[0])
    drawn = cka(first, second, debiased, halves.to(first)).cpu().numpy()
    low, high = percentiles(drawn - drawn.mean())
    return value, value + low, value + high


def cosines(features: Tensor) -> Tensor:
    """Return the (n, n) cosine similarities of features (n, F). In float64, as features with a large common part differ in late digits."""
    unit = functional.normalize(features.double(), dim=-1)
    return unit @ unit.T


def neighbors(similarities: Tensor, k: int) -> Tensor:
    """Return (n, n) bool: whether item j is among the k items most similar to item i, without i itself and items tied at rank k."""
    others = similarities.clone().fill_diagonal_(-torch.inf)
    return others > others.topk(min(k + 1, len(others)), dim=1).values[:, -1:]


def neighbor_overlap(first: Tensor, second: Tensor, k: int) -> Tensor:
    """Return (n,) float64: the share of each item's k neighbors that two similarity matrices (n, n) have in common.

    The mean is the mutual k-NN alignment (Huh et al. 2024). Its chance level is k / (n - 1).
    """
    k = min(k, len(first) - 1)
    return (neighbors(first, k) & neighbors(second, k)).sum(1).double() / k


def whiten(rows: Tensor, components: int) -> Tensor:
    """Return (n, c) float32 principal components of rows (n, F), scaled to variance 1. c is at most `components`, F and the rank."""
    step = max(1, len(rows) // PCA_ROWS)
    sample = rows[::step].float()
    mean = sample.mean(0)
    centered = sample - mean
    values, vectors = torch.linalg.eigh((centered.T @ centered).double() / max(1, len(sample) - 1))  # ascending
    keep = min(components, int((values > 1e-6 * values[-1].clamp(min=1e-30)).sum()), len(sample) - 1)
    if keep < 1:
        return torch.zeros(len(rows), 1, device=rows.device)
    basis = (vectors[:, -keep:] / values[-keep:].sqrt()).float()
    return (rows.float() - mean) @ basis


def chamfer(patches: Tensor, block: int = 8) -> Tensor:
    """Return the (n, n) float32 symmetric Chamfer similarities of images given as patches (n, P, F).

    The similarity of two images is the mean, over the patches of both, of the cosine to the other image's most similar patch.
    `block` images are compared with all later ones at a time, so each of the (n P)^2 / 2 cosines is computed once.
    """
    unit = functional.normalize(patches.float(), dim=-1)
    n, count, width = unit.shape
    flat = unit.reshape(n * count, width)
    one_way = torch.empty(n, n, device=unit.device)  # [i, j]: mean over the patches of i of the best match in j
    for start in range(0, n, block):
        stop = min(start + block, n)
        cosine = (flat[start * count : stop * count] @ flat[start * count :].T).view(stop - start, count, n - start, count)
        one_way[start:stop, start:] = cosine.amax(3).mean(1)
        one_way[start:, start:stop] = cosine.amax(1).mean(2).T
    return (one_way + one_way.T) / 2


def patch_overlap(patches: Tensor, captions: Tensor, k: int, components: int = 128) -> Tensor:
    """Return (n,) shares of k neighbors that images (patches (n, P, F)) and captions (n, D) have in common: RAVEL's training-free score.

    Images are compared by symmetric Chamfer, captions by cosine (arXiv 2610.05413: n = 1000, k = 100, so chance is 0.1). Both are
    PCA-whitened to at most `components` and n / 8 directions: in n directions all whitened items are equally far apart.
    """
    n, count, width = patches.shape
    components = max(1, min(components, n // 8))
    white = whiten(patches.reshape(n * count, width), components).reshape(n, count, -1)
    return neighbor_overlap(chamfer(white), cosines(whiten(captions, components)), k)


def knn_votes(similarities: Tensor, labels: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """Return (n, C) weighted votes of the k most similar items, given similarities (n, N) to items with labels (N,) int64.

    A neighbor with cosine s has the weight exp(s / temperature), as in DINO, here divided by the nearest neighbor's weight.
    """
    nearest = similarities.topk(min(k, similarities.shape[1]), dim=1)
    weights = torch.exp((nearest.values - nearest.values[:, :1]) / temperature)
    votes = torch.zeros(len(similarities), classes, dtype=weights.dtype, device=weights.device)
    return votes.scatter_add_(1, labels[nearest.indices], weights)


def vote_correct(votes: Tensor, labels: Tensor) -> Tensor:
    """Return (n,) bool: whether each item's own class has more votes (n, C) than every other class. A tie is wrong."""
    return (votes >= votes.gather(1, labels[:, None])).sum(1) == 1


def knn_correct(features: Tensor, labels: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Return (n,) bool: whether weighted k-NN over all other items predicts each item's class; features (n, F), labels (n,)."""
    similar = cosines(features).fill_diagonal_(-torch.inf)
    k = min(k, len(labels) - 1)
    return vote_correct(knn_votes(similar, labels, int(labels.max()) + 1, k, temperature), labels)
