"""Tasks by exact id: what is measured, where its data belongs, in which layout, and by which protocol.

The ids are the usual ones of each data set. A task of one's own is a YAML file with the fields of Task; its data may lie in an
official layout too, or in one that `align.sources.plan` or `eval.tasks.masks` reads.
"""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from align.common.errors import UsageError
from align.common.recipes_yaml import load_yaml, nearest
from eval.tasks.official.layout import OWN_NAMES
from eval.tasks.official.manifest import READERS

PlainLayout = Literal["webdataset", "folder", "jsonl", "csv", "parquet"]
Kind = Literal["classification", "retrieval", "compositional", "segmentation"]
MASKS = ("folder", "ade20k", "coco_stuff", "voc")  # the layouts of eval.tasks.masks
OWN_TEMPLATES = "zeroshot_classification_templates.txt"  # in a data set's folder: templates that win over its published ones
_LABEL = {"webdataset": "cls"}  # where the label or the captions are unless the task says so
_CAPTIONS = {"webdataset": "txt", "folder": "txt"}


@dataclass(frozen=True)
class Task:
    """One thing to measure: what kind, where its data lies and how it is laid out. All paths are relative."""

    id: str
    """Name in results; letters, digits, `.`, `_` and `-`."""
    kind: Kind
    """classification, retrieval, compositional or segmentation."""
    layout: str
    """How the data lies on disk: a PlainLayout, an official one (eval.tasks.official.manifest.READERS), or one of MASKS."""
    path: str
    """The task's folder, below the data root."""
    data: str = "."
    """The data in that folder: a file, a folder or a glob."""
    templates: str = "simple"
    """Prompts: the id of a set, or a .txt (templates) or .json (sentences of each class) file in the task's folder."""
    classes: str = ""
    """File of class names in the task's folder, one a line: the name of class 0, 1, ... or `label<TAB>name`."""
    label: str = ""
    """Column of the label; by default `cls` in tars, the folder's name in folders, else `label`."""
    captions: str = ""
    """Column of the captions; by default `txt` in tars and folders, else `captions`."""
    image: str = "image"
    """Column of the image."""
    key: str = "key"
    """Column of the sample key."""
    protocol: str = ""
    """How a compositional task is scored: winoground or mmvp. Segmentation: whether there is a background class (see eval.tasks.masks)."""
    prefix: str = ""
    """Put before every caption, for example MMVP's `a photo of `."""
    labels: str = "labels"
    """Segmentation: folder of the label PNGs, named like the images."""
    ignore: int = 255
    """Segmentation: label value of pixels that do not count."""
    captions_each: int = 0
    """Take the first so many captions of each image (five in the Karpathy protocol); 0: all."""
    published: int = 0
    """Images of the published protocol, if there is one: another number of them is noted with the results."""
    note: str = ""
    """Shown with the numbers, for example what they may not be compared with."""
    credit: str = ""
    """Whom the data is by."""

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


DEMONSTRATION = (
    "Sprite scenes are a small embedded demonstration: drawn pictures with exact answers. Their numbers show that the kit works "
    "and what was learned; they cannot be compared with published ones."
)
_TWEMOJI = "Graphics: Twemoji by Twitter, Inc. and other contributors, CC-BY 4.0."
_NO_SPLIT = "The data set has no test split: all of its images are measured, where published tables use splits of their own."
_IMAGENET_V2 = "imagenetv2-matched-frequency-format-val"


def _sprites(part: str, kind: Kind, layout: str, data: str, templates: str = "simple", classes: str = "", protocol: str = "") -> Task:
    """Return a task on the sprite scenes that `make quickstart` draws."""
    name = f"sprites-{part}"
    return Task(name, kind, layout, name, data, templates, classes, protocol=protocol, note=DEMONSTRATION, credit=_TWEMOJI)


def _photos(name: str, path: str, published: int = 0, note: str = "", templates: str = "") -> Task:
    """Return a classification task whose official layout has its name, with the templates that clip_benchmark ships for it."""
    return Task(name, "classification", name, path, templates=templates or f"clip:{name}", published=published, note=note)


def _masks(name: str, layout: str, path: str, published: int, protocol: str = "") -> Task:
    return Task(name, "segmentation", layout, path, templates="imagenet80", published=published, protocol=protocol)


_TASKS = (
    _sprites("seen", "classification", "webdataset", "test/*.tar", OWN_TEMPLATES, OWN_NAMES),
    _sprites("unseen", "classification", "webdataset", "test/*.tar", OWN_TEMPLATES, OWN_NAMES),
    _sprites("retrieval", "retrieval", "jsonl", "retrieval.jsonl"),
    _sprites("swapped", "compositional", "pairs", "pairs.jsonl", protocol="winoground"),
    _sprites("segmentation", "segmentation", "folder", "images", "sprites", "classes.txt"),
    Task("imagenet1k", "classification", "imagenet", "imagenet", templates="imagenet80", published=50_000),
    Task("imagenetv2", "classification", "imagenetv2", _IMAGENET_V2, templates="imagenet80", published=10_000),
    _photos("food101", "food-101", 25_250),
    _photos("cifar10", "cifar-10-batches-bin", 10_000),
    _photos("cifar100", "cifar-100-binary", 10_000),
    _photos("sun397", "SUN397", 19_850, "Test half of the first official partition; CLIP_benchmark measures all 108,754 images."),
    _photos("cars", "stanford_cars", 8_041),
    _photos("fgvc_aircraft", "fgvc-aircraft-2013b", 3_333),
    _photos("dtd", "dtd", 1_880, "First of ten official test splits."),
    _photos("pets", "oxford-iiit-pet", 3_669),
    _photos("caltech101", "caltech101", 0, f"{_NO_SPLIT} BACKGROUND_Google, which is no category, is left out: 101 classes."),
    _photos("flowers", "flowers-102", 6_149),
    _photos("eurosat", "eurosat", 0, _NO_SPLIT),
    _photos("ucf101", "ucf101", 3_783, "Middle frames of the first official test list; video models see whole clips.", "ucf101"),
    _photos("cub", "CUB_200_2011", 5_794, templates="cub"),
    Task("coco_karpathy", "retrieval", "coco_karpathy", "coco", captions_each=5, published=5_000),
    Task("flickr30k_karpathy", "retrieval", "flickr30k_karpathy", "flickr30k", captions_each=5, published=1_000),
    Task("winoground", "compositional", "winoground", "winoground", protocol="winoground", published=800),
    Task("mmvp_vlm", "compositional", "mmvp_vlm", "MMVP_VLM", protocol="mmvp", prefix="a photo of ", published=270),
    _masks("ade20k", "ade20k", "ADEChallengeData2016", 2_000),
    _masks("coco_stuff164k", "coco_stuff", "coco_stuff164k", 5_000),
    _masks("voc20", "voc", "VOCdevkit/VOC2012", 1_449),
    _masks("voc21", "voc", "VOCdevkit/VOC2012", 1_449, "background"),
)
TASKS: dict[str, Task] = {task.id: task for task in _TASKS}


def find_task(name: str) -> Task:
    """Return the task of that exact id, or the one a YAML file describes; UsageError for an unknown id, key or value."""
    if not name.endswith((".yaml", ".yml")):
        if name not in TASKS:
            raise UsageError(f"unknown task {name!r}; {nearest(name, sorted(TASKS))} (a task of your own is a YAML file)")
        return TASKS[name]
    content = load_yaml(Path(name))
    known = [field.name for field in fields(Task)]
    if not isinstance(content, dict):
        raise UsageError(f"{name}: expected `field: value` lines; fields are {', '.join(known)}")
    for key, value in content.items():
        if key not in known:
            raise UsageError(f"{name}: unknown field {key!r}; {nearest(str(key), known)}")
        wanted = next(field.type for field in fields(Task) if field.name == key)
        if not isinstance(value, int if wanted is int else str) or isinstance(value, bool):
            what = "a whole number" if wanted is int else "text"
            raise UsageError(f"{name}: {key} should be {what}, found {value!r}" + ("" if wanted is int else "; put it in quotes"))
    missing = [field for field in ("id", "kind", "layout", "path") if field not in content]
    if missing:
        raise UsageError(f"{name} lacks {', '.join(missing)}; a task needs at least id, kind, layout and path")
    if content["id"] in TASKS:
        raise UsageError(f"{name}: the id {content['id']!r} is taken by a built-in task; choose another")
    return Task(**content)


# what a segmentation layout holds; the other layouts say it where they are read
SEGMENTATION_FILES = {
    "folder": "a folder of images, one of label PNGs named like them, and a file of class names, one class a line",
    "ade20k": "ADEChallengeData2016: images/validation, annotations/validation and objectInfo150.txt",
    "coco_stuff": "images/val2017, annotations/val2017 (the PNGs of stuffthingmaps) and labels.txt",
    "voc": "VOC2012: JPEGImages, SegmentationClass and ImageSets/Segmentation/val.txt",
}


def describe(task: Task) -> str:
    """Return one line on a task: id, kind, where its data belongs and in which form, and the images of the published protocol."""
    place = Path("DATA_ROOT", task.path, task.data)
    readers = {layout: reader.what for layout, reader in READERS.items()}
    what = (SEGMENTATION_FILES if task.kind == "segmentation" else readers).get(task.layout, task.layout)
    return f"{task.id}: {task.kind}, {place}, {what}" + (f"; {task.published:,} images" if task.published else "")
