"""Dual encoders trained as one on images and texts, to compare with: any CLIP of open_clip, CLIP and SigLIP of transformers.

    openclip:ViT-L-14/openai                                 a pretrained tag of open_clip; fetched once, needs a network
    openclip:ViT-B-32/models/open_clip_model.safetensors     a local file; an open_clip_config.json beside it is followed
    hf:openai/clip-vit-large-patch14                         a hub id or a local folder

What is kept as a feature is the projected embedding before it is normalised; aligning is dividing by the L2 norm. Each model has
its own image processing, tokenizer and context length. The bias of SigLIP's logits changes no rank and is not read.

Dense embeddings are those of the plain MaskCLIP baseline (Zhou et al., "Extract Free Dense Labels from CLIP", ECCV 2022) without
its changes to the last block: the patch tokens of the last layer after the final norm, through the visual projection. SigLIP
projects by attention pooling; there each patch is pooled as if it were the only one, so that its value and output projections
and its MLP remain.

Legend: `B` images, `P` patches, `W` width of the tower, `T` texts, `E` embedding width.
"""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from align.common.errors import OfflineError, UsageError
from align.common.files import hash_bytes
from align.common.recipes_yaml import nearest
from align.encoders.loading import first_line, hash_weights, load_errors_named, recorded_id, require_complete, resolve_encoder
from align.encoders.text import _hash_tokenizer
from align.encoders.vision import Transform

FOLDER_FILES = "needed are config.json, preprocessor_config.json, the tokenizer's files and model.safetensors"
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


class Baseline(nn.Module, ABC):
    """An image-text model as `eval.models.candidates.DualEncoder`: always in eval mode, parameters without gradient, float32.

    `transform` makes pixels (3, H, W) of an RGB image; `width` is E.
    """

    def __init__(self, model: nn.Module, transform: Callable[..., Tensor], description: str) -> None:
        super().__init__()
        self.model: Any = model
        self.transform, self.description = transform, description
        self.vision_fingerprint: dict[str, Any] = {}
        self.text_fingerprint: dict[str, Any] = {}
        self.requires_grad_(False).eval()
        self.width = self.sentences(["a"]).shape[-1]

    def train(self, mode: bool = True) -> "Baseline":
        """Return self, left in eval mode: a frozen model has no training mode."""
        return super().train(False)

    @abstractmethod
    def images(self, pixels: Tensor) -> Tensor:
        """Return projected embeddings (B, E), not normalised, of pixels (B, 3, H, W) on `device`."""

    @abstractmethod
    def patches(self, pixels: Tensor) -> Tensor:
        """Return projected patch tokens (B, P, E), not normalised, of pixels (B, 3, H, W) on `device`."""

    @abstractmethod
    def sentences(self, texts: list[str]) -> Tensor:
        """Return projected embeddings (T, E), not normalised; texts are cut to the context length."""

    @property
    @abstractmethod
    def patch_size(self) -> int:
        """Pixels a side of a patch."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.parameters()).device

    @property
    def scale(self) -> float:
        """t of the model's logits."""
        return self.model.logit_scale.detach().exp().item()

    @property
    def vision_encoder(self) -> "Images":
        """The image side."""
        return Images(self)

    @property
    def text_encoder(self) -> "Sentences":
        """The text side."""
        return Sentences(self)

    def project_image(self, features: Tensor) -> Tensor:
        """Return the features (..., E) divided by their L2 norm, float32."""
        return functional.normalize(features.float(), dim=-1)

    def project_text(self, features: Tensor) -> Tensor:
        """Return the features (..., E) divided by their L2 norm, float32."""
        return functional.normalize(features.float(), dim=-1)

    @property
    def patch_fingerprint(self) -> dict[str, Any]:
        """What decides `encode_patches`."""
        return self.vision_fingerprint

    @torch.inference_mode()
    def encode_patches(self, pixels: Tensor) -> Tensor:
        """Return the projected patches (B, P, E); H and W may be any multiples of the patch size."""
        return self.patches(pixels.to(self.device))

    def project_patches(self, features: Tensor) -> Tensor:
        """Return the features (B, P, E) divided by their L2 norm, float32."""
        return functional.normalize(features.float(), dim=-1)


@dataclass(frozen=True)
class Images:
    """The image side of a baseline, as `align.features.extract.Extraction` takes it."""

    model: Baseline

    @property
    def transform(self) -> Callable[..., Tensor]:
        """RGB image -> pixels (3, H, W)."""
        return self.model.transform

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides an image feature."""
        return self.model.vision_fingerprint

    @property
    def feature_width(self) -> int:
        """E."""
        return self.model.width

    @property
    def patch_size(self) -> int:
        """Pixels a side of a patch."""
        return self.model.patch_size

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        return self.model.images(pixels.to(self.model.device, non_blocking=True)).float()


@dataclass(frozen=True)
class Sentences:
    """The text side of a baseline."""

    model: Baseline

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides a text feature."""
        return self.model.text_fingerprint

    @torch.inference_mode()
    def encode(self, texts: list[str], batch_size: int) -> Tensor:
        """Return embeddings (T, E) float32 on the CPU, not normalised, in the order of `texts`."""
        if not texts:
            return torch.empty(0, self.model.width)
        return torch.cat([self.model.sentences(texts[at : at + batch_size]).float().cpu() for at in range(0, len(texts), batch_size)])


def open_baseline(library: str, source: str, device: str = "cpu") -> Baseline:
    """Return the model `source` of `library` (openclip or hf) on `device`.

    Raises UsageError (unknown names, unsafe files, missing files or weights), OfflineError, DamagedError.
    """
    openers = {"openclip": open_open_clip, "hf": open_hugging_face}
    return openers[library](source).to(device)


class HuggingFaceBaseline(Baseline):
    """CLIP or SigLIP of transformers; `max_length` is the context length in tokens. SigLIP was trained on texts padded to it."""

    def __init__(self, model: Any, tokenizer: Any, transform: Transform, description: str) -> None:
        self.tokenizer, self.family = tokenizer, HUGGING_FACE_FAMILIES[model.config.model_type]
        self.max_length = model.config.text_config.max_position_embeddings
        super().__init__(model, transform, description)

    def images(self, pixels: Tensor) -> Tensor:
        """Return `get_image_features`."""
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def patches(self, pixels: Tensor) -> Tensor:
        """Return what the family makes of the last layer's patch tokens; position embeddings are interpolated."""
        return self.family.project(self.model, self.model.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state)

    def sentences(self, texts: list[str]) -> Tensor:
        """Return `get_text_features`."""
        tokens = self.tokenizer(texts, padding=self.family.padding, truncation=True, max_length=self.max_length, return_tensors="pt")
        given = {name: tokens[name].to(self.device) for name in self.family.inputs}
        return self.model.get_text_features(**given).pooler_output

    @property
    def patch_size(self) -> int:
        """Pixels a side of a patch."""
        return int(self.model.config.vision_config.patch_size)


@dataclass(frozen=True)
class Family:
    """How the models of one model_type take texts, and how their patch tokens (B, prefix + P, W) become (B, P, E)."""

    padding: bool | str
    inputs: tuple[str, ...]
    project: Callable[[Any, Tensor], Tensor]


def _project_clip(model: Any, tokens: Tensor) -> Tensor:
    return model.visual_projection(model.vision_model.post_layernorm(tokens[:, 1:]))  # CLIP normalises only what it pools


def _project_siglip(model: Any, tokens: Tensor) -> Tensor:
    alone = tokens.flatten(0, 1)[:, None]  # (B P, 1, W): an attention over one token gives its value, whatever the query
    return model.vision_model.head(alone).unflatten(0, tokens.shape[:2])


_CLIP = Family(True, ("input_ids", "attention_mask"), _project_clip)
# fixed-size SigLIP 2 is `siglip`; `siglip2` means the NaFlex models, whose pixels come as packed patches of any number
HUGGING_FACE_FAMILIES = {"clip": _CLIP, "metaclip_2": _CLIP, "siglip": Family("max_length", ("input_ids",), _project_siglip)}


def open_hugging_face(source: str) -> HuggingFaceBaseline:
    """Return the model of a local folder or hub id; UsageError unless its model_type is one of HUGGING_FACE_FAMILIES."""
    place = resolve_encoder(source, None, trust_remote_code=False)
    with load_errors_named(source, FOLDER_FILES):
        config = AutoConfig.from_pretrained(place)
        if config.model_type not in HUGGING_FACE_FAMILIES:
            known = ", ".join(HUGGING_FACE_FAMILIES)
            naflex = "; NaFlex models take no images of a fixed size: use the fixed-size one" if config.model_type == "siglip2" else ""
            raise UsageError(f"{source}: model_type {config.model_type!r} is not a dual encoder known here; known: {known}{naflex}")
        transform = Transform(AutoImageProcessor.from_pretrained(place))
        tokenizer: Any = AutoTokenizer.from_pretrained(place)
        tokens = _hash_tokenizer(tokenizer)  # before a call sets how it pads
        model, report = AutoModel.from_pretrained(place, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    require_complete(source, report["missing_keys"], ())
    name = recorded_id(source)
    baseline = HuggingFaceBaseline(model, tokenizer, transform, name)
    baseline.vision_fingerprint = {
        **_common(name, config.vision_config.to_dict()),
        "weights": hash_weights(model, ("text_", "logit_")),
        "preprocessing": transform.canonical(),
    }
    baseline.text_fingerprint = {
        **_common(name, config.text_config.to_dict()),
        "weights": hash_weights(model, ("vision_", "visual_", "logit_")),
        "preprocessing": f"tokenizer {tokens}",
        "max_length": baseline.max_length,
    }
    return baseline


class OpenClipBaseline(Baseline):
    """A model of open_clip with its tokenizer, which cuts and pads texts to the context length."""

    def __init__(self, model: Any, tokenizer: Any, transform: Callable[..., Tensor], description: str) -> None:
        self.tokenizer = tokenizer
        super().__init__(model, transform, description)

    def images(self, pixels: Tensor) -> Tensor:
        """Return `encode_image`."""
        return self.model.encode_image(pixels, normalize=False)

    def sentences(self, texts: list[str]) -> Tensor:
        """Return `encode_text`."""
        return self.model.encode_text(self.tokenizer(texts).to(self.device), normalize=False)

    def patches(self, pixels: Tensor) -> Tensor:
        """Return the projected patch tokens of open_clip's own ViT; UsageError for another tower."""
        visual = self._vit()
        grid = tuple(side // self.patch_size for side in pixels.shape[2:])
        seen: list[Tensor] = []
        handle = visual.transformer.register_forward_hook(lambda block, inputs, output: seen.append(output))
        try:
            position = {"positional_embedding": _interpolated(visual.positional_embedding, visual.grid_size, grid)}
            torch.func.functional_call(visual, position, (pixels,))
        finally:
            handle.remove()
        tokens = visual.ln_post(seen[0][:, 1:])  # (B, P, W)
        return tokens if visual.proj is None else tokens @ visual.proj

    @property
    def patch_size(self) -> int:
        """Pixels a side of a patch."""
        return int(self._vit().patch_size[0])

    def _vit(self) -> Any:
        from open_clip.transformer import VisionTransformer

        visual = self.model.visual
        if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None:
            raise UsageError(
                f"{self.description}: dense embeddings are read from open_clip's own ViT without attention pooling, not from "
                f"{type(visual).__name__}; give the same model as hf:, or leave out segmentation"
            )
        return visual


def _interpolated(position: Tensor, own: tuple[int, int], grid: tuple[int, ...]) -> Tensor:
    """Return position embeddings (1 + h w, W) for another grid, bicubic as open_clip's loader does it; CLS keeps its own."""
    if tuple(own) == grid:
        return position
    patches = position[1:].T.reshape(1, -1, *own)  # (1, W, h, w)
    resized = functional.interpolate(patches, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([position[:1], resized[0].flatten(1).T])


def open_open_clip(source: str) -> OpenClipBaseline:
    """Return the open_clip model `source`: ARCH/TAG, or ARCH/FILE.safetensors.

    A tag says itself whether it was trained with QuickGELU. A file does not: there ARCH decides (`ViT-B-32-quickgelu`), or the
    open_clip_config.json beside the file, which also says how images are prepared and, with the tokenizer's files, texts.
    """
    try:
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2
    except ImportError as error:
        raise UsageError("openclip: models need the package open_clip_torch; pip install 'sail-upgrade-kit[clip]'") from error
    architecture, _, weights = source.partition("/")
    if architecture not in open_clip.list_models() or not weights:
        known = nearest(architecture, open_clip.list_models())
        raise UsageError(
            f"openclip:{source}: expected openclip:ARCH/TAG or openclip:ARCH/FILE.safetensors with an ARCH of open_clip; {known}"
        )
    options: dict[str, Any] = {"pretrained_text": False, "weights_only": True}
    described = architecture
    with load_errors_named(f"openclip:{source}", "needed are weights of this architecture"):
        tag = open_clip.get_pretrained_cfg(architecture, weights)
        if tag:
            quick = {"force_quick_gelu": bool(tag.get("quick_gelu"))}  # open_clip only warns if it differs from the architecture
            try:
                with _unlogged():  # the hub's retries
                    model = open_clip.create_model(architecture, pretrained=weights, **quick, **options)
            except RuntimeError as error:
                if not str(error).startswith("Failed to download"):
                    raise
                why = first_line(error).partition(". Last")[0]
                raise OfflineError(
                    f"openclip:{source} is not on this machine and cannot be fetched ({why}); fetch it elsewhere and give the file: "
                    f"openclip:{architecture}/PATH/open_clip_model.safetensors"
                ) from error
        else:
            file = _weights_file(source, architecture, weights, open_clip.list_pretrained_tags_by_model(architecture))
            if (file.parent / "open_clip_config.json").is_file():
                described = f"local-dir:{file.parent}"
            else:
                options["force_preprocess_cfg"] = _preprocessing(open_clip, architecture)
            with _unlogged():  # "initialized randomly"
                model = open_clip.create_model(described, load_weights=False, **options)
            _refuse_other_positions(source, file, model)
            open_clip.load_checkpoint(model, str(file), strict=True)
        tokenizer = open_clip.get_tokenizer(described)
    preprocessing = open_clip.get_model_preprocess_cfg(model)
    transform = image_transform_v2(PreprocessCfg(**preprocessing), is_train=False)
    baseline = OpenClipBaseline(model, tokenizer, transform, f"open_clip {architecture}, {weights if tag else file.name}")
    common = _common(recorded_id(source), {"arch": open_clip.get_model_config(described), "quick": bool(tag.get("quick_gelu"))})
    baseline.vision_fingerprint = {
        **common,
        "weights": hash_weights(model.visual, ()),
        "preprocessing": json.dumps(preprocessing, sort_keys=True),
    }
    rules = _hash_tokenizer(tokenizer.tokenizer) if hasattr(tokenizer, "tokenizer") else hash_bytes(json.dumps(tokenizer.encoder).encode())
    baseline.text_fingerprint = {
        **common,
        "weights": hash_weights(model, ("visual.", "logit_")),
        "preprocessing": f"{type(tokenizer).__name__} {rules}",
        "max_length": tokenizer.context_length,
    }
    return baseline


@contextmanager
def _unlogged() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _weights_file(source: str, architecture: str, weights: str, tags: list[str]) -> Path:
    """Return the safetensors file that the part after ARCH/ names: relative, or from the root."""
    file = next((place for place in (Path(weights).expanduser(), Path("/", weights)) if place.is_file()), None)
    if file is None:
        known = f"tags: {', '.join(tags) or 'none'}"
        raise UsageError(f"openclip:{source}: {weights!r} is neither a file nor a pretrained tag of {architecture}; {known}")
    if file.suffix != ".safetensors":
        why = "as other formats can carry code; most hub repositories have such a file, too"
        raise UsageError(f"openclip:{source}: a local file has to be .safetensors, {why}")
    return file


def _preprocessing(open_clip: Any, architecture: str) -> dict[str, Any]:
    """Return how the architecture's pretrained models prepare images; UsageError if they differ among themselves."""
    tags = [open_clip.get_pretrained_cfg(architecture, tag) for tag in open_clip.list_pretrained_tags_by_model(architecture)]
    known = {json.dumps({key: tag[key] for key in PREPROCESSING if key in tag}) for tag in tags}
    if len(known) > 1:
        raise UsageError(
            f"pretrained models of {architecture} prepare images in different ways; put the weights' open_clip_config.json beside them"
        )
    return json.loads(known.pop()) if known else {}


def _refuse_other_positions(source: str, file: Path, model: nn.Module) -> None:
    """Refuse weights for another image size or context length, which open_clip would interpolate without a word."""
    own = model.state_dict()
    with safe_open(file, framework="pt") as stored:
        for key in sorted(key for key in stored.keys() if key.endswith("positional_embedding") and key in own):  # noqa: SIM118
            shape = tuple(stored.get_slice(key).get_shape())
            if shape != tuple(own[key].shape):
                raise UsageError(
                    f"openclip:{source}: {key} is {shape} in the file, {tuple(own[key].shape)} in this architecture: the file is "
                    "for another image size or context length; name its own architecture"
                )


def _common(name: str, architecture: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a fingerprint that all baselines have; the same weights with another activation are another model."""
    kept = {key: value for key, value in architecture.items() if key not in ("_name_or_path", "transformers_version", "dtype")}
    digest = hash_bytes(json.dumps(kept, sort_keys=True, default=str).encode())
    return {"encoder": name, "feature": "projected", "architecture": digest, "precision": "fp32"}
