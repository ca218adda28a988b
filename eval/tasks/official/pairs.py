"""Readers of compositional sets (Winoground, MMVP-VLM, your own pairs): caption i belongs to image i of its pair.

A pair becomes a group of two consecutive rows. The layout `pairs` is the kit's own: a JSONL file with {"key", "images": [a, b],
"captions": [a, b], "category"} rows and image paths relative to it.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align.common.errors import DataError
from align.common.reject_codes import Reject
from align.sources.safe_files import parse_json
from eval.tasks.official.layout import ManifestRow, Official, OfficialLayout

MMVP_IMAGES = "MLLM_VLM Images"
_WINOGROUND = ("id", "image_0", "image_1", "caption_0", "caption_1")


def pairs(path: Path) -> Official:
    """Return the pairs in a JSONL file."""
    return Official(_pairs(path))


def winoground(folder: Path) -> Official:
    """Return Winoground from examples.jsonl and images/ (also in data/), or from Hugging Face's parquet files; the category is its tag."""
    for place in (folder, folder / "data"):
        if (place / "examples.jsonl").is_file():
            return Official(_winoground_files(place / "examples.jsonl", place.relative_to(folder) / "images"))
    files = [*sorted(folder.glob("*.parquet")), *sorted(folder.glob("data/*.parquet"))]
    if not files:
        raise DataError(f"{folder} has neither examples.jsonl (beside images/) nor .parquet files; put facebook/winoground there")
    return Official(row for file in files for row in _winoground_parquet(file))


def mmvp_vlm(folder: Path) -> Official:
    """Return MMVP-VLM: two consecutive questions in Questions.csv are a pair. Their type is the category and the images' folder."""
    path = folder / "Questions.csv"
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = [line for line in csv.reader(file) if line][1:]  # 270 of them; the first names the columns
    if len(lines) % 2 or any(len(line) != 3 for line in lines):
        raise DataError(f"{path}: expected Question ID, Type and Statement, two lines a pair; found {len(lines)} lines")
    rows: list[ManifestRow] = []
    for (first, category, one), (second, other, two) in zip(lines[::2], lines[1::2], strict=True):
        if category != other or not first.isdecimal() or second != str(int(first) + 1):
            raise DataError(f"{path}: questions {first} ({category}) and {second} ({other}) are no pair; get the file again")
        names = [f"{MMVP_IMAGES}/{category}/{number}.jpg" for number in (first, second)]
        rows += _group(first, names, [one, two], category)
    return Official(rows)


def _group(key: Any, images: list[Any], captions: list[Any], category: Any) -> list[ManifestRow]:
    shared = {"group": str(key), "category": str(category)}
    both = zip(images, captions, strict=True)
    return [{"key": f"{key}/{n}", "image": image, "captions": [caption], **shared} for n, (image, caption) in enumerate(both)]


def _json_rows(path: Path, wanted: tuple[str, ...]) -> Iterator[tuple[int, ManifestRow]]:
    """Yield (line number, object) of a JSONL file; DataError for a line that is no object or lacks one of `wanted`."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = parse_json(line)
            except Reject as reject:
                raise DataError(f"{path}, line {number}: {reject}; expected one JSON object a line") from reject
            if missing := [name for name in wanted if name not in row]:
                raise DataError(f"{path}, line {number} lacks {', '.join(missing)}")
            yield number, row


def _pairs(path: Path) -> Iterator[ManifestRow]:
    for number, row in _json_rows(path, ("key", "images", "captions")):
        for name in ("images", "captions"):
            if not isinstance(row[name], list) or len(row[name]) != 2 or not all(isinstance(one, str) for one in row[name]):
                raise DataError(f"{path}, line {number}: {name} should be two texts, found {row[name]!r}")
        yield from _group(row["key"], row["images"], row["captions"], row.get("category", ""))


def _winoground_files(path: Path, images: Path) -> Iterator[ManifestRow]:
    for _, row in _json_rows(path, _WINOGROUND):
        names = [str(images / (name if "." in name else f"{name}.png")) for name in (str(row["image_0"]), str(row["image_1"]))]
        yield from _group(row["id"], names, [row["caption_0"], row["caption_1"]], row.get("collapsed_tag", ""))


def _winoground_parquet(path: Path) -> Iterator[ManifestRow]:
    wanted = [*_WINOGROUND, "collapsed_tag"]
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=16, columns=wanted):
            for row in batch.to_pylist():
                images = [row["image_0"]["bytes"], row["image_1"]["bytes"]]
                yield from _group(row["id"], images, [row["caption_0"], row["caption_1"]], row["collapsed_tag"])
    except (pa.ArrowException, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read as Winoground ({error}); expected {', '.join(wanted)}, images with bytes") from error


_READERS: dict[str, tuple[Any, ...]] = {  # the fields of an OfficialLayout after its kind
    "winoground": (winoground, (".",),
        "examples.jsonl and images/ (images.zip unpacked), or data/*.parquet (huggingface.co/datasets/facebook/winoground)"),
    "mmvp_vlm": (mmvp_vlm, ("Questions.csv", MMVP_IMAGES),
        f"Questions.csv and '{MMVP_IMAGES}'/<category>/<number>.jpg (huggingface.co/datasets/MMVP/MMVP_VLM)"),
    "pairs": (pairs, (".",),
        'a JSONL file with {"key", "images": [a, b], "captions": [a, b], "category"} rows, image paths relative to it'),
}  # fmt: skip
PAIRS = {name: OfficialLayout("compositional", *given) for name, given in _READERS.items()}
