"""Frozen vision and text encoders behind one contract, by hub id, local folder or `embedded:` id.

Legend: `B` batch, `P` patches (row by row over the grid), `T` tokens, `D` encoder width, `F` width of the pooled image feature.

Vision models are read through `align.towers`; text models by sentence-transformers with their own pooling, without a closing
`Normalize`. No remote code unless asked for with a pinned commit; weights from safetensors only; a checkpoint that lacks weights
of its architecture is refused.

Fingerprints are flat dicts of what decides a feature. `weights` hashes names, types, shapes and values of the loaded float32
tensors: it depends neither on file format or sharding nor on which layer is read. `encoder` is the hub or `embedded:` id, or the
base name of a local folder, so that a folder can be moved.
"""

import copy
import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import xxhash
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.image_utils import SizeDict
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor
from transformers.utils import logging as transformers_logging

from align.errors import DamagedError, KitError, OfflineError, UsageError
from align.towers import DUAL_ENCODERS, VISION_ADAPTERS, Tower

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Feature = Literal["auto", "cls_mean", "cls", "mean"]
Precision = Literal["fp32", "bf16"]
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
COMMIT_ID = re.compile(r"[0-9a-f]{40}")


# ---------------------------------------------------------------- vision


class Transform:
    """An encoder's own image processor as a picklable function: RGB PIL image -> (3, H, W) float32."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> Tensor:
        return self.processor(image, return_tensors="pt")["pixel_values"][0]

    def canonical(self) -> str:
        """Return the processor's values and backend as JSON; the torchvision and PIL backends differ by up to 0.015."""
        # timm's own transforms work on PIL images and do not name a backend
        backend = "pil" if isinstance(self.processor, TimmWrapperImageProcessor) else self.processor.backend
        return json.dumps({**self.processor.to_dict(), "backend": backend}, sort_keys=True)


class VisionEncoder(nn.Module):
    """A frozen image encoder: always in eval mode, parameters without gradient, features in float32.

    `width` D, `patch_grid` (rows, columns) and `layers` (number of the last layer) are measured at load time. `layer` counts from
    the embeddings (0; CNNs: first stage 1). `feature` is how `pool` makes one vector: `cls_mean`, `cls` or `mean`.
    """

    def __init__(
        self, tower: Tower, transform: Transform, size: tuple[int, int], *, layer: int, feature: Feature, precision: Precision
    ) -> None:
        super().__init__()
        self.tower = tower
        self.transform = transform
        self.precision = precision
        self.layers = tower.count
        self.has_cls = tower.has_cls
        self.layer = _layer_index(layer, tower.first, tower.count)
        self.feature = feature if feature != "auto" else "cls_mean" if self.has_cls else "mean"
        self.id = ""
        self.fingerprint: dict[str, Any] = {}
        tower.truncate(self.layer)
        self.requires_grad_(False).eval()
        _, patches = self.encode(torch.zeros(1, 3, *size))
        self.width = patches.shape[-1]
        self.patch_grid = _grid(patches.shape[1], *size)
        self.feature_width = feature_width(self.width, self.feature, self.has_cls)

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Return self, left in eval mode: a frozen encoder has no training mode."""
        return super().train(False)

    def encode(self, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return cls (B, D) or None and patches (B, P, D) of pixels (B, 3, H, W): float32, after the final norm, no registers."""
        return self.encode_layers(pixels, [self.layer])[0]

    def encode_layers(self, pixels: Tensor, layers: Sequence[int]) -> list[tuple[Tensor | None, Tensor]]:
        """Return what `encode` returns, for several layers in one forward; UsageError for a layer that was not loaded."""
        indices = [_layer_index(layer, self.tower.first, self.layers) for layer in layers]
        if max(indices) > self.layer:
            raise UsageError(
                f"layer {max(indices)} is not there: this encoder was loaded with layer={self.layer}; load it with layer=-1"
            )
        device = next(self.tower.parameters()).device
        pixels = pixels.to(device, non_blocking=True)
        if self.tower.cnn:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with _autocast(device, self.precision):
            outputs = self.tower(pixels, indices)
        return [self._split(tokens.float()) for tokens in outputs]

    def _split(self, tokens: Tensor) -> tuple[Tensor | None, Tensor]:
        return (tokens[:, 0] if self.has_cls else None), tokens[:, self.tower.prefix :]

    def pool(self, cls: Tensor | None, patches: Tensor) -> Tensor:
        """Return the image feature (B, F), not normalized: `[cls ; mean(patches)]`, `cls` or the mean of the patches."""
        if self.feature == "mean":
            return patches.mean(1)
        assert cls is not None
        return cls if self.feature == "cls" else torch.cat([cls, patches.mean(1)], dim=-1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the image feature (B, F) of pixels (B, 3, H, W)."""
        return self.pool(*self.encode(pixels))

    def dense(self, pixels: Tensor) -> Tensor:
        """Return `[cls ; patch]` for each patch (B, P, 2D), or the patches (B, P, D) of an encoder without CLS."""
        cls, patches = self.encode(pixels)
        return patches if cls is None else torch.cat([cls[:, None].expand_as(patches), patches], dim=-1)


def feature_width(width: int, feature: str, has_cls: bool) -> int:
    """Return the width F of the pooled feature; UsageError if the feature needs a CLS token that the encoder does not have."""
    widths = {"auto": 2 * width if has_cls else width, "cls_mean": 2 * width, "cls": width, "mean": width}
    if feature not in widths:
        raise UsageError(f"feature={feature!r} is unknown; allowed: {', '.join(widths)}")
    if feature.startswith("cls") and not has_cls:
        raise UsageError(f"feature={feature!r} needs a CLS token, which this encoder does not have; use feature='mean' or 'auto'")
    return widths[feature]


def load_vision_encoder(
    name: str,
    *,
    feature: Feature = "auto",
    layer: int = -1,
    precision: Precision = "fp32",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    image_size: int | None = None,
) -> VisionEncoder:
    """Return the frozen vision encoder `name`: a hub id, a local folder or an `embedded:` id.

    `layer` counts from 0 (embeddings) or from the end (-1 = last); a ViT's inner layers also pass the final norm. `bf16` is
    autocast over float32 weights. `image_size` in pixels scales the processor's resize and crop to another shorter side.
    Raises UsageError (unknown id, model type, layer or feature; missing files or weights), OfflineError, DamagedError.
    """
    _require_precision(precision)
    source = _resolve(name, revision, trust_remote_code)
    remote: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    known = f"known model types: {', '.join(sorted(VISION_ADAPTERS))}"
    with _loading(name, f"{VISION_FILES}; {known}"):
        config = AutoConfig.from_pretrained(source, **remote)
        if config.model_type not in VISION_ADAPTERS:
            raise UsageError(f"{name}: model_type {config.model_type!r} has no vision adapter; {known}")
        processor = AutoImageProcessor.from_pretrained(source, **remote)
        model, report = AutoModel.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **remote,
        )
    missing = report["missing_keys"]
    if config.model_type in DUAL_ENCODERS:
        model = model.vision_model
        missing = {key.removeprefix("vision_model.") for key in missing if key.startswith("vision_model.")}
    tower = VISION_ADAPTERS[config.model_type](model)
    feature_width(1, feature, tower.has_cls)
    _require_complete(name, missing, tower.unused)
    weights = _hash_weights(model, tower.unused)
    transform = Transform(processor)
    if image_size is not None:
        transform = _resized(name, transform, image_size)
    size = _output_size(name, transform)
    if image_size is not None and config.model_type == "timm_wrapper" and hasattr(model.timm_model, "set_input_size"):
        model.timm_model.set_input_size(img_size=size)
    if tower.cnn:
        tower.to(memory_format=torch.channels_last)
    try:
        encoder = VisionEncoder(tower.to(device), transform, size, layer=layer, feature=feature, precision=precision)
    except (RuntimeError, ValueError, AssertionError) as error:
        if isinstance(error, KitError):
            raise
        raise UsageError(f"{name} does not take images of {size[0]} x {size[1]} pixels ({_first_line(error)})") from error
    encoder.id = name
    encoder.fingerprint = {
        "encoder": _recorded_id(name),
        "weights": weights,
        "preprocessing": transform.canonical(),
        "feature": encoder.feature,
        "layer": encoder.layer,
        "precision": precision,
    }
    return encoder


def _layer_index(layer: int, first: int, count: int) -> int:
    index = layer if layer >= 0 else count + 1 + layer
    if not first <= index <= count:
        raise UsageError(f"layer={layer} is out of range; allowed: {first} to {count}, or {first - count - 1} to -1")
    return index


def _grid(patches: int, height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of `patches`, the pair of factors nearest to the image's aspect ratio."""
    rows = [n for n in range(1, patches + 1) if patches % n == 0]
    best = min(rows, key=lambda n: abs(math.log(n * n / patches * width / height)))
    return best, patches // best


def _output_size(name: str, transform: Transform) -> tuple[int, int]:
    """Return (H, W) of the transform's output; UsageError if it depends on the image, as such outputs cannot be batched."""
    shapes = {tuple(transform(Image.new("RGB", size)).shape) for size in ((320, 240), (240, 320), (97, 101))}
    if len(shapes) > 1 or len(next(iter(shapes))) != 3:
        raise UsageError(
            f"{name}: its image processor gives outputs of different shapes, {sorted(shapes)}; "
            "set a fixed `size` (height and width) or `do_center_crop` with a `crop_size` in preprocessor_config.json"
        )
    _, height, width = next(iter(shapes))
    return height, width


def _resized(name: str, transform: Transform, image_size: int) -> Transform:
    """Return a copy of `transform` whose resize and crop are scaled so that the shorter side of its output is `image_size`."""
    scale = image_size / min(_output_size(name, transform))
    processor = copy.deepcopy(transform.processor)
    if isinstance(processor, TimmWrapperImageProcessor):
        channels, height, width = processor.data_config["input_size"]
        data = {**processor.data_config, "input_size": (channels, round(height * scale), round(width * scale))}
        processor = TimmWrapperImageProcessor(pretrained_cfg=data)
    else:
        for key in ("size", "crop_size"):
            sides = getattr(processor, key)
            if sides is not None:
                setattr(processor, key, SizeDict(**{side: round(value * scale) for side, value in dict(sides).items()}))
    resized = Transform(processor)
    if min(_output_size(name, resized)) != image_size:
        raise UsageError(f"{name}: its image processor cannot be scaled to image_size={image_size}; leave image_size out")
    return resized


# ---------------------------------------------------------------- text


class TextEncoder(nn.Module):
    """A frozen text encoder: its own pooling, no normalization, always in eval mode, parameters without gradient.

    `prompt` is put before each text by `encode` and `encode_tokens`; `max_length` is in tokens, special tokens included.
    """

    model: Any  # a SentenceTransformer

    def __init__(self, model: "SentenceTransformer", *, prompt: str, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.prompt = prompt
        self.precision = precision
        self.id = ""
        self.fingerprint: dict[str, Any] = {}
        self.max_length: int = self.model.max_seq_length
        self.tokenizer = model.tokenizer
        self.requires_grad_(False).eval()
        blank = model.preprocess(["a"], prompt=prompt)
        # a pooling that leaves the prompt out needs to know its length
        self._prompt = {key: blank[key] for key in ("prompt_length",) if key in blank}
        self.width = self.encode(["a"], batch_size=1).shape[1]

    def train(self, mode: bool = True) -> "TextEncoder":
        """Return self, left in eval mode: a frozen encoder has no training mode."""
        return super().train(False)

    def encode(self, texts: list[str], batch_size: int) -> Tensor:
        """Return embeddings (B, D), float32 on the CPU, not normalized, in the order of `texts`; batches are sorted by length."""
        if not texts:
            return torch.empty(0, self.width)
        with _autocast(self.model.device, self.precision):
            embeddings = self.model.encode(
                texts, batch_size=batch_size, prompt=self.prompt, convert_to_tensor=True, show_progress_bar=False
            )
        return embeddings.to("cpu", torch.float32).clone()  # inference tensors cannot be trained on; their clone can

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return embeddings (B, D), float32, of token ids (B, T) that `tokenizer` made, the prompt included."""
        features = {"input_ids": input_ids, "attention_mask": attention_mask, **self._prompt}
        with _autocast(self.model.device, self.precision):
            return self.model(features)["sentence_embedding"].float()

    def encode_tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return token embeddings before pooling (B, T, D), float32, and their mask (B, T), bool, on the encoder's device."""
        features = self.model.preprocess(texts, prompt=self.prompt)
        moved = {key: value.to(self.model.device) if isinstance(value, Tensor) else value for key, value in features.items()}
        with _autocast(self.model.device, self.precision):
            output = self.model[0](moved)
        return output["token_embeddings"].float(), output["attention_mask"].bool()


def load_text_encoder(
    name: str,
    *,
    prompt: str = "",
    max_length: int | None = None,
    precision: Precision = "fp32",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> TextEncoder:
    """Return the frozen text encoder `name`: a hub id, a local folder or an `embedded:` id.

    A sentence-transformers folder is read with its own modules, without a closing `Normalize`; a plain Hugging Face folder gets
    sentence-transformers' default, the masked mean (decoders: the last token). A default prompt of the model is not applied.
    Raises UsageError (unknown id, missing files or weights, max_length), OfflineError, DamagedError.
    """
    # imported here as it takes seconds, which vision users need not wait for
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer

    _require_precision(precision)
    source = _resolve(name, revision, trust_remote_code)
    remote: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _loading(name, TEXT_FILES):
        kwargs = {"dtype": torch.float32, "use_safetensors": True}
        model: Any = SentenceTransformer(source, device="cpu", model_kwargs=kwargs, **remote)
        if not isinstance(model[0], Transformer):
            raise UsageError(
                f"{name}: its first module is {type(model[0]).__name__}; choose a text encoder that is a transformer"
            )
        language_model = model[0].auto_model
        # sentence-transformers does not tell which weights were missing; loading without data does
        _, report = type(language_model).from_pretrained(
            language_model.name_or_path,
            config=language_model.config,
            device_map="meta",
            use_safetensors=True,
            output_loading_info=True,
            **remote,
        )
    _require_complete(name, report["missing_keys"], TEXT_UNUSED)
    if isinstance(model[-1], Normalize):
        del model[-1]
    _limit_length(name, model, max_length)
    encoder = TextEncoder(model.to(device), prompt=prompt, precision=precision)
    encoder.id = name
    encoder.fingerprint = {
        "encoder": _recorded_id(name),
        "weights": _hash_weights(model, tuple(f"0.model.{key}" for key in TEXT_UNUSED)),
        "preprocessing": f"tokenizer {_hash_tokenizer(model.tokenizer)}",
        "pooling": json.dumps([{"type": type(module).__name__, **module.get_config_dict()} for module in list(model)[1:]], default=str),
        "prompt": prompt,
        "max_length": encoder.max_length,
        "truncation_side": model.tokenizer.truncation_side,
        "precision": precision,
        "normalized": "no",
    }
    return encoder


def _limit_length(name: str, model: "SentenceTransformer", max_length: int | None) -> None:
    """Set the longest input in tokens; one longer than the folder says is tried out, as position tables end somewhere."""
    own = model.max_seq_length
    if max_length is None:
        if own is None or own > 1 << 20:
            raise UsageError(f"{name} does not say how long a text may be; pass max_length")
        return
    if max_length < 1:
        raise UsageError(f"max_length={max_length} must be at least 1 token")
    model.max_seq_length = max_length
    if own is not None and max_length > own:
        try:
            model.encode(["a " * max_length])
        except (IndexError, RuntimeError) as error:
            raise UsageError(f"max_length={max_length} is more than {name} has positions for; {own} is sure to work") from error


def _hash_tokenizer(tokenizer: Any) -> str:
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        content = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}  # these follow the calls
    else:
        content = tokenizer.get_vocab()
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


# ---------------------------------------------------------------- shared by both


VISION_FILES = "needed are config.json, preprocessor_config.json (timm: only config.json) and model.safetensors"
TEXT_FILES = "needed are config.json, the tokenizer's files, model.safetensors and, for its own pooling, modules.json"
TEXT_UNUSED = ("pooler.",)  # BERT's pooler is not part of any sentence-transformers pooling


def _resolve(name: str, revision: str | None, trust_remote_code: bool) -> str:
    """Return the local folder or hub id to open."""
    if name.startswith("embedded:"):
        from align.assets import resolve

        return resolve(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
            raise UsageError(f"{name} has no config.json; vision encoders: {VISION_FILES}; text encoders: {TEXT_FILES}")
        return str(folder)
    if name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        raise UsageError(f"{name!r} is not a folder; give an existing folder, a hub id (owner/name) or an embedded: id")
    if trust_remote_code and not COMMIT_ID.fullmatch(revision or ""):
        raise UsageError(f"{name}: remote code runs only from a pinned commit; pass revision= with the 40 hex digits of one")
    return name


@contextmanager
def _loading(name: str, needed: str) -> Iterator[None]:
    """Turn what the libraries raise while opening `name` into one line, and silence their load reports and bars meanwhile."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except KitError:
        raise
    except SafetensorError as error:
        raise DamagedError(f"{name}: the weights cannot be read ({_first_line(error)}); fetch or copy them again") from error
    except (OSError, ValueError, RuntimeError) as error:
        if any(sign in str(error) for sign in ("couldn't connect", "offline mode", "Cannot reach", "ConnectError")):
            raise OfflineError(
                f"{name} is not a local folder, and the hub is out of reach ({_first_line(error)}); give a downloaded folder"
            ) from error
        raise UsageError(f"{name} cannot be opened ({_first_line(error)}); {needed}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _recorded_id(name: str) -> str:
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.is_dir() else name


def _require_precision(precision: str) -> None:
    if precision not in ("fp32", "bf16"):
        raise UsageError(f"precision={precision!r} is unknown; allowed: fp32, bf16")


def _require_complete(name: str, missing: Iterable[str], unused: tuple[str, ...]) -> None:
    """Refuse a checkpoint that lacks weights a feature depends on: they would be random."""
    lacking = sorted(key for key in missing if _is_used(key, unused))
    if lacking:
        raise UsageError(
            f"{name} lacks {len(lacking)} weights of its architecture, such as {lacking[0]}; use a complete checkpoint"
        )


def _is_used(key: str, unused: tuple[str, ...]) -> bool:
    return not key.startswith(unused) and not key.endswith("num_batches_tracked")


def _hash_weights(model: nn.Module, unused: tuple[str, ...]) -> str:
    """Return the xxh3-128 over names, types, shapes and bytes of the tensors that features depend on, sorted by name."""
    digest = xxhash.xxh3_128()
    for key, value in sorted(model.state_dict().items()):
        if _is_used(key, unused):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the context of an encoder's forward; it also shields an fp32 encoder from an outer autocast."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def load_transform(name: str, *, image_size: int | None = None, revision: str | None = None) -> Transform:
    """Return the transform of the vision encoder `name` without its weights; arguments and errors as `load_vision_encoder`."""
    source = _resolve(name, revision, trust_remote_code=False)
    with _loading(name, VISION_FILES):
        transform = Transform(AutoImageProcessor.from_pretrained(source, revision=revision))
    return transform if image_size is None else _resized(name, transform, image_size)


def copy_encoder(name: str, folder: Path, revision: str | None = None) -> None:
    """Copy the files that load the encoder `name` (json, txt, model, safetensors; no code, no other weights) to `folder`."""
    source = Path(_resolve(name, revision, trust_remote_code=False))
    if not source.is_dir():
        with _loading(name, "a downloaded snapshot"):
            source = Path(snapshot_download(name, revision=revision, local_files_only=True))
    for file in source.rglob("*"):
        if file.is_file() and file.suffix in (".json", ".txt", ".model", ".safetensors"):
            target = folder / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
