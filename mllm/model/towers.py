"""Vision towers of a SailLlava, each an encoder with its alignment head, and the projector.

    pixels -> encoder (layer `sail_layer`, final norm) -> [cls ; p_i] -> head -> `sail_grid` -> projector

Legend: `B` images, `P` patches, `N` visual tokens an image, `D` encoder width, `F` width given to the head, `E` head width,
`H` LLM width. This file is copied into every saved model, so it imports only what the copy has.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoConfig, AutoModel
from transformers.activations import ACT2FN

from align.encoders.families import VISION_ADAPTERS, Backbone
from align.model.heads import build_head


class Tower:
    """An encoder and its head as `place` holds them in `vision_tower` and `sail_head`, and the `fields` of SailLlavaConfig about them.

    `place` is the model itself for its first tower, and an entry of its `beside` for another. A Tower is made anew at each use, so that
    peft can wrap what it reads.
    """

    def __init__(self, place: Any, fields: Any) -> None:
        self.place, self.fields = place, fields

    def build(self) -> None:
        """Give `place` an encoder and a head of the shapes that the fields describe."""
        fields = self.fields
        known = AutoConfig.for_model(**fields.vision_config) if isinstance(fields.vision_config, dict) else fields.vision_config
        self.place.vision_tower = AutoModel.from_config(known, trust_remote_code=False)
        self.backbone.truncate(fields.sail_layer)
        self.place.sail_head = nn.Identity()
        if fields.sail_head != "none":
            options = {"expansion": fields.sail_head_expansion, "dropout": fields.sail_head_dropout}
            self.place.sail_head = build_head(fields.sail_head_kind, fields.sail_feature_width, fields.sail_width, **options)

    @property
    def backbone(self) -> Backbone:
        """The encoder as a reader of layers."""
        encoder = self.place.vision_tower
        backbone = VISION_ADAPTERS[encoder.config.model_type](encoder)
        if not self.fields.sail_norm:
            backbone.norm = None
        return backbone

    def freeze_unread(self) -> None:
        """Freeze the encoder's parameters that are never trained: DDP would wait for gradients that never come."""
        for name in self.fields.sail_unread or ():
            self.place.vision_tower.get_parameter(name).requires_grad_(False)

    def hold_still(self) -> None:
        """Put a frozen encoder into eval mode, and all BatchNorms of a trained one."""
        encoder = self.place.vision_tower
        if not any(parameter.requires_grad for parameter in encoder.parameters()):
            encoder.eval()
        for module in encoder.modules():
            if isinstance(module, _BatchNorm):
                module.eval()

    def features(self, pixels: Tensor) -> Tensor:
        """Return (B, N, E) for pixels (B, 3, H, W): the head's output for each patch, not normalized; without a head, E is F.

        With `sail_raw` it is (B, N, E + F): the raw patch follows.
        """
        fields, backbone, head = self.fields, self.backbone, self.place.sail_head
        pixels = pixels.to(_dtype(self.place.vision_tower, pixels.dtype))
        if backbone.cnn:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        [tokens] = backbone(pixels, [fields.sail_layer])  # (B, prefix + P, D)
        features = tokens[:, backbone.prefix :]  # (B, P, D)
        if fields.sail_feature == "cls_patch":
            features = torch.cat([tokens[:, :1].expand_as(features), features], dim=-1)  # (B, P, F)
        aligned = head(features.to(_dtype(head, features.dtype)))  # (B, P, E)
        features = torch.cat([aligned, features.to(aligned.dtype)], dim=-1) if fields.sail_raw else aligned
        if fields.sail_grid is not None and fields.sail_grid != fields.sail_patch_grid:
            maps = features.transpose(1, 2).unflatten(2, fields.sail_patch_grid)  # (B, E, rows, columns)
            features = functional.adaptive_avg_pool2d(maps, (fields.sail_grid[0], fields.sail_grid[1])).flatten(2).transpose(1, 2)
        return features


def block_widths(fields: Any) -> list[int]:
    """Return the widths of a tower's blocks of features: [E], or [F] without a head; with `sail_raw` [E, F]."""
    first = fields.sail_feature_width if fields.sail_head == "none" else fields.sail_width
    return [first, fields.sail_feature_width] if fields.sail_raw else [first]


def token_grid(fields: Any) -> tuple[int, int]:
    """Return (rows, columns) of a tower's visual tokens."""
    rows, columns = fields.sail_grid or fields.sail_patch_grid
    return rows, columns


class SailProjector(nn.Module):
    """LLaVA-1.5's projector (arXiv 2310.03744), on the head's width: `Linear(H, H)(GELU(Linear(E, H)(x)))`.

    With `words` V, the hidden units are V words that compete: `Linear(V, H)(softmax(Linear(E, V)(n(x))))`. Solved in closed form
    (mllm/assembly/warmstart.py), the second layer holds the words' input embeddings, so a visual token is a mixture of words that the
    LLM can read. AlignVLM (arXiv 2502.01341) learns such mixtures. n is a LayerNorm without weights.

    Further blocks, such as the raw patch r, lie beside x: the first layer is `Linear(E, .)(n(x)) + Linear(F, .)(n(r))`, so that no block
    drowns the others and those after the first can have a learning rate of their own.

    With `positions` N each of an image's N tokens gets a vector of its own added, which says where in the image it is.
    """

    def __init__(
        self, widths: Sequence[int], out_width: int, activation: str, bias: bool, words: int | None = None, positions: int = 0
    ) -> None:
        super().__init__()
        self.widths, self.words = list(widths), words
        hidden = words or out_width
        self.linear_1 = nn.Linear(self.widths[0], hidden, bias=bias)
        if len(self.widths) > 1:
            self.linear_raw = nn.Linear(sum(self.widths[1:]), hidden, bias=False)  # one matrix for all further blocks
        self.act = nn.Softmax(dim=-1) if words else ACT2FN[activation]
        self.linear_2 = nn.Linear(hidden, out_width, bias=bias)
        self.positions = nn.Parameter(torch.zeros(positions, out_width)) if positions else None

    def blocks(self, features: Tensor) -> list[Tensor]:
        """Return what the first layers are given of features (..., sum of widths): a tensor (..., width) for each block."""
        return [self.normed(block) for block in features.to(self.linear_1.weight.dtype).split(self.widths, dim=-1)]

    def normed(self, block: Tensor) -> Tensor:
        """Return one block (..., width) as a first layer is given it: normalized before words, or if there is another beside it."""
        return functional.layer_norm(block, block.shape[-1:]) if self.words or len(self.widths) > 1 else block

    def scores(self, features: Tensor) -> Tensor:
        """Return what the activation is given for features (..., sum of widths): (..., H), or (..., V) logits of words."""
        first, *further = self.blocks(features)
        return self.linear_1(first) + self.linear_raw(torch.cat(further, dim=-1)) if further else self.linear_1(first)

    def forward(self, features: Tensor) -> Tensor:
        """Return (..., N, H) for features (..., N, sum of widths)."""
        tokens = self.linear_2(self.act(self.scores(features)))
        return tokens if self.positions is None else tokens + self.positions


def _dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """Return the dtype of the module's parameters, or `default` if it has none."""
    return next((parameter.dtype for parameter in module.parameters()), default)
