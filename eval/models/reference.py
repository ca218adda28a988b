"""CLIP-like dual encoders, to compare with: what the models of open_clip and transformers share.

A feature is the projected embedding before L2 normalization. Each model has its own image processing, tokenizer and context length.
The bias of SigLIP's logits changes no rank and is not read. Dense embeddings are the last layer's patch tokens after the final norm
and the visual projection: plain MaskCLIP (Zhou et al., "Extract Free Dense Labels from CLIP", ECCV 2022), its last block unchanged.

Legend: `B` images, `P` patches, `T` texts, `E` embedding width.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from align.common.files import hash_bytes


class ReferenceModel(nn.Module, ABC):
    """An image-text model as a DualEncoder: always in eval mode, frozen, float32. `transform` gives pixels (3, H, W); `width` is E."""

    def __init__(self, model: nn.Module, transform: Callable[..., Tensor], description: str) -> None:
        super().__init__()
        self.model: Any = model
        self.transform, self.description = transform, description
        self.vision_fingerprint: dict[str, Any] = {}
        self.text_fingerprint: dict[str, Any] = {}
        self.requires_grad_(False).eval()
        self.width = self.sentences(["a"]).shape[-1]

    def train(self, mode: bool = True) -> "ReferenceModel":
        """Return self in eval mode: a frozen model has no training mode."""
        return super().train(False)

    @abstractmethod
    def images(self, pixels: Tensor) -> Tensor:
        """Return projected embeddings (B, E), not normalized, of pixels (B, 3, H, W) on `device`."""

    @abstractmethod
    def patches(self, pixels: Tensor) -> Tensor:
        """Return projected patch tokens (B, P, E), not normalized, of pixels (B, 3, H, W) on `device`."""

    @abstractmethod
    def sentences(self, texts: list[str]) -> Tensor:
        """Return projected embeddings (T, E), not normalized; texts are cut to the context length."""

    @property
    @abstractmethod
    def patch_size(self) -> int: ...

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def scale(self) -> float:
        return self.model.logit_scale.detach().exp().item()

    @property
    def vision_encoder(self) -> "Images":
        return Images(self)

    @property
    def text_encoder(self) -> "Sentences":
        return Sentences(self)

    def project_image(self, features: Tensor) -> Tensor:
        """Return the features (..., E) divided by their L2 norm, float32."""
        return functional.normalize(features.float(), dim=-1)

    project_text = project_patches = project_image

    @property
    def patch_fingerprint(self) -> dict[str, Any]:
        return self.vision_fingerprint

    @torch.inference_mode()
    def encode_patches(self, pixels: Tensor) -> Tensor:
        """Return projected patches (B, P, E), not normalized. H and W may be any multiples of the patch size."""
        return self.patches(pixels.to(self.device))


class Images:
    """The image side of a reference model, for `align.features.extract.Extraction`."""

    spec = None  # the kit's encoder loader cannot open it again

    def __init__(self, model: ReferenceModel) -> None:
        self.model, self.transform, self.feature_width, self.fingerprint = model, model.transform, model.width, model.vision_fingerprint

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        return self.model.images(pixels.to(self.model.device, non_blocking=True)).float()


class Sentences:
    """The text side of a reference model."""

    def __init__(self, model: ReferenceModel) -> None:
        self.model, self.fingerprint = model, model.text_fingerprint

    @torch.inference_mode()
    def encode(self, texts: list[str], batch_size: int) -> Tensor:
        """Return embeddings (T, E) float32 on the CPU, not normalized, in the order of `texts`."""
        if not texts:
            return torch.empty(0, self.model.width)
        return torch.cat([self.model.sentences(texts[at : at + batch_size]).float().cpu() for at in range(0, len(texts), batch_size)])


def fingerprint_of(name: str, architecture: dict[str, Any], weights: str, preprocessing: str) -> dict[str, Any]:
    """Return the fingerprint of one side. It covers the architecture: the same weights with another activation are another model."""
    kept = {key: value for key, value in architecture.items() if key not in ("_name_or_path", "transformers_version", "dtype")}
    digest = hash_bytes(json.dumps(kept, sort_keys=True, default=str).encode())
    side = {"encoder": name, "feature": "projected", "architecture": digest, "precision": "fp32"}
    return side | {"weights": weights, "preprocessing": preprocessing}
