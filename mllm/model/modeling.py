"""The multimodal LLM as a Hugging Face model: a LLaVA whose patches pass SAIL's alignment head before the projector.

SAIL in an MLLM (arXiv 2412.04616), on LLaVA-1.5 (arXiv 2310.03744):

    pixels -> vision tower -> [cls ; p_i] -> head -> projector -> in the place of <image> tokens

A second tower stands beside the first: its features join by channel (one projector sees those of both; Prismatic, arXiv 2402.07865),
or its tokens follow in sequence (each tower has a projector; Interleaved-MoF, arXiv 2401.06209, without the interleaving).

Legend: `B` images, `N` visual tokens an image, `F` width given to the head, `E` head width, `H` LLM width, `T` text tokens. This file is
copied into every saved model, so it imports only what the copy has.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration, LlavaModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from align.common.errors import UsageError
from align.model.strict_loading import StrictModel
from mllm.model.towers import SailProjector, Tower, block_widths, token_grid

HEAD_STATES = ("none", "random", "trained")
FEATURES = ("cls_patch", "patch")
JOINS = ("channel", "sequence")
Item = TypeVar("Item")


class SailLlavaConfig(LlavaConfig):
    """Config of a SailLlava: `vision_config` is the plain encoder's, `text_config` the LLM's, `sail_*` describes what is between them.

    `sail_layer` counts as in `align.encoders.vision` (0 = embeddings); later blocks are not built. `sail_unread` names the vision
    parameters that are never trained: no feature depends on them (DINOv2's mask token), or their own class keeps them fixed.

    The fields from `sail_head` to `sail_fingerprint` and `vision_config` describe the first vision tower. Each entry of `sail_beside`
    describes a further one by fields of the same names.
    """

    model_type = "sail_llava"

    vision_config: Any = None
    text_config: Any = None
    sail_head: str = "none"  # none | random | trained
    sail_head_kind: str = "glu"
    sail_head_expansion: int | None = None
    sail_head_dropout: float | None = None
    sail_raw: bool = False  # the projector is given the raw patch beside the head's output
    sail_words: int | None = None  # V, words that a projector mixes; None: LLaVA's MLP. Of the first tower that shares the projector
    sail_positions: bool = False  # the projector adds a vector to each visual token that says where it is
    sail_width: int = 1024  # E
    sail_feature: str = "patch"  # cls_patch | patch
    sail_feature_width: int = 1024  # F
    sail_layer: int = 0
    sail_norm: bool = True  # the encoder's final norm is applied to the layer
    sail_image_size: list[int] | None = None  # [height, width] in pixels
    sail_patch_grid: list[int] | None = None  # [rows, columns] of the encoder
    sail_grid: list[int] | None = None  # [rows, columns] of the visual tokens; None: sail_patch_grid
    sail_unread: list[str] | None = None
    sail_untrained_tokens: list[int] | None = None  # of the template, unknown to the LLM: LoRA trains their rows, too
    sail_fingerprint: dict[str, Any] | None = None
    sail_beside: list[dict[str, Any]] | None = None
    sail_join: str = "channel"  # channel | sequence: how the tokens of several towers come together

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for tower in self.towers:
            for field, allowed in (("sail_head", HEAD_STATES), ("sail_feature", FEATURES), ("sail_join", JOINS)):
                if getattr(tower, field) not in allowed:
                    raise UsageError(f"{field} is {getattr(tower, field)!r}; allowed: {', '.join(allowed)}")
            if tower.sail_raw and tower.sail_head == "none":
                raise UsageError("sail_raw is True without a head: the raw patch is all that the projector is given, set sail_raw to False")
        if self.sail_patch_grid is not None:
            self.image_seq_length = self.image_tokens()

    @property
    def towers(self) -> "list[SailLlavaConfig | TowerFields]":
        """The fields of each vision tower; those of the first are the config's own."""
        return [self, *map(TowerFields, self.sail_beside or ())]

    def by_projector(self, towers: Sequence[Item]) -> list[list[Item]]:
        """Return one thing a tower as groups: those of towers that share a projector are together."""
        return [list(towers)] if self.sail_join == "channel" else [[tower] for tower in towers]

    def image_tokens(self) -> int:
        """Return N, the number of visual tokens per image."""
        if any(tower.sail_patch_grid is None for tower in self.towers):
            raise UsageError("this config has no sail_patch_grid; make a model with mllm/upgrade.py")
        return sum(map(prod, self.grids()))

    def grids(self) -> list[tuple[int, int]]:
        """Return (rows, columns) of the visual tokens of each projector."""
        grids = self.by_projector([token_grid(tower) for tower in self.towers])
        for shared in grids:
            if len(set(shared)) > 1:
                raise UsageError(f"towers joined by channel have the grids {shared}; give each the same sail_grid")
        return [grid for grid, *_ in grids]

    def pixel_shape(self) -> list[int]:
        """Return the shape of an image's pixels: [3, H, W], of several towers [3, all their pixels one after the other]."""
        sizes: list[Any] = [tower.sail_image_size or [0, 0] for tower in self.towers]
        return [3, *sizes[0]] if len(sizes) == 1 else [3, sum(height * width for height, width in sizes)]


class TowerFields:
    """An entry of `sail_beside` as attributes, for reading and writing; what it leaves out has SailLlavaConfig's default."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__ = values

    def __getattr__(self, name: str) -> Any:
        return getattr(SailLlavaConfig, name)


class SailLlavaModel(LlavaModel):
    """Vision tower, alignment head, projector and language model, without the language modeling head.

    `beside` holds a second tower's `vision_tower` and `sail_head`, and in sequence its `multi_modal_projector`.
    """

    config: SailLlavaConfig

    def __init__(self, config: SailLlavaConfig) -> None:
        super(LlavaModel, self).__init__(config)  # LlavaModel's own would build a projector for the bare encoder
        self.beside = nn.ModuleList(nn.Module() for _ in config.sail_beside or ())
        for tower in self.towers:
            tower.build()
        for place, group in zip(self.places, config.by_projector(config.towers), strict=False):
            widths = [width for fields in group for width in block_widths(fields)]
            place.multi_modal_projector = SailProjector(
                widths,
                config.text_config.hidden_size,
                config.projector_hidden_act,
                config.multimodal_projector_bias,
                words=group[0].sail_words,
                positions=prod(token_grid(group[0])) if group[0].sail_positions else 0,
            )
        self.language_model = AutoModel.from_config(config.text_config, trust_remote_code=False)
        self.freeze_unread()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: assembly and the strict `from_pretrained` set every weight."""

    @property
    def places(self) -> list[Any]:
        """The modules that hold a tower: the model itself, and those beside it."""
        return [self, *self.beside]

    @property
    def towers(self) -> list[Tower]:
        """The vision towers with their heads."""
        return [Tower(place, fields) for place, fields in zip(self.places, self.config.towers, strict=True)]

    @property
    def projectors(self) -> list[Any]:
        """The projectors: one, in sequence one a tower."""
        return [place.multi_modal_projector for place in self.places if hasattr(place, "multi_modal_projector")]

    def freeze_unread(self) -> None:
        """Freeze the vision parameters that are never trained: DDP would wait for gradients that never come."""
        for tower in self.towers:
            tower.freeze_unread()

    def train(self, mode: bool = True) -> "SailLlavaModel":
        """Return self in training mode. A frozen vision tower stays in eval mode, and so do all BatchNorms of a trained one."""
        super().train(mode)
        for tower in self.towers:
            tower.hold_still()
        return self

    def get_patch_features(self, pixel_values: Tensor, projector: int = 0) -> Tensor:
        """Return the input (B, N, E) of a projector (by its number), not normalized: for each patch the head's output, or the raw patch.

        With `sail_raw` it is (B, N, E + F): the raw patch follows. Towers joined by channel follow each other, too.
        pixel_values must have the size that the model was assembled for: (B, 3, H, W), of two towers (B, 3, pixels), those of one
        after those of the other; UsageError otherwise.
        """
        wanted = self.config.pixel_shape()
        if list(pixel_values.shape[1:]) != wanted:
            raise UsageError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; this model takes (images, {', '.join(map(str, wanted))}): "
                "use its own processor"
            )
        sizes: list[Any] = [fields.sail_image_size for fields in self.config.towers]
        parts = pixel_values.flatten(2).split([height * width for height, width in sizes], dim=2)
        pixels = [part.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]
        group = self.config.by_projector(list(zip(self.towers, pixels, strict=True)))[projector]
        return torch.cat([tower.features(own) for tower, own in group], dim=-1)

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Return `pooler_output`, a list of B tensors (N, H), and `last_hidden_state` (B, N, E), the first projector's input."""
        features = [self.get_patch_features(pixel_values, number) for number in range(len(self.projectors))]
        projected = [projector(own) for projector, own in zip(self.projectors, features, strict=True)]
        listed: Any = list(torch.cat(projected, dim=1))
        return BaseModelOutputWithPooling(last_hidden_state=features[0], pooler_output=listed)

    def with_described(self, input_ids: Tensor, pixel_values: Tensor | None, described: Tensor, which: Tensor) -> Tensor:
        """Return the input embeddings (B, T, H) of a batch some of whose images are given as features `described` (n, N, D).

        `which` (images,) is True for those, False for the images that `pixel_values` holds.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        tokens = self.multi_modal_projector(described)  # (n, N, H)
        if pixel_values is not None:
            seen = torch.stack(self.get_image_features(pixel_values, return_dict=True).pooler_output)
            every = tokens.new_empty(len(which), *tokens.shape[1:])
            every[which], every[~which] = tokens, seen.to(tokens)
            tokens = every
        return embeddings.masked_scatter((input_ids == self.config.image_token_index)[..., None], tokens.to(embeddings))

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None, past_key_values: Any = None,
        inputs_embeds: Tensor | None = None, described_features: Tensor | None = None, is_described: Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Return LlavaModel's output. In training, a batch without pixels also passes a blank image with weight 0.

        So every process of a distributed run uses the same modules at each step and reduces their gradients. Images of which there are
        only features: see `with_described`.
        """
        if pixel_values is not None and len(pixel_values) == 0:
            pixel_values = None
        blank_needed = self.training and pixel_values is None and past_key_values is None
        if described_features is not None and is_described is not None and input_ids is not None:
            inputs_embeds = self.with_described(input_ids, pixel_values, described_features, is_described)
            input_ids = pixel_values = None
        if blank_needed:
            if inputs_embeds is None:
                input_ids, inputs_embeds = None, self.get_input_embeddings()(input_ids)
            blank = inputs_embeds.new_zeros(1, *self.config.pixel_shape())
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


AutoConfig.register("sail_llava", SailLlavaConfig, exist_ok=True)
AutoModel.register(SailLlavaConfig, SailLlavaModel, exist_ok=True)
AutoModelForImageTextToText.register(SailLlavaConfig, SailLlavaForConditionalGeneration, exist_ok=True)
