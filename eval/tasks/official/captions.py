"""Readers of the Karpathy test splits of COCO and Flickr30k (caption_datasets.zip). COCO's val2017 has other images and is refused."""

import json
from pathlib import Path
from typing import Any

from align.common.errors import DataError
from eval.tasks.official.layout import ManifestRow, Official, OfficialLayout

VAL2017 = (
    "COCO val2017 is not the Karpathy test split: it has 5,000 images too, but others; dataset_coco.json names the right ones, of val2014"
)
_ZIP = "caption_datasets.zip by A. Karpathy, cs.stanford.edu/people/karpathy/deepimagesent"


def coco_karpathy(folder: Path) -> Official:
    """Return COCO's Karpathy test split, 5,000 images of val2014 with all their captions (five or more)."""
    return _karpathy(folder / "dataset_coco.json", "")


def flickr30k_karpathy(folder: Path) -> Official:
    """Return Flickr30k's Karpathy test split, 1,000 images with five captions each."""
    return _karpathy(folder / "dataset_flickr30k.json", "flickr30k-images")


def _karpathy(path: Path, below: str) -> Official:
    """Return the test split in a Karpathy file. Images without `filepath` lie in `below`."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file, object_hook=_only_test)
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); get the file again") from error
    if not isinstance(content, dict) or "annotations" in content or not isinstance(content.get("images"), list):
        said = "COCO's own captions" if isinstance(content, dict) and "annotations" in content else "something else"
        raise DataError(f"{path} holds {said}, not a Karpathy split ({VAL2017}); take the file of that name from caption_datasets.zip")
    rows: list[ManifestRow] = []
    for image in filter(None, content["images"]):
        place = image["filepath"] or below
        if "2017" in place:
            raise DataError(f"{path} lists images of {place}: {VAL2017}")
        name = image["filename"]
        rows.append({"key": name.rpartition(".")[0], "image": f"{place}/{name}", "captions": image["captions"]})
    return Official(rows)


def _only_test(value: dict[str, Any]) -> Any:
    """Return what is needed of a JSON object while it is parsed: all of the file as objects would take gigabytes."""
    if "raw" in value:
        return value["raw"]
    if "sentences" in value and "filename" in value:
        if value.get("split") != "test":
            return None
        return {"filename": value["filename"], "filepath": value.get("filepath", ""), "captions": value["sentences"]}
    return value


CAPTIONS: dict[str, OfficialLayout] = {
    "coco_karpathy": OfficialLayout(
        "retrieval", coco_karpathy, ("dataset_coco.json", "val2014"), f"dataset_coco.json ({_ZIP}) and val2014/*.jpg (cocodataset.org)",
        {"val2017": VAL2017, "annotations/captions_val2017.json": VAL2017},
    ),
    "flickr30k_karpathy": OfficialLayout(
        "retrieval", flickr30k_karpathy, ("dataset_flickr30k.json", "flickr30k-images"),
        f"dataset_flickr30k.json ({_ZIP}) and flickr30k-images/*.jpg (shannon.cs.illinois.edu/DenotationGraph)",
    ),
}  # fmt: skip
