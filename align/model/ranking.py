"""Exact ranks of the right answer, in chunks: what every retrieval metric is computed from.

Shapes: `Q` queries, `T` targets, `E` aligned width, `K` targets kept.
"""

import torch
from torch import Tensor

from align.common.errors import UsageError


def best_ranks(queries: Tensor, targets: Tensor, query_ids: Tensor, target_ids: Tensor, chunk: int = 1024) -> Tensor:
    """Return the ranks of `ranks_and_top` alone."""
    return ranks_and_top(queries, targets, query_ids, target_ids, 0, chunk)[0]


@torch.no_grad()
def ranks_and_top(
    queries: Tensor, targets: Tensor, query_ids: Tensor, target_ids: Tensor, keep: int, chunk: int = 1024
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (Q,) int64 ranks, from 1, of each query's best positive target, and its K = min(keep, T) best targets, best first.

    These are numbers (Q, K) int64 and cosines (Q, K) float32. queries (Q, E) and targets (T, E) are L2-normalised floats; target j is a
    positive of query i if `target_ids[j] == query_ids[i]`. A non-positive that ties with the best positive is ranked before it, so
    that a collapsed model, whose scores are all equal, gets the last rank and not the first. No (Q, T) matrix is kept: memory is
    O(chunk T). Raises UsageError if a query has no positive.
    """
    ranks, numbers, cosines = [], [], []
    for start in range(0, len(queries), chunk):
        scores = queries[start : start + chunk] @ targets.T  # (chunk, T)
        positive = query_ids[start : start + chunk, None] == target_ids[None, :]
        if not positive.any(dim=1).all():
            missing = start + int((~positive.any(dim=1)).nonzero()[0])
            raise UsageError(f"query {missing} has no positive among {len(targets)} targets; every query needs at least one")
        best = scores.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(1 + ((scores >= best) & ~positive).sum(dim=1))
        top = torch.topk(scores, min(keep, len(targets)))
        numbers.append(top.indices)
        cosines.append(top.values)
    if not ranks:
        none = torch.zeros(0, min(keep, len(targets)))
        return torch.zeros(0, dtype=torch.int64), none.long(), none
    return torch.cat(ranks), torch.cat(numbers), torch.cat(cosines)


def recalls(ranks: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict[int, float]:
    """Return, for each k, the fraction of ranks that are at most k."""
    return {k: float((ranks <= k).double().mean()) for k in ks}
