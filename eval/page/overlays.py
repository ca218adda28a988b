"""Label maps as pictures: every class a color of its own, laid over the image; pixels that do not count are hatched."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from align.common.files import atomic_bytes
from eval.measures.segmentation import LabelMaps, confusion_matrix
from eval.results.records import file_name
from eval.tasks.masks import IGNORED, SegmentationData

SIDE = 320  # pixels of the longer side
_OPACITY = 0.6
_TO_CONES = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])  # linear RGB -> LMS
_TO_OKLAB = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])  # cube roots of LMS -> L, a, b
_SHOWN = 0.01  # share of the pixels from which a class that is only predicted is named in the legend


def palette(classes: int) -> np.ndarray:
    """Return (C, 3) uint8 RGB colors, the same for a class number whatever C is: each as far as possible from all before it.

    Distances are in OKLab (B. Ottosson, 2020), where equal steps look equal; grays are left out, as they mark what does not count.
    """
    shades = np.arange(0, 256, 17)
    colors = np.stack(np.meshgrid(shades, shades, shades, indexing="ij"), axis=-1).reshape(-1, 3)
    linear = (colors / 255) ** 2.2
    lab = np.cbrt(linear @ _TO_CONES.T) @ _TO_OKLAB.T
    kept = (np.hypot(lab[:, 1], lab[:, 2]) > 0.09) & (lab[:, 0] > 0.35)
    colors, lab = colors[kept], lab[kept]
    chosen, distance = [int(lab[:, 2].argmin())], np.full(len(lab), np.inf)  # blue first
    while len(chosen) < classes:
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(distance.argmax()))
    return colors[chosen[:classes]].astype(np.uint8)


def overlay(image: Image.Image, classes: np.ndarray, colors: np.ndarray, ignored: np.ndarray) -> Image.Image:
    """Return a small picture (longer side at most SIDE) with the colors (C, 3) of `classes` (H, W) over it, class borders dark.

    Pixels where `ignored` (H, W) bool is set are gray and hatched.
    """
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
    regions = np.where(void, IGNORED, shown.astype(np.int64))
    border = np.zeros_like(void)
    border[1:] |= regions[1:] != regions[:-1]
    border[:, 1:] |= regions[:, 1:] != regions[:, :-1]
    blended[border] *= 0.4
    return Image.fromarray(blended.clip(0, 255).astype(np.uint8))


def segmentation_examples(
    folder: Path, data: SegmentationData, maps: Mapping[str, LabelMaps], count: int, generator: np.random.Generator
) -> dict[str, Any]:
    """Return `count` random images with each model's pixel accuracy and legend, and write their overlays below `folder`/examples.

    `maps` maps model names to label maps. Paths in the result are relative to `folder`/examples. `pixel_accuracy` is None for an
    image without a pixel that counts. `classes` are those that are there, then those that a model names for 1% of the image or more.
    """
    colors, place = palette(len(data.class_names)), file_name(data.task.id)
    (folder / "examples" / place).mkdir(parents=True, exist_ok=True)
    numbers = [int(n) for n in generator.choice(len(data.keys), size=min(count, len(data.keys)), replace=False)]
    items = []
    for number in numbers:
        image, truth = data.image(number), data.truth(number)
        ignored = truth == IGNORED
        counts = np.bincount(truth[~ignored], minlength=len(colors))
        named = np.zeros(len(colors), dtype=bool)
        true_path = f"{place}/{number}--truth.jpg"
        _save(folder / "examples" / true_path, overlay(image, truth, colors, ignored))
        said = {}
        for model, predictions in maps.items():
            predicted = predictions[number]
            path = f"{place}/{number}--{file_name(model)}.jpg"
            _save(folder / "examples" / path, overlay(image, predicted, colors, ignored))
            right = confusion_matrix(truth, predicted, len(colors)).trace()
            accuracy = round(float(right / counts.sum()), 4) if counts.any() else None
            said[model] = {"overlay": path, "pixel_accuracy": accuracy}
            named |= np.bincount(predicted[~ignored], minlength=len(colors)) >= max(1, _SHOWN * truth.size)
        legend = [*np.flatnonzero(counts)[np.argsort(-counts[counts > 0], kind="stable")], *np.flatnonzero(named & (counts == 0))]
        items.append(
            {
                "image": number,
                "key": data.keys[number],
                "classes": _legend([int(n) for n in legend], data.class_names, colors),
                "truth": true_path,
                "answers": said,
            }
        )
    return {"items": items}


def _legend(numbers: Sequence[int], names: Sequence[str], colors: np.ndarray) -> list[dict[str, str]]:
    return [{"name": names[n], "color": "#{:02x}{:02x}{:02x}".format(*colors[n])} for n in numbers]


def _save(path: Path, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=85, optimize=True)
    atomic_bytes(path, buffer.getvalue())
