"""Readers of segmentation sets (ADE20K, COCO-Stuff, VOC, your own): images with a class for every pixel, and class names with synonyms.

`eval.tasks.task.MASKS` lists the files of each layout. Commas separate several names of a class: `person, man, woman`. With the
protocol `background`, VOC's class 0 is a class with many names (VOC21). Without, its pixels are ignored (VOC20).
Shapes: `N` images, `C` classes, `S` names of all classes, `H` and `W` pixels of an image.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash
from PIL import Image

from align.common.errors import DataError, UsageError
from align.common.files import hash_bytes
from align.common.reject_codes import Reject
from align.sources.gate import Limits, gate_image
from align.sources.safe_files import MAX_FILE_BYTES, read_below
from eval.tasks.prompts import read_lines
from eval.tasks.task import MASKS, Task

IGNORED = -1  # class of pixels that do not count
_UNKNOWN = -2
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_LABEL_MODES = ("L", "P", "1", "I;16", "I;16B", "I")  # one number a pixel
_COCO_GAPS = frozenset((11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90))  # ids of COCO that no picture has: 182 - 11 = 171 classes
_VOC = (
    "aeroplane, airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table, table", "dog",
    "horse", "motorbike, motorcycle", "person", "potted plant", "sheep", "sofa, couch", "train", "tv monitor, television",
)  # fmt: skip
# typical content of VOC's unlabeled pixels; papers differ, so this list and the names above are our choice (`classes` replaces them)
_VOC_BACKGROUND = (
    "background, sky, cloud, wall, ceiling, floor, window, door, curtain, building, fence, road, pavement, grass, tree, bush, "
    "mountain, sand, water, sea, river, snow, rock, shelf, cabinet, lamp, bed"
)


@dataclass(frozen=True)
class SegmentationData:
    """The images of a task that have a good label map."""

    task: Task
    folder: Path
    keys: tuple[str, ...]
    files: tuple[tuple[str, str], ...]  # image below image_root, label map below label_root
    image_root: str
    label_root: str
    class_names: tuple[str, ...]  # (C,) the first name of each class
    names: tuple[str, ...]  # (S,) the names of all classes
    owner: np.ndarray  # (S,) int64 class of each name
    classes_of: np.ndarray = field(repr=False)  # (65536,) int16: the class of each label value, IGNORED or _UNKNOWN
    rejected: dict[str, int]
    images_digest: str  # of keys and encoded images
    digest: str  # of everything measured: also of label maps and names
    remarks: tuple[str, ...] = ()  # as of eval.tasks.data.TaskData

    def image(self, number: int) -> Image.Image:
        """Return image `number` as RGB; DataError if its file has changed."""
        try:
            return gate_image(read_below(self.image_root, self.files[number][0], MAX_FILE_BYTES), Limits())
        except Reject as reject:
            raise self._changed(number, reject) from reject

    def truth(self, number: int) -> np.ndarray:
        """Return the classes (H, W) int16 of image `number`, IGNORED where pixels do not count; DataError as in `image`."""
        path = self.files[number][1]
        try:
            return _classes(gate_labels(read_below(self.label_root, path, MAX_FILE_BYTES), Limits()), self.classes_of, path)
        except Reject as reject:
            raise self._changed(number, reject) from reject

    def _changed(self, number: int, reject: Reject) -> DataError:
        return DataError(f"image {self.keys[number]!r} of {self.task.id} changed while it was measured ({reject}); run again")


@dataclass(frozen=True)
class _Layout:
    """The files of a layout: (image, label map) paths below their folders, class names, and the class of each label value."""

    images: Path
    labels: Path
    files: list[tuple[str, str]]
    names: tuple[tuple[str, ...], ...]
    values: dict[int, int]


def load_segmentation(task: Task, data_root: Path, *, max_reject_fraction: float = 0.05) -> SegmentationData:
    """Return the images of a segmentation task; DataError, which says what to put where, if its data is missing or unusable.

    Every file is decoded once. Pairs that are damaged, incomplete or of different sizes are left out and counted by reject code, up to
    `max_reject_fraction`. A label value that is no class is an error, because it would falsify the result.
    """
    assert task.kind == "segmentation", "eval.tasks.data reads the others"
    folder = data_root / task.path
    found = _layout(task, folder)
    classes_of = np.full(1 << 16, _UNKNOWN, dtype=np.int16)
    classes_of[list(found.values)] = list(found.values.values())
    image_root, label_root = str(found.images.resolve()), str(found.labels.resolve())
    good, rejected = list[tuple[str, tuple[str, str]]](), Counter[str]()
    pixels, content = xxhash.xxh3_128(), xxhash.xxh3_128(repr((found.names, sorted(found.values.items()))).encode())
    stems = Counter(_stem(image) for image, _ in found.files)
    for image, label in found.files:
        key = _stem(image)
        code, hashes = _check(image_root, image, label_root, label, classes_of)
        if stems[key] > 1 or code:
            rejected["duplicate_key" if stems[key] > 1 else code] += 1
            continue
        good.append((key, (image, label)))
        pixels.update(f"{key}\0{hashes[0]}\0".encode())
        content.update(hashes[1].encode())
    if not good or len(good) < (1 - max_reject_fraction) * len(found.files):
        shown = ", ".join(f"{code} {count}" for code, count in rejected.most_common()) or "there is none"
        usable = f"{len(good)} of {len(found.files)} images in {found.images} are usable ({shown}); expected {MASKS[task.layout]}"
        raise DataError(f"task {task.id!r}: {usable}. Mend the data, or raise --max-reject-fraction")
    content.update(pixels.digest())
    return SegmentationData(
        task=task,
        folder=folder,
        keys=tuple(key for key, _ in good),
        files=tuple(pair for _, pair in good),
        image_root=image_root,
        label_root=label_root,
        class_names=tuple(names[0] for names in found.names),
        names=tuple(name for names in found.names for name in names),
        owner=np.repeat(np.arange(len(found.names)), [len(names) for names in found.names]),
        classes_of=classes_of,
        rejected=dict(rejected),
        images_digest=pixels.hexdigest(),
        digest=content.hexdigest(),
    )


def _layout(task: Task, folder: Path) -> _Layout:
    if task.protocol not in ("", "background"):
        raise UsageError(f"task {task.id!r}: protocol {task.protocol!r} is unknown; allowed: background, or none")
    if not folder.is_dir():
        raise DataError(f"task {task.id!r} has no data: put {MASKS[task.layout]} in {folder}, or give another --data-root")
    return LAYOUTS[task.layout](task, folder)


def gate_labels(data: bytes, limits: Limits) -> np.ndarray:
    """Return the numbers (H, W) of an encoded label PNG, or its palette indices; Reject as in `gate_image`, DataError for colors."""
    gate_image(data, limits)  # decodes all of it, within limits
    image = Image.open(io.BytesIO(data))
    if image.format != "PNG" or image.mode not in _LABEL_MODES:
        raise DataError(f"a label map is a PNG with one number a pixel (8 or 16 bits, or a palette); found {image.format} {image.mode}")
    return np.asarray(image)


def split_names(line: str) -> tuple[str, ...]:
    """Return the names of a class from one line, split at commas (or semicolons, as in ADE20K's CSV)."""
    return tuple(name.strip() for name in re.split("[,;]", line) if name.strip())


def _check(image_root: str, image: str, label_root: str, label: str, classes_of: np.ndarray) -> tuple[str, tuple[str, str]]:
    """Return the reject code of one pair (or "") and the hashes of image and label map."""
    try:
        encoded = read_below(image_root, image, MAX_FILE_BYTES)
        size = gate_image(encoded, Limits()).size
    except Reject as reject:
        return reject.code, ("", "")
    try:
        labels = read_below(label_root, label, MAX_FILE_BYTES)
        numbers = gate_labels(labels, Limits())
    except Reject as reject:
        return f"label_{reject.code.partition('_')[2]}", ("", "")
    except DataError as error:
        raise DataError(f"{Path(label_root) / label}: {error}") from error
    if numbers.shape != size[::-1]:
        return "label_size", ("", "")
    _classes(numbers, classes_of, str(Path(label_root) / label))
    return "", (hash_bytes(encoded), hash_bytes(labels))


def _classes(numbers: np.ndarray, classes_of: np.ndarray, path: str) -> np.ndarray:
    within = (numbers >= 0) & (numbers < len(classes_of))
    classes = np.where(within, classes_of[np.where(within, numbers, 0).astype(np.int64)], np.int16(_UNKNOWN))
    if (classes == _UNKNOWN).any():
        value = int(numbers[classes == _UNKNOWN].flat[0])
        known = np.flatnonzero(classes_of != _UNKNOWN)
        wrong = f"the label value {value}, which is no class; {len(known)} values from {known[0]} to {known[-1]} are known"
        raise DataError(f"{path} has {wrong}. Mend the label map, the file of class names, or the task's `ignore`")
    return classes


def _stem(path: str) -> str:
    return path.rpartition(".")[0]


def _pairs(folder: Path, pattern: str = "**/*") -> list[tuple[str, str]]:
    """Return the (image, label map) paths of matching images, relative to `folder` and sorted: a/b.jpg has a/b.png."""
    found = (path for path in folder.glob(pattern) if path.suffix.lower() in _SUFFIXES and not path.name.startswith("."))
    return [(name, f"{_stem(name)}.png") for name in sorted(path.relative_to(folder).as_posix() for path in found)]


def _required(task: Task, path: Path) -> Path:
    if not path.exists():
        raise DataError(f"task {task.id!r} lacks {path}; expected {MASKS[task.layout]}")
    return path


def _folder(task: Task, folder: Path) -> _Layout:
    if not task.classes:
        raise UsageError(f"task {task.id!r} needs `classes`: a file with the names of class 0, 1, ..., one class a line")
    lines = read_lines(_required(task, folder / task.classes))
    if task.ignore in range(len(lines)):
        raise UsageError(f"task {task.id!r}: ignore={task.ignore} is the number of a class; {task.classes} names 0 to {len(lines) - 1}")
    data = Path("images" if task.data == "." else task.data)
    fixed = next((at for at, part in enumerate(data.parts) if re.search(r"[*?[]", part)), len(data.parts))
    images, pattern = folder.joinpath(*data.parts[:fixed]), str(Path(*data.parts[fixed:])) if fixed < len(data.parts) else "**/*"
    files = _pairs(_required(task, images), pattern)
    values = {number: number for number in range(len(lines))} | {task.ignore: IGNORED}
    return _Layout(images, _required(task, folder / task.labels), files, _named(task, lines, len(lines)), values)


def _ade20k(task: Task, folder: Path) -> _Layout:
    images, labels = (_required(task, folder / kind / "validation") for kind in ("images", "annotations"))
    table = [line.split("\t") for line in read_lines(_required(task, folder / (task.classes or "objectInfo150.txt")))]
    column = next((at for at, cell in enumerate(table[0]) if cell.strip() == "Name"), None)
    rows = table[1:] if column is not None else table  # your own file holds only names
    values = {0: IGNORED} | {number: number - 1 for number in range(1, 151)}
    return _Layout(images, labels, _pairs(images), _named(task, [row[column or 0] for row in rows], 150), values)


def _coco_stuff(task: Task, folder: Path) -> _Layout:
    images, labels = (_required(task, folder / kind / "val2017") for kind in ("images", "annotations"))
    lines = read_lines(_required(task, folder / (task.classes or "labels.txt")))
    rows = [line.partition(":")[::2] for line in lines]
    used = [value for value in range(182) if value not in _COCO_GAPS]
    if all(number.strip().isdigit() for number, _ in rows):  # the published file: 0 is unlabeled, k is label value k - 1
        named = {int(number) - 1: name for number, name in rows}
        lines = tuple(re.sub("-(other|stuff)$", "", named[value].strip()).replace("-", " ") for value in used if value in named)
    values = {value: number for number, value in enumerate(used)} | {255: IGNORED}
    return _Layout(images, labels, _pairs(images), _named(task, lines, len(used)), values)


def _voc(task: Task, folder: Path) -> _Layout:
    images, labels = (_required(task, folder / name) for name in ("JPEGImages", "SegmentationClass"))
    keys = read_lines(_required(task, folder / "ImageSets" / "Segmentation" / "val.txt"))
    background = task.protocol == "background"
    lines = read_lines(_required(task, folder / task.classes)) if task.classes else (*((_VOC_BACKGROUND,) if background else ()), *_VOC)
    shift = 0 if background else 1
    values = {255: IGNORED, 0: IGNORED} | {number: number - shift for number in range(shift, 21)}
    files = [(f"{key}.jpg", f"{key}.png") for key in keys]
    return _Layout(images, labels, files, _named(task, lines, 21 - shift), values)


def _named(task: Task, lines: Iterable[str], classes: int) -> tuple[tuple[str, ...], ...]:
    """Return the names of each class, one line each; DataError unless all `classes` have names."""
    names = tuple(map(split_names, lines))
    named = sum(map(bool, names))
    if not named == len(names) == classes:
        raise DataError(f"task {task.id!r}: its file of class names names {named} classes, one a line; expected {classes}")
    return names


LAYOUTS: dict[str, Callable[[Task, Path], _Layout]] = {"folder": _folder, "ade20k": _ade20k, "coco_stuff": _coco_stuff, "voc": _voc}
