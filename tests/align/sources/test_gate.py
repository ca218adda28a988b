"""The gate lets good images and captions through unchanged, and gives each bad one its own code."""

import gzip
import io
import random
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin, TiffImagePlugin

from align.common.errors import UsageError
from align.common.reject_codes import REJECT_CODES, Reject
from align.sources.gate import GRAY_BITS, GrayCount, Limits, gate_captions, gate_image, gate_key, split_captions

LIMITS = Limits()


def photo(width=64, height=48, seed=0):
    """A smooth RGB picture with noise, so that a JPEG of it has real content."""
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    ramp = np.linspace(0, 190, width)[None, :, None] * np.array([1.0, 0.6, 0.3])
    return Image.fromarray((noise + ramp).astype(np.uint8))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_with(data, name, payload):
    """Insert a chunk after the header chunk of a PNG."""
    return data[:33] + png_chunk(name, payload) + data[33:]


def flipped(data, position):
    return data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]


def rejected(data, limits=LIMITS):
    with pytest.raises(Reject) as caught:
        gate_image(data, limits)
    return caught.value.code


def pixels(data):
    return np.asarray(gate_image(data, LIMITS))


JPEG, PNG = encoded(photo(), "JPEG"), encoded(photo())


def announced_png(side):
    """A PNG whose header announces side x side pixels, which its content does not have."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")


BAD_IMAGES = {
    "none": (None, "image_missing"),
    "empty file": (b"", "image_empty"),
    "HTML named .jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "image_format"),
    "JPEG cut at 50%": (JPEG[: len(JPEG) // 2], "image_damaged"),
    "JPEG cut at 90%": (JPEG[: len(JPEG) * 9 // 10], "image_damaged"),
    "JPEG header only": (JPEG[:20], "image_format"),
    "JPEG marker only": (JPEG[:2], "image_format"),
    "PNG header only": (PNG[:33], "image_format"),
    "PNG cut": (PNG[: len(PNG) // 2], "image_damaged"),
    "PNG with a flipped IDAT byte": (flipped(PNG, len(PNG) // 2), "image_damaged"),
    "PNG with a flipped checksum": (flipped(PNG, len(PNG) - 14), "image_damaged"),
    "20000x20000 PNG": (announced_png(20_000), "image_pixels"),
    "PNG below Pillow's own limit": (announced_png(9_000), "image_pixels"),
    "9000x9000 PNG": (encoded(Image.new("1", (9000, 9000))), "image_pixels"),
    "1x1": (encoded(photo(1, 1)), "image_small"),
    "20000x2": (encoded(photo(20_000, 2)), "image_small"),
    "3000x5": (encoded(photo(3000, 5)), "image_aspect"),
    "zTXt bomb": (png_with(PNG, b"zTXt", b"Comment\0\0" + zlib.compress(bytes(50_000_000))), "image_damaged"),
    "iTXt bomb": (png_with(PNG, b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(50_000_000))), "image_damaged"),
    "ICC bomb": (png_with(PNG, b"iCCP", b"icc\0\0" + zlib.compress(bytes(50_000_000))), "image_damaged"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "image_format"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image_format"),
    "PDF": (b"%PDF-1.7\n1 0 obj\n", "image_format"),
    "gzip of a JPEG": (gzip.compress(JPEG), "image_format"),
    "ICO, not in the whitelist": (encoded(photo(32, 32), "ICO"), "image_format"),
    "float TIFF with NaN": (encoded(Image.fromarray(np.full((8, 8), np.nan, np.float32)), "TIFF"), "image_nonfinite"),
    "float TIFF with infinity": (encoded(Image.fromarray(np.full((8, 8), np.inf, np.float32)), "TIFF"), "image_nonfinite"),
    "a file that could not be read": (Reject("file_missing", "a.jpg"), "file_missing"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_image_is_rejected_with_its_code(case):
    data, code = BAD_IMAGES[case]
    assert rejected(data) == code


def test_huge_image_is_refused_from_its_header():
    start = time.perf_counter()
    assert rejected(BAD_IMAGES["20000x20000 PNG"][0]) == "image_pixels"
    assert time.perf_counter() - start < 0.1


def test_limits_are_applied_exactly():
    data = encoded(photo(40, 10))
    assert gate_image(data, Limits(max_pixels=400, min_side=10, max_aspect=4)).size == (40, 10)
    assert rejected(data, Limits(max_pixels=399)) == "image_pixels"
    assert rejected(data, Limits(min_side=11)) == "image_small"
    assert rejected(data, Limits(max_aspect=3.99)) == "image_aspect"


@pytest.mark.parametrize(
    "setting",
    [
        {"max_pixels": 0}, {"max_pixels": 10**9}, {"min_side": 0}, {"max_aspect": 0.5}, {"max_captions": 40_000},
        {"gray_bits": 7}, {"gray_bits": 17},
    ],
)  # fmt: skip
def test_impossible_limits_are_refused(setting):
    with pytest.raises(UsageError):
        Limits(**setting)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_out_as_they_went_in(kind):
    assert np.array_equal(pixels(encoded(photo(), kind)), np.asarray(photo()))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_lossy_formats_equal_a_plain_decode(kind):
    data = encoded(photo(), kind)
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_is_rescaled_not_clipped(kind):
    for steps in ([0, 1, 128, 255], [2, 3, 4, 5]):  # a narrow range is not stretched
        values = np.repeat(np.array(steps, np.uint16) * 257, 4).reshape(4, 4)
        assert pixels(encoded(Image.fromarray(values), kind))[:, 0].tolist() == [[step] * 3 for step in steps]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(("bits", "white"), [(8, 255), (10, 1023), (12, 4095), (14, 16383), (16, 65535)])
def test_gray_of_fewer_bits_in_16_bit_files_is_rescaled_on_request_and_never_clipped(kind, bits, white):
    steps = np.array([0, white // 4, white // 2, white], np.uint16)
    data = encoded(Image.fromarray(np.repeat(steps, 4).reshape(4, 4)), kind)
    image = gate_image(data, Limits(gray_bits=bits))
    assert np.asarray(image)[:, 0, 0].tolist() == np.rint(steps / white * 255).astype(int).tolist() and image.info[GRAY_BITS] == bits
    assert gate_image(data, LIMITS).info[GRAY_BITS] == bits
    if bits > 8:
        with pytest.raises(Reject, match=rf"image_range: a value of {white}; white is {2 ** (bits - 1) - 1} with --gray-bits {bits - 1}"):
            gate_image(data, Limits(gray_bits=bits - 1))


def test_dark_16_bit_images_are_counted_with_the_flag_that_rescales_them():
    count = GrayCount()
    for bits in (None, 16, 12, 11, None, 0):
        count.add(bits)
    said = "3 of 4 16-bit gray images hold values of 12 bits at most and come out dark: if their white is 4095, give --gray-bits 12"
    assert count.note(16).startswith(said) and count.note(12) == GrayCount().note(16) == ""
    assert "gray_bits" not in gate_image(JPEG, LIMITS).info


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([0, 0.5, 1], [0, 128, 255]),
        ([0.1, 0.2, 0.4], [26, 51, 102]),
        ([-5, 0, 5], [0, 128, 255]),
        ([0, 1000, 4000], [0, 64, 255]),
        ([7, 7, 7], [0, 0, 0]),
        ([-3e38, 0, 3e38], [0, 128, 255]),
    ],
)
def test_float_gray_keeps_unit_range_and_stretches_any_other(rows, expected):
    values = np.repeat(np.array(rows, np.float32), 4)[:, None].repeat(6, 1)
    assert np.abs(pixels(encoded(Image.fromarray(values), "TIFF"))[::4, 0, 0].astype(int) - expected).max() <= 1


def test_32_bit_integers_beyond_16_bits_are_stretched():
    values = np.repeat(np.array([0, 50_000, 100_000], np.int32), 4)[:, None].repeat(6, 1)
    assert pixels(encoded(Image.fromarray(values), "TIFF"))[::4, 0, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_on_white(mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert(mode)
    image.paste((0, 0, 0, 255) if mode == "RGBA" else (0, 255), (0, 0, 4, 8))
    result = pixels(encoded(image))
    assert (result[:, :4] == 0).all() and (result[:, 4:] == 255).all()


def test_half_transparent_black_is_mid_gray():
    assert abs(int(pixels(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 128))))[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_transparent_palette_entry_is_white(kind):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.paste(1, (0, 0, 4, 8))
    result = pixels(encoded(image, kind, transparency=0))
    assert (result[:, :4] == [0, 0, 200]).all() and (result[:, 4:] == 255).all()


def test_transparent_color_of_an_rgb_png_is_white():
    image = Image.new("RGB", (8, 8), (9, 9, 9))
    image.paste((50, 60, 70), (0, 0, 4, 8))
    result = pixels(encoded(image, transparency=(9, 9, 9)))
    assert (result[:, :4] == [50, 60, 70]).all() and (result[:, 4:] == 255).all()


def test_cmyk_jpeg_becomes_rgb():
    result = pixels(encoded(Image.new("RGB", (16, 16), (200, 30, 30)).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(result.astype(int) - [200, 30, 30]).max() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_undone(kind, orientation):
    upright = Image.new("RGB", (32, 16))
    for box, color in (((0, 0, 16, 8), "red"), ((16, 0, 32, 8), "lime"), ((0, 8, 16, 16), "blue"), ((16, 8, 32, 16), "white")):
        upright.paste(color, box)
    stored = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # the inverse of each: Pillow's transpose numbers
    image = upright if stored is None else upright.transpose(Image.Transpose(stored))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    result = gate_image(encoded(image, kind, exif=exif, **options), LIMITS)
    assert result.size == (32, 16)
    assert np.abs(np.asarray(result)[4::8, 8::16].astype(int) - np.asarray(upright)[4::8, 8::16]).max() < 40


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12", b"Exif\0\0"]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_corrupt_exif_leaves_the_image_as_it_is(kind, exif):
    assert gate_image(encoded(photo(), kind, exif=exif), LIMITS).size == (64, 48)


def test_corrupt_color_profile_is_ignored():
    assert gate_image(encoded(photo(), "JPEG", icc_profile=b"not a profile"), LIMITS).size == (64, 48)
    assert np.array_equal(pixels(png_with(PNG, b"iCCP", b"icc\0\0not zlib")), np.asarray(photo()))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    assert (pixels(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)) == [255, 0, 0]).all()


def test_result_is_detached_from_its_file():
    image = gate_image(JPEG, LIMITS)
    assert image.mode == "RGB" and image.getpixel((63, 47)) is not None


def _fuzz_seeds():
    gray = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 900)
    palette = photo(16, 16).convert("P")
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        encoded(photo(24, 16), "JPEG", exif=exif),
        encoded(photo(24, 16), "JPEG", progressive=True),
        encoded(photo(16, 16).convert("CMYK"), "JPEG"),
        encoded(photo(24, 16), pnginfo=_text_chunk()),
        encoded(gray),
        encoded(palette, transparency=3),
        encoded(palette, "GIF", save_all=True, append_images=[photo(16, 16, 1).convert("P")]),
        encoded(photo(24, 16), "WEBP"),
        encoded(photo(24, 16).convert("RGBA"), "WEBP", lossless=True, exif=exif),
        encoded(photo(16, 16), "TIFF", exif=exif),
        encoded(photo(16, 16), "TIFF", compression="tiff_lzw"),
        encoded(photo(16, 16), "TIFF", compression="jpeg"),
        encoded(gray, "TIFF", compression="tiff_adobe_deflate"),
        encoded(photo(16, 16), "BMP"),
        encoded(photo(16, 16), "PPM"),
        b"P3 4 4 255 " + b"9 " * 48,
        b"P2 4 4 65535 " + b"900 " * 16,
    ]


def _text_chunk():
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "words " * 20, zip=True)
    info.add_itxt("Title", "more words", "en", "title", zip=True)
    return info


FUZZ_SEEDS = _fuzz_seeds()


@pytest.mark.parametrize("number", range(len(FUZZ_SEEDS)))
def test_damaged_bytes_give_an_image_or_a_reject_and_nothing_else(number):
    whole = FUZZ_SEEDS[number]
    gate_image(whole, LIMITS)
    draw = random.Random(number)
    limits = Limits(max_pixels=1_000_000)
    for turn in range(120):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 8))):
            # headers decide most, so half of the changes fall into the first bytes
            data[draw.randrange(min(len(data), 200) if turn % 2 else len(data))] = draw.randrange(256)
        if turn % 5 == 0:
            del data[draw.randrange(len(data)) :]
        _image_or_reject(bytes(data), limits)


@settings(max_examples=150, deadline=None)
@given(
    prefix=st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"MM\0*", b"BM", b"P5 ", b"RIFF"]),
    rest=st.binary(max_size=200),
)
def test_arbitrary_bytes_give_an_image_or_a_reject(prefix, rest):
    _image_or_reject(prefix + rest, LIMITS)


def _image_or_reject(data, limits):
    try:
        image = gate_image(data, limits)
    except Reject as reject:
        assert reject.code in REJECT_CODES and str(reject).startswith(reject.code)
    else:
        assert image.mode == "RGB" and image.width * image.height <= limits.max_pixels


def test_tiff_with_a_lying_strip_is_rejected():
    info = TiffImagePlugin.ImageFileDirectory_v2()
    data = encoded(photo(16, 16), "TIFF", tiffinfo=info)
    assert rejected(data[: len(data) // 2]) in ("image_damaged", "image_format")


GOOD_CAPTIONS = {
    "stripped, inner space kept": ("  a  dog \r\n", ["a  dog"]),
    "list": (["a", "b "], ["a", "b"]),
    "tuple": (("a",), ["a"]),
    "emoji": ("a 🐕‍🦺 dog", ["a 🐕‍🦺 dog"]),
    "right to left": ("كلب على العشب", ["كلب على العشب"]),
    "image placeholder": ("<image>\nwhat is it?", ["<image>\nwhat is it?"]),
    "special tokens": ("<|im_start|> </s> [CLS] [INST]", ["<|im_start|> </s> [CLS] [INST]"]),
    "longest allowed": ("x" * 20_000, ["x" * 20_000]),
    "bad items of a list are dropped": (["a", "", None, "b"], ["a", "b"]),
}
BAD_CAPTIONS = {
    "empty": ("", "caption_empty"),
    "blank": (" \t\r\n\u3000", "caption_empty"),
    "null": (None, "caption_missing"),
    "NaN": (float("nan"), "caption_missing"),
    "empty list": ([], "caption_missing"),
    "list of nulls": ([None, None], "caption_missing"),
    "number": (3, "caption_type"),
    "infinity": (float("inf"), "caption_type"),
    "truth value": (True, "caption_type"),
    "bytes": (b"a dog", "caption_type"),
    "object": ({"text": "a dog"}, "caption_type"),
    "list in a list": ([["a dog"]], "caption_type"),
    "100k tokens": ("dog " * 100_000, "caption_large"),
    "NUL": ("a\x00dog", "caption_invalid"),
    "lone surrogate": ("a dog \ud800", "caption_invalid"),
    "too many": (["a"] * 101, "caption_count"),
}


@pytest.mark.parametrize("case", GOOD_CAPTIONS)
def test_good_captions_pass(case):
    value, expected = GOOD_CAPTIONS[case]
    assert gate_captions(value, LIMITS) == expected


@pytest.mark.parametrize("case", BAD_CAPTIONS)
def test_bad_caption_is_rejected_with_its_code(case):
    value, code = BAD_CAPTIONS[case]
    with pytest.raises(Reject) as caught:
        gate_captions(value, LIMITS)
    assert caught.value.code == code


def test_dropped_captions_are_reported():
    good, dropped = split_captions(["a", " ", 5, "b"], LIMITS)
    assert good == ["a", "b"] and [reject.code for reject in dropped] == ["caption_empty", "caption_type"]


@pytest.mark.parametrize(("value", "key"), [("a/b", "a/b"), (12, "12"), ("ключ 🐕", "ключ 🐕"), ("x" * 512, "x" * 512)])
def test_good_keys_pass(value, key):
    assert gate_key(value) == key


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (None, "key_missing"),
        ("", "key_missing"),
        (1.0, "key_invalid"),
        (True, "key_invalid"),
        (["a"], "key_invalid"),
        ("a\x00", "key_invalid"),
        ("\udc80", "key_invalid"),
        ("x" * 513, "key_large"),
        ("é" * 257, "key_large"),
    ],
)
def test_bad_keys_are_rejected(value, code):
    with pytest.raises(Reject) as caught:
        gate_key(value)
    assert caught.value.code == code


def test_a_cut_file_is_rejected_though_another_library_told_pillow_to_accept_it(monkeypatch):
    buffer = io.BytesIO()
    Image.effect_noise((64, 48), 50).convert("RGB").save(buffer, "JPEG")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(Reject, match="image_damaged"):
        gate_image(buffer.getvalue()[: len(buffer.getvalue()) // 2], Limits())
    assert ImageFile.LOAD_TRUNCATED_IMAGES, "the switch is put back"
