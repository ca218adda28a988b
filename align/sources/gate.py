"""The gate decodes every image completely and checks every caption. Bad ones are rejected with a code, never repaired."""

import io
import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from align.common.errors import UsageError
from align.common.reject_codes import Reject

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # what Pillow may try; nothing with scripts or outside references
MAX_KEY_BYTES = 512
_ORIENTATION = 0x0112  # EXIF tag
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
# what Pillow's decoders raise on hostile bytes (RuntimeError includes NotImplementedError and RecursionError)
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError,
    EOFError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
GRAY_BITS = "gray_bits"  # in the info of a decoded image
FULL_BITS, DARK_BITS = 16, 14
_TRUNCATED = "LOAD_TRUNCATED_IMAGES"  # the name of Pillow's process-wide switch


@dataclass(frozen=True)
class Limits:
    """Limits of a usable sample. A sample beyond them is rejected, never shrunk or cut to fit."""

    max_pixels: int = 64_000_000  # width x height in the header, checked before decoding
    min_side: int = 4  # pixels of the shorter side
    max_aspect: float = 50.0  # longer side / shorter side
    max_caption_chars: int = 20_000  # Unicode code points of one caption
    max_captions: int = 100  # captions in one cell
    gray_bits: int = 16  # of 16-bit gray: its white is 2**gray_bits - 1

    def __post_init__(self) -> None:
        highest = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        if not 1 <= self.max_pixels <= highest:
            raise UsageError(f"max_pixels is {self.max_pixels}; allowed is 1 to {highest}, where Pillow itself refuses an image")
        if not 8 <= self.gray_bits <= 16:
            raise UsageError(f"--gray-bits {self.gray_bits}: 8 to 16 bits of a 16-bit gray image can hold values")
        if self.min_side < 1 or self.max_aspect < 1 or self.max_caption_chars < 1 or not 1 <= self.max_captions <= 32_767:
            raise UsageError(f"{self}: all limits must be at least 1, and max_captions at most 32767")


def gate_image(data: bytes | Reject | None, limits: Limits) -> Image.Image:
    """Return the image file `data` as a decoded, upright, 8-bit RGB image. Raise Reject if it is bad, and if `data` is None or a Reject.

    Formats: see FORMATS. An animation gives its first frame. EXIF orientation is applied; damaged EXIF and color profiles are ignored.
    Transparency is composited on white. 16-bit gray is scaled so that 2**gray_bits - 1 is white; `info[GRAY_BITS]` then says how many
    bits its largest value has. Float gray within [0, 1] is multiplied by 255. Other float gray, and 32-bit integers outside 16 bits, are
    stretched from their minimum and maximum to 0..255.
    """
    if data is None:
        raise Reject("image_missing")
    if isinstance(data, Reject):
        raise data
    if not data:
        raise Reject("image_empty")
    with warnings.catch_warnings(), _complete_files_only():  # process-wide: call it in worker processes, not in threads
        warnings.simplefilter("ignore")  # about corrupt EXIF and large images, which are checked here
        image = _open(data)
        _check_size(image.size, limits)
        try:
            if image.format == "PNG":
                _open(data).verify()  # checksums of all chunks, which decoding does not check
            image.load()
            method = _TRANSPOSE.get(_orientation(image))
            converted = _to_rgb(image, limits.gray_bits)
        except _DECODER_ERRORS as error:
            raise Reject("image_damaged", f"{image.format} {image.mode}: {error}") from error
    return converted if method is None else converted.transpose(method)


@contextmanager
def _complete_files_only() -> Iterator[None]:
    """Make Pillow refuse truncated files in the block, whatever another library (for example lmms-eval) has set."""
    allowed = getattr(ImageFile, _TRUNCATED)
    setattr(ImageFile, _TRUNCATED, False)
    try:
        yield
    finally:
        setattr(ImageFile, _TRUNCATED, allowed)


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise Reject("image_format", f"{len(data)} bytes beginning with {data[:16]!r}") from error
    except Image.DecompressionBombError as error:
        raise Reject("image_pixels", str(error)) from error
    except _DECODER_ERRORS as error:
        raise Reject("image_damaged", str(error)) from error


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise Reject("image_pixels", f"{width}x{height}, at most {limits.max_pixels} pixels are allowed")
    if min(size) < limits.min_side:
        raise Reject("image_small", f"{width}x{height}, at least {limits.min_side} pixels a side are needed")
    if max(size) > limits.max_aspect * min(size):
        raise Reject("image_aspect", f"{width}x{height}, at most {limits.max_aspect:g} to 1 is allowed")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF or XMP orientation (1 to 8), or 1 if none is readable."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except _DECODER_ERRORS:
        return 1


def _to_rgb(image: Image.Image, gray_bits: int) -> Image.Image:
    if image.mode in _SIXTEEN_BITS or image.mode in ("I", "F"):
        return _to_eight_bits(image, gray_bits).convert("RGB")
    if image.mode in _ALPHA or "transparency" in image.info:
        if image.mode in ("RGBa", "La"):  # premultiplied: only to its own plain mode
            image = image.convert(image.mode.upper())
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image, gray_bits: int) -> Image.Image:
    """Return 16-bit, 32-bit or float gray (H, W) as 8-bit gray. Raise Reject `image_nonfinite` for NaN or infinity."""
    bits = None
    values = np.asarray(image)
    if image.mode == "F" and not np.isfinite(values).all():
        raise Reject("image_nonfinite")
    low, high = float(values.min()), float(values.max())
    if image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif image.mode != "F" and low >= 0 and high <= 65_535:
        bits, white = int(high).bit_length(), 2**gray_bits - 1
        if high > white:
            raise Reject("image_range", f"a value of {high:.0f}; white is {white} with --gray-bits {gray_bits}")
        low, high = 0.0, float(white)
    scale = 255 / (high - low) if high > low else 0.0
    gray = values.astype(np.float32)
    gray *= scale  # before the shift, so that float32 cannot overflow
    gray -= low * scale
    scaled = Image.fromarray(np.rint(gray, out=gray).clip(0, 255).astype(np.uint8))
    if bits is not None:
        scaled.info[GRAY_BITS] = bits
    return scaled


@dataclass
class GrayCount:
    """How many 16-bit gray images were seen, and how many of them hold values of 14 bits or fewer, which come out dark."""

    seen: int = 0
    dark: int = 0
    bits: int = 0  # of the largest value in a dark one

    def add(self, bits: int | None) -> None:
        """Count an image by its `info.get(GRAY_BITS)`."""
        if bits is not None:
            self.seen += 1
            self.dark += bits <= DARK_BITS
            self.bits = max(self.bits, bits if bits <= DARK_BITS else 0)

    def note(self, gray_bits: int) -> str:
        """Return a warning, or "" if no image comes out dark or --gray-bits was given."""
        if not self.dark or gray_bits < FULL_BITS:
            return ""
        largest = 2 ** max(8, self.bits) - 1
        return (
            f"{self.dark} of {self.seen} 16-bit gray images hold values of {self.bits} bits at most and come out dark: if their white is "
            f"{largest}, give --gray-bits {max(8, self.bits)} (of a task: `gray_bits`)"
        )


def gate_captions(value: Any, limits: Limits) -> list[str]:
    """Return the usable captions (at least one) of a cell with a text or a list of texts. Raise Reject if none is usable."""
    return split_captions(value, limits)[0]


def split_captions(value: Any, limits: Limits) -> tuple[list[str], list[Reject]]:
    """Return (usable captions, rejects of the others). Raise the first Reject if no caption is usable."""
    values = value if isinstance(value, list | tuple) else [value]
    if not values:
        raise Reject("caption_missing", "an empty list")
    if len(values) > limits.max_captions:
        raise Reject("caption_count", f"{len(values)} captions, at most {limits.max_captions} are allowed")
    good, dropped = list[str](), list[Reject]()
    for item in values:
        try:
            good.append(_gate_caption(item, limits))
        except Reject as reject:
            dropped.append(reject)
    if not good:
        raise dropped[0]
    return good, dropped


def _gate_caption(value: Any, limits: Limits) -> str:
    if isinstance(value, Reject):  # of a row that has none
        raise value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise Reject("caption_missing", repr(value))
    if not isinstance(value, str):
        raise Reject("caption_type", f"{type(value).__name__} {str(value)[:50]!r}")
    text = value.strip()  # nothing else changes: `<image>` and special tokens are plain text
    if not text:
        raise Reject("caption_empty")
    if len(text) > limits.max_caption_chars:
        raise Reject("caption_large", f"{len(text)} characters, at most {limits.max_caption_chars} are allowed")
    if problem := text_problem(text):
        raise Reject("caption_invalid", problem)
    return text


def gate_key(value: Any) -> str:
    """Return a sample's key as text; a whole number becomes its digits. Raise Reject if it cannot identify a row."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None or value == "" or value != value:  # NaN, which pandas writes into empty cells
        raise Reject("key_missing")
    if not isinstance(value, str):
        raise Reject("key_invalid", f"{type(value).__name__} {str(value)[:50]!r}")
    if problem := text_problem(value):
        raise Reject("key_invalid", problem)
    if len(value.encode()) > MAX_KEY_BYTES:
        raise Reject("key_large", f"{len(value.encode())} bytes, at most {MAX_KEY_BYTES} are allowed")
    return value


def text_problem(text: str) -> str:
    """Return why `text` cannot be stored as UTF-8 ("a NUL character", "a lone surrogate ..."), or "" if it can."""
    if "\x00" in text:
        return "a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"a lone surrogate at character {error.start}"
    return ""
