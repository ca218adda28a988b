"""Contrastive losses over very large batches, on one process or several.

Shapes: `B` rows of the global batch, `N` rows of this process (N = B in a single process), `E` aligned width.
Logits are `t <x_i, y_j> + b` with `t = exp(log_scale)`, x an image and y a caption embedding, both L2-normalized by the caller.

The B x B logits are never kept: memory is O(B E + tile^2). The forward pass adds each tile of logits to the loss and to all
gradients; the backward pass multiplies the stored gradients by the incoming one. Matmuls run in `matmul_dtype` (the inputs' by
default, whatever autocast says), everything else in float32 or wider. The diagonal carries most of the gradient: it is computed
apart from the tiles, never in low precision.

With several processes the negatives are global: captions are gathered, each process computes the rows of its own images, and the
captions' gradients are summed back. Every process gets the global loss. Its gradients (of its own rows, and its part of those of
log_scale and bias) are multiplied by the number of processes: DistributedDataParallel averages parameter gradients, and so arrives
at exactly the gradient of one process on the whole batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from align.common.errors import UsageError

Reduction = Literal["mean", "sum_over_batch"]


def sigmoid_loss(
    images: Tensor,
    captions: Sequence[Tensor],
    log_scale: Tensor,
    bias: Tensor,
    *,
    image_ids: Tensor | None = None,
    caption_ids: Sequence[Tensor] | None = None,
    reduction: Reduction = "mean",
    tile: int = 4096,
    matmul_dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return SAIL's loss `-sum_ij log sigmoid(Z_ij S_ij)`, `S_ij = t <x_i, y_j> + b`, a scalar: the mean over the caption sets.

    `images` (N, E) and each of `captions` (N, E) are L2-normalized; row i of one belongs to row i of the others. Z is +1 on positives
    and -1 elsewhere. Positives are the diagonal, pairs of rows with equal `image_ids` (N,) int64 (several rows of one image), and
    pairs with equal `caption_ids`, one (N,) int64 for each caption set (captions of the same words).
    `mean` divides by B^2 (SAIL), `sum_over_batch` by B (SigLIP). Lion's update, a sign, is the same with both; AdamW's is not once
    dividing by B^2 makes gradients smaller than its epsilon (1e-8).
    The loss is float32 (float64 for such inputs); gradients have the inputs' dtypes; there is no second derivative.
    N may differ between the processes of `group` (default: the default group). Raises UsageError for shapes or names that do not
    fit. Source: SAIL (arXiv 2412.04616), SigLIP (arXiv 2303.15343).
    """
    if reduction not in get_args(Reduction):
        raise UsageError(f"unknown reduction {reduction!r}: choose one of {', '.join(get_args(Reduction))}")
    _check_scalar("bias", bias)
    task = _plan(images, captions, log_scale, image_ids, caption_ids, tile, matmul_dtype, group)
    pairs = task.ranks.total**2 if reduction == "mean" else task.ranks.total
    with torch.autocast(images.device.type, enabled=False):
        return _SigmoidLoss.apply(task, 1 / (pairs * len(captions)), images, log_scale, bias, *captions)


def info_nce_loss(
    images: Tensor,
    captions: Sequence[Tensor],
    log_scale: Tensor,
    *,
    image_ids: Tensor | None = None,
    caption_ids: Sequence[Tensor] | None = None,
    tile: int = 4096,
    matmul_dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return the symmetric cross-entropy (image to caption and caption to image, averaged), a scalar: the mean over caption sets.

    An anchor's term is minus the mean log-probability of its positives, `-log softmax_j(t <x_i, y_j>)_i` with one positive: InfoNCE
    as in CLIP (arXiv 2103.00020) and freeze-align (arXiv 2409.19425). The rest is as in `sigmoid_loss`.
    """
    task = _plan(images, captions, log_scale, image_ids, caption_ids, tile, matmul_dtype, group)
    with torch.autocast(images.device.type, enabled=False):
        return _InfoNceLoss.apply(task, 1 / (2 * task.ranks.total * len(captions)), images, log_scale, *captions)


class LossStats(NamedTuple):
    """Mean logits over all positive and over all negative pairs of the global batch and of all caption sets: floats."""

    positive_mean_logit: float
    negative_mean_logit: float  # NaN when every pair is a positive


@torch.no_grad()
def logit_stats(
    images: Tensor,
    captions: Sequence[Tensor],
    log_scale: Tensor,
    bias: Tensor | None = None,
    *,
    image_ids: Tensor | None = None,
    caption_ids: Sequence[Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
) -> LossStats:
    """Return the mean positive and mean negative logit of a batch, in O(B E), the same on all processes; all of them must call it.

    Arguments as in `sigmoid_loss` (`bias` None is 0).
    """
    task = _plan(images, captions, log_scale, image_ids, caption_ids, 1, None, group)
    rows = images.to(task.wide)
    cosines = rows.new_zeros(2)  # sums over positive pairs, over all pairs
    for positives, own in zip(task.positives, captions, strict=True):
        wide_own = own.to(task.wide)
        cosines[0] += (rows * task.positive_sums(positives, wide_own)).sum()
        cosines[1] += (rows.sum(0) * task.ranks.add(wide_own.sum(0))).sum()
    positive_sum, whole_sum = task.ranks.add(cosines).tolist()
    scale, shift = log_scale.exp().item(), 0.0 if bias is None else bias.item()
    count = sum(int(task.positive_counts(positives).sum()) for positives in task.positives)
    negatives = task.ranks.total**2 * len(captions) - count
    return LossStats(
        positive_mean_logit=scale * positive_sum / count + shift,
        negative_mean_logit=scale * (whole_sum - positive_sum) / negatives + shift if negatives else float("nan"),
    )


@dataclass(frozen=True)
class _Ranks:
    """The processes that share one batch, with their row counts in rank order."""

    group: dist.ProcessGroup | None
    sizes: list[int]
    rank: int

    @property
    def total(self) -> int:  # B
        return sum(self.sizes)

    @property
    def here(self) -> slice:
        """This process's rows of the global batch."""
        start = sum(self.sizes[: self.rank])
        return slice(start, start + self.sizes[self.rank])

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes (B, ...) given this one's (N, ...)."""
        if len(self.sizes) == 1:
            return rows
        padded = rows.new_zeros(max(self.sizes), *rows.shape[1:])  # collectives want equal shapes
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])

    def add(self, values: Tensor) -> Tensor:
        """Sum `values` over processes, in place, and return them."""
        if len(self.sizes) > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def add_own(self, values: Tensor) -> Tensor:
        """Return this process's rows (N, ...) of the sum over processes of `values` (B, ...), which are used up."""
        if len(self.sizes) == 1:
            return values
        return self.add(values)[self.here].clone()

    def logsumexp(self, values: Tensor) -> Tensor:
        """Return the log of the sum over processes of exp(values)."""
        if len(self.sizes) == 1:
            return values
        top = values.clamp(min=torch.finfo(values.dtype).min)  # finite, so that -inf everywhere stays -inf
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self.group)
        return top + self.add((values - top).exp()).log()


@dataclass(frozen=True)
class _Task:
    """What the losses need besides the tensors that they differentiate."""

    ranks: _Ranks
    positives: list["_Positives"]  # of each caption set
    tile: int
    matmul: torch.dtype
    wide: torch.dtype  # of logits, sums and stored gradients

    def tiles(self, images: Tensor, captions: Tensor, scale: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield (rows of images (N, E), columns = rows of captions (B, E), scaled cosines with -inf on the diagonal)."""
        for top, left in product(*(range(0, len(side), self.tile) for side in (images, captions))):
            rows, columns = slice(top, top + self.tile), slice(left, left + self.tile)
            logits = (images[rows] @ captions[columns].T).to(self.wide).mul_(scale)  # (rows, columns)
            logits.diagonal(self.ranks.here.start + top - left).fill_(-torch.inf)
            yield rows, columns, logits

    def off_diagonal_positives(self, positives: "_Positives", rows: slice, columns: slice) -> Tensor | None:
        """Return a boolean mask of a tile's positives that are not on the diagonal, or None if there cannot be any."""
        if not positives:
            return None
        here = self.ranks.here
        alike = [labels[here][rows, None] == labels[columns] for sign, labels in positives if sign > 0]  # (rows, columns) each
        mask = alike[0] if len(alike) == 1 else alike[0].logical_or_(alike[1])
        mask.diagonal(here.start + rows.start - columns.start).fill_(False)
        return mask

    def positive_counts(self, positives: "_Positives") -> Tensor:
        """Return how many positives each row of the global batch has (B,) int64, at least 1."""
        if not positives:
            return torch.ones(self.ranks.total, dtype=torch.int64)
        return torch.stack([sign * torch.bincount(labels)[labels] for sign, labels in positives]).sum(0)

    def positive_sums(self, positives: "_Positives", captions: Tensor) -> Tensor:
        """Return for each image of this process the sum of its positive captions (N, E), given this process's captions (N, E)."""
        if not positives:
            return captions
        return self.ranks.add(self.sums_of_alike(positives, captions))[self.ranks.here]

    def sums_of_alike(self, positives: "_Positives", own: Tensor) -> Tensor:
        """Return for each row of the global batch the sum (B, E) of those of this process's rows `own` (N, E) that are its positives."""
        total = own.new_zeros(self.ranks.total, own.shape[1])
        for sign, labels in positives:
            sums = torch.zeros_like(total).index_add_(0, labels[self.ranks.here], own)
            total += sign * sums[labels]
        return total


# Which rows of the global batch are positives of each other: those with equal labels (B,) int64 of sign +1. Two such labels come with a
# third of sign -1, equal where both are, so that signed counts and sums are those of the union. Empty: the diagonal alone.
_Positives = list[tuple[int, Tensor]]


class _StoredGradients(torch.autograd.Function):
    """A function whose forward pass has already computed the gradients of its scalar result."""

    @staticmethod
    def store(ctx: Any, task: _Task, factor: float, gradients: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """Keep `gradients`, times `factor` and the number of processes, for the differentiable `inputs`."""
        ctx.save_for_backward(*[gradient.mul_(factor * len(task.ranks.sizes)) for gradient in gradients])
        ctx.dtypes = [tensor.dtype for tensor in inputs]

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # torch's once_differentiable would let a gradient penalty silently miss this part
            raise RuntimeError("the tiled losses have no second derivative: call backward without create_graph")
        scaled = [(stored * incoming).to(dtype) for stored, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return None, None, *scaled


class _SigmoidLoss(_StoredGradients):
    @staticmethod
    def forward(ctx: Any, task: _Task, factor: float, images: Tensor, log_scale: Tensor, bias: Tensor, *captions: Tensor) -> Tensor:
        scale, shift = log_scale.to(task.wide).exp(), bias.to(task.wide)
        x, x_wide = images.to(task.matmul), images.to(task.wide)  # (N, E)
        loss, bias_grad = torch.zeros_like(scale), torch.zeros_like(scale)
        image_grad, caption_grads = torch.zeros_like(x_wide), []  # both still to be multiplied by `scale`
        for positives, own in zip(task.positives, captions, strict=True):
            y, own_wide = task.ranks.gather(own.to(task.matmul)), own.to(task.wide)  # (B, E), (N, E)
            caption_grad = torch.zeros_like(y, dtype=task.wide)
            for rows, columns, logits in task.tiles(x, y, scale):
                logits += shift
                flipped = task.off_diagonal_positives(positives, rows, columns)
                if flipped is not None:
                    logits = torch.where(flipped, -logits, logits)
                loss += functional.softplus(logits).sum()
                slope = logits.sigmoid_()  # of the loss by the logits, (rows, columns)
                if flipped is not None:
                    slope = torch.where(flipped, -slope, slope)
                bias_grad += slope.sum()
                slope = slope.to(task.matmul)
                image_grad[rows] += slope @ y[columns]
                caption_grad[columns] += slope.T @ x[rows]
            diagonal = (x_wide * own_wide).sum(1) * scale + shift  # (N,)
            loss += functional.softplus(-diagonal).sum()
            diagonal_slope = -torch.sigmoid(-diagonal)
            bias_grad += diagonal_slope.sum()
            image_grad += diagonal_slope[:, None] * own_wide
            caption_grad[task.ranks.here] += diagonal_slope[:, None] * x_wide
            caption_grads.append(task.ranks.add_own(caption_grad).mul_(scale))
        image_grad *= scale
        scale_grad = (image_grad * x_wide).sum()  # Euler: the logits are linear in the images
        _StoredGradients.store(ctx, task, factor, [image_grad, scale_grad, bias_grad, *caption_grads], [images, log_scale, bias, *captions])
        return task.ranks.add(loss) * factor


class _InfoNceLoss(_StoredGradients):
    @staticmethod
    def forward(ctx: Any, task: _Task, factor: float, images: Tensor, log_scale: Tensor, *captions: Tensor) -> Tensor:
        scale, here = log_scale.to(task.wide).exp(), task.ranks.here
        x, x_wide = images.to(task.matmul), images.to(task.wide)  # (N, E)
        loss = torch.zeros_like(scale)
        image_grad, caption_grads = torch.zeros_like(x_wide), []  # both still to be multiplied by `scale`
        for positives, own in zip(task.positives, captions, strict=True):
            y, own_wide = task.ranks.gather(own.to(task.matmul)), own.to(task.wide)  # (B, E), (N, E)
            caption_grad = torch.zeros_like(y, dtype=task.wide)
            # Log of the sum of each anchor's other logits (N,), (B,). With s = its diagonal logit and o = this, minus the
            # log-probability of the diagonal is softplus(o - s): exact however small, unlike log(e^s + e^o) - s.
            image_others, caption_others = _log_sums_off_diagonal(task, x, y, scale)
            diagonal = (x_wide * own_wide).sum(1) * scale  # (N,)
            image_total = torch.logaddexp(image_others, diagonal)
            caption_total = torch.logaddexp(caption_others, task.ranks.gather(diagonal))
            for rows, columns, logits in task.tiles(x, y, scale):
                slope = (logits - image_total[rows, None]).exp_() + logits.sub_(caption_total[columns]).exp_()
                slope = slope.to(task.matmul)  # both probabilities of each pair, (rows, columns)
                image_grad[rows] += slope @ y[columns]
                caption_grad[columns] += slope.T @ x[rows]
            image_margin, caption_margin = image_others - diagonal, caption_others[here] - diagonal
            loss += functional.softplus(image_margin).sum() + functional.softplus(caption_margin).sum()
            slope = -(torch.sigmoid(image_margin) + torch.sigmoid(caption_margin))[:, None]  # (N, 1)
            image_grad += slope * own_wide
            caption_grad[here] += slope * x_wide
            if positives:  # the target is the mean of several positives, not the diagonal
                counts = task.positive_counts(positives).to(task.wide)[:, None]  # (B, 1)
                wanted = task.positive_sums(positives, own_wide) / counts[here] + task.positive_sums(positives, own_wide / counts[here])
                shift = 2 * own_wide - wanted  # of both directions' targets, (N, E)
                loss += scale * (x_wide * shift).sum()
                image_grad += shift
                caption_grad[here] += 2 * x_wide
                caption_grad -= task.sums_of_alike(positives, x_wide) / counts + task.sums_of_alike(positives, x_wide / counts[here])
            caption_grads.append(task.ranks.add_own(caption_grad).mul_(scale))
        image_grad *= scale
        scale_grad = (image_grad * x_wide).sum()
        _StoredGradients.store(ctx, task, factor, [image_grad, scale_grad, *caption_grads], [images, log_scale, *captions])
        return task.ranks.add(loss) * factor


def _log_sums_off_diagonal(task: _Task, x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of the logits off the diagonal: of each image (N,) and, over all processes, of each caption (B,)."""
    images = torch.full_like(x[:, 0], -torch.inf, dtype=task.wide)
    captions = torch.full_like(y[:, 0], -torch.inf, dtype=task.wide)
    for rows, columns, logits in task.tiles(x, y, scale):
        images[rows] = torch.logaddexp(images[rows], logits.logsumexp(1))
        captions[columns] = torch.logaddexp(captions[columns], logits.logsumexp(0))
    return images, task.ranks.logsumexp(captions)


def _plan(
    images: Tensor,
    captions: Sequence[Tensor],
    log_scale: Tensor,
    image_ids: Tensor | None,
    caption_ids: Sequence[Tensor] | None,
    tile: int,
    matmul_dtype: torch.dtype | None,
    group: dist.ProcessGroup | None,
) -> _Task:
    """Return the checked plan of a loss; processes exchange their row counts and, if given, their ids."""
    _check_scalar("log_scale", log_scale)
    if isinstance(captions, Tensor) or not captions:
        raise UsageError("captions must be a list of tensors (N, E), one for each caption set: pass [captions] for one set")
    for name, tensor in [("images", images), *((f"captions[{k}]", caption) for k, caption in enumerate(captions))]:
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise UsageError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}: expected floating-point (N, E)")
        if tensor.shape != images.shape:
            raise UsageError(f"{name} has shape {tuple(tensor.shape)} but images {tuple(images.shape)}: rows must be pairs")
    if caption_ids is not None and len(caption_ids) != len(captions):
        raise UsageError(f"{len(caption_ids)} caption_ids for {len(captions)} caption sets: give one for each")
    for name, ids in [("image_ids", image_ids), *((f"caption_ids[{k}]", ids) for k, ids in enumerate(caption_ids or ()))]:
        if ids is not None and (ids.shape != images.shape[:1] or ids.is_floating_point()):
            raise UsageError(f"{name} is {ids.dtype} of shape {tuple(ids.shape)}: expected whole numbers ({images.shape[0]},)")
    if tile < 1:
        raise UsageError(f"tile is {tile}: expected a whole number of at least 1")
    ranks = _find_ranks(images, group)
    if ranks.total == 0:
        raise UsageError("the batch is empty: the loss of no pairs is undefined")
    shared = [] if image_ids is None else [_labels(ranks.gather(image_ids))]
    own = [[] for _ in captions] if caption_ids is None else [[_labels(ranks.gather(ids))] for ids in caption_ids]
    positives = [_alike(shared + labels) for labels in own]
    wide = reduce(torch.promote_types, (tensor.dtype for tensor in (images, *captions)), torch.float32)
    return _Task(ranks, positives, tile, matmul_dtype or images.dtype, wide)


def _labels(ids: Tensor) -> Tensor:
    """Return whole numbers below B (B,) int64, equal where `ids` (B,) are."""
    return torch.unique(ids, return_inverse=True)[1]


def _alike(labels: list[Tensor]) -> _Positives:
    signed = [(1, one) for one in labels]
    if len(labels) == 2:
        signed.append((-1, _labels(labels[0] * len(labels[0]) + labels[1])))
    return signed


def _find_ranks(rows: Tensor, group: dist.ProcessGroup | None) -> _Ranks:
    if not (dist.is_available() and dist.is_initialized()):
        return _Ranks(None, [rows.shape[0]], 0)
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.full_like(sizes[0], rows.shape[0]), group=group)
    return _Ranks(group, [int(size) for size in torch.cat(sizes).tolist()], dist.get_rank(group))


def _check_scalar(name: str, value: Tensor) -> None:
    if value.ndim != 0:
        raise UsageError(f"{name} has shape {tuple(value.shape)}: expected a scalar tensor")
