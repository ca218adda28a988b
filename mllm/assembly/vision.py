"""The image half of a model to be made: a vision encoder, the alignment head that stage one trained for it, its image processor.

Legend: `F` width given to the head, `E` head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import nn

from align.common.errors import UsageError
from align.encoders.families import VISION_ADAPTERS
from align.encoders.loading import hash_weights
from align.encoders.spec import VisionSpec
from align.encoders.transforms import Transform, output_size, pixel_normalizer
from align.encoders.vision import VisionEncoder, load_vision_encoder
from align.model.dual_encoder import SailModel
from align.model.heads import build_head, initialize
from align.model.saving import model_folder
from mllm.assembly.language import Language
from mllm.model.modeling import TowerFields
from mllm.model.processing import SailLlavaImageProcessor
from mllm.model.towers import SailProjector, block_widths

SailHead = Literal["trained", "random", "none"]


@dataclass
class AlignedEncoder:
    """A vision encoder with its alignment head (an Identity without one), and the fields of SailLlavaConfig that describe them."""

    encoder: VisionEncoder
    head: nn.Module
    head_weights: str  # where they are from
    fields: dict[str, Any]
    kept_projector: SailProjector | None = None  # of a tower that a LLaVA keeps

    @property
    def source(self) -> str:
        """The encoder's id."""
        return str(self.encoder.fingerprint["encoder"])

    @property
    def widths(self) -> list[int]:
        """Widths of what the projector is given: [E], or [F] without a head; with raw patches beside the head's output [E, F]."""
        return block_widths(TowerFields(self.fields))


def load_aligned_encoder(
    *,
    sail: str | None = None,
    vision: str | None = None,
    sail_head: SailHead = "trained",
    head: str = "glu",
    expansion: int | None = None,
    width: int = 1024,
    layer: int = -1,
    image_size: int | None = None,
    raw: bool = False,
    seed: int = 0,
) -> AlignedEncoder:
    """Return the encoder of the stage-one run `sail` with its head, a random or no head, or the encoder `vision` with one of the latter.

    `head`, `expansion`, `width` and `layer` describe what a run would: they count with `vision` only. With `raw` the projector is given
    the raw patch beside the head's output. Raises UsageError (unknown
    names, token heads), FingerprintError if the encoder is not the one that the head was trained on, OfflineError, DamagedError.
    """
    dropout, trained = None, None
    if sail is not None:
        stage_one = SailModel.from_pretrained(model_folder(Path(sail).expanduser()))
        settings, trained = stage_one.config, stage_one.vision_head
        if settings.head == "token":
            raise UsageError(f"{sail} has token heads, which make one vector of an image; an MLLM needs one for each patch (glu, mlp)")
        encoder = stage_one.vision_encoder
        if image_size is not None:
            encoder = load_vision_encoder(replace(stage_one.encoder_spec("vision"), image_size=image_size, precision="fp32"))
        head, expansion, dropout, width = settings.head, settings.expansion, settings.dropout, settings.width
        if head == "sharelock":  # its options are those of the text side
            head, expansion, dropout = "identity", None, None
    else:
        assert vision is not None
        encoder = load_vision_encoder(VisionSpec(vision, layer=layer, image_size=image_size))
    module: nn.Module = nn.Identity()
    weights = ""
    if sail_head == "trained":
        assert trained is not None
        module, weights = trained, f"trained in {sail}"
    elif sail_head == "random":
        module, weights = build_head(head, encoder.feature_width, width, expansion=expansion, dropout=dropout), f"random, seed {seed}"  # type: ignore[arg-type]
        initialize(module, torch.Generator().manual_seed(seed))
    fields = {
        "sail_head": sail_head, "sail_head_kind": head, "sail_head_expansion": expansion, "sail_head_dropout": dropout,
        "sail_width": width, "sail_raw": raw and sail_head != "none",
    }  # fmt: skip
    return AlignedEncoder(encoder, module, weights, fields | _encoder_fields(encoder))


def kept_tower(language: Language) -> AlignedEncoder:
    """Return the vision tower of a LLaVA and its projector, to be kept: patches of the LLaVA's own layer, before the final norm.

    The modules are the LLaVA's, in their dtype; blocks after that layer are dropped. UsageError if it reads its tower in another way.
    """
    config, model = language.whole.config, language.whole.model.vision_tower
    name, dtype = f"{language.source}'s own tower", model.dtype
    if model.config.model_type not in VISION_ADAPTERS or not isinstance(config.vision_feature_layer, int):
        raise UsageError(
            f"{name} ({model.config.model_type}, layer {config.vision_feature_layer}) cannot be kept; it must be one layer of "
            f"{', '.join(sorted(VISION_ADAPTERS))}: leave --keep-tower out"
        )
    backbone: Any = VISION_ADAPTERS[model.config.model_type](model.float())  # changes no bit, and is undone below
    if backbone.cnn or backbone.prefix != (config.vision_feature_select_strategy == "default"):
        raise UsageError(f"{name} has visual tokens that are no patches (CLS, registers); it cannot be kept: leave --keep-tower out")
    backbone.norm = None
    transform = Transform(language.image_processor)
    spec = VisionSpec(name, layer=config.vision_feature_layer, feature="mean")
    encoder = VisionEncoder(backbone, transform, output_size(name, transform), spec, hash_weights(model, backbone.unused))
    fields = {"sail_head": "none", "sail_raw": False, "sail_norm": False, **_encoder_fields(encoder)}
    projector = SailProjector([encoder.width], config.text_config.hidden_size, "gelu", bias=True).to(dtype)
    theirs = language.whole.model.multi_modal_projector.state_dict()
    if config.projector_hidden_act != "gelu" or theirs.keys() != projector.state_dict().keys():
        raise UsageError(f"{language.source} has a projector of another kind than LLaVA-1.5's; it cannot be kept: leave --keep-tower out")
    projector.load_state_dict(theirs)
    model.to(dtype)
    return AlignedEncoder(encoder, nn.Identity(), "", fields, projector)


def _encoder_fields(encoder: VisionEncoder) -> dict[str, Any]:
    """Return the fields of SailLlavaConfig about an encoder without its head."""
    _, rows, columns = encoder.transform(Image.new("RGB", (64, 64))).shape
    with_cls = encoder.feature == "cls_mean"
    return {
        "sail_feature": "cls_patch" if with_cls else "patch", "sail_feature_width": encoder.width * (2 if with_cls else 1),
        "sail_layer": encoder.layer, "sail_image_size": [rows, columns], "sail_patch_grid": list(encoder.patch_grid),
        "sail_unread": unread_parameters(encoder, (rows, columns)), "sail_fingerprint": encoder.fingerprint,
    }  # fmt: skip


@torch.enable_grad()
def unread_parameters(encoder: VisionEncoder, size: tuple[int, int]) -> list[str]:
    """Return the names of the encoder's parameters that no feature depends on, found by asking for their gradient."""
    model = encoder.backbone.model
    model.requires_grad_(True)
    named = dict(model.named_parameters())
    [tokens] = encoder.backbone(torch.zeros(1, 3, *size), [encoder.layer])
    read = tokens[:, encoder.backbone.prefix :].sum() + (tokens[:, 0].sum() if encoder.feature == "cls_mean" else 0)
    gradients = torch.autograd.grad(read, list(named.values()), allow_unused=True)
    return [name for name, gradient in zip(named, gradients, strict=True) if gradient is None]


def image_processor_of(
    transform: Transform, size: list[int], aspect: Literal["pad", "resize"], beside: Sequence[SailLlavaImageProcessor] = ()
) -> SailLlavaImageProcessor:
    """Return our processor with the mean, std, filter and scale of an encoder's own, for images of `size` [height, width].

    It also makes the pixels of the processors `beside`, which are those of further encoders.
    """
    normalizer = pixel_normalizer(transform)
    names = ("size", "image_mean", "image_std", "resample", "rescale_factor")
    return SailLlavaImageProcessor(
        {"height": size[0], "width": size[1]}, list(normalizer.mean), list(normalizer.std), int(normalizer.resample), 1 / 255,
        image_aspect_ratio=aspect, beside=[{name: getattr(other, name) for name in names} for other in beside],
    )  # fmt: skip
