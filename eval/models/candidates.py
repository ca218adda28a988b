"""The models that a measurement compares: SailModels, freshly initialised twins of them, and dual encoders trained as one.

Shapes: `B` images, `P` patches, `F` image feature width, `D` text feature width, `E` aligned width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from align.common.errors import UsageError
from align.common.files import hash_bytes
from align.encoders.loading import hash_weights
from align.model.dual_encoder import SailModel
from align.model.heads import ImageTokenHead, TextTokenHead
from align.model.saving import model_folder
from align.model.token_heads import TextWithHead, VisionWithHead
from eval.measures.config import EvalConfig
from eval.models.baselines import open_baseline
from eval.results.records import ModelRecord

HUGGING_FACE, OPEN_CLIP = "hf:", "openclip:"


class ImageEncoder(Protocol):
    """What `align.features.extract.Extraction` asks of the encoder of images; pixels (B, 3, H, W) of `transform` give features (B, F)."""

    @property
    def transform(self) -> Callable[..., Tensor]:
        """RGB image -> pixels (3, H, W)."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides a feature."""

    @property
    def feature_width(self) -> int:
        """F."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return features (B, F) float32, not normalised."""


class SentenceEncoder(Protocol):
    """The encoder of sentences."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides a feature."""

    def encode(self, texts: list[str], batch_size: int) -> Tensor:
        """Return features (T, D) float32, not normalised, in the order of `texts`."""


class DualEncoder(Protocol):
    """Two frozen encoders and what maps their features into one space. Features are kept; aligning them is cheap.

    The encoders are asked for only when features are not known yet. `scale` is the t of the logits t <x, y>.
    """

    @property
    def vision_fingerprint(self) -> dict[str, Any]:
        """What decides an image feature."""

    @property
    def text_fingerprint(self) -> dict[str, Any]:
        """What decides a text feature."""

    @property
    def vision_encoder(self) -> ImageEncoder:
        """The encoder of images, on `device`."""

    @property
    def text_encoder(self) -> SentenceEncoder:
        """The encoder of texts, on `device`."""

    @property
    def device(self) -> torch.device:
        """Where features are aligned."""

    @property
    def scale(self) -> float:
        """t of the model's logits."""

    @property
    def patch_size(self) -> int:
        """Pixels a side of a patch of `encode_patches`."""

    @property
    def patch_fingerprint(self) -> dict[str, Any]:
        """What decides `encode_patches`: models that agree in it share one forward pass."""

    def project_image(self, features: Tensor) -> Tensor:
        """Return (..., E) L2-normalised float32 embeddings of image features (..., F)."""

    def project_text(self, features: Tensor) -> Tensor:
        """Return (..., E) L2-normalised float32 embeddings of text features (..., D)."""

    def encode_patches(self, pixels: Tensor) -> Tensor:
        """Return what `project_patches` takes, for pixels (B, 3, H, W)."""

    def project_patches(self, features: Tensor) -> Tensor:
        """Return (B, P, E) L2-normalised float32 patch embeddings, row by row over the grid of patches."""


@dataclass(frozen=True)
class SailDualEncoder:
    """A SailModel as a DualEncoder; its encoders are loaded, and checked, when they are first asked for."""

    sail: SailModel

    @property
    def vision_fingerprint(self) -> dict[str, Any]:
        """The fingerprint of `vision_encoder`, known without loading it; a token head's weights are part of it."""
        return _with_head(self.sail.config.vision_fingerprint, self.sail.vision_head)

    @property
    def text_fingerprint(self) -> dict[str, Any]:
        """The fingerprint of `text_encoder`, known without loading it; a token head's weights are part of it."""
        return _with_head(self.sail.config.text_fingerprint, self.sail.text_head)

    @property
    def vision_encoder(self) -> Any:
        """The frozen vision encoder, with a token head after it if there is one; FingerprintError if it is another one."""
        encoder, head = self.sail.vision_encoder, self.sail.vision_head
        return VisionWithHead(encoder, head, self.vision_fingerprint) if isinstance(head, ImageTokenHead) else encoder

    @property
    def text_encoder(self) -> Any:
        """The frozen text encoder, with a token head after it if there is one; FingerprintError if it is another one."""
        encoder, head = self.sail.text_encoder, self.sail.text_head
        return TextWithHead(encoder, head, self.text_fingerprint) if isinstance(head, TextTokenHead) else encoder

    @property
    def device(self) -> torch.device:
        """Where the heads are."""
        return self.sail.device

    @property
    def scale(self) -> float:
        """t of the model's logits."""
        return self.sail.logit_scale.detach().exp().item()

    @property
    def patch_size(self) -> int:
        """Pixels a side of a patch."""
        return int(self.sail.vision_encoder.patch_size)

    @torch.no_grad()
    def project_image(self, features: Tensor) -> Tensor:
        """Return (..., E) embeddings of image features (..., F); a token head's output (..., E) is only normalized."""
        if isinstance(self.sail.vision_head, ImageTokenHead):
            return functional.normalize(features.float(), dim=-1)
        return self.sail.project_image(features)

    @torch.no_grad()
    def project_text(self, features: Tensor) -> Tensor:
        """Return (..., E) embeddings of text features (..., D); a token head's output (..., E) is only normalized."""
        if isinstance(self.sail.text_head, TextTokenHead):
            return functional.normalize(features.float(), dim=-1)
        return self.sail.project_text(features)

    @property
    def patch_fingerprint(self) -> dict[str, Any]:
        """The frozen encoder's fingerprint, whatever the head."""
        return self.sail.config.vision_fingerprint

    @torch.no_grad()
    def encode_patches(self, pixels: Tensor) -> Tensor:
        """Return each patch as [cls ; patch], or as the patch alone (of token heads: token rows), as the frozen encoder gives it."""
        return self.sail.vision_encoder.dense(pixels)

    @torch.no_grad()
    def project_patches(self, features: Tensor) -> Tensor:
        """Return (B, P, E) embeddings of `encode_patches` through the image head."""
        return self.sail.project_patches(features)


def _with_head(fingerprint: dict[str, Any], head: nn.Module) -> dict[str, Any]:
    token_head = isinstance(head, (ImageTokenHead, TextTokenHead))
    return {**fingerprint, "head": hash_weights(head, ())} if token_head else fingerprint


@dataclass(frozen=True)
class Candidate:
    """A model to measure and what results say about it."""

    record: ModelRecord
    model: DualEncoder


def split_name(given: str) -> tuple[str, str]:
    """Return (name, model) of PATH, NAME=PATH, openclip:ARCH/TAG, hf:FOLDER or NAME= before one of these; no name is "".

    What exists as a path is one, whatever `=` it holds, and a NAME has no `/` or `:`.
    """
    name, equals, rest = given.partition("=")
    if not (name and equals and rest) or "/" in name or ":" in name or Path(given).exists():
        return "", given
    return name, rest


def open_models(config: EvalConfig, device: str) -> list[Candidate]:
    """Return the models to measure in the order given, then each SailModel with untrained heads if a baseline is wanted."""
    pairs = [split_name(given) for given in config.model]
    baselines = [model.startswith((HUGGING_FACE, OPEN_CLIP)) for _, model in pairs]
    alone = baselines.count(False) == 1
    names = [
        name or (model.partition(":")[2] if baseline else "trained" if alone else model)
        for (name, model), baseline in zip(pairs, baselines, strict=True)
    ]
    if len(set(names)) < len(names):
        raise UsageError(f"two models have the same name ({', '.join(names)}); name them: --model NAME=PATH NAME=PATH")
    folders = [None if baseline else _folder(model) for (_, model), baseline in zip(pairs, baselines, strict=True)]
    given, untrained = [], []
    for name, (_, model), folder in zip(names, pairs, folders, strict=True):
        if folder is None:
            given.append(_baseline(name, model, device))
            continue
        sail = SailModel.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        given.append(candidate(name, "trained", sail, str(folder), device))
        if config.baseline:
            other = "untrained" if alone else f"{name} untrained"
            untrained.append(candidate(other, "untrained", sail.untrained(config.seed), "", device))
    return given + untrained


def _folder(model: str) -> Path:
    try:
        return model_folder(Path(model))
    except UsageError as error:
        raise UsageError(f"{error}, or name a model to compare with: {OPEN_CLIP}ARCH/TAG or {HUGGING_FACE}FOLDER") from error


def candidate(name: str, kind: str, model: SailModel, folder: str, device: str = "cpu") -> Candidate:
    """Return a model with its record: encoders, heads, and fingerprints of all three."""
    settings = model.config
    encoders = [Path(str(side.get("name", "encoded features"))).name for side in (settings.vision, settings.text)]
    heads = hash_bytes(b"".join(value.numpy(force=True).tobytes() for _, value in sorted(model.state_dict().items())))
    fingerprint = {f"vision {name}": value for name, value in settings.vision_fingerprint.items()}
    fingerprint |= {f"text {name}": value for name, value in settings.text_fingerprint.items()} | {"heads": heads}
    state = "" if kind == "trained" else "freshly initialized "
    description = f"{encoders[0]} + {encoders[1]}, {state}{settings.head} heads to {settings.width} dimensions"
    nn.Module.to(model, torch.device(device))
    return Candidate(ModelRecord(name, kind, description, folder, fingerprint), SailDualEncoder(model))


def _baseline(name: str, model: str, device: str) -> Candidate:
    """Return a dual encoder that was trained as one, with its record of kind clip."""
    library, _, source = model.partition(":")
    opened = open_baseline(library, source, device)
    fingerprint = {f"vision {name}": value for name, value in opened.vision_fingerprint.items()}
    fingerprint |= {f"text {name}": value for name, value in opened.text_fingerprint.items()}
    description = f"{opened.description}, trained as one on images and texts, {opened.width} dimensions"
    return Candidate(ModelRecord(name, "clip", description, "", fingerprint), opened)
