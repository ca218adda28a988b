"""Built-in tasks by exact id: where their data belongs, its layout, and the protocol of the measurement."""

from pathlib import Path

from align.common.errors import UsageError
from align.runtime.recipes_yaml import nearest
from eval.tasks.official.layout import OWN_NAMES
from eval.tasks.official.manifest import READERS
from eval.tasks.task import MASKS, Kind, Task, read_task_file

OWN_TEMPLATES = "zeroshot_classification_templates.txt"  # in a data set's folder: replaces the published templates
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
    """Return a classification task whose layout has its name, with clip_benchmark's templates unless others are given."""
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
    """Return the task with exactly that id, or the one in a YAML file; UsageError for an unknown id, key or value."""
    if not name.endswith((".yaml", ".yml")):
        if name not in TASKS:
            raise UsageError(f"unknown task {name!r}; {nearest(name, sorted(TASKS))} (a task of your own is a YAML file)")
        return TASKS[name]
    task = read_task_file(Path(name))
    if task.id in TASKS:
        raise UsageError(f"{name}: the id {task.id!r} is taken by a built-in task; choose another")
    return task


def describe(task: Task) -> str:
    """Return one line about a task: id, kind, place and form of its data, and the published number of images."""
    place = Path("DATA_ROOT", task.path, task.data)
    readers = {layout: reader.what for layout, reader in READERS.items()}
    what = (MASKS if task.kind == "segmentation" else readers).get(task.layout, task.layout)
    return f"{task.id}: {task.kind}, {place}, {what}" + (f"; {task.published:,} images" if task.published else "")
