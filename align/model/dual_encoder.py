"""The dual encoder as a Hugging Face model: frozen encoders by reference, heads, scale and bias by value.

    model = SailModel.from_pretrained("runs/quickstart/best")
    pipeline("zero-shot-image-classification", model="runs/quickstart/best")      # after `import align.model.dual_encoder`

Shapes: `B` images, `T` texts, `P` patches, `F` image feature width, `D` caption feature width, `E` aligned width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    BaseImageProcessor,
    BatchFeature,
    PreTrainedConfig,
    ProcessorMixin,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from align.common.errors import DamagedError, UsageError
from align.common.fingerprints import compare_encoders
from align.common.folders import COMMIT, check_model_folder
from align.common.hardware import Arithmetic
from align.encoders.claims import within_weights
from align.encoders.loading import load_errors_named
from align.encoders.spec import TextSpec, VisionSpec
from align.encoders.text import TextEncoder, load_text_encoder
from align.encoders.transforms import load_transform
from align.encoders.vision import VisionEncoder, load_vision_encoder
from align.model.heads import ImageTokenHead, TextTokenHead, build_head, initialize
from align.model.strict_loading import StrictModel

FORMAT_VERSION = 1
VISION_FOLDER, TEXT_FOLDER = "vision_encoder", "text_encoder"  # where embedded copies of the encoders lie


class SailConfig(PreTrainedConfig):
    """What a SailModel is made of. `vision` and `text` describe the frozen encoders, as `EncoderSpec.stored`.

    `vision_width` and `text_width` are what a head is given: the width of a pooled feature or, for token heads, of one token;
    `vision_cls` says whether the first token of an image is its CLS. `bias` is None for a model trained with InfoNCE, which has none.
    """

    model_type = "sail"

    def __init__(
        self,
        vision: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        vision_fingerprint: dict[str, Any] | None = None,
        text_fingerprint: dict[str, Any] | None = None,
        vision_width: int = 1,
        text_width: int = 1,
        vision_cls: bool = True,
        width: int = 1,
        head: str = "glu",
        expansion: int | None = None,
        dropout: float | None = None,
        log_scale: float = 2.995732273553991,
        bias: float | None = -10.0,
        precision: Arithmetic = "fp32",
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise DamagedError(f"model format {format_version!r}, this version reads {FORMAT_VERSION}; convert or train again")
        self.vision, self.text = vision or {}, text or {}
        self.vision_fingerprint, self.text_fingerprint = vision_fingerprint or {}, text_fingerprint or {}
        self.vision_width, self.text_width, self.vision_cls, self.width = vision_width, text_width, vision_cls, width
        self.head, self.expansion, self.dropout = head, expansion, dropout
        self.log_scale, self.bias, self.precision = log_scale, bias, precision
        self.format_version = format_version
        super().__init__(**kwargs)


@dataclass
class SailOutput(ModelOutput):
    """logits_per_image (B, T) = t <x, y> + b (b = 0 after InfoNCE), its transpose, and the L2-normalized embeddings (B, E) and (T, E)."""

    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None


class SailModel(StrictModel):
    """Heads, scale and bias; the frozen encoders are loaded, and checked against their fingerprints, when first used."""

    config_class = SailConfig
    config: SailConfig
    base_model_prefix = "sail"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]

    def __init__(self, config: SailConfig) -> None:
        super().__init__(config)
        self.vision_head, self.text_head = _heads(config)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.log_scale)))
        self.logit_bias = None if config.bias is None else nn.Parameter(torch.tensor(float(config.bias)))
        self._encoders: dict[str, Any] = {}  # not submodules: their weights are no part of this model's state
        self.trust_remote_code = False  # of the encoders
        self.post_init()

    def initialize(self, seed: int) -> "SailModel":
        """Give the heads their initial weights (Xavier uniform, zero bias), a pure function of `seed`; return self."""
        generator = torch.Generator().manual_seed(seed)
        for head in (self.vision_head, self.text_head):
            initialize(head, generator)
        with torch.no_grad():
            self.logit_scale.fill_(self.config.log_scale)
            if self.logit_bias is not None:
                self.logit_bias.fill_(float(self.config.bias or 0.0))
        return self

    def untrained(self, seed: int) -> "SailModel":
        """Return a model with the same encoders and architecture whose heads are freshly initialized from `seed`."""
        other = SailModel(self.config).initialize(seed)
        other.config.name_or_path = self.config.name_or_path
        other._encoders, other.trust_remote_code = self._encoders, self.trust_remote_code
        return other.eval()

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Return the model saved in `folder`; DamagedError if a file is not as saved, or a weight missing, unexpected or of another shape.

        `trust_remote_code=True` lets code run that ships with its encoders, of local folders and of pinned commits.
        """
        trusted = bool(kwargs.pop("trust_remote_code", False))
        check_model_folder(Path(folder))
        needed = "needed are config.json and model.safetensors, as align/train.py writes them"
        with load_errors_named(str(folder), needed), within_weights(str(folder), str(folder)):
            loaded = super().from_pretrained(folder, *args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).trust_remote_code = trusted
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does. Hashes of an older model in the folder (see `align.model.saving`) are deleted."""
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / COMMIT).unlink(missing_ok=True)

    def encoder_spec(self, side: Literal["vision", "text"]) -> Any:
        """Return the VisionSpec or TextSpec that loads one encoder; a copy inside the model folder is found relative to it."""
        stored = dict(getattr(self.config, side))
        if not stored:
            raise UsageError(f"this model names no {side} encoder; it can only align features that are already encoded")
        if stored["name"] in (VISION_FOLDER, TEXT_FOLDER):
            stored["name"] = str(Path(str(self.config.name_or_path)) / stored["name"])
        kind = VisionSpec if side == "vision" else TextSpec
        return kind(**stored, precision=self.config.precision, trust_remote_code=self.trust_remote_code)

    @property
    def vision_encoder(self) -> VisionEncoder:
        """The frozen vision encoder, loaded at first use; FingerprintError if it is not the one the heads were trained on."""
        return self._encoder("vision", load_vision_encoder)

    @property
    def text_encoder(self) -> TextEncoder:
        """The frozen text encoder, loaded at first use; FingerprintError if it is not the one the heads were trained on."""
        return self._encoder("text", load_text_encoder)

    def _encoder(self, side: Literal["vision", "text"], load: Callable[..., Any]) -> Any:
        if side not in self._encoders:
            encoder, trained_on = load(self.encoder_spec(side)), getattr(self.config, f"{side}_fingerprint")
            compare_encoders(encoder.fingerprint, trained_on, f"the model in {self.config.name_or_path}")
            self._encoders[side] = encoder
        return self._encoders[side].to(self.device)

    def project_image(self, features: Tensor) -> Tensor:
        """Return (..., E) L2-normalized float32 embeddings of what `vision_encoder` gives: features (..., F) or token rows (B, T F)."""
        return functional.normalize(self.vision_head(features.to(self.logit_scale.dtype)).float(), dim=-1)

    def project_text(self, features: Tensor) -> Tensor:
        """Return (..., E) L2-normalized float32 embeddings of what `text_encoder` gives: features (..., D) or token rows (T, tokens D)."""
        return functional.normalize(self.text_head(features.to(self.logit_scale.dtype)).float(), dim=-1)

    def project_patches(self, features: Tensor) -> Tensor:
        """Return (B, P, E) L2-normalized dense embeddings of `vision_encoder.dense`: features (B, P, F) or token rows (B, T F)."""
        head = self.vision_head.dense if isinstance(self.vision_head, ImageTokenHead) else self.vision_head
        return functional.normalize(head(features.to(self.logit_scale.dtype)).float(), dim=-1)

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Return an output whose `pooler_output` (B, E) are L2-normalized image embeddings, as CLIP's in transformers.

        pixel_values (B, 3, H, W) come from the processor; `last_hidden_state` holds the patches (B, P, width) before the head.
        """
        cls, patches = self.vision_encoder.encode(pixel_values)
        embeddings = self.project_image(self.vision_encoder.pool(cls, patches))
        return BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=embeddings)

    def get_patch_features(self, pixel_values: Tensor) -> Tensor:
        """Return (B, P, E) L2-normalized dense embeddings: each patch as [cls ; p_i] through the image head.

        Of a token head: `TP_local(p_i) + TP_cls(cls)`, whose mean before normalization is the image's.
        """
        return self.project_patches(self.vision_encoder.dense(pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutputWithPooling:
        """Return an output whose `pooler_output` (T, E) are L2-normalized text embeddings; token ids come from the processor."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return BaseModelOutputWithPooling(pooler_output=self.project_text(self.text_encoder(input_ids, mask)))

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None, **_: Any) -> SailOutput:
        """Return logits (B, T) of all images against all texts, with the embeddings they come from."""
        images = self.get_image_features(pixel_values).pooler_output
        texts = self.get_text_features(input_ids, attention_mask).pooler_output
        assert images is not None and texts is not None
        logits = self.logit_scale.exp() * images @ texts.T
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        return SailOutput(logits_per_image=logits, logits_per_text=logits.T, text_embeds=texts, image_embeds=images)


def _heads(config: SailConfig) -> tuple[nn.Module, nn.Module]:
    """Return the image and the text head that `config` describes."""
    if config.head == "token":
        images = ImageTokenHead(config.vision_width, config.width, config.vision_cls, config.dropout)
        return images, TextTokenHead(config.text_width, config.width, config.dropout)
    kind: Any = config.head
    options: dict[str, Any] = {"expansion": config.expansion, "dropout": config.dropout}
    texts = build_head(kind, config.text_width, config.width, **options)
    if kind == "sharelock":
        return build_head("identity", config.vision_width, config.width), texts
    return build_head(kind, config.vision_width, config.width, **options), texts


class SailImageProcessor(BaseImageProcessor):
    """Prepares images exactly as they were encoded for training: it is the vision encoder's own transform."""

    model_input_names = ["pixel_values"]

    def __init__(self, vision: dict[str, Any] | None = None, folder: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vision, self.folder = vision or {}, folder
        self._transform: Any = None

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the saved settings, with the folder they came from."""
        values, rest = super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        return {**values, "folder": str(pretrained_model_name_or_path)}, rest

    def to_dict(self) -> dict[str, Any]:
        """Return the settings to save."""
        return {"image_processor_type": type(self).__name__, "vision": self.vision}

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **_: Any) -> BatchFeature:
        """Return pixel_values (B, 3, H, W) float32 for one PIL image or a list of them."""
        if self._transform is None:
            inside = {"name": str(Path(self.folder) / VISION_FOLDER)} if self.vision["name"] == VISION_FOLDER else {}
            self._transform = load_transform(VisionSpec(**{**self.vision, **inside}))
        listed = images if isinstance(images, (list, tuple)) else [images]
        pixels = torch.stack([self._transform(image.convert("RGB")) for image in listed])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)


class SailProcessor(ProcessorMixin):
    """Image processor and tokenizer of a SailModel in one: `processor(text=[...], images=[...], padding=True)`."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)


AutoConfig.register("sail", SailConfig)
AutoModel.register(SailConfig, SailModel)
AutoModelForZeroShotImageClassification.register(SailConfig, SailModel)
AutoImageProcessor.register(SailConfig, slow_image_processor_class=SailImageProcessor)
AutoProcessor.register(SailConfig, SailProcessor)
