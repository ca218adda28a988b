"""Frozen vision encoders behind one contract, by hub id, local folder or `embedded:` id; their text partners are in `text_encoders`.

Legend: `B` batch, `P` patches (row by row over the grid), `D` encoder width, `F` width of the pooled image feature.
How each family of models is read is in `align.encoders.families`.

Fingerprints are flat dicts of what decides a feature. `weights` hashes names, types, shapes and values of the loaded float32
tensors: it depends neither on file format or sharding nor on which layer is read. `encoder` is the hub or `embedded:` id, or the
base name of a local folder, so that a folder can be moved.
"""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.image_utils import SizeDict

from align.common.errors import KitError, UsageError
from align.common.hardware import Arithmetic
from align.encoders.families import DUAL_ENCODERS, VISION_ADAPTERS, Backbone
from align.encoders.loading import (
    VISION_FILES,
    autocast,
    first_line,
    hash_weights,
    load_errors_named,
    recorded_id,
    require_complete,
    require_own_code,
    require_precision,
    resolve_encoder,
)

_MEASURED = 256  # pixels: a multiple of any CNN's stride
Feature = Literal["auto", "cls_mean", "cls", "mean", "tokens"]


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
        # timm's own transforms work on PIL images and do not name a backend
        backend = "pil" if self.is_timm else self.processor.backend
        return json.dumps({**self.processor.to_dict(), "backend": backend}, sort_keys=True)


@dataclass(frozen=True)
class PixelNormalizer:
    """What a transform does besides resizing and cropping: `resample` is its filter, `mean` and `std` (3 each) are on a scale of 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: Image.Resampling

    def __call__(self, image: Image.Image, size: tuple[int, int]) -> Tensor:
        """Return an RGB image as pixels (3, H, W) float32 of `size` (H, W)."""
        height, width = size
        resized = np.asarray(image.resize((width, height), self.resample), dtype=np.float32) / 255
        mean, std = (np.array(values, dtype=np.float32) for values in (self.mean, self.std))
        return torch.from_numpy((resized - mean) / std).permute(2, 0, 1)


def pixel_normalizer(transform: Any) -> PixelNormalizer:
    """Return how `transform` (a Transform, or a torchvision Compose) scales pixels; UsageError if it does not say."""
    from torchvision.transforms import Compose, Normalize  # a second, for what few processes ask

    source: Any = transform.processor if isinstance(transform, Transform) else transform
    if isinstance(transform, Transform) and transform.is_timm:
        source = source.val_transforms
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


class VisionEncoder(nn.Module):
    """A frozen image encoder: always in eval mode, parameters without gradient, features in float32.

    `width` D, `patch_grid` (rows, columns) and `layers` (number of the last layer) are measured at load time. `layer` counts from
    the embeddings (0; CNNs: first stage 1). `feature` is how `pool` makes one vector: `cls_mean`, `cls`, `mean`, or
    `tokens`: all of them one after the other, CLS first, for token heads.
    `image_size` (H, W) is what the transform gives; images of other sizes have a patch for every `patch_size` pixels a side.
    """

    def __init__(
        self, backbone: Backbone, transform: Transform, size: tuple[int, int], *, layer: int, feature: Feature, precision: Arithmetic
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.transform = transform
        self.precision = precision
        self.image_size = size
        self.layers = backbone.count
        self.has_cls = backbone.has_cls
        self.layer = _layer_index(layer, backbone.first, backbone.count)
        self.feature = feature if feature != "auto" else "cls_mean" if self.has_cls else "mean"
        self.id = ""
        self.fingerprint: dict[str, Any] = {}
        backbone.truncate(self.layer)
        self.requires_grad_(False).eval()
        _, patches = self.encode(torch.zeros(1, 3, *size))
        self.width = patches.shape[-1]
        self.patch_grid = _grid(patches.shape[1], *size)
        self.feature_width = feature_width(self.width, self.feature, self.has_cls, patches.shape[1])

    @cached_property
    def patch_size(self) -> int:
        """Pixels a side of a patch: a ViT's stem says it; how often a CNN halves an image is measured on one, as some round down."""
        if not self.backbone.cnn:
            return next(module for module in self.backbone.modules() if isinstance(module, nn.Conv2d)).stride[0]
        if self.backbone.fixed:
            return self.image_size[0] // self.patch_grid[0]
        with torch.no_grad():
            _, patches = self.encode(torch.zeros(1, 3, _MEASURED, _MEASURED))
        return _MEASURED // math.isqrt(patches.shape[1])

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Return self, left in eval mode: a frozen encoder has no training mode."""
        return super().train(False)

    def encode(self, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return cls (B, D) or None and patches (B, P, D) of pixels (B, 3, H, W): float32, after the final norm, no registers.

        H and W are multiples of `patch_size`, and P is H / patch_size x W / patch_size. UsageError if the model takes one size only.
        """
        return self.encode_layers(pixels, [self.layer])[0]

    def encode_layers(self, pixels: Tensor, layers: Sequence[int]) -> list[tuple[Tensor | None, Tensor]]:
        """Return what `encode` returns, for several layers in one forward; UsageError for a layer that was not loaded."""
        indices = [_layer_index(layer, self.backbone.first, self.layers) for layer in layers]
        if max(indices) > self.layer:
            raise UsageError(f"layer {max(indices)} is not there: this encoder was loaded with layer={self.layer}; load it with layer=-1")
        if self.backbone.fixed and tuple(pixels.shape[2:]) != self.image_size:
            given, taken = (" x ".join(map(str, size)) for size in (pixels.shape[2:], self.image_size))
            raise UsageError(
                f"{self.id}: given pixels of {given}; this model takes {taken} only, as its position embeddings cannot be interpolated: "
                "load it with another image_size, or choose another encoder for larger images"
            )
        device = next(self.backbone.parameters()).device
        pixels = pixels.to(device, non_blocking=True)
        if self.backbone.cnn:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with autocast(device, self.precision):
            outputs = self.backbone(pixels, indices)
        return [self._split(tokens.float()) for tokens in outputs]

    def _split(self, tokens: Tensor) -> tuple[Tensor | None, Tensor]:
        return (tokens[:, 0] if self.has_cls else None), tokens[:, self.backbone.prefix :]

    def pool(self, cls: Tensor | None, patches: Tensor) -> Tensor:
        """Return the image feature (B, F), not normalized: `[cls ; mean(patches)]`, `cls`, the mean of the patches, or all tokens."""
        if self.feature == "tokens":
            return (patches if cls is None else torch.cat([cls[:, None], patches], dim=1)).flatten(1)
        if self.feature == "mean":
            return patches.mean(1)
        assert cls is not None
        return cls if self.feature == "cls" else torch.cat([cls, patches.mean(1)], dim=-1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the image feature (B, F) of pixels (B, 3, H, W)."""
        return self.pool(*self.encode(pixels))

    def dense(self, pixels: Tensor) -> Tensor:
        """Return what a head takes, for each patch: (B, P, F) with `[cls ; patch]` where `pool` gives `[cls ; mean]`, else the patch.

        With feature "tokens" it is the row of all tokens (B, T F), of which a token head makes one embedding a patch.
        """
        cls, patches = self.encode(pixels)
        if self.feature == "tokens":
            return self.pool(cls, patches)
        if self.feature != "cls_mean":
            return patches
        assert cls is not None
        return torch.cat([cls[:, None].expand_as(patches), patches], dim=-1)


def feature_width(width: int, feature: str, has_cls: bool, patches: int = 1) -> int:
    """Return the width F of the image feature; UsageError if the feature needs a CLS token that the encoder does not have."""
    widths = {"auto": 2 * width if has_cls else width, "cls_mean": 2 * width, "cls": width, "mean": width}
    widths["tokens"] = (patches + has_cls) * width
    if feature not in widths:
        raise UsageError(f"feature={feature!r} is unknown; allowed: {', '.join(widths)}")
    if feature.startswith("cls") and not has_cls:
        raise UsageError(f"feature={feature!r} needs a CLS token, which this encoder does not have; use feature='mean' or 'auto'")
    return widths[feature]


def load_vision_encoder(
    name: str,
    *,
    feature: Feature = "auto",
    layer: int = -1,
    precision: Arithmetic = "fp32",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    image_size: int | None = None,
) -> VisionEncoder:
    """Return the frozen vision encoder `name`: a hub id, a local folder or an `embedded:` id.

    `layer` counts from 0 (embeddings) or from the end (-1 = last); a ViT's inner layers also pass the final norm. `bf16` is
    autocast over float32 weights. `image_size` in pixels scales the processor's resize and crop to another shorter side.
    Raises UsageError (unknown id, model type, layer or feature; missing files or weights), OfflineError, DamagedError.
    """
    require_precision(precision)
    source = resolve_encoder(name, revision, trust_remote_code)
    remote: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    known = f"known model types: {', '.join(sorted(VISION_ADAPTERS))}"
    with load_errors_named(name, f"{VISION_FILES}; {known}"):
        if trust_remote_code:
            require_own_code(name, source, revision)
        config = AutoConfig.from_pretrained(source, **remote)
        if config.model_type not in VISION_ADAPTERS:
            raise UsageError(f"{name}: model_type {config.model_type!r} has no vision adapter; {known}")
        processor = AutoImageProcessor.from_pretrained(source, **remote)
        model, report = AutoModel.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **remote,
        )
    missing = report["missing_keys"]
    if config.model_type in DUAL_ENCODERS:
        model = model.vision_model
        missing = {key.removeprefix("vision_model.") for key in missing if key.startswith("vision_model.")}
    backbone = VISION_ADAPTERS[config.model_type](model)
    feature_width(1, feature, backbone.has_cls)
    require_complete(name, missing, backbone.unused)
    weights = hash_weights(model, backbone.unused)
    transform = Transform(processor)
    if image_size is not None:
        transform = _resized(name, transform, image_size)
    size = _output_size(name, transform)
    if image_size is not None and config.model_type == "timm_wrapper" and hasattr(model.timm_model, "set_input_size"):
        model.timm_model.set_input_size(img_size=size)
    if backbone.cnn:
        backbone.to(memory_format=torch.channels_last)
    try:
        encoder = VisionEncoder(backbone.to(device), transform, size, layer=layer, feature=feature, precision=precision)
    except (RuntimeError, ValueError, AssertionError) as error:
        if isinstance(error, KitError):
            raise
        raise UsageError(f"{name} does not take images of {size[0]} x {size[1]} pixels ({first_line(error)})") from error
    encoder.id = name
    encoder.fingerprint = {
        "encoder": recorded_id(name),
        "weights": weights,
        "preprocessing": transform.canonical(),
        "feature": encoder.feature,
        "layer": encoder.layer,
        "precision": precision,
    }
    if encoder.feature == "tokens":
        encoder.fingerprint |= {"tokens": encoder.feature_width // encoder.width, "has_cls": encoder.has_cls}
    return encoder


def _layer_index(layer: int, first: int, count: int) -> int:
    index = layer if layer >= 0 else count + 1 + layer
    if not first <= index <= count:
        raise UsageError(f"layer={layer} is out of range; allowed: {first} to {count}, or {first - count - 1} to -1")
    return index


def _grid(patches: int, height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of `patches`, the pair of factors nearest to the image's aspect ratio."""
    rows = [n for n in range(1, patches + 1) if patches % n == 0]
    best = min(rows, key=lambda n: abs(math.log(n * n / patches * width / height)))
    return best, patches // best


def _output_size(name: str, transform: Transform) -> tuple[int, int]:
    """Return (H, W) of the transform's output; UsageError if it depends on the image, as such outputs cannot be batched."""
    shapes = {tuple(transform(Image.new("RGB", size)).shape) for size in ((320, 240), (240, 320), (97, 101))}
    if len(shapes) > 1 or len(next(iter(shapes))) != 3:
        raise UsageError(
            f"{name}: its image processor gives outputs of different shapes, {sorted(shapes)}; "
            "set a fixed `size` (height and width) or `do_center_crop` with a `crop_size` in preprocessor_config.json"
        )
    _, height, width = next(iter(shapes))
    return height, width


def _resized(name: str, transform: Transform, image_size: int) -> Transform:
    """Return a copy of `transform` whose resize and crop are scaled so that the shorter side of its output is `image_size`."""
    scale = image_size / min(_output_size(name, transform))
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
    if min(_output_size(name, resized)) != image_size:
        raise UsageError(f"{name}: its image processor cannot be scaled to image_size={image_size}; leave image_size out")
    return resized


def load_transform(name: str, *, image_size: int | None = None, revision: str | None = None) -> Transform:
    """Return the transform of the vision encoder `name` without its weights; arguments and errors as `load_vision_encoder`."""
    source = resolve_encoder(name, revision, trust_remote_code=False)
    with load_errors_named(name, VISION_FILES):
        transform = Transform(AutoImageProcessor.from_pretrained(source, revision=revision))
    return transform if image_size is None else _resized(name, transform, image_size)
