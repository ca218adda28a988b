"""Label maps as pictures: one color per class, laid over the image. Ignored pixels are hatched."""

import numpy as np
from PIL import Image

SIDE = 320  # pixels of the longer side
_OPACITY = 0.6
_TO_CONES = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])  # linear RGB -> LMS
_TO_OKLAB = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])  # cube roots of LMS -> L, a, b


def palette(classes: int) -> np.ndarray:
    """Return (C, 3) uint8 RGB colors, each as far as possible from all earlier ones. A class keeps its color whatever C is."""
    shades = np.arange(0, 256, 17)
    colors = np.stack(np.meshgrid(shades, shades, shades, indexing="ij"), axis=-1).reshape(-1, 3)
    linear = (colors / 255) ** 2.2
    lab = np.cbrt(linear @ _TO_CONES.T) @ _TO_OKLAB.T  # (B. Ottosson, 2020): equal steps look equal
    kept = (np.hypot(lab[:, 1], lab[:, 2]) > 0.09) & (lab[:, 0] > 0.35)  # no grays: they mark ignored pixels
    colors, lab = colors[kept], lab[kept]
    chosen, distance = [int(lab[:, 2].argmin())], np.full(len(lab), np.inf)  # blue first
    while len(chosen) < classes:
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(distance.argmax()))
    return colors[chosen[:classes]].astype(np.uint8)


def overlay(image: Image.Image, classes: np.ndarray, colors: np.ndarray, ignored: np.ndarray) -> Image.Image:
    """Return a picture (longer side at most SIDE) with `classes` (H, W) in `colors` (C, 3); `ignored` (H, W) pixels are hatched gray."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    rows = np.arange(small.height) * classes.shape[0] // small.height
    columns = np.arange(small.width) * classes.shape[1] // small.width
    shown, void = classes[rows[:, None], columns], ignored[rows[:, None], columns]
    picture = np.asarray(small, dtype=np.float64)
    blended = (1 - _OPACITY) * picture + _OPACITY * colors[np.where(void, 0, shown)]
    stripes = (np.add.outer(np.arange(small.height), np.arange(small.width)) // 4) % 2
    gray = 0.5 * picture.mean(axis=2) + 40 + 50 * stripes
    blended = np.where(void[:, :, None], gray[:, :, None], blended)
    regions = np.where(void, -1, shown.astype(np.int64))
    border = np.zeros_like(void)
    border[1:] |= regions[1:] != regions[:-1]
    border[:, 1:] |= regions[:, 1:] != regions[:, :-1]
    blended[border] *= 0.4
    return Image.fromarray(blended.clip(0, 255).astype(np.uint8))
