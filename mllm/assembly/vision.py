"""The image half of a model to be made: a vision encoder, the alignment head that stage one trained for it, its image processor.

Legend: `F` width given to the head, `E` head width.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import nn

from align.common.errors import UsageError
from align.encoders.spec import VisionSpec
from align.encoders.transforms import Transform, pixel_normalizer
from align.encoders.vision import VisionEncoder, load_vision_encoder
from align.model.dual_encoder import SailModel
from align.model.heads import build_head, initialize
from align.model.saving import model_folder
from mllm.model.processing import SailLlavaImageProcessor

SailHead = Literal["trained", "random", "none"]


@dataclass
class AlignedEncoder:
    """A vision encoder with its alignment head (an Identity without one), and the fields of SailLlavaConfig that describe them."""

    encoder: VisionEncoder
    head: nn.Module
    head_weights: str  # where they are from
    fields: dict[str, Any]

    @property
    def source(self) -> str:
        """The encoder's id."""
        return str(self.encoder.fingerprint["encoder"])

    @property
    def width(self) -> int:
        """Width of what the projector is given: E, or F without a head."""
        return int(self.fields["sail_feature_width"] if self.fields["sail_head"] == "none" else self.fields["sail_width"])


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
    _, rows, columns = encoder.transform(Image.new("RGB", (64, 64))).shape
    with_cls = encoder.feature == "cls_mean"
    fields = {
        "sail_head": sail_head, "sail_head_kind": head, "sail_head_expansion": expansion, "sail_head_dropout": dropout,
        "sail_width": width, "sail_raw": raw, "sail_feature": "cls_patch" if with_cls else "patch",
        "sail_feature_width": encoder.width * (2 if with_cls else 1), "sail_layer": encoder.layer,
        "sail_image_size": [rows, columns], "sail_patch_grid": list(encoder.patch_grid),
        "sail_unread": unread_parameters(encoder, (rows, columns)), "sail_fingerprint": encoder.fingerprint,
    }  # fmt: skip
    return AlignedEncoder(encoder, module, weights, fields)


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


def image_processor_of(transform: Transform, size: list[int], aspect: Literal["pad", "resize"]) -> SailLlavaImageProcessor:
    """Return our processor with the mean, std, filter and scale of an encoder's own, for images of `size` [height, width]."""
    normalizer = pixel_normalizer(transform)
    return SailLlavaImageProcessor(
        {"height": size[0], "width": size[1]}, list(normalizer.mean), list(normalizer.std), int(normalizer.resample), 1 / 255,
        image_aspect_ratio=aspect,
    )  # fmt: skip
