"""Features of many candidates from one pass over the images: a store for each layer, and one for a sample of its patches.

    folder/plan.parquet               the rows of the source, usually a sample
    folder/ENCODER/layer-09           [cls ; mean of patches], or the mean where there is no CLS: what align/encode.py writes
    folder/ENCODER/patches-09         the patches of the first images, averaged to a small grid (side by side in one row)
    folder/ENCODER/captions-COLUMN    of a text encoder

A layer's store serves the features `cls`, `mean` and `cls_mean` (slices of its columns) and is a store that align/train.py takes.
Shapes: `B` batch, `P` patches, `D` encoder width, `N` rows.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from align.encoders.spec import VisionFeature
from align.encoders.vision import VisionEncoder
from align.features.extract import Extraction, ImageStore
from align.features.store import StoreHeader
from align.features.writer import StoreWriter
from align.sources.plan import Plan, Source

PATCH_SIDE = 7  # patches are averaged to at most 7 x 7 before their neighborhoods are compared


class LayerShape(NamedTuple):
    """What one layer gives: width D and the grid of its patches, as it is and as it is kept."""

    width: int
    grid: tuple[int, int]
    kept: tuple[int, int]


class LayerFeatures:
    """Called with pixels, returns the features and pooled patches of several layers side by side, float16."""

    def __init__(self, encoder: VisionEncoder, layers: Sequence[int], with_patches: bool) -> None:
        self.encoder, self.layers, self.with_patches, self.transform = encoder, layers, with_patches, encoder.transform
        size = encoder.transform(Image.new("RGB", (64, 64))).shape
        self.shapes = {}
        for layer, (_, patches) in zip(layers, encoder.encode_layers(torch.zeros(1, *size), layers), strict=True):
            rows = round((patches.shape[1] * encoder.patch_grid[0] / encoder.patch_grid[1]) ** 0.5)  # of the last layer's proportions
            grid = (rows, patches.shape[1] // rows)
            assert grid[0] * grid[1] == patches.shape[1], f"layer {layer}: {patches.shape[1]} patches are no grid"
            self.shapes[layer] = LayerShape(patches.shape[2], grid, (min(PATCH_SIDE, grid[0]), min(PATCH_SIDE, grid[1])))

    def widths(self, patches: bool) -> dict[int, int]:
        """Return, per layer, the columns of its features or of its pooled patches."""
        factor = 2 if self.encoder.has_cls else 1
        return {k: shape.width * (shape.kept[0] * shape.kept[1] if patches else factor) for k, shape in self.shapes.items()}

    @property
    def feature_width(self) -> int:
        """Columns of one row."""
        return sum(self.widths(False).values()) + (sum(self.widths(True).values()) if self.with_patches else 0)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return (B, W): every layer's [cls ; mean of patches] (or mean), then every layer's patches if they are wanted."""
        pooled, kept = [], []
        for layer, (cls, patches) in zip(self.layers, self.encoder.encode_layers(pixels, self.layers), strict=True):
            pooled.append(patches.mean(1) if cls is None else torch.cat([cls, patches.mean(1)], dim=-1))
            if not self.with_patches:
                continue
            shape = self.shapes[layer]
            map_ = patches.transpose(1, 2).unflatten(2, shape.grid)  # (B, D, rows, columns)
            kept.append(functional.adaptive_avg_pool2d(map_, shape.kept).flatten(2).transpose(1, 2).flatten(1))
        return torch.cat([*pooled, *kept], dim=1).half()


class LayerExtraction(Extraction):
    """An extraction whose forward fills the stores of several layers at once."""

    def __init__(self, source: Source, plan: Plan, output: Path, features: LayerFeatures, patch_images: int = 0, **options: Any) -> None:
        """`output`: folder of the encoder's stores; `options` as of Extraction."""
        super().__init__(source, plan, output, **options)
        self.vision = features  # type: ignore[assignment]  # what an extraction asks of an encoder: transform, width, a call
        encoder, begin = features.encoder, 0
        feature: VisionFeature = "cls_mean" if encoder.has_cls else "mean"
        counts = {"layer": plan.samples} | ({"patches": min(plan.samples, patch_images)} if features.with_patches else {})
        for kind, count in counts.items():
            for layer, width in features.widths(kind == "patches").items():
                fingerprint = {**encoder.fingerprint, "feature": feature, "layer": layer}
                if kind == "patches":
                    fingerprint |= {"feature": f"patches {features.shapes[layer].kept}", "images": count}
                loader = replace(encoder.spec, feature=feature, layer=layer).stored()
                header = StoreHeader("image", fingerprint, loader, width, plan.digest, len(plan.shards), count)
                writer = StoreWriter(output / f"{kind}-{layer:02d}", header)
                self.image_stores.append(ImageStore(writer, slice(begin, begin + width), count))
                begin += width
