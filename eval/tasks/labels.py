"""Labels of classification in plain layouts: class numbers and names, and what makes them wrong without looking wrong."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.common.errors import DataError
from align.runtime.recipes_yaml import nearest
from align.sources.row import IMAGE_ENDINGS, IMAGE_SUFFIXES
from eval.tasks.official.layout import OWN_NAMES
from eval.tasks.task import Task

_SHOWN = 8  # names in a message
_DIGITS = 40  # of a class number
_ID = re.compile(r"n\d{8}|\d+|(?=.*\d)[0-9a-f-]{8,}")  # a synset id, a number or a hash: no name
_NUMBERED = re.compile(r"\d+[\W_]")  # how the names of CUB's folders begin


def class_labels(task: Task, lines: tuple[str, ...], values: list[int | str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return class numbers (N,) and class names. Numeric labels need `lines`, the file of class names; text labels do not."""
    if unlabeled := sum(not str(value).strip() for value in values):
        raise DataError(f"task {task.id!r}: {unlabeled} of {len(values)} rows have an empty label: label or remove them")
    if lines and all("\t" in line for line in lines):  # `label<TAB>name`, where a label may be a number
        values = [str(value) for value in values]
    elif (lines or task.layout != "folder") and not set(map(str, values)) <= set(lines):
        numbered = all(isinstance(value, str) and value.isdecimal() for value in values)  # class numbers in a text file
        values = [_number(task, str(value)) for value in values] if numbered else values
    if any(numeric := [isinstance(value, int) for value in values]):
        if not all(numeric):
            raise DataError(f"task {task.id!r}: some labels are class numbers, others names; use one of them")
        if not lines:
            raise DataError(f"task {task.id!r}: labels are numbers, so it needs `classes`, a file with the names of class 0, 1, ...")
        given = [int(value) for value in values]
        if not 0 <= min(given) <= max(given) < len(lines):  # before numpy, whose numbers have 64 bits
            found = f"labels from {min(given)} to {max(given)}"
            raise DataError(f"task {task.id!r}: {found}, but {task.classes or OWN_NAMES} names classes 0 to {len(lines) - 1}")
        return np.array(given, dtype=np.int64), lines
    found_labels = sorted({str(value) for value in values})
    pairs = [line.partition("\t") for line in lines] or [(label, "\t", label.replace("_", " ")) for label in found_labels]
    known = {label: number for number, (label, _, _) in enumerate(pairs)}
    if len(known) < len(pairs):
        raise DataError(f"task {task.id!r}: {task.classes or OWN_NAMES} names a class twice; labels that are names must differ")
    for value in values:
        if value not in known:
            raise DataError(f"task {task.id!r}: label {value!r} is not in {task.classes}; {nearest(str(value), sorted(known))}")
    numbers = np.array([known[str(value)] for value in values], dtype=np.int64)
    return numbers, tuple(name if tab else label for label, tab, name in pairs)


def _number(task: Task, text: str) -> int:
    """Return a class number written in decimal digits."""
    if len(text) > _DIGITS:
        raise DataError(f"task {task.id!r}: the label {text[:_DIGITS]}... has {len(text)} digits; class numbers count from 0")
    return int(text)


def checked_classes(
    task: Task, place: Path, lost: Sequence[Any], values: Sequence[Any], labels: np.ndarray, names: Sequence[str]
) -> list[str]:
    """Return what the user should know: the names in use, names without images, names that are ids, and files that are not read.

    `lost` are the labels of rejected rows, `values` and `labels` (N,) those of usable ones. Raise DataError if all images have one class,
    or if a class has images but none that can be used: chance would rise silently. Also if class folders lie at different depths.
    """
    shared = _class_folders(task, place) if task.layout == "folder" else ""
    if len(np.unique(labels)) < 2:
        deeper = ". A class is the folder an image lies in: class/1.jpg, not class/images/1.jpg" if task.layout == "folder" else ""
        raise DataError(f"task {task.id!r}: all {len(labels)} images have the class {names[labels[0]]!r}, so any answer is right{deeper}")
    usable = set(map(str, values))
    gone = Counter(str(value) for value in lost if value is not None and str(value) not in usable)
    empty, unread = _unread(place) if task.layout == "folder" else ({}, Counter[str]())
    if gone or empty:
        without = [f"{name} ({count} rejected)" for name, count in gone.items()]
        without += [f"{name} ({_counted(counts) or 'empty'})" for name, counts in empty.items()]
        raise DataError(
            f"task {task.id!r}: classes without a usable image: {_listed(without)}. Without them the others are easier to tell apart: "
            f"convert their files ({', '.join(IMAGE_SUFFIXES)} are read), or remove them from the data"
        )
    used = len(np.unique(labels))
    said = [f"{used} classes in use: {_listed([names[number] for number in np.unique(labels)])}"]
    if used < len(names):
        said.append(f"{len(names) - used} of {len(names)} class names have no image")
    if ids := [name for name in names if _ID.fullmatch(name)]:
        said.append(f"{len(ids)} class names are ids, not words: {_listed(ids)}. Give `classes`, a file of `id<TAB>name` lines")
    elif all(map(_NUMBERED.match, names)):
        said.append(f"all class names begin with a number: {_listed(names)}. Give `classes`, a file of `folder<TAB>name` lines")
    if shared:
        said.append(shared)
    if unread:
        said.append(f"files that are not read: {_counted(unread)}")
    return said


def _class_folders(task: Task, place: Path) -> str:
    """Return which class is made of several folders, or ""; DataError if the folders that hold images lie at different depths."""
    depths, homes = dict[int, str](), dict[str, list[str]]()
    for folder, inside, files in os.walk(place):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        if Path(folder) != place and any(name.lower().endswith(IMAGE_ENDINGS) and name[0] != "." for name in files):
            path = os.path.relpath(folder, place)
            depths.setdefault(path.count(os.sep), path)
            homes.setdefault(os.path.basename(path), []).append(path)
    if len(depths) > 1:
        near, far = depths[min(depths)], depths[max(depths)]
        raise DataError(
            f"task {task.id!r}: images lie in folders of different depths, {near!r} and {far!r}, and a class is the folder an image lies "
            f"in: {os.path.basename(near)!r} and {os.path.basename(far)!r}. Put each image directly into the folder of its class"
        )
    several = {name: paths for name, paths in homes.items() if len(paths) > 1}
    name = next(iter(several), "")
    if not name:
        return ""
    where = f"the first is {name!r}: {_listed(several[name])}"
    return f"{len(several)} classes have images in several folders, {where}. If these are splits, give the folder of one as `data`"


def _unread(place: Path) -> tuple[dict[str, Counter[str]], Counter[str]]:
    """Return the folders below `place` without an image that is read, with their files by suffix; and all such files by suffix."""
    empty, others = dict[str, Counter[str]](), Counter[str]()
    for folder, inside, files in os.walk(place):
        inside[:] = [name for name in inside if not name.startswith(".")]
        seen = [name for name in files if not name.startswith(".")]
        others_here = [name for name in seen if not name.lower().endswith((*IMAGE_ENDINGS, ".txt"))]
        rest = Counter(os.path.splitext(name)[1].lower() or "no suffix" for name in others_here)
        if Path(folder) == place:  # task files, lists and read-mes lie here
            continue
        others += rest
        if not inside and not any(name.lower().endswith(IMAGE_ENDINGS) for name in seen):
            empty[os.path.relpath(folder, place)] = rest
    return empty, others


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
