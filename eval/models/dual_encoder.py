"""What a model must be to be measured, and SailModel seen so: two frozen encoders and what maps their features into one space.

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
    """Two frozen encoders and what maps their features into one space. Features are kept; aligning them is cheap.

    The encoders are asked for only when features are not known yet. `scale` is the t of the logits t <x, y>.
    """

    @property
    def vision_fingerprint(self) -> dict[str, Any]:
        """What decides an image feature."""

    @property
    def text_fingerprint(self) -> dict[str, Any]:
        """What decides a text feature."""

    @property
    def vision_encoder(self) -> Any:
        """The encoder of images, on `device`, as `align.features.extract.Extraction` takes it: pixels (B, 3, H, W) of its `transform`
        give features (B, F) float32, not normalized, which its `fingerprint` decides; `feature_width` is F."""

    @property
    def text_encoder(self) -> Any:
        """The encoder of texts, on `device`: `encode(texts, batch_size)` gives features (T, D) float32, not normalized, in their order."""

    @property
    def device(self) -> torch.device:
        """Where features are aligned."""

    @property
    def scale(self) -> float:
        """t of the model's logits."""

    @property
    def patch_size(self) -> int:
        """Pixels a side of a patch of `encode_patches`."""

    @property
    def patch_fingerprint(self) -> dict[str, Any]:
        """What decides `encode_patches`: models that agree in it share one forward pass."""

    def project_image(self, features: Tensor) -> Tensor:
        """Return (..., E) L2-normalized float32 embeddings of image features (..., F)."""

    def project_text(self, features: Tensor) -> Tensor:
        """Return (..., E) L2-normalized float32 embeddings of text features (..., D)."""

    def encode_patches(self, pixels: Tensor) -> Tensor:
        """Return what `project_patches` takes, for pixels (B, 3, H, W)."""

    def project_patches(self, features: Tensor) -> Tensor:
        """Return (B, P, E) L2-normalized float32 patch embeddings, row by row over the grid of patches."""


@dataclass(frozen=True)
class SailDualEncoder(DualEncoder):
    """A SailModel as a DualEncoder; its encoders are loaded, and checked, when they are first asked for.

    A token head belongs to the encoder: its output is the feature, and its weights are part of the fingerprint.
    """

    sail: SailModel

    @property
    def vision_fingerprint(self) -> dict[str, Any]:
        return _with_head(self.sail.config.vision_fingerprint, self.sail.vision_head)

    @property
    def text_fingerprint(self) -> dict[str, Any]:
        return _with_head(self.sail.config.text_fingerprint, self.sail.text_head)

    @property
    def vision_encoder(self) -> Any:
        """The frozen vision encoder, with a token head after it if there is one; FingerprintError if it is another one."""
        encoder, head = self.sail.vision_encoder, self.sail.vision_head
        return VisionWithHead(encoder, head, self.vision_fingerprint) if isinstance(head, ImageTokenHead) else encoder

    @property
    def text_encoder(self) -> Any:
        """The frozen text encoder, with a token head after it if there is one; FingerprintError if it is another one."""
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
        if isinstance(self.sail.vision_head, ImageTokenHead):
            return functional.normalize(features.float(), dim=-1)
        return self.sail.project_image(features)

    @torch.no_grad()
    def project_text(self, features: Tensor) -> Tensor:
        if isinstance(self.sail.text_head, TextTokenHead):
            return functional.normalize(features.float(), dim=-1)
        return self.sail.project_text(features)

    @property
    def patch_fingerprint(self) -> dict[str, Any]:
        return self.sail.config.vision_fingerprint

    @torch.no_grad()
    def encode_patches(self, pixels: Tensor) -> Tensor:
        """Return each patch as [cls ; patch], or as the patch alone (of token heads: token rows), as the frozen encoder gives it."""
        return self.sail.vision_encoder.dense(pixels)

    @torch.no_grad()
    def project_patches(self, features: Tensor) -> Tensor:
        return self.sail.project_patches(features)


def _with_head(fingerprint: dict[str, Any], head: nn.Module) -> dict[str, Any]:
    token_head = isinstance(head, (ImageTokenHead, TextTokenHead))
    return {**fingerprint, "head": hash_weights(head, ())} if token_head else fingerprint
