"""Frozen vision encoders behind one contract, by hub id, local folder or `embedded:` id; their text partners are in `align.encoders.text`.

Legend: `B` batch, `P` patches (row by row over the grid), `D` encoder width, `F` width of the pooled image feature.
How each family of models is read is in `align.encoders.families`.

Fingerprints are flat dicts of what decides a feature. `weights` hashes names, types, shapes and values of the loaded float32
tensors: it depends neither on file format or sharding nor on which layer is read. `encoder` is the hub or `embedded:` id, or the
base name of a local folder, so that a folder can be moved.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from align.common.errors import KitError, UsageError
from align.encoders.agreement import require_agreement
from align.encoders.families import DUAL_ENCODERS, VISION_ADAPTERS, Backbone
from align.encoders.loading import (
    FORWARD_ERRORS,
    VISION_FILES,
    autocast,
    first_line,
    hash_weights,
    load_errors_named,
    opened,
    recorded_id,
    require_complete,
)
from align.encoders.spec import VisionSpec
from align.encoders.transforms import Transform, load_transform, output_size

_MEASURED = 256  # pixels: a multiple of any CNN's stride


class VisionEncoder(nn.Module):
    """A frozen image encoder: always in eval mode, parameters without gradient, features in float32.

    `width` D, `patch_grid` (rows, columns) and `layers` (number of the last layer) are measured at load time. `layer` counts from
    the embeddings (0; CNNs: first stage 1). `feature` is how `pool` makes one vector: `cls_mean`, `cls`, `mean`, or
    `tokens`: all of them one after the other, CLS first, for token heads.
    `image_size` (H, W) is what the transform gives; images of other sizes have a patch for every `patch_size` pixels a side.
    `spec` is what it was loaded by, `weights` the hash of the loaded weights.
    """

    def __init__(self, backbone: Backbone, transform: Transform, size: tuple[int, int], spec: VisionSpec, weights: str) -> None:
        super().__init__()
        self.backbone, self.transform, self.image_size, self.spec = backbone, transform, size, spec
        self.id, self.precision = spec.name, spec.precision
        self.layers, self.has_cls = backbone.count, backbone.has_cls
        self.layer = _layer_index(spec.layer, backbone.first, backbone.count)
        self.feature = spec.feature if spec.feature != "auto" else "cls_mean" if self.has_cls else "mean"
        backbone.truncate(self.layer)
        self.requires_grad_(False).eval()
        _, patches = self.encode(torch.zeros(1, 3, *size))
        self.width = patches.shape[-1]
        self.patch_grid = _grid(patches.shape[1], *size)
        self.feature_width = feature_width(self.width, self.feature, self.has_cls, patches.shape[1])
        self.fingerprint: dict[str, Any] = {
            "encoder": recorded_id(spec.name),
            "weights": weights,
            "preprocessing": transform.canonical(),
            "feature": self.feature,
            "layer": self.layer,
            "precision": spec.precision,
        }
        if self.feature == "tokens":
            self.fingerprint |= {"tokens": self.feature_width // self.width, "has_cls": self.has_cls}

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
        features = [tokens.float() for tokens in outputs]
        return [(tokens[:, 0] if self.has_cls else None, tokens[:, self.backbone.prefix :]) for tokens in features]

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
    factors = {"auto": 1 + has_cls, "cls_mean": 2, "cls": 1, "mean": 1, "tokens": patches + has_cls}
    if feature not in factors:
        raise UsageError(f"feature={feature!r} is unknown; allowed: {', '.join(factors)}")
    if feature.startswith("cls") and not has_cls:
        raise UsageError(f"feature={feature!r} needs a CLS token, which this encoder does not have; use feature='mean' or 'auto'")
    return factors[feature] * width


def load_vision_encoder(spec: VisionSpec | str, device: str | torch.device = "cpu") -> VisionEncoder:
    """Return the frozen vision encoder that `spec` describes; a name alone stands for its last layer, feature `auto`, in float32.

    A ViT's inner layers also pass the final norm. Raises UsageError (unknown id, model type, layer or feature; missing files or
    weights), OfflineError, DamagedError.
    """
    spec = VisionSpec(spec) if isinstance(spec, str) else spec
    model, model_type, missing = _open(spec)
    backbone = VISION_ADAPTERS[model_type](model)
    feature_width(1, spec.feature, backbone.has_cls)
    require_complete(spec.name, missing, backbone.unused)
    weights = hash_weights(model, backbone.unused)
    transform = load_transform(spec)
    size = output_size(spec.name, transform)
    if spec.image_size is not None and model_type == "timm_wrapper" and hasattr(model.timm_model, "set_input_size"):
        model.timm_model.set_input_size(img_size=size)
    if model_type == "timm_wrapper":
        require_agreement(spec.name, backbone, size)
    if backbone.cnn:
        backbone.to(memory_format=torch.channels_last)
    try:
        return VisionEncoder(backbone.to(device), transform, size, spec, weights)
    except FORWARD_ERRORS as error:
        if isinstance(error, KitError):
            raise
        raise UsageError(f"{spec.name} does not take images of {size[0]} x {size[1]} pixels ({first_line(error)})") from error


def _open(spec: VisionSpec) -> tuple[Any, str, set[str]]:
    """Return the model that AutoModel opens, of an image-text model its vision half; its model_type; and the weights that are missing."""
    known = f"known model types: {', '.join(sorted(VISION_ADAPTERS))}"
    with opened(spec, f"{VISION_FILES}; {known}") as (source, remote):
        config = AutoConfig.from_pretrained(source, **remote)
        if config.model_type not in VISION_ADAPTERS:
            raise UsageError(f"{spec.name}: model_type {config.model_type!r} has no vision adapter; {known}")
        needed = f"{VISION_FILES}; {known}"
        if config.model_type == "timm_wrapper":
            config.model_args, needed = _timm_arguments(config.model_args or {}), _timm_needed(config)
        arguments = {"config": config, "dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
        with load_errors_named(spec.name, needed):
            model, report = AutoModel.from_pretrained(source, **arguments, **remote)
    half = "vision_model." if config.model_type in DUAL_ENCODERS else ""
    missing = {key.removeprefix(half) for key in report["missing_keys"] if key.startswith(half)}
    return model.vision_model if half else model, config.model_type, missing


def _timm_arguments(saved: dict[str, Any]) -> dict[str, Any]:
    """Return what timm is given besides the architecture: no classes, which timm saves too and transformers sets itself."""
    return {key: value for key, value in saved.items() if key != "num_classes"}


def _timm_needed(config: Any) -> str:
    return (
        f"timm was told to build {config.architecture!r} with the model_args of config.json, {config.model_args}; they have to be what the "
        "model was made with: timm.models.save_for_hf(model, folder, model_args={...}, safe_serialization=True) writes both"
    )


def _layer_index(layer: int, first: int, count: int) -> int:
    index = layer if layer >= 0 else count + 1 + layer
    if not first <= index <= count:
        raise UsageError(f"layer={layer} is out of range; allowed: {first} to {count}, or {first - count - 1} to -1")
    return index


def _grid(patches: int, height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of `patches`, the pair of factors nearest to the image's aspect ratio."""
    factors = (n for n in range(1, patches + 1) if patches % n == 0)
    rows = min(factors, key=lambda n: abs(math.log(n * n / patches * width / height)))
    return rows, patches // rows
