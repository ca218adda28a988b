"""The interface of a measured model, and SailModel behind it: two frozen encoders and projections into one space.

Shapes: `B` images, `P` patches, `F` image feature width, `D` text feature width, `E` aligned width.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from align.encoders.loading import hash_weights
from align.model.dual_encoder import SailModel
from align.model.heads import ImageTokenHead, TextTokenHead
from align.model.token_heads import TextWithHead, VisionWithHead


class DualEncoder(Protocol):
    """Two frozen encoders and the projections of their features into one space. Embeddings (..., E) are L2-normalized float32."""

    @property
    def vision_fingerprint(self) -> dict[str, Any]: ...  # what decides an image feature
    @property
    def text_fingerprint(self) -> dict[str, Any]: ...  # what decides a text feature
    @property
    def patch_fingerprint(self) -> dict[str, Any]: ...  # what decides `encode_patches`; equal ones share a forward pass
    @property
    def vision_encoder(self) -> Any: ...  # for `Extraction`, on `device`: pixels of its `transform` -> (B, F) float32, not normalized
    @property
    def text_encoder(self) -> Any: ...  # on `device`; `encode(texts, batch_size)` -> (T, D) float32, not normalized, in order
    @property
    def device(self) -> torch.device: ...  # where features are projected
    @property
    def scale(self) -> float: ...  # t of the model's logits t <x, y>
    @property
    def patch_size(self) -> int: ...  # side of a patch of `encode_patches`, in pixels

    def project_image(self, features: Tensor) -> Tensor: ...  # (..., F) -> (..., E)
    def project_text(self, features: Tensor) -> Tensor: ...  # (..., D) -> (..., E)
    def encode_patches(self, pixels: Tensor) -> Tensor: ...  # (B, 3, H, W) -> what `project_patches` takes
    def project_patches(self, features: Tensor) -> Tensor: ...  # -> (B, P, E), row by row over the grid of patches


@dataclass(frozen=True)
class SailDualEncoder(DualEncoder):
    """A SailModel as a DualEncoder. Token heads count as part of the encoder. FingerprintError if an encoder differs from training."""

    sail: SailModel

    @property
    def vision_fingerprint(self) -> dict[str, Any]:
        return _with_head(self.sail.config.vision_fingerprint, self.sail.vision_head)

    @property
    def text_fingerprint(self) -> dict[str, Any]:
        return _with_head(self.sail.config.text_fingerprint, self.sail.text_head)

    @property
    def patch_fingerprint(self) -> dict[str, Any]:
        return self.sail.config.vision_fingerprint

    @property
    def vision_encoder(self) -> Any:
        encoder, head = self.sail.vision_encoder, self.sail.vision_head
        return VisionWithHead(encoder, head, self.vision_fingerprint) if isinstance(head, ImageTokenHead) else encoder

    @property
    def text_encoder(self) -> Any:
        encoder, head = self.sail.text_encoder, self.sail.text_head
        return TextWithHead(encoder, head, self.text_fingerprint) if isinstance(head, TextTokenHead) else encoder

    @property
    def device(self) -> torch.device:
        return self.sail.device

    @property
    def scale(self) -> float:
        return self.sail.logit_scale.detach().exp().item()

    @property
    def patch_size(self) -> int:
        return int(self.sail.vision_encoder.patch_size)

    @torch.no_grad()
    def project_image(self, features: Tensor) -> Tensor:
        projected = isinstance(self.sail.vision_head, ImageTokenHead)
        return functional.normalize(features.float(), dim=-1) if projected else self.sail.project_image(features)

    @torch.no_grad()
    def project_text(self, features: Tensor) -> Tensor:
        projected = isinstance(self.sail.text_head, TextTokenHead)
        return functional.normalize(features.float(), dim=-1) if projected else self.sail.project_text(features)

    @torch.no_grad()
    def encode_patches(self, pixels: Tensor) -> Tensor:
        """Return the frozen encoder's patches: [cls ; patch], the patch alone, or (for token heads) token rows."""
        return self.sail.vision_encoder.dense(pixels)

    @torch.no_grad()
    def project_patches(self, features: Tensor) -> Tensor:
        return self.sail.project_patches(features)


def _with_head(fingerprint: dict[str, Any], head: nn.Module) -> dict[str, Any]:
    token_head = isinstance(head, (ImageTokenHead, TextTokenHead))
    return {**fingerprint, "head": hash_weights(head, ())} if token_head else fingerprint
