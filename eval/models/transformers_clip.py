"""CLIP, MetaCLIP 2 and SigLIP of transformers, to compare with: a hub id or local folder, such as `hf:openai/clip-vit-large-patch14`.

SigLIP pools by attention. For dense embeddings each patch is pooled alone: value and output projections, then the MLP.

Legend: `B` images, `P` patches, `W` width of the tower, `T` texts, `E` embedding width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from align.common.errors import UsageError
from align.encoders.claims import within_weights
from align.encoders.loading import hash_weights, load_errors_named, recorded_id, require_complete, resolve_encoder
from align.encoders.text import hash_tokenizer
from align.encoders.transforms import Transform
from eval.models.reference import ReferenceModel, fingerprint_of

NEEDED = "needed are config.json, preprocessor_config.json, the tokenizer's files and model.safetensors"


class TransformersClip(ReferenceModel):
    """CLIP or SigLIP of transformers. `max_length` is the context length in tokens; SigLIP pads all texts to it, as in its training."""

    def __init__(self, model: Any, tokenizer: Any, transform: Transform, description: str) -> None:
        self.tokenizer, self.family = tokenizer, FAMILIES[model.config.model_type]
        self.max_length = model.config.text_config.max_position_embeddings
        super().__init__(model, transform, description)

    def images(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def patches(self, pixels: Tensor) -> Tensor:
        """Return the family's projection of the last layer's patch tokens. Position embeddings are interpolated."""
        return self.family.project(self.model, self.model.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state)

    def sentences(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(texts, padding=self.family.padding, truncation=True, max_length=self.max_length, return_tensors="pt")
        given = {name: tokens[name].to(self.device) for name in self.family.inputs}
        return self.model.get_text_features(**given).pooler_output

    @property
    def patch_size(self) -> int:
        return int(self.model.config.vision_config.patch_size)


@dataclass(frozen=True)
class Family:
    """How one model_type reads texts, and how its patch tokens (B, prefix + P, W) become (B, P, E)."""

    padding: bool | str
    inputs: tuple[str, ...]
    project: Callable[[Any, Tensor], Tensor]


def _project_clip(model: Any, tokens: Tensor) -> Tensor:
    return model.visual_projection(model.vision_model.post_layernorm(tokens[:, 1:]))  # CLIP itself normalizes only pooled tokens


def _project_siglip(model: Any, tokens: Tensor) -> Tensor:
    alone = tokens.flatten(0, 1)[:, None]  # (B P, 1, W): an attention over one token gives its value, whatever the query
    return model.vision_model.head(alone).unflatten(0, tokens.shape[:2])


_CLIP = Family(True, ("input_ids", "attention_mask"), _project_clip)
# fixed-size SigLIP 2 has the model_type `siglip`; `siglip2` is NaFlex, which takes packed patches of any number
FAMILIES = {"clip": _CLIP, "metaclip_2": _CLIP, "siglip": Family("max_length", ("input_ids",), _project_siglip)}


def load_transformers_clip(source: str) -> TransformersClip:
    """Return the model of a local folder or hub id; UsageError unless its model_type is in FAMILIES."""
    place = resolve_encoder(source)
    with load_errors_named(source, NEEDED), within_weights(source, place):
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        if config.model_type not in FAMILIES:
            naflex = "; NaFlex models take no images of a fixed size: use the fixed-size one" if config.model_type == "siglip2" else ""
            known = f"known: {', '.join(FAMILIES)}{naflex}"
            raise UsageError(f"{source}: model_type {config.model_type!r} is not a dual encoder known here; {known}")
        transform = Transform(AutoImageProcessor.from_pretrained(place, trust_remote_code=False))
        tokenizer: Any = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        tokens = hash_tokenizer(tokenizer)  # before any call, which would change its padding state
        model, report = AutoModel.from_pretrained(
            place, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    require_complete(source, report["missing_keys"], ())
    name = recorded_id(source)
    clip = TransformersClip(model, tokenizer, transform, name)
    vision, text = hash_weights(model, ("text_", "logit_")), hash_weights(model, ("vision_", "visual_", "logit_"))
    clip.vision_fingerprint = fingerprint_of(name, config.vision_config.to_dict(), vision, transform.canonical())
    clip.text_fingerprint = fingerprint_of(name, config.text_config.to_dict(), text, f"tokenizer {tokens}")
    clip.text_fingerprint["max_length"] = clip.max_length
    return clip
