"""The data of a task: keys, labels or captions, and a digest of exactly what is measured.

Data lies below the data root, in a data set's official layout (`official/`) or in one that `align.sources.plan` reads. Segmentation is
read by `eval.tasks.masks`. Built-in tasks also accept CLIP_benchmark's webdatasets, in `wds_<id>`: `test/*.tar` with .jpg and .cls or
.txt members, `classnames.txt`, `zeroshot_classification_templates.txt`.
"""

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, compress, groupby
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import xxhash
from PIL import Image

from align.common.errors import DataError
from align.common.reject_codes import Reject, advice
from align.sources.gate import Limits, gate_image, split_captions
from align.sources.places import expand_braces, find_files
from align.sources.plan import Plan, Source, open_shard, plan
from align.sources.samples import Group
from eval.tasks.labels import checked_classes, class_labels
from eval.tasks.official.layout import OWN_NAMES
from eval.tasks.official.manifest import READERS, read_official
from eval.tasks.prompts import TEMPLATES, read_lines, read_templates
from eval.tasks.registry import DEMONSTRATION, OWN_TEMPLATES, TASKS
from eval.tasks.task import PlainLayout, Task

SHARD_ROWS = 4096  # samples per committed shard of features
_GROUP_LOST = "group_incomplete"  # reject code of a good sample whose partner was rejected
_WDS_NAMES = {"coco_karpathy": "mscoco_captions", "flickr30k_karpathy": "flickr30k"}  # CLIP_benchmark's names, if not our ids
_EXPECTED = {
    "webdataset": "tars whose samples hold an image and a .cls (class number) or .txt (captions, one a line)",
    "folder": "one folder of images a class, named like the class",
    "jsonl": 'a JSONL file with {"key", "image", "label" or "captions"} rows, image paths relative to it',
    "csv": "a CSV file with the columns key, image and label or captions, image paths relative to it",
    "parquet": "parquet files with the columns key, image and label or captions",
    "arrow": "Arrow files, as `save_to_disk` writes them, with the columns key, image and label or captions",
    "auto": "images in folders named like their classes, or tars, parquet, JSONL or CSV files",
}


def protocol_note(task: Task, images: int, captions: Sequence[int] = ()) -> Task:
    """Return the task with a note if the numbers of images, or of `captions` per image, differ from the published protocol."""
    differs = [f"{images:,} of {task.published:,} images"] if task.published and images != task.published else []
    if short := sum(count < task.captions_each for count in captions):
        differs.append(f"{short:,} images with fewer than {task.captions_each} captions")
    said = f"{' and '.join(differs)}: not the published protocol." if differs else ""
    return replace(task, note=" ".join(filter(None, (said, task.note))))


@dataclass(frozen=True)
class TaskData:
    """The samples of a task. Labels are class numbers. Caption j belongs to sample `caption_image[j]`, in ascending order.

    In compositional tasks sample j has caption j, and two consecutive samples form a group. `task` is the task as read: its templates may
    be files in the data's folder, and its note says how the data differs from the published protocol.
    """

    task: Task
    folder: Path
    source: Source
    plan: Plan
    keys: tuple[str, ...]
    places: np.ndarray  # (N, 2) shard and row within it
    labels: np.ndarray  # (N,) int64; empty for retrieval
    class_names: tuple[str, ...]
    captions: tuple[str, ...]
    caption_image: np.ndarray  # (M,) int64
    rejected: dict[str, int]
    images_digest: str  # of keys and encoded images: what image features depend on
    digest: str  # of everything measured: images, labels, class names, captions
    groups: tuple[str, ...] = ()  # (N,) of compositional tasks: the group of each sample
    categories: tuple[str, ...] = ()  # (N,) of compositional tasks
    remarks: tuple[str, ...] = ()  # what the user should know about how the data was read

    def keep(self, usable: np.ndarray, rejected: dict[str, int]) -> "TaskData":
        """Return the samples where `usable` (N,) bool is set, with the counts `rejected` added. Incomplete groups are dropped."""
        if self.groups:
            broken = set(compress(self.groups, ~usable))
            whole = np.array([group not in broken for group in self.groups], dtype=bool)
            if lost := int(usable.sum() - whole.sum()):
                rejected = {**rejected, _GROUP_LOST: lost}
            usable = whole
        number = np.cumsum(usable) - 1  # new number of each kept sample
        kept = usable[self.caption_image]  # (M,)
        return replace(
            self,
            keys=tuple(compress(self.keys, usable)),
            places=self.places[usable],
            labels=self.labels[usable] if len(self.labels) else self.labels,
            captions=tuple(compress(self.captions, kept)),
            caption_image=number[self.caption_image[kept]],
            rejected=dict(Counter(self.rejected) + Counter(rejected)),
            groups=tuple(compress(self.groups, usable)),
            categories=tuple(compress(self.categories, usable)),
        )


def load_task(task: Task, data_root: Path, cache: Path | None = None) -> TaskData:
    """Return the samples of `task`; DataError, which says what to put where, if its data is missing or unusable.

    Images are read once, for the digest, and not decoded. Unusable samples are left out and counted by reject code. A label that is no
    known class is an error, because it would falsify the result. An official layout becomes a manifest in `cache`/manifests (without
    `cache`: in a hidden folder of the data root).
    """
    assert task.kind != "segmentation", "eval.tasks.masks reads those"
    task = _found(task, data_root)
    folder = data_root / task.path
    place = folder / task.data
    if task.layout in READERS:
        source, official = read_official(task.layout, place, task.id, cache or data_root / ".manifests")
        names = official.class_names
    else:
        source = _source(task, folder)
        names = read_lines(folder / task.classes) if task.classes else ()
    made = plan(source, SHARD_ROWS, (task.column,))
    grouped = f"{made.rows} rows name {made.samples} images: rows of one image are one sample." if made.samples != made.rows else ""
    layout_digest = b"" if task.layout in READERS else made.digest.encode()  # the size of a manifest depends on labels and pyarrow
    rows = list(_read(task, source, made))
    rejected, usable = _usable(rows)
    pixels, content = xxhash.xxh3_128(layout_digest), xxhash.xxh3_128()
    for row in rows:
        pixels.update(f"{row.key}\0{row.image_hash}\0".encode())
    for row in usable:
        content.update(repr((row.key, row.value, *row.group)).encode())
    if not usable:
        linked = "; link the whole folder, not folders in it" if "unsafe_path" in rejected else ""
        shown = ", ".join(f"{code} {count}" for code, count in rejected.most_common())
        mend = advice(rejected.most_common(1)[0][0])
        raise DataError(f"task {task.id!r}: none of the {len(rows)} samples in {place} is usable ({shown}){linked}. {mend}")
    labels, captions, values, said = np.zeros(0, dtype=np.int64), list[list[str]](), [row.value for row in usable], list[str]()
    if task.kind == "classification":
        labels, names = class_labels(task, names, values)
        if task.layout not in READERS:
            said = checked_classes(task, place, [row.lost for row in rows if row.value is None], values, labels, names)
    else:
        captions, names = values, ()
    captions_each = [len(texts) for texts in captions]
    content.update(repr((pixels.hexdigest(), names)).encode())
    return TaskData(
        task=protocol_note(replace(task, note=" ".join(filter(None, (grouped, task.note)))), len(usable), captions_each),
        folder=folder,
        source=source,
        plan=made,
        keys=tuple(row.key for row in usable),
        places=np.array([row.place for row in usable]),
        labels=labels,
        class_names=names,
        captions=tuple(chain.from_iterable(captions)),
        caption_image=np.repeat(np.arange(len(captions)), captions_each),
        rejected=dict(rejected),
        images_digest=pixels.hexdigest(),
        digest=content.hexdigest(),
        groups=tuple(row.group[0] for row in usable if row.group),
        categories=tuple(row.group[1] for row in usable if row.group),
        remarks=(*made.notes, *filter(None, [grouped]), *said),
    )


def _source(task: Task, folder: Path) -> Source:
    """Return the source of a task in a plain layout. In retrieval, rows that name one image are one sample with several captions."""
    group = task.group or ("image" if task.kind == "retrieval" else "none")
    key_prefix = cast(Literal["none", "file"], task.key_prefix)
    root = str(folder / task.image_root) if task.image_root else None
    return Source(
        str(folder / task.data), cast(PlainLayout, task.layout), task.image, task.key, root, cast(Group, group), key_prefix, task.gray_bits
    )  # fmt: skip


def read_images(data: TaskData, numbers: Sequence[int]) -> Iterator[tuple[int, bytes | Reject | None]]:
    """Yield (number, encoded image) of the given samples of a task, shard by shard."""
    places = sorted((*data.places[number].tolist(), number) for number in numbers)
    for shard, wanted in groupby(places, key=lambda place: place[0]):
        reader = open_shard(data.source, data.plan, shard)
        for _, row, number in wanted:
            yield number, next(iter(reader.rows(row, row + 1))).image


def pictures(data: TaskData, numbers: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
    """Yield (number, RGB picture) of samples that were encoded; DataError if a file has changed since."""
    for number, encoded in read_images(data, numbers):
        try:
            yield number, gate_image(encoded, Limits(gray_bits=data.source.gray_bits))
        except Reject as reject:
            changed = f"image {data.keys[number]!r} of {data.task.id} changed while it was measured"
            raise DataError(f"{changed} ({reject}); run again") from reject


@dataclass(frozen=True)
class _Sample:
    """A row as read: `value` is its label or list of captions, or None if it is rejected with `code`."""

    key: str
    place: tuple[int, int]
    image_hash: str
    value: Any
    code: str
    group: tuple[str, ...] = ()  # of compositional tasks: group and category
    dropped: tuple[str, ...] = ()  # codes of its unusable captions
    lost: Any = None  # the label of a rejected row, if it is known


def _read(task: Task, source: Source, made: Plan) -> Iterator[_Sample]:
    for shard in range(len(made.shards)):
        for row in open_shard(source, made, shard).rows():
            place = (shard, row.index)
            image = xxhash.xxh3_128_hexdigest(row.image) if isinstance(row.image, bytes) else "none"
            try:
                if bad := row.reject or (row.image if isinstance(row.image, Reject) else None):
                    raise bad
                value, dropped = row.cell(task.column), list[Reject]()
                if task.kind != "classification":
                    texts, dropped = split_captions(value, Limits())
                    value = [task.prefix + text for text in texts[: task.captions_each or None]]
                elif isinstance(value, bool) or not isinstance(value, int | str):
                    raise DataError(f"task {task.id!r}: {row.key!r} has the label {value!r}; expected a class number or name")
            except Reject as reject:
                yield _Sample(row.key, place, image, None, reject.code, lost=row.fields.get(task.column))
                continue
            group = (str(row.fields["group"]), str(row.fields["category"])) if task.kind == "compositional" else ()
            yield _Sample(row.key, place, image, value, "", group, tuple(reject.code for reject in dropped))


def _usable(rows: Sequence[_Sample]) -> tuple[Counter[str], list[_Sample]]:
    """Return reject counts by code, those of single captions included, and the remaining samples. Incomplete groups are rejected."""
    rejected = Counter(row.code for row in rows if row.value is None) + Counter(code for row in rows for code in row.dropped)
    usable = [row for row in rows if row.value is not None]
    sizes = Counter(row.group for row in usable)
    whole = [row for row in usable if not row.group or sizes[row.group] == 2]
    if len(whole) < len(usable):
        rejected[_GROUP_LOST] = len(usable) - len(whole)
    return rejected, whole


def _found(task: Task, data_root: Path) -> Task:
    """Return the task as found on disk, in its own layout or as CLIP_benchmark's tars; DataError if it is in neither."""
    if task.layout not in READERS:
        task = _plain(task, data_root)
        folder = data_root / task.path
        for name in (task.classes, task.templates):
            if name.endswith((".txt", ".json")) and not (folder / name).is_file():
                raise DataError(f"task {task.id!r} lacks {folder / name}{_beside(task, folder)}")
        return task
    folder = data_root / task.path
    place = folder / task.data
    layout = READERS[task.layout]
    missing = layout.missing(place)
    if not missing:
        return replace(task, templates=_templates(task, folder))
    name = _WDS_NAMES.get(task.id, task.id)
    packed = [] if task.kind == "compositional" else [task.path, f"wds_{name}", f"wds_vtab-{name}"]
    for path in packed:
        if any((data_root / path).glob("test/*.tar")):
            note = f"Read from CLIP_benchmark's tars in {path}, whose split may be another than the official one. {task.note}".strip()
            as_tars = replace(task, layout="webdataset", path=path, data="test/*.tar", group="none", note=note)
            if task.kind == "classification":
                as_tars = replace(as_tars, classes=OWN_NAMES, templates=_templates(task, data_root / path))
            return _found(as_tars, data_root)
    trap = f". {found}" if (found := layout.trap(place)) else ""
    lacking = f" (missing: {', '.join(missing)})" if folder.is_dir() and missing != ["."] else ""
    tars = f" or CLIP_benchmark's test/*.tar in {data_root / packed[1]}," if packed else ""
    where = f"{place}{lacking}{_beside(task, folder)}"
    raise DataError(f"task {task.id!r} has no data: put {layout.what} in {where},{tars} or give another --data-root{trap}")


def _plain(task: Task, data_root: Path) -> Task:
    """Return a task in a plain layout with its folder as `path` and its files as `data`; DataError if there are none."""
    if task.data == "." and not (data_root / task.path).is_dir():  # a file or a pattern
        parts = Path(task.path).parts
        first = next((at for at, part in enumerate(parts) if set("*?[{") & set(part)), len(parts) - 1)
        task = replace(task, path=str(Path(*parts[:first])), data=str(Path(*parts[first:])))
    folder = data_root / task.path
    place = folder / task.data
    if not (place.exists() or glob.glob(str(place), recursive=True) or any(map(glob.glob, expand_braces(str(place))[:1]))):
        expected = f"{_EXPECTED[task.layout]} at {place}{_beside(task, folder)}"
        near = next((root for root in (Path(), data_root.parent) if (root / task.path / task.data).exists()), None)
        advice = f"give --data-root {near.absolute()}, where {Path(task.path, task.data)} is" if near else "give another --data-root"
        raise DataError(f"task {task.id!r} has no data: put {expected}, or {advice}")
    return replace(task, layout=find_files(str(place), "auto")[0]) if task.layout == "auto" else task


def _templates(task: Task, folder: Path) -> str:
    """Return a task's templates. For a built-in task, a file in its folder replaces them if it differs from the named set."""
    path = folder / OWN_TEMPLATES
    if task.id not in TASKS or not path.is_file() or set(read_templates(path)) == set(TEMPLATES.get(task.templates, ())):
        return task.templates
    return OWN_TEMPLATES


def _beside(task: Task, folder: Path) -> str:
    files = [name for name in (task.classes, task.templates) if name.endswith((".txt", ".json"))]
    made = " (`make quickstart` makes it)" if task.note == DEMONSTRATION else ""
    return (f", with {' and '.join(files)} in {folder}" if files else "") + made
