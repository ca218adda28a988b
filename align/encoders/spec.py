"""Which frozen encoder is meant and what is read of it: the one description that configs, stores, models and loaders share.

Imports no torch, so that configs are read fast.
"""

from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any, Literal

from align.common.checks import check
from align.common.hardware import Arithmetic
from align.encoders.trust import may_run_code

VisionFeature = Literal["auto", "cls_mean", "cls", "mean", "tokens"]
TextFeature = Literal["pooled", "tokens"]
_OF_THE_RUN = ("precision", "trust_remote_code")  # not stored: the fingerprint holds the one, each user decides about the other


@dataclass(frozen=True)
class EncoderSpec:
    """A frozen encoder: `name` is a hub id, a local folder or an `embedded:` id, `revision` a commit on the hub.

    `precision` bf16 is autocast over float32 weights. `trust_remote_code` lets code run that ships with the encoder, but only from a
    local folder or a pinned commit. UsageError for an unknown precision.
    """

    name: str
    revision: str | None = None
    _: KW_ONLY
    precision: Arithmetic = "fp32"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check(self.precision in ("fp32", "bf16"), f"precision={self.precision!r} is unknown", "allowed: fp32, bf16")

    @property
    def from_pretrained(self) -> dict[str, Any]:
        """What `from_pretrained` of transformers is told besides the name."""
        trusted = may_run_code(self.name, self.revision, self.trust_remote_code)
        return {"revision": self.revision, "trust_remote_code": trusted}

    def stored(self) -> dict[str, Any]:
        """Return what store.json (`loader`) and SailConfig (`vision`, `text`) keep: the fields that open the same encoder again."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_THE_RUN}


@dataclass(frozen=True, kw_only=True)
class VisionSpec(EncoderSpec):
    """A vision encoder. `layer` counts from 0 (embeddings; CNNs: first stage 1) or from the end (-1 = last).

    `feature` is what is made of an image's tokens: `[cls ; mean of patches]`, one of them, whichever of cls_mean and mean the encoder
    has (auto), or all tokens. `image_size` in pixels scales the processor's resize and crop to another shorter side.
    """

    feature: VisionFeature = "auto"
    layer: int = -1
    image_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class TextSpec(EncoderSpec):
    """A text encoder. `prompt` is put before each text; `max_length` is in tokens (None: the encoder's own).

    `feature` pooled is the encoder's own pooling, tokens keeps all of them. `layer` k stops after block k (from 1), -1 is the last.
    """

    prompt: str = ""
    max_length: int | None = None
    feature: TextFeature = "pooled"
    layer: int = -1
