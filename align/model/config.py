"""What align/convert.py and align/package.py can be told. Every field is a flag; checked when it is made."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from align.common.checks import check, check_least
from align.common.hardware import Arithmetic, Precision
from align.encoders.config import EncoderFlags
from align.encoders.spec import TextSpec, VisionSpec
from align.encoders.trust import check_trust


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(EncoderFlags):
    """Turn published SAIL weights or embeddings into this kit's formats, or heads back into the published layout."""

    REPLACES: ClassVar[dict[str, tuple[str, ...]]] = {
        **EncoderFlags.REPLACES,
        "heads": ("projector", "model", "to_published", "embeddings"),
        "projector": ("heads", "base", "vision", "text", "model", "to_published", "embeddings"),
        "to_published": ("heads", "base", "vision", "text", "projector", "embeddings", "output"),
        "embeddings": ("heads", "base", "vision", "text", "projector", "model", "to_published"),
    }

    heads: str | None = None
    """Published heads (.pt, .bin, .safetensors), into a model folder."""
    base: str | None = None
    """Model folder that gives what a file with the image head only (vlhead.bin) does not have."""
    projector: str | None = None
    """LLaVA's mm_projector.bin, into a .safetensors file."""
    model: str | None = None
    """Model folder whose heads are written with --to-published."""
    to_published: str | None = None
    """File for the heads of --model in the published layout: .pt or .safetensors."""
    embeddings: str | None = None
    """Folder of published embeddings (0.pt, 1.pt, ... or clip-retrieval's), into a feature store."""
    output: str | None = None
    """Model folder, file or feature store to write."""
    trust_remote_code: bool = False
    """Run code that ships with an encoder: of those on the hub whose revision is pinned, and of local folders."""
    feature: Literal["auto", "cls_mean", "cls", "mean"] = "auto"
    """What the vision encoder pools; SAIL's heads take cls_mean."""
    layer: int = -1
    """Layer of the vision encoder."""
    precision: Precision = "auto"
    """Arithmetic of the encoders (auto: bf16 where this machine's CPU has it)."""
    embed_encoders: bool = False
    """Put copies of the encoders into the model folder, so that it can be moved anywhere."""
    kind: Literal["image", "caption"] | None = None
    """What the embeddings are of."""
    encoder_name: str | None = None
    """What made the embeddings; believed, as it cannot be checked."""
    stated: tuple[str, ...] = ()
    """More of their fingerprint, each as FIELD=VALUE (weights=..., feature=...)."""
    keys: str | None = None
    """File with the keys of .pt embeddings that have none, one a line for all files in order."""
    key_column: str = "image_path"
    """Column of clip-retrieval's metadata that has the keys."""
    shard_rows: int = 65536
    """Rows a shard of the store."""

    def __post_init__(self) -> None:
        given = [name for name in ("heads", "projector", "to_published", "embeddings") if getattr(self, name)]
        wanted = "give exactly one of --heads, --projector, --to-published and --embeddings"
        check(len(given) == 1, " and ".join(given) or "nothing to convert", wanted)
        check(bool(self.output) != bool(self.to_published), f"--output {self.output}", "is needed, but not with --to-published FILE")
        check(bool(self.model) == bool(self.to_published), "--model and --to-published", "give both or neither")
        check(not self.base or bool(self.heads), "--base", "goes with --heads")
        own = not (self.vision or self.text or self.embed_encoders)
        check(not self.base or own, "--base with --vision, --text or --embed-encoders", "the base has its own encoders; leave them out")
        check(not (self.vision or self.text) or bool(self.heads), "--vision and --text", "go with --heads")
        check(not self.embeddings or bool(self.kind and self.encoder_name), "--embeddings", "needs --kind and --encoder-name")
        check(all("=" in given for given in self.stated), f"--stated {' '.join(self.stated)}", "each is FIELD=VALUE")
        check_least(self, shard_rows=1)
        check_trust(self.trust_remote_code, (self.vision, self.vision_revision), (self.text, self.text_revision))

    def encoders(self, precision: Arithmetic) -> tuple[VisionSpec | None, TextSpec | None]:
        """Return what describes both encoders, None where not asked for; `precision` is what `auto` was resolved to."""
        own = {"feature": self.feature, "layer": self.layer}
        return self.specs(own, {}, precision=precision, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True, kw_only=True)
class PackageConfig:
    """Write a model of stage one with copies of its encoders: a folder that opens on any machine."""

    run: str
    """Run folder of align/train.py, also a finished one, or a model folder."""
    output: str
    """Model folder to write."""
    which: Literal["best", "last"] = "best"
    """Which model of the run."""
    vision: str | None = None
    """Where the vision encoder lies, if not where the model says. It has to be the same one."""
    text: str | None = None
    """Where the text encoder lies, if not where the model says. It has to be the same one."""
    trust_remote_code: bool = False
    """Run code that ships with the encoders, to try the copies of those, too."""
