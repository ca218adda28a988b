"""What keeps heads from overfitting few pairs: FuseMix, mixed latents, and STRUCTURE, kept neighbourhoods.

Shapes: `b` rows of this process's share of the batch, `N` rows looked at, `F` width of a frozen feature, `E` aligned width.
Both are pure functions of their arguments, so a resumed run is the straight one. What they draw is drawn within a process's share:
the same run on another number of processes has the same distribution, not the same draws (as with dropout).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from align.common.seeds import generator

TEMPERATURE = 0.05  # of the neighbourhoods
MAX_ROWS = 1024  # of a neighbourhood: N^2 values are held a level and modality
TINY = 1e-30  # smallest probability whose logarithm is taken


def fusemix(features: Sequence[Tensor], alpha: float, *, seed: int, step: int, rank: int = 0) -> list[Tensor]:
    """Return each of `features` (b, F) mixed within itself, `s x_i + (1 - s) x_p(i)`, at least in float32.

    The share s ~ Beta(alpha, alpha) and the partners p are common to all tensors, so row i of one still belongs to row i of the
    others; s depends on (seed, step), p on (seed, step, rank). The partners form one random cycle: from three rows on, no row meets
    itself and no two rows meet each other twice, which would make near-duplicates of them that count as negatives.
    Source: FuseMix (Vouitsis et al., Data-Efficient Multimodal Fusion on a Single GPU, arXiv 2312.10144).
    """
    share = float(generator(seed, 5, step).beta(alpha, alpha))
    cycle = generator(seed, 5, step, rank).permutation(len(features[0]))
    partners = np.empty_like(cycle)
    partners[cycle] = np.roll(cycle, 1)
    wide = [rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in features]
    return [share * rows + (1 - share) * rows[torch.as_tensor(partners, device=rows.device)] for rows in wide]


def structure(features: Sequence[Tensor], embeddings: Sequence[Tensor], levels: int, *, seed: int, step: int, rank: int = 0) -> Tensor:
    """Return how far aligned neighbourhoods are from those before the heads, a scalar: that of images plus the mean of the captions'.

    `features` are [images (b, F), captions (b, D), ...] and `embeddings` (b, E) each what became of them. Of more than 1,024
    rows, 1,024 drawn by (seed, step, rank) are looked at. See `neighbourhood_distance`.
    """
    if len(features[0]) > MAX_ROWS:
        drawn = np.sort(generator(seed, 6, step, rank).choice(len(features[0]), MAX_ROWS, replace=False))
        rows = torch.as_tensor(drawn, device=features[0].device)
        features, embeddings = [f[rows] for f in features], [e[rows] for e in embeddings]
    images, *captions = [neighbourhood_distance(f, e, levels) for f, e in zip(features, embeddings, strict=True)]
    return images + torch.stack(captions).mean()


def neighbourhood_distance(features: Tensor, embeddings: Tensor, levels: int = 1) -> Tensor:
    """Return `1/L sum_l 1/l JS(P^l, Q^l)`, a scalar in 0..ln 2: 0 if embeddings (N, E) have the neighbourhoods of features (N, F).

    P and Q are the Markov matrices (N, N) of both: rows are L2-normalized, centered and normalized again, and a row's cosines with the
    others over the temperature 0.05 go through a softmax. P^l, l steps on that graph, is a wider neighbourhood. JS is the
    Jensen-Shannon divergence in nats, averaged over rows. Gradients reach the embeddings only.
    Source: STRUCTURE (Groeger et al., NeurIPS 2025, arXiv 2506.16895), written from the paper's idea; chosen here: a row is no
    neighbor of itself (its own cosine, 1, would outweigh all others), normalization comes before and after centring.
    """
    if len(features) < 2:
        return embeddings.new_zeros(())
    with torch.no_grad():
        before = _markov(features.to(embeddings.dtype))
    after = _markov(embeddings)
    p, q, total = before, after, embeddings.new_zeros(())
    for level in range(1, levels + 1):
        if level > 1:
            p, q = p @ before, q @ after
        divergence = _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2  # (N,)
        total = total + divergence.mean() / level
    return total / levels


def _markov(rows: Tensor) -> Tensor:
    rows = functional.normalize(rows, dim=-1)
    rows = functional.normalize(rows - rows.mean(0), dim=-1)
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return (rows @ rows.T / TEMPERATURE).masked_fill(itself, -torch.inf).softmax(1)


def _entropy(rows: Tensor) -> Tensor:
    return torch.special.entr(rows.clamp(min=TINY)).sum(1)  # the clamp keeps the gradient at 0, which is infinite, out
