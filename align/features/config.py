"""What align/encode.py can be told. Every field is a flag; checked when it is made."""

from dataclasses import dataclass
from typing import Literal

from align.common.checks import check, check_least, check_share
from align.common.hardware import Arithmetic, Precision
from align.encoders.spec import TextSpec, VisionFeature, VisionSpec
from align.encoders.trust import check_trust


@dataclass(frozen=True)
class EncodeConfig:
    """Encode images and captions once with frozen encoders into feature stores."""

    data: str
    """What to read: a folder, a file or a quoted glob ('shards/*.tar')."""
    output: str
    """Folder for the stores: OUTPUT/images and OUTPUT/captions-COLUMN."""
    vision: str | None = None
    """Vision encoder: hub id, local folder or an `embedded:` id. None: do not encode images."""
    text: str | None = None
    """Text encoder: hub id, local folder or an `embedded:` id. None: do not encode captions."""
    captions: tuple[str, ...] = ()
    """Caption columns to encode, each into a store of its own. A column may hold a list of captions."""
    layout: Literal["auto", "webdataset", "parquet", "jsonl", "csv", "folder"] = "auto"
    """How the data lies on disk."""
    image_column: str = "image"
    """Column with image bytes or a path (parquet, jsonl, csv)."""
    key_column: str = "key"
    """Column with the sample key; without one, file name and row number make the key."""
    image_root: str | None = None
    """Folder that image paths are relative to. None: the folder of the manifest."""
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
    max_length: int | None = None
    """Longest caption in tokens. None: the text encoder's own."""
    precision: Precision = "auto"
    """Arithmetic of the encoders (auto: bf16 where the hardware has it); features are stored in fp16 either way."""
    batch_size: int = 64
    """Images a forward pass."""
    text_batch_size: int = 64
    """Captions a forward pass."""
    workers: int = 2
    """Processes that read and decode images beside the forward pass."""
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
    vision_revision: str | None = None
    """Commit of the vision encoder on the hub."""
    text_revision: str | None = None
    """Commit of the text encoder on the hub."""

    def __post_init__(self) -> None:
        check(bool(self.vision or self.text), "neither --vision nor --text", "name at least one encoder")
        check(bool(self.text) == bool(self.captions), f"--text {self.text} with --captions {self.captions}", "give both or neither")
        check(len(set(self.captions)) == len(self.captions), f"--captions {self.captions}", "name each column once")
        check_least(self, batch_size=1, text_batch_size=1, shard_rows=1, workers=0)
        check_share("max-reject-fraction", self.max_reject_fraction)
        check_trust(self.trust_remote_code, (self.vision, self.vision_revision), (self.text, self.text_revision))

    def encoders(self, precision: Arithmetic) -> tuple[VisionSpec | None, TextSpec | None]:
        """Return what describes both encoders, None where not asked for; `precision` is what `auto` was resolved to."""
        vision, text = None, None
        if self.vision:
            vision = VisionSpec(
                self.vision, self.vision_revision, feature=self.feature, layer=self.layer, image_size=self.image_size,
                precision=precision, trust_remote_code=self.trust_remote_code,
            )  # fmt: skip
        if self.text:
            text = TextSpec(
                self.text, self.text_revision, prompt=self.prompt, max_length=self.max_length, layer=self.text_layer,
                feature="tokens" if self.feature == "tokens" else "pooled", precision=precision, trust_remote_code=self.trust_remote_code,
            )  # fmt: skip
        return vision, text
