"""A frozen encoder with its trained token head after it: one encoder to whoever keeps features, as evaluation does.

A token head needs every token, so no pooled feature stands between encoder and head, and what can be kept of an image or text is the
head's output (E numbers instead of all tokens). The fingerprint holds the head's weights, so that no model reads another's features.
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
        self.id, self.transform, self.precision = encoder.id, encoder.transform, encoder.precision
        self.spec = None  # the encoder alone does not give these features
        self.image_size, self.patch_grid, self.patch_size = encoder.image_size, encoder.patch_grid, encoder.patch_size
        self.feature_width = head.width

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        return self.head(self.encoder(pixels))


class TextWithHead:
    """Gives a token head's output (T, E), not normalized, for texts, without gradient."""

    def __init__(self, encoder: TextEncoder, head: TextTokenHead, fingerprint: dict[str, Any]) -> None:
        self.encoder, self.head, self.fingerprint = encoder, head, fingerprint
        self.id, self.tokenizer, self.max_length = encoder.id, encoder.tokenizer, encoder.max_length
        self.width = head.width

    @torch.no_grad()
    def encode(self, texts: list[str], batch_size: int) -> Tensor:
        """Return features (T, E), float32 on the CPU, in the order of `texts`."""
        device = next(self.head.parameters()).device
        parts = [torch.empty(0, self.width)]
        for start in range(0, len(texts), batch_size):
            parts.append(self.head(self.encoder.encode(texts[start : start + batch_size], batch_size).to(device)).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return features (T, E) of token ids (T, length) that `tokenizer` made."""
        return self.head(self.encoder(input_ids, attention_mask))
