"""CLIP models of open_clip, to compare with.

    openclip:ViT-L-14/openai                                 a pretrained tag of open_clip; downloaded once, needs a network
    openclip:ViT-B-32/models/open_clip_model.safetensors     a local file; an open_clip_config.json beside it replaces ARCH

Legend: `B` images, `P` patches, `W` width of the tower, `T` texts, `E` embedding width.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from align.common.errors import OfflineError, UsageError
from align.common.files import hash_bytes
from align.encoders.loading import first_line, hash_weights, load_errors_named, recorded_id
from align.encoders.text import hash_tokenizer
from align.runtime.recipes_yaml import nearest
from eval.models.reference import ReferenceModel, fingerprint_of

PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
OPTIONS = {"pretrained_text": False, "weights_only": True}  # of open_clip.create_model


class OpenClip(ReferenceModel):
    """A model of open_clip with its tokenizer, which cuts and pads texts to the context length."""

    def __init__(self, model: Any, tokenizer: Any, transform: Callable[..., Tensor], description: str) -> None:
        self.tokenizer = tokenizer
        super().__init__(model, transform, description)

    def images(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels, normalize=False)

    def sentences(self, texts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(texts).to(self.device), normalize=False)

    def patches(self, pixels: Tensor) -> Tensor:
        """Return the projected patch tokens of open_clip's own ViT; UsageError for other towers."""
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
        return int(self._vit().patch_size[0])

    def _vit(self) -> Any:
        from open_clip.transformer import VisionTransformer

        visual = self.model.visual
        if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None:
            said = f"dense embeddings are read from open_clip's own ViT without attention pooling, not from {type(visual).__name__}"
            raise UsageError(f"{self.description}: {said}; give the same model as hf:, or leave out segmentation")
        return visual


def _interpolated(position: Tensor, own: tuple[int, int], grid: tuple[int, ...]) -> Tensor:
    """Return position embeddings (1 + h w, W) for another grid, bicubic as in open_clip's loader. CLS keeps its own."""
    if tuple(own) == grid:
        return position
    patches = position[1:].T.reshape(1, -1, *own)  # (1, W, h, w)
    resized = functional.interpolate(patches, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([position[:1], resized[0].flatten(1).T])


def load_openclip(source: str) -> OpenClip:
    """Return the open_clip model of ARCH/TAG or ARCH/FILE.safetensors. The tag decides about QuickGELU; for a file, ARCH decides."""
    try:
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2
    except ImportError as error:
        raise UsageError("openclip: models need the package open_clip_torch; pip install 'sail-upgrade-kit[clip]'") from error
    architecture, _, weights = source.partition("/")
    if architecture not in open_clip.list_models() or not weights:
        expected = "expected openclip:ARCH/TAG or openclip:ARCH/FILE.safetensors with an ARCH of open_clip"
        raise UsageError(f"openclip:{source}: {expected}; {nearest(architecture, open_clip.list_models())}")
    tag = open_clip.get_pretrained_cfg(architecture, weights)
    with load_errors_named(f"openclip:{source}", "needed are weights of this architecture"):
        model, described, named = (_of_tag if tag else _of_file)(open_clip, architecture, weights)
        tokenizer = open_clip.get_tokenizer(described)
    preprocessing = open_clip.get_model_preprocess_cfg(model)
    transform = image_transform_v2(PreprocessCfg(**preprocessing), is_train=False)
    clip = OpenClip(model, tokenizer, transform, f"open_clip {architecture}, {named}")
    name, parts = recorded_id(source), {"arch": open_clip.get_model_config(described), "quick": bool(tag.get("quick_gelu"))}
    clip.vision_fingerprint = fingerprint_of(name, parts, hash_weights(model.visual, ()), json.dumps(preprocessing, sort_keys=True))
    rules = hash_tokenizer(tokenizer.tokenizer) if hasattr(tokenizer, "tokenizer") else hash_bytes(json.dumps(tokenizer.encoder).encode())
    text = hash_weights(model, ("visual.", "logit_"))
    clip.text_fingerprint = fingerprint_of(name, parts, text, f"{type(tokenizer).__name__} {rules}")
    clip.text_fingerprint["max_length"] = tokenizer.context_length
    return clip


def _of_tag(open_clip: Any, architecture: str, tag: str) -> tuple[Any, str, str]:
    """Return the pretrained model, the name under which open_clip describes it, and the name of its weights."""
    quick = bool(open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu"))  # open_clip only warns if the architecture differs
    try:
        with _unlogged():  # hides the hub's retries
            return open_clip.create_model(architecture, pretrained=tag, force_quick_gelu=quick, **OPTIONS), architecture, tag
    except RuntimeError as error:
        if not str(error).startswith("Failed to download"):
            raise
        why = first_line(error).partition(". Last")[0]
        raise OfflineError(
            f"openclip:{architecture}/{tag} is not on this machine and cannot be fetched ({why}); fetch it elsewhere and give the file: "
            f"openclip:{architecture}/PATH/open_clip_model.safetensors"
        ) from error


def _of_file(open_clip: Any, architecture: str, weights: str) -> tuple[Any, str, str]:
    """Return the model with the weights of a local file; the values are those of `_of_tag`."""
    source = f"{architecture}/{weights}"
    file = _weights_file(source, architecture, weights, open_clip.list_pretrained_tags_by_model(architecture))
    own = (file.parent / "open_clip_config.json").is_file()
    described = f"local-dir:{file.parent}" if own else architecture
    preprocessing = {} if own else {"force_preprocess_cfg": _preprocessing(open_clip, architecture)}
    with _unlogged():  # hides the warning "initialized randomly"
        model = open_clip.create_model(described, load_weights=False, **preprocessing, **OPTIONS)
    _refuse_other_positions(source, file, model)
    open_clip.load_checkpoint(model, str(file), strict=True)
    return model, described, file.name


@contextmanager
def _unlogged() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _weights_file(source: str, architecture: str, weights: str, tags: list[str]) -> Path:
    """Return the safetensors file named after ARCH/, relative or absolute; UsageError if it is none."""
    file = next((place for place in (Path(weights).expanduser(), Path("/", weights)) if place.is_file()), None)
    if file is None:
        known = f"tags: {', '.join(tags) or 'none'}"
        raise UsageError(f"openclip:{source}: {weights!r} is neither a file nor a pretrained tag of {architecture}; {known}")
    if file.suffix != ".safetensors":
        why = "as other formats can carry code; most hub repositories have such a file, too"
        raise UsageError(f"openclip:{source}: a local file has to be .safetensors, {why}")
    return file


def _preprocessing(open_clip: Any, architecture: str) -> dict[str, Any]:
    """Return how the architecture's pretrained models prepare images; UsageError if they differ."""
    tags = [open_clip.get_pretrained_cfg(architecture, tag) for tag in open_clip.list_pretrained_tags_by_model(architecture)]
    known = {json.dumps({key: tag[key] for key in PREPROCESSING if key in tag}) for tag in tags}
    if len(known) > 1:
        mend = "put the weights' open_clip_config.json beside them"
        raise UsageError(f"pretrained models of {architecture} prepare images in different ways; {mend}")
    return json.loads(known.pop()) if known else {}


def _refuse_other_positions(source: str, file: Path, model: nn.Module) -> None:
    """Raise UsageError for weights of another image size or context length; open_clip would interpolate them silently."""
    own = model.state_dict()
    with safe_open(file, framework="pt") as stored:
        for key in sorted(key for key in stored.keys() if key.endswith("positional_embedding") and key in own):  # noqa: SIM118
            shape = tuple(stored.get_slice(key).get_shape())
            if shape != tuple(own[key].shape):
                why = "the file is for another image size or context length; name its own architecture"
                raise UsageError(f"openclip:{source}: {key} is {shape} in the file, {tuple(own[key].shape)} in this architecture: {why}")
