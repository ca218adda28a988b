"""Flags of every entry that takes one vision and one text encoder: which ones."""

from dataclasses import dataclass
from typing import Any, ClassVar

from align.encoders.spec import TextSpec, VisionSpec


@dataclass(frozen=True, kw_only=True)
class EncoderFlags:
    """A vision and a text encoder, either may be left out; a base of configs."""

    REPLACES: ClassVar[dict[str, tuple[str, ...]]] = {"vision": ("vision_revision",), "text": ("text_revision",)}

    vision: str | None = None
    """Vision encoder: hub id, local folder or an `embedded:` id. None: no images are encoded."""
    text: str | None = None
    """Text encoder: hub id, local folder or an `embedded:` id. None: no captions are encoded."""
    vision_revision: str | None = None
    """Commit of the vision encoder on the hub."""
    text_revision: str | None = None
    """Commit of the text encoder on the hub."""
    max_length: int | None = None
    """Longest caption in tokens. None: the text encoder's own. Set it for token heads: captions are padded to it."""

    def specs(self, vision: dict[str, Any], text: dict[str, Any], **both: Any) -> tuple[VisionSpec | None, TextSpec | None]:
        """Return the specs of both encoders, None where not asked for; the arguments are further fields of one or both."""
        return (
            VisionSpec(self.vision, self.vision_revision, **vision, **both) if self.vision else None,
            TextSpec(self.text, self.text_revision, max_length=self.max_length, **text, **both) if self.text else None,
        )
