"""A frozen encoder with its trained token head after it: one encoder to whoever keeps features, as evaluation does.

A token head needs every token, so what can be kept of an image or text is the head's output: E numbers instead of all tokens.
The fingerprint holds the head's weights, so that no model reads another's features.
Shapes: `B` images, `T` texts, `E` aligned width.
"""

from typing import Any

import torch
from torch import Tensor

from align.encoders.text import TextEncoder
from align.encoders.vision import VisionEncoder
from align.model.heads import ImageTokenHead, TextTokenHead


class VisionWithHead:
    """Gives a token head's output (B, E), not normalized, for pixels (B, 3, H, W), without gradient."""

    def __init__(self, encoder: VisionEncoder, head: ImageTokenHead, fingerprint: dict[str, Any]) -> None:
        self.encoder, self.head, self.fingerprint = encoder, head, fingerprint
        self.transform, self.feature_width = encoder.transform, head.width
        self.spec = None  # the encoder alone does not give these features

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        return self.head(self.encoder(pixels))


class TextWithHead:
    """Gives a token head's output (T, E), not normalized, for texts, without gradient."""

    def __init__(self, encoder: TextEncoder, head: TextTokenHead, fingerprint: dict[str, Any]) -> None:
        self.encoder, self.head, self.fingerprint, self.width = encoder, head, fingerprint, head.width

    @torch.no_grad()
    def encode(self, texts: list[str], batch_size: int) -> Tensor:
        """Return features (T, E), float32 on the CPU, in the order of `texts`."""
        device = next(self.head.parameters()).device
        parts = [torch.empty(0, self.width)]
        for start in range(0, len(texts), batch_size):
            parts.append(self.head(self.encoder.encode(texts[start : start + batch_size], batch_size).to(device)).cpu())
        return torch.cat(parts)
