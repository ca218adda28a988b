"""One task to measure: a built-in one, or a user's YAML file with the fields of Task."""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from align.common.errors import UsageError
from align.common.files import expand_home
from align.runtime.recipes_yaml import load_yaml, nearest
from align.sources.samples import Group
from eval.tasks.official.manifest import READERS

PlainLayout = Literal["auto", "webdataset", "folder", "jsonl", "csv", "parquet", "arrow"]
Kind = Literal["classification", "retrieval", "compositional", "segmentation"]
MASKS = {  # the layouts of eval.tasks.masks and their files
    "folder": "a folder of images, one of label PNGs named like them, and a file of class names, one class a line",
    "ade20k": "ADEChallengeData2016: images/validation, annotations/validation and objectInfo150.txt",
    "coco_stuff": "images/val2017, annotations/val2017 (the PNGs of stuffthingmaps) and labels.txt",
    "voc": "VOC2012: JPEGImages, SegmentationClass and ImageSets/Segmentation/val.txt",
}
_LABEL = {"webdataset": "cls"}  # default columns of the label and the captions
_FLAGS = {"image_column": "image", "key_column": "key"}  # flags of align/encode.py that a field has another name for
_CAPTIONS = {"webdataset": "txt", "folder": "txt"}


@dataclass(frozen=True)
class Task:
    """One task to measure: its kind, and where and how its data lies. All paths are relative."""

    id: str
    """Name in results; letters, digits, `.`, `_` and `-`."""
    kind: Kind
    """classification, retrieval, compositional or segmentation."""
    layout: str
    """How the data lies on disk: a PlainLayout, an official one (eval.tasks.official.manifest.READERS), or one of MASKS."""
    path: str
    """The task's folder, or its only file or pattern, relative to the data root."""
    data: str = "."
    """The data in that folder: a file, a folder or a glob."""
    templates: str = "simple"
    """Prompts: the id of a set, or a .txt (templates) or .json (sentences per class) file in the task's folder."""
    classes: str = ""
    """File of class names in the task's folder, one per line: the name of class 0, 1, ..., or `label<TAB>name`."""
    label: str = ""
    """Column of the label. Default: `cls` in tars, the folder's name in folders, else `label`."""
    captions: str = ""
    """Column of the captions. Default: `txt` in tars and folders, else `captions`."""
    image: str = "image"
    """Column of the image."""
    key: str = "key"
    """Column of the sample key."""
    group: str = ""
    """Rows of a table that are one sample: image, key or none, as `--group` of align/encode.py. Default: image for retrieval, else none."""
    image_root: str = ""
    """Folder that image paths start from, relative to the task's folder. Default: the folder of the table."""
    gray_bits: int = 16
    """Bits that 16-bit gray images use, as `--gray-bits` of align/encode.py."""
    key_prefix: str = "none"
    """file: put the path of a row's file before its key, as `--key-prefix` of align/encode.py."""
    protocol: str = ""
    """Compositional: winoground or mmvp. Segmentation: `background` if there is a background class (see eval.tasks.masks)."""
    prefix: str = ""
    """Text before every caption, for example MMVP's `a photo of `."""
    labels: str = "labels"
    """Segmentation: folder of the label PNGs, which are named like the images."""
    ignore: int = 255
    """Segmentation: label value of pixels that do not count."""
    captions_each: int = 0
    """Use the first N captions of each image (five in the Karpathy protocol); 0: all."""
    published: int = 0
    """Number of images in the published protocol, if there is one. A different number is noted with the results."""
    note: str = ""
    """Shown with the numbers, for example what they cannot be compared with."""
    credit: str = ""
    """Authors of the data."""

    def __post_init__(self) -> None:
        every = tuple(dict.fromkeys((*get_args(PlainLayout), *READERS, *MASKS)))
        for name, known in (("kind", get_args(Kind)), ("layout", every)):
            value = getattr(self, name)
            if value not in known:
                raise UsageError(f"task {self.id!r}: unknown {name} {value!r}; {nearest(str(value), known)}")
        fitting = MASKS if self.kind == "segmentation" else tuple(name for name, one in READERS.items() if one.kind == self.kind)
        if self.kind in ("classification", "retrieval"):
            fitting = (*get_args(PlainLayout), *fitting)
        if self.layout not in fitting:
            raise UsageError(f"task {self.id!r}: {self.kind} cannot be read from the layout {self.layout!r}; {', '.join(fitting)} can")
        if self.kind == "compositional" and self.protocol not in ("winoground", "mmvp"):
            raise UsageError(f"task {self.id!r}: protocol {self.protocol!r}; a compositional task is scored by winoground or mmvp")
        for name, allowed in (("group", ("", *get_args(Group))), ("key_prefix", ("none", "file"))):
            if (value := getattr(self, name)) not in allowed:
                raise UsageError(f"task {self.id!r}: unknown {name} {value!r}; {nearest(str(value), allowed)}")
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.id):
            raise UsageError(f"task id {self.id!r}: use letters, digits, '.', '_' and '-' only")

    @property
    def column(self) -> str:
        """The column that holds the label or the captions."""
        if self.layout in READERS:
            return "label" if self.kind == "classification" else "captions"
        if self.kind == "classification":
            return self.label or _LABEL.get(self.layout, "label")
        return self.captions or _CAPTIONS.get(self.layout, "captions")


def read_task_file(path: Path) -> Task:
    """Return the task that a YAML file describes; UsageError for an unknown, missing or wrongly typed field."""
    content = load_yaml(path)
    known = {field.name: field.type for field in fields(Task)}
    if isinstance(content, dict):
        content = {_FLAGS.get(str(key), key): value for key, value in content.items()}
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected `field: value` lines; fields are {', '.join(known)}")
    for key, value in content.items():
        if key not in known:
            raise UsageError(f"{path}: unknown field {key!r}; {nearest(str(key), list(known))}")
        wanted, what, mend = (int, "a whole number", "") if known[key] is int else (str, "text", "; put it in quotes")
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise UsageError(f"{path}: {key} should be {what}, found {value!r}{mend}")
    missing = [field for field in ("id", "kind", "path") if field not in content]
    if missing:
        raise UsageError(f"{path} lacks {', '.join(missing)}; a task needs at least id, kind and path")
    content = {"layout": "auto", **content}
    content |= {key: expand_home(content[key]) for key in ("path", "data", "image_root") if key in content}
    return Task(**content)
