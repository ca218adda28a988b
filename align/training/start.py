"""Initial weights of linear heads in closed form: regularized canonical correlation analysis (CCA) of the training pairs.

Shapes: `N` images, `T` captions, `F` image feature width, `D` caption feature width, `K` = min(F, D), `E` aligned width.
"""

import torch
from torch import Tensor

from align.common.errors import UsageError
from align.model.dual_encoder import SailModel
from align.model.heads import LinearHead
from align.training.online import OnlinePairs
from align.training.pairs import PairedFeatures

MOST_PAIRS = 10_000  # read for the start; with more pairs than that, training has steps enough
IMAGE_RIDGE = 10.0  # added to the variance of each image feature, in mean variances; both were chosen on photos (docs/LOG.md)
CAPTION_RIDGE = 1.0  # the same for caption features


@torch.no_grad()
def start_from_correlations(model: SailModel, pairs: PairedFeatures | OnlinePairs) -> None:
    """Set both linear heads of `model` to the strongest E canonical directions of the first 10,000 pairs, in place.

    The maps are scaled to the spread of the random weights that they replace. UsageError if E is above K.
    """
    heads = [head for head in (model.vision_head, model.text_head) if isinstance(head, LinearHead)]
    assert len(heads) == 2, "TrainConfig refuses other heads"
    width, shared = heads[0].out.out_features, min(head.out.in_features for head in heads)
    if width > shared:
        raise UsageError(
            f"--start cca finds at most {shared} directions, the width of the narrower features, for --width {width}: "
            f"give --width {shared} or less"
        )
    images, captions, owners = pairs.everything(MOST_PAIRS)
    sides = [head.norm(torch.from_numpy(rows).float()) for head, rows in zip(heads, (images, captions), strict=True)]
    for head, rows, found in zip(heads, sides, canonical_maps(sides[0], sides[1], torch.from_numpy(owners)), strict=True):
        matrix = found[:width].to(rows.dtype)  # (E, F) or (E, D)
        matrix *= head.out.weight.std() / matrix.std()
        head.out.weight.copy_(matrix)
        head.out.bias.copy_(-matrix @ rows.mean(0))


def canonical_maps(images: Tensor, captions: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """Return maps (K, F) and (K, D), float64, of images (N, F) and captions (T, D) of images `owners` (T,), strongest direction first.

    Regularized CCA of images and the means of their captions, each direction weighted by the root of its correlation. The product
    of a mapped image and a mapped caption then weights each direction by its correlation. Features need not be centered.
    """
    images, captions = images - images.mean(0), captions - captions.mean(0)
    means = images.new_zeros(len(images), captions.shape[1]).index_add_(0, owners, captions)  # (N, D) sums at first
    means /= torch.bincount(owners, minlength=len(images))[:, None]
    image_root, caption_root = _inverse_root(images, IMAGE_RIDGE), _inverse_root(captions, CAPTION_RIDGE)
    between = (images.T @ means).double() / len(images)  # (F, D)
    left, correlations, right = torch.linalg.svd(image_root @ between @ caption_root, full_matrices=False)
    roots = correlations.sqrt()[:, None]  # (K, 1)
    return roots * (left.T @ image_root), roots * (right @ caption_root)


def _inverse_root(centered: Tensor, ridge: float) -> Tensor:
    """Return the inverse square root (F, F) float64 of the covariance of rows (N, F) plus `ridge` mean variances."""
    covariance = (centered.T @ centered).double() / len(centered)
    values, vectors = torch.linalg.eigh(covariance)
    floor = ridge * covariance.diagonal().mean()
    return (vectors * (values.clamp(min=0) + floor).rsqrt()) @ vectors.T
