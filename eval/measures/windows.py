"""Open-vocabulary segmentation of one image: a window slides over it, and each patch is compared with all class names.

The image is resized to whole patches, its shorter side to 448 pixels, so the patches of all windows form one grid. Cosines are
averaged where windows overlap and interpolated bilinearly to the image's own size. A pixel gets the class of its best name.

Shapes: `B` windows, `P` patches, `E` aligned width, `S` names, `h` and `w` patches of the whole image, `H` and `W` its pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from align.common.errors import NonFiniteError, UsageError
from align.encoders.transforms import pixel_normalizer
from eval.models.dual_encoder import DualEncoder

_BYTES = 64 << 20  # of interpolated cosines held at a time; a whole COCO-Stuff image (640 x 480) would need 210 MB


@dataclass(frozen=True)
class Windows:
    """The protocol in pixels, rounded to whole patches: the image's shorter `side`, the side of a square `window`, and the `stride`."""

    side: int = 448
    window: int = 448
    stride: int = 224

    def __post_init__(self) -> None:
        if not 0 < self.stride <= self.window or self.side < 1:
            raise UsageError(f"{self}: expected a side of at least 1 and 0 < stride <= window, in pixels")

    def __str__(self) -> str:
        """Return the text for reports."""
        return f"shorter side {self.side}, windows of {self.window}, stride {self.stride} pixels"

    def grid(self, size: tuple[int, int], patch: int) -> tuple[int, int]:
        """Return the patches (h, w) of the resized image, from its original `size` (H, W) in pixels."""
        scale = self.side / min(size) / patch
        return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))

    def places(self, grid: tuple[int, int], patch: int) -> Iterator[tuple[slice, slice]]:
        """Yield the rows and columns of patches that each window covers. The last window ends at the image's edge."""
        whole, step = max(1, round(self.window / patch)), max(1, round(self.stride / patch))
        step = min(step, whole)  # rounding must not leave gaps
        starts = [[*range(0, max(1, cells - whole), step), max(0, cells - whole)] for cells in grid]
        for row in dict.fromkeys(starts[0]):
            for column in dict.fromkeys(starts[1]):
                yield slice(row, min(row + whole, grid[0])), slice(column, min(column + whole, grid[1]))


@torch.inference_mode()
def patch_cosines(
    models: Sequence[DualEncoder], image: Image.Image, weights: Sequence[Tensor], windows: Windows, batch_size: int = 8
) -> list[Tensor]:
    """Return each model's cosines (S, h, w) with its `weights` (S, E): means over all windows of an RGB image, on the model's device.

    The models share one encoder. UsageError for an irregular grid of patches, NonFiniteError for embeddings that are not finite.
    """
    first = models[0]
    patch, device = first.patch_size, first.device
    rows, columns = grid = windows.grid((image.height, image.width), patch)
    pixels = pixel_normalizer(first.vision_encoder.transform)(image, (rows * patch, columns * patch)).to(device)
    weights = [of_model.to(device) for of_model in weights]
    totals = [torch.zeros(len(of_model), rows, columns, device=device) for of_model in weights]
    count = torch.zeros(rows, columns, device=device)
    places = list(windows.places(grid, patch))
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        crops = torch.stack([pixels[:, r.start * patch : r.stop * patch, c.start * patch : c.stop * patch] for r, c in batch])
        down, across = crops.shape[2] // patch, crops.shape[3] // patch
        features = first.encode_patches(crops)
        for model, of_model, total in zip(models, weights, totals, strict=True):
            cosines = model.project_patches(features).float() @ of_model.T  # (B, P, S)
            if cosines.shape[1] != down * across:
                found = f"{cosines.shape[1]} patches, not {down} x {across}, for {down * patch} x {across * patch} pixels"
                mend = f"its patches are not of {patch} pixels a side; choose an encoder with a regular grid"
                raise UsageError(f"the encoder gives {found}: {mend}")
            for (r, c), cosine in zip(batch, cosines, strict=True):
                total[:, r, c] += cosine.T.unflatten(1, (down, across))
        for r, c in batch:
            count[r, c] += 1
    if not all(torch.isfinite(total).all() for total in totals):
        raise NonFiniteError("the model gave patch embeddings that are not finite; use fp32, or another model")
    return [total / count for total in totals]


@torch.inference_mode()
def best_classes(cosines: Tensor, owner: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return each pixel's class (H, W) as uint8 or uint16: the `owner` (S,) of the name with the highest interpolated cosine."""
    height, width = size
    names, rows, columns = cosines.shape
    # bilinear interpolation is linear along each axis, so the interpolated unit vectors are its matrix
    down, across = (
        interpolate(torch.eye(cells, device=cosines.device)[None], size=pixels, mode="linear", align_corners=False)[0]
        for cells, pixels in ((rows, height), (columns, width))
    )  # (h, H), (w, W)
    strips = down.split(max(1, _BYTES // (4 * names * width)), dim=1)  # (h, step)
    best = [(torch.einsum("shw,hr->srw", cosines, strip) @ across).argmax(0).cpu() for strip in strips]  # (step, W)
    kind = np.uint8 if int(owner.max()) < 256 else np.uint16
    return owner.astype(kind)[torch.cat(best).numpy()]


def segment(
    models: Sequence[DualEncoder], image: Image.Image, weights: Sequence[Tensor], owner: np.ndarray, windows: Windows
) -> list[np.ndarray]:
    """Return each model's class (H, W) of every pixel of an RGB image. `owner` (S,) holds the class of each name. See `patch_cosines`."""
    found = patch_cosines(models, image, weights, windows)
    return [best_classes(cosines, owner, (image.height, image.width)) for cosines in found]
