"""What align/encode.py can be told. Every field is a flag; checked when it is made."""

from dataclasses import dataclass

from align.common.checks import check, check_least, check_share
from align.common.hardware import Arithmetic, Precision
from align.encoders.config import EncoderFlags
from align.encoders.spec import TextSpec, VisionFeature, VisionSpec
from align.encoders.trust import check_trust
from align.sources.config import SourceFlags


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(EncoderFlags, SourceFlags):
    """Encode images and captions once with frozen encoders into feature stores."""

    data: str
    """What to read: a folder, a file or a quoted glob ('shards/*.tar')."""
    output: str
    """Folder for the stores: OUTPUT/images and OUTPUT/captions-COLUMN."""
    captions: tuple[str, ...] = ()
    """Caption columns to encode, each into a store of its own. A column may hold a list of captions."""
    feature: VisionFeature = "auto"
    """What is pooled: [cls ; mean of patches], one of them, or whichever of cls_mean and mean the encoder has. tokens: nothing,
    all tokens of images and captions are kept for `--head token` (526 KB an image of ViT-L; set --max-length, too)."""
    layer: int = -1
    """Layer to take features from; -1 is the last, k the output of block k (final norm applied)."""
    image_size: int | None = None
    """Input side in pixels, if not the encoder's own."""
    text_layer: int = -1
    """Layer of the text encoder; -1 is the last."""
    prompt: str = ""
    """Text put before every caption."""
    precision: Precision = "auto"
    """Arithmetic of the encoders (auto: bf16 where the hardware has it); features are stored in fp16 either way."""
    batch_size: int = 64
    """Images a forward pass."""
    text_batch_size: int = 64
    """Captions a forward pass."""
    shard_rows: int = 32768
    """Samples a shard: the unit of work, commit and restart."""
    max_pixels: int = 64_000_000
    """Images with more pixels are rejected from their header."""
    max_reject_fraction: float = 0.05
    """Stop when a larger share of samples is rejected."""
    max_rejects_in_a_row: int = 100
    """Stop when so many samples in a row are rejected."""
    job: str | None = None
    """Name of the job; processes that give the same name share the work (SLURM arrays, several hosts)."""
    verify: bool = False
    """Read every committed byte again and compare hashes, then exit."""
    dry_run: bool = False
    """Check the data, predict size and disk, encode nothing."""
    trust_remote_code: bool = False
    """Run code that ships with an encoder: of those on the hub whose revision is pinned, and of local folders."""

    def __post_init__(self) -> None:
        check(bool(self.vision or self.text), "neither --vision nor --text", "name at least one encoder")
        given = f"--text {self.text} with --captions {' '.join(self.captions) or 'not given'}"
        both = "give both or neither; --captions names the columns that hold captions (of tars and folders: suffixes, such as txt)"
        check(bool(self.text) == bool(self.captions), given, both)
        check(len(set(self.captions)) == len(self.captions), f"--captions {self.captions}", "name each column once")
        check_least(self, batch_size=1, text_batch_size=1, shard_rows=1, workers=0)
        check_share("max-reject-fraction", self.max_reject_fraction)
        check_trust(self.trust_remote_code, (self.vision, self.vision_revision), (self.text, self.text_revision))

    def encoders(self, precision: Arithmetic) -> tuple[VisionSpec | None, TextSpec | None]:
        """Return what describes both encoders, None where not asked for; `precision` is what `auto` was resolved to."""
        return self.specs(
            {"feature": self.feature, "layer": self.layer, "image_size": self.image_size},
            {"feature": "tokens" if self.feature == "tokens" else "pooled", "layer": self.text_layer, "prompt": self.prompt},
            precision=precision, trust_remote_code=self.trust_remote_code,
        )  # fmt: skip
