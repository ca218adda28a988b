"""Flags of every entry that reads images and captions."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from align.sources.plan import Source


@dataclass(frozen=True, kw_only=True)
class SourceFlags:
    """How samples are read; a base of configs."""

    layout: Literal["auto", "webdataset", "parquet", "arrow", "jsonl", "csv", "folder"] = "auto"
    """How the data lies on disk."""
    image_column: str = "image"
    """Column with image bytes or a path (parquet, arrow, jsonl, csv)."""
    key_column: str = "key"
    """Column with the sample key. Without one, file name and row number make the key."""
    image_root: str | None = None
    """Folder that image paths are relative to. None: the folder of the manifest."""
    group: Literal["image", "key", "none"] = "image"
    """Rows that are one sample with all their captions. image: those with one image path, or the same image bytes (in parquet and tars).
    key: those with one key, whose first row gives the image. none: each row is a sample, and copies of an image are negatives of each
    other."""
    key_prefix: Literal["none", "file"] = "none"
    """file: put the path of a row's file before its key, for data sets whose files count from 0 each."""
    gray_bits: int = 16
    """Bits that 16-bit gray images use: 12 for the X-ray and CT images whose white is 4095. Brighter images are rejected."""
    workers: int = 2
    """Processes that read and decode images during the forward pass."""

    def source(self, data: str) -> "Source":
        """Return the source that reads `data` (a folder, a file or a glob)."""
        from align.sources.plan import Source  # here, as it loads pyarrow

        return Source(data, self.layout, self.image_column, self.key_column, self.image_root, self.group, self.key_prefix, self.gray_bits)
