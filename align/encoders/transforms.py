"""Images to pixels: an encoder's own image processor, scaled to other sizes, and what it does to pixel values.

Pixels are (3, H, W) float32.
"""

import copy
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor
from transformers.image_utils import SizeDict

from align.common.errors import UsageError
from align.encoders.loading import VISION_FILES, load_errors_named, opened
from align.encoders.spec import VisionSpec


class Transform:
    """An encoder's own image processor as a picklable function: RGB PIL image -> (3, H, W) float32."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    @property
    def is_timm(self) -> bool:
        """Whether timm's own transforms are wrapped (known by name: importing timm takes seconds that others need not wait for)."""
        return type(self.processor).__name__ == "TimmWrapperImageProcessor"

    def __call__(self, image: Image.Image) -> Tensor:
        return self.processor(image, return_tensors="pt")["pixel_values"][0]

    def canonical(self) -> str:
        """Return the processor's values and backend as JSON; the torchvision and PIL backends differ by up to 0.015."""
        backend = "pil" if self.is_timm else self.processor.backend  # timm's works on PIL images and names none
        return json.dumps({**self.processor.to_dict(), "backend": backend}, sort_keys=True)


@dataclass(frozen=True)
class PixelNormalizer:
    """What a transform does besides resizing and cropping: `resample` is its filter, `mean` and `std` (3 each) are on a scale of 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: Image.Resampling

    def __call__(self, image: Image.Image, size: tuple[int, int]) -> Tensor:
        """Return an RGB image as pixels (3, H, W) float32 of `size` (H, W)."""
        resized = np.asarray(image.resize(size[::-1], self.resample), dtype=np.float32) / 255
        mean, std = (np.array(values, dtype=np.float32) for values in (self.mean, self.std))
        return torch.from_numpy((resized - mean) / std).permute(2, 0, 1)


def pixel_normalizer(transform: Any) -> PixelNormalizer:
    """Return how `transform` (a Transform, or a torchvision Compose) scales pixels; UsageError if it does not say."""
    from torchvision.transforms import Compose, Normalize  # a second, for what few processes ask

    source: Any = transform
    if isinstance(transform, Transform):
        source = transform.processor.val_transforms if transform.is_timm else transform.processor
    if isinstance(source, Compose):
        steps = source.transforms
        mean, std = next(((step.mean, step.std) for step in steps if isinstance(step, Normalize)), (0.0, 1.0))
        resample, factor = next((step.interpolation for step in steps if hasattr(step, "interpolation")), None), 1 / 255
    elif hasattr(source, "image_mean"):
        mean, std = (source.image_mean, source.image_std) if source.do_normalize else (0.0, 1.0)
        resample, factor = source.resample, source.rescale_factor if source.do_rescale else 1.0
    else:
        raise UsageError(
            f"cannot read mean, std and filter from {type(source).__name__}; known are image processors of transformers with an "
            "image_mean, timm's, and torchvision's Compose"
        )
    name = Image.Resampling(resample).name if isinstance(resample, int) else getattr(resample, "name", str(resample or "bilinear"))
    filters = Image.Resampling.__members__
    if name.upper() not in filters:
        raise UsageError(f"{type(source).__name__} resizes with {name!r}, which Pillow does not have; known: {', '.join(filters)}")
    scale = 1 / (255 * factor)
    channels = [np.broadcast_to(np.asarray(value, dtype=np.float64) * scale, 3).tolist() for value in (mean, std)]
    return PixelNormalizer(tuple(channels[0]), tuple(channels[1]), filters[name.upper()])


def load_transform(spec: VisionSpec) -> Transform:
    """Return the transform of a vision encoder, without its weights, for images of `spec.image_size`; errors as `load_vision_encoder`."""
    with opened(spec, VISION_FILES) as (source, remote):
        transform = Transform(AutoImageProcessor.from_pretrained(source, **remote))
    return transform if spec.image_size is None else _resized(spec.name, transform, spec.image_size)


def output_size(name: str, transform: Transform) -> tuple[int, int]:
    """Return (H, W) of the transform's output; UsageError if it depends on the image, which cannot be batched, or is no pixels."""
    with load_errors_named(name, "its image processor fails on a plain image: mend preprocessor_config.json"):
        outputs = [transform(Image.new("RGB", size)) for size in ((320, 240), (240, 320), (97, 101))]
    shapes = {tuple(output.shape) for output in outputs}
    if not all(output.isfinite().all() for output in outputs):
        raise UsageError(f"{name}: its image processor gives infinite pixels; mend image_mean and image_std in preprocessor_config.json")
    if len(shapes) > 1 or len(next(iter(shapes))) != 3:
        raise UsageError(
            f"{name}: its image processor gives outputs of different shapes, {sorted(shapes)}; "
            "set a fixed `size` (height and width) or `do_center_crop` with a `crop_size` in preprocessor_config.json"
        )
    _, height, width = next(iter(shapes))
    return height, width


def _resized(name: str, transform: Transform, image_size: int) -> Transform:
    """Return a copy of `transform` whose resize and crop are scaled so that the shorter side of its output is `image_size`."""
    scale = image_size / min(output_size(name, transform))
    processor = copy.deepcopy(transform.processor)
    if transform.is_timm:
        channels, height, width = processor.data_config["input_size"]
        data = {**processor.data_config, "input_size": (channels, round(height * scale), round(width * scale))}
        processor = type(processor)(pretrained_cfg=data)
    else:
        for key in ("size", "crop_size"):
            sides = getattr(processor, key)
            if sides is not None:
                setattr(processor, key, SizeDict(**{side: round(value * scale) for side, value in dict(sides).items()}))
    resized = Transform(processor)
    if min(output_size(name, resized)) != image_size:
        raise UsageError(f"{name}: its image processor cannot be scaled to image_size={image_size}; leave image_size out")
    return resized
