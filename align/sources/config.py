"""Flags of every entry that reads images and captions."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from align.sources.plan import Source


@dataclass(frozen=True, kw_only=True)
class SourceFlags:
    """How samples are read; a base of configs."""

    layout: Literal["auto", "webdataset", "parquet", "jsonl", "csv", "folder"] = "auto"
    """How the data lies on disk."""
    image_column: str = "image"
    """Column with image bytes or a path (parquet, jsonl, csv)."""
    key_column: str = "key"
    """Column with the sample key. Without one, file name and row number make the key."""
    image_root: str | None = None
    """Folder that image paths are relative to. None: the folder of the manifest."""
    workers: int = 2
    """Processes that read and decode images during the forward pass."""

    def source(self, data: str) -> "Source":
        """Return the source that reads `data` (a folder, a file or a glob)."""
        from align.sources.plan import Source  # here, as it loads pyarrow

        return Source(data, self.layout, self.image_column, self.key_column, self.image_root)
