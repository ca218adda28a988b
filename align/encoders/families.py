"""Families of vision models (add yours here): where the blocks and the final norm are, and how many tokens precede the patches.

`VISION_ADAPTERS` maps the exact `model_type` of a config to a function that wraps the model which AutoModel opens in a backbone.
A backbone returns the tokens of any of its layers after the final norm. Legend: `B` batch, `P` patches, `D` width.

Pixels of another size than the model was trained with give more or fewer patches: position embeddings are interpolated (bicubic, as
each library does it), rotary and sinusoidal ones are computed, CNNs have none. A backbone that cannot is `fixed` to its own size.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from align.common.errors import UsageError


class BlockBackbone(nn.Module):
    """A model that is a list of blocks (ViT) or stages (CNN) with a final norm.

    `blocks` and `norm` are module paths inside `model`. `prefix` tokens precede the patches: CLS first if `has_cls`, then
    registers. `unused` are parameter prefixes that no feature reads. `arguments(model, pixels)` are extra forward arguments.
    `fixed` models take images of one size only.
    Layer 0 is the input of the first block; a CNN starts at layer 1, and its norm fits its last stage only.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: str,
        norm: str | None,
        *,
        has_cls: bool = False,
        prefix: int = 0,
        cnn: bool = False,
        fixed: bool = False,
        unused: tuple[str, ...] = (),
        arguments: Callable[[Any, Tensor], dict[str, Any]] = lambda model, pixels: {},
    ) -> None:
        super().__init__()
        self.model = model
        self.blocks, self.norm = blocks, norm
        self.has_cls, self.prefix, self.cnn, self.fixed = has_cls, prefix, cnn, fixed
        self.unused, self.arguments = unused, arguments
        self.first, self.count = int(cnn), len(self._blocks())

    def _blocks(self) -> Any:
        return self.model.get_submodule(self.blocks)  # ModuleList or Sequential

    def truncate(self, layer: int) -> None:
        """Drop the blocks of a ViT after `layer`: they would be computed in vain. (The norm after a CNN needs its last stage.)"""
        if not self.cnn:
            self.model.set_submodule(self.blocks, self._blocks()[: max(layer, 1)])

    def forward(self, pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Return, per layer, the tokens after the final norm, prefix included: (B, prefix + P, D)."""
        outputs: dict[int, Tensor] = {}
        blocks = self._blocks()
        handles = [blocks[layer - 1].register_forward_hook(partial(_keep, outputs, layer)) for layer in set(layers) - {0}]
        if 0 in layers:
            handles.append(blocks[0].register_forward_pre_hook(partial(_keep, outputs, 0)))
        try:
            self.model(pixels, **self.arguments(self.model, pixels))
        finally:
            for handle in handles:
                handle.remove()
        return [self._tokens(outputs[layer], layer) for layer in layers]

    def _tokens(self, output: Tensor, layer: int) -> Tensor:
        tokens = output.flatten(2).transpose(1, 2) if self.cnn else output  # (B, D, h, w) -> (B, P, D)
        if self.norm is None or (self.cnn and layer < self.count):
            return tokens
        return self.model.get_submodule(self.norm)(tokens)


class PyramidBackbone(nn.Module):
    """A timm CNN, a pyramid like Swin, or a model of tokens without class token like MLP-Mixer.

    Layers 1..n are its stages' maps, layer n + 1 is what its `forward_features` gives: a map, channels first or last, or patches.
    """

    has_cls, prefix, cnn, first = False, 0, True, 1
    unused: tuple[str, ...] = ()

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        staged = hasattr(model.timm_model, "forward_intermediates") and hasattr(model.timm_model, "feature_info")
        self.count = len(model.timm_model.feature_info) + 1 if staged else 1
        self.fixed = hasattr(model.timm_model, "set_input_size")  # Swin: its windows are laid out for one size

    def truncate(self, layer: int) -> None:
        """Nothing to drop: inner stages are read with `stop_early`."""

    def forward(self, pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Return, per layer, the map as tokens: (B, P, D), D differing between layers."""
        timm_model, inner, last = self.model.timm_model, sorted(set(layers) - {self.count}), self.count in layers
        maps: dict[int, Tensor] = {}
        final: Any = None
        if inner:
            options: dict[str, Any] = {"indices": [k - 1 for k in inner], "output_fmt": "NCHW"}
            read = timm_model.forward_intermediates(pixels, **options, intermediates_only=not last, stop_early=not last)
            final, found = read if last else (None, read)
            maps = dict(zip(inner, found, strict=True))
        else:
            final = timm_model.forward_features(pixels)
        if last:
            maps[self.count] = self._channels_first(final)
        return [maps[layer].flatten(2).transpose(1, 2) for layer in layers]

    def _channels_first(self, final: Any) -> Tensor:
        """Return a map or tokens with the width as its second dimension: (B, D, h, w) or (B, D, P)."""
        if final.ndim == 3:
            return final.transpose(1, 2)
        return final if final.shape[1] == self.model.timm_model.num_features != final.shape[3] else final.permute(0, 3, 1, 2)


Backbone = BlockBackbone | PyramidBackbone


def _keep(outputs: dict[int, Tensor], layer: int, block: nn.Module, inputs: Any, output: Any = None) -> None:
    value = inputs if output is None else output  # before the block there is no output yet
    outputs[layer] = value[0] if isinstance(value, tuple) else value


def _interpolated(model: Any, pixels: Tensor) -> dict[str, Any]:
    return {"interpolate_pos_encoding": True}  # a no-op at the size that the model was trained with


def _unmasked(model: Any, pixels: Tensor) -> dict[str, Any]:
    """MAE drops and shuffles patches by sorting random noise; ascending noise and a mask ratio of 0 keep all, in order."""
    model.config.mask_ratio = 0.0
    height, width = model.embeddings.patch_embeddings.patch_size
    patches = (pixels.shape[2] // height) * (pixels.shape[3] // width)
    noise = torch.arange(patches, dtype=torch.float32, device=pixels.device).expand(len(pixels), -1)
    return {"noise": noise, "interpolate_pos_encoding": True}


def _vit(blocks: str, norm: str, has_cls: bool = True, registers: bool = False, **more: Any) -> Callable[[Any], Backbone]:
    def adapter(model: Any) -> Backbone:
        prefix = int(has_cls) + (model.config.num_register_tokens if registers else 0)
        return BlockBackbone(model, blocks, norm, has_cls=has_cls, prefix=prefix, **more)

    return adapter


def _timm(model: Any) -> Backbone:
    timm_model = model.timm_model
    if not hasattr(timm_model, "num_prefix_tokens"):
        return PyramidBackbone(model)
    if not hasattr(timm_model, "blocks") or not hasattr(timm_model, "norm"):
        raise UsageError(
            f"timm architecture {model.config.architecture!r} is neither a ViT (blocks, then norm) nor a CNN; "
            "choose another architecture, or one that transformers has itself"
        )
    has_cls = getattr(timm_model, "cls_token", None) is not None
    options: dict[str, Any] = {"has_cls": has_cls, "prefix": timm_model.num_prefix_tokens, "fixed": not _take_any_size(timm_model)}
    return BlockBackbone(model, "timm_model.blocks", "timm_model.norm", **options, arguments=lambda model, pixels: {"do_pooling": False})


def _take_any_size(timm_model: Any) -> bool:
    """Make a plain timm ViT as if it were created with `dynamic_img_size=True`; return whether it is one. Its own size gives the same."""
    # timm is there if a timm model is; an import statement would make every exported model need it
    layers, models = (importlib.import_module(name) for name in ("timm.layers", "timm.models.vision_transformer"))
    if not isinstance(timm_model, models.VisionTransformer) or type(embed := timm_model.patch_embed) is not layers.PatchEmbed:
        return False
    timm_model.dynamic_img_size = True
    embed.strict_img_size, embed.flatten, embed.output_fmt = False, False, layers.Format.NHWC
    return True


def _aimv2(model: Any) -> Backbone:
    """AIMv2 learns its position embeddings unless it is `native`, and transformers does not interpolate them."""
    return BlockBackbone(model, "encoder.layers", "rms_norm", fixed=not model.config.is_native, unused=("head.",))


# CLIP's last_hidden_state is before its post_layernorm; it is applied here to all tokens. SigLIP, AIMv2 and I-JEPA have no CLS.
# `siglip2` means the NaFlex models, whose pixels come as packed patches: not an image contract (fixed-size SigLIP 2 is `siglip`).
_CLIP = _vit("encoder.layers", "post_layernorm", arguments=_interpolated)
_SIGLIP = _vit("encoder.layers", "post_layernorm", has_cls=False, unused=("head.",), arguments=_interpolated)

VISION_ADAPTERS: dict[str, Callable[[Any], Backbone]] = {
    "dinov2": _vit("encoder.layer", "layernorm", unused=("embeddings.mask_token",)),
    "dinov2_with_registers": _vit("encoder.layer", "layernorm", registers=True, unused=("embeddings.mask_token",)),
    "dinov3_vit": _vit("model.layer", "norm", registers=True, unused=("embeddings.mask_token",)),
    "dinov3_convnext": partial(BlockBackbone, blocks="model.stages", norm="layer_norm", cnn=True),
    "vit": _vit("layers", "layernorm", unused=("pooler.",), arguments=_interpolated),
    "vit_mae": _vit("layers", "layernorm", arguments=_unmasked),
    "ijepa": _vit("layers", "layernorm", has_cls=False, unused=("pooler.",), arguments=_interpolated),
    "aimv2": _aimv2,
    "aimv2_vision_model": _aimv2,
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "convnextv2": partial(BlockBackbone, blocks="encoder.stages", norm="layernorm", cnn=True),
    "resnet": partial(BlockBackbone, blocks="encoder.stages", norm=None, cnn=True),
    "timm_wrapper": _timm,
}
DUAL_ENCODERS = ("aimv2", "clip", "siglip")  # the vision model is read out of the image-text model's folder
