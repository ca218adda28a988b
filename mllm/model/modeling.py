"""The multimodal LLM as a Hugging Face model: a LLaVA whose patches pass SAIL's alignment head before the projector.

SAIL in an MLLM (arXiv 2412.04616), on LLaVA-1.5 (arXiv 2310.03744):

    pixels -> vision tower (layer `sail_layer`, final norm) -> [cls ; p_i] -> head -> projector -> in the place of <image> tokens

Legend: `B` images, `P` patches, `N` visual tokens an image, `D` encoder width, `F` width given to the head, `E` head width, `H` LLM
width, `T` text tokens. This file is copied into every saved model, so it imports only what the copy has.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration, LlavaModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from align.common.errors import UsageError
from align.encoders.families import VISION_ADAPTERS, Backbone
from align.model.heads import build_head
from align.model.strict_loading import StrictModel

HEAD_STATES = ("none", "random", "trained")
FEATURES = ("cls_patch", "patch")


class SailLlavaConfig(LlavaConfig):
    """Config of a SailLlava: `vision_config` is the plain encoder's, `text_config` the LLM's, `sail_*` describes what is between them.

    `sail_layer` counts as in `align.encoders.vision` (0 = embeddings); later blocks are not built. `sail_unread` names the vision
    parameters that are never trained: no feature depends on them (DINOv2's mask token), or their own class keeps them fixed.
    """

    model_type = "sail_llava"

    vision_config: Any = None
    text_config: Any = None
    sail_head: str = "none"  # none | random | trained
    sail_head_kind: str = "glu"
    sail_head_expansion: int | None = None
    sail_head_dropout: float | None = None
    sail_raw: bool = False  # the projector is given the raw patch beside the head's output
    sail_width: int = 1024  # E
    sail_feature: str = "patch"  # cls_patch | patch
    sail_feature_width: int = 1024  # F
    sail_layer: int = 0
    sail_image_size: list[int] | None = None  # [height, width] in pixels
    sail_patch_grid: list[int] | None = None  # [rows, columns] of the encoder
    sail_grid: list[int] | None = None  # [rows, columns] of the visual tokens; None: sail_patch_grid
    sail_unread: list[str] | None = None
    sail_fingerprint: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for field, allowed in (("sail_head", HEAD_STATES), ("sail_feature", FEATURES)):
            if getattr(self, field) not in allowed:
                raise UsageError(f"{field} is {getattr(self, field)!r}; allowed: {', '.join(allowed)}")
        if self.sail_raw and self.sail_head == "none":
            raise UsageError("sail_raw is True without a head: the raw patch is all that the projector is given, set sail_raw to False")
        if self.sail_patch_grid is not None:
            self.image_seq_length = self.image_tokens()

    def image_tokens(self) -> int:
        """Return N, the number of visual tokens per image."""
        grid = self.sail_grid or self.sail_patch_grid
        if grid is None:
            raise UsageError("this config has no sail_patch_grid; make a model with mllm/upgrade.py")
        return grid[0] * grid[1]


class SailProjector(nn.Module):
    """Returns `Linear(H, H)(GELU(Linear(E, H)(x)))`: LLaVA-1.5's projector (arXiv 2310.03744), on the head's width.

    With `raw_width` F the raw patch r lies beside x: `Linear(H, H)(GELU(Linear(E, H)(n(x)) + Linear(F, H)(n(r))))`, n a LayerNorm
    without weights, so that neither block drowns the other and each can have its own learning rate.
    """

    def __init__(self, in_width: int, out_width: int, activation: str, bias: bool, raw_width: int = 0) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_width, out_width, bias=bias)
        if raw_width:
            self.linear_raw = nn.Linear(raw_width, out_width, bias=False)
        self.act = ACT2FN[activation]
        self.linear_2 = nn.Linear(out_width, out_width, bias=bias)
        self.widths = [in_width, raw_width] if raw_width else [in_width]

    def blocks(self, features: Tensor) -> list[Tensor]:
        """Return what the first layers are given of features (..., E) or (..., E + F): (..., E), and (..., F) if there is a raw block."""
        return [self.normed(block) for block in features.to(self.linear_1.weight.dtype).split(self.widths, dim=-1)]

    def normed(self, block: Tensor) -> Tensor:
        """Return one block (..., width) as a first layer is given it: normalized if there is another beside it."""
        return functional.layer_norm(block, block.shape[-1:]) if len(self.widths) > 1 else block

    def forward(self, features: Tensor) -> Tensor:
        """Return (..., H) for features (..., E), with a raw block (..., E + F)."""
        first, *raw = self.blocks(features)
        hidden = self.linear_1(first) + self.linear_raw(raw[0]) if raw else self.linear_1(first)
        return self.linear_2(self.act(hidden))


class SailLlavaModel(LlavaModel):
    """Vision tower, alignment head, projector and language model, without the language modeling head."""

    config: SailLlavaConfig

    def __init__(self, config: SailLlavaConfig) -> None:
        super(LlavaModel, self).__init__(config)  # LlavaModel's own would build a projector for the bare encoder
        self.vision_tower = AutoModel.from_config(config.vision_config, trust_remote_code=False)
        self.backbone.truncate(config.sail_layer)
        width = config.sail_feature_width
        if config.sail_head == "none":
            self.sail_head: nn.Module = nn.Identity()
        else:
            options = {"expansion": config.sail_head_expansion, "dropout": config.sail_head_dropout}
            self.sail_head = build_head(config.sail_head_kind, width, config.sail_width, **options)  # type: ignore[arg-type]
            width = config.sail_width
        self.multi_modal_projector: nn.Module = SailProjector(  # type: ignore[assignment]
            width,
            config.text_config.hidden_size,
            config.projector_hidden_act,
            config.multimodal_projector_bias,
            raw_width=config.sail_feature_width if config.sail_raw else 0,
        )
        self.language_model = AutoModel.from_config(config.text_config, trust_remote_code=False)
        self.freeze_unread()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: assembly and the strict `from_pretrained` set every weight."""

    @property
    def backbone(self) -> Backbone:
        """The vision tower as a reader of layers. It is made anew at each use, so that peft can wrap `vision_tower`."""
        return VISION_ADAPTERS[self.config.vision_config.model_type](self.vision_tower)

    def freeze_unread(self) -> None:
        """Freeze the vision parameters that are never trained: DDP would wait for gradients that never come."""
        for name in self.config.sail_unread or ():
            self.vision_tower.get_parameter(name).requires_grad_(False)

    def train(self, mode: bool = True) -> "SailLlavaModel":
        """Return self in training mode. A frozen vision tower stays in eval mode, and so do all BatchNorms of a trained one."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.vision_tower.parameters()):
            self.vision_tower.eval()
        for module in self.vision_tower.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def get_patch_features(self, pixel_values: Tensor) -> Tensor:
        """Return the projector's input (B, N, E), not normalized: the head's output for each patch; without a head, E is F.

        With `sail_raw` it is (B, N, E + F): the raw patch follows.
        pixel_values (B, 3, H, W) must have the size that the model was assembled for; UsageError otherwise.
        """
        config, backbone = self.config, self.backbone
        if list(pixel_values.shape[2:]) != config.sail_image_size:
            raise UsageError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; this model takes (images, 3, "
                f"{', '.join(map(str, config.sail_image_size or ()))}): use its own processor"
            )
        pixels = pixel_values.to(_dtype(self.vision_tower, pixel_values.dtype))
        if backbone.cnn:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        [tokens] = backbone(pixels, [config.sail_layer])  # (B, prefix + P, D)
        features = tokens[:, backbone.prefix :]  # (B, P, D)
        if config.sail_feature == "cls_patch":
            features = torch.cat([tokens[:, :1].expand_as(features), features], dim=-1)  # (B, P, F)
        aligned = self.sail_head(features.to(_dtype(self.sail_head, features.dtype)))  # (B, P, E)
        features = torch.cat([aligned, features.to(aligned.dtype)], dim=-1) if config.sail_raw else aligned
        if config.sail_grid is not None and config.sail_grid != config.sail_patch_grid:
            maps = features.transpose(1, 2).unflatten(2, config.sail_patch_grid)  # (B, E, rows, columns)
            features = functional.adaptive_avg_pool2d(maps, (config.sail_grid[0], config.sail_grid[1])).flatten(2).transpose(1, 2)
        return features

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Return `pooler_output`, a list of B tensors (N, H), and `last_hidden_state` (B, N, E), which is before the projector."""
        features = self.get_patch_features(pixel_values)
        projected: Any = list(self.multi_modal_projector(features))
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=projected)

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None, past_key_values: Any = None,
        inputs_embeds: Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Return LlavaModel's output. In training, a batch without images also passes a blank image with weight 0.

        So every process of a distributed run uses the same modules at each step and reduces their gradients.
        """
        if pixel_values is not None and len(pixel_values) == 0:
            pixel_values = None
        if self.training and pixel_values is None and past_key_values is None:
            if inputs_embeds is None:
                input_ids, inputs_embeds = None, self.get_input_embeddings()(input_ids)
            blank = inputs_embeds.new_zeros(1, 3, *(self.config.sail_image_size or ()))
            visual = self.get_image_features(blank, return_dict=True).pooler_output[0]
            inputs_embeds = inputs_embeds + 0.0 * visual.sum().to(inputs_embeds.device, inputs_embeds.dtype)
        return super().forward(
            input_ids=input_ids, pixel_values=pixel_values, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )


class SailLlavaForConditionalGeneration(StrictModel, LlavaForConditionalGeneration):
    """SailLlavaModel with the language modeling head. It does everything that LlavaForConditionalGeneration does."""

    config: SailLlavaConfig

    def __init__(self, config: SailLlavaConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = SailLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Return the model saved in `folder`; DamagedError if a weight is missing, unexpected or of another shape."""
        loaded = super().from_pretrained(folder, *args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).model.freeze_unread()
        return loaded

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Any = None, inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None, logits_to_keep: int | Tensor = 0, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Return LLaVA's output, with the loss if `labels` (B, T) are given, -100 where nothing is learned.

        In training with labels, logits are computed only where there are labels and are not returned (`logits` is None): with a
        vocabulary of 100,000 tokens they take most of the memory. The loss equals the stock one; without any label it is 0.
        """
        inputs = {
            "input_ids": input_ids, "pixel_values": pixel_values, "attention_mask": attention_mask,
            "position_ids": position_ids, "past_key_values": past_key_values, "inputs_embeds": inputs_embeds,
        }  # fmt: skip
        if labels is None or not self.training:
            return super().forward(**inputs, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
        shifted = kwargs.pop("shift_labels", None)
        if shifted is None:  # token n predicts token n + 1
            shifted = functional.pad(labels, (0, 1), value=-100)[:, 1:]
        outputs = self.model(**inputs, **kwargs)
        shifted = shifted.to(outputs.last_hidden_state.device)
        logits = self.lm_head(outputs.last_hidden_state[shifted != -100])  # (supervised tokens, vocabulary)
        loss = logits.float().sum()  # without any label 0, with a gradient of 0 for every parameter
        if len(logits):
            wanted, vocabulary = shifted[shifted != -100], self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=None, vocab_size=vocabulary, shift_labels=wanted, **kwargs)
        return LlavaCausalLMOutputWithPast(
            loss=loss, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions, image_hidden_states=outputs.image_hidden_states,
        )  # fmt: skip


def _dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """Return the dtype of the module's parameters, or `default` if it has none."""
    return next((parameter.dtype for parameter in module.parameters()), default)


AutoConfig.register("sail_llava", SailLlavaConfig, exist_ok=True)
AutoModel.register(SailLlavaConfig, SailLlavaModel, exist_ok=True)
AutoModelForImageTextToText.register(SailLlavaConfig, SailLlavaForConditionalGeneration, exist_ok=True)
