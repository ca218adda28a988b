"""Shared by all readers of official layouts: their return types, and functions for list files, class folders and .mat files.

A reader turns a published folder, as its archives unpack, into rows of the test split. It reads lists and file names, never an
image. A missing image is counted later, like any bad sample.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from align.common.errors import DataError, UsageError
from align.runtime.recipes_yaml import nearest
from align.sources.row import IMAGE_ENDINGS
from eval.tasks.prompts import read_lines

ManifestRow = dict[str, Any]
_MAT_SECONDS = 300
_READ_MAT = """
import json, sys
import numpy as np
from scipy.io import loadmat
found = np.atleast_1d(loadmat(sys.argv[1], squeeze_me=True, variable_names=sys.argv[2:])[sys.argv[2]])
rows = [{name: one[name] for name in found.dtype.names} for one in found] if found.dtype.names else found.tolist()
print(json.dumps(rows, default=lambda value: value.tolist()))
"""
OWN_NAMES = "classnames.txt"  # in a data set's folder: replaces the official or packaged class names


@dataclass(frozen=True)
class Official:
    """The test split of a data set. `rows` may be read once.

    Classification: {key, image, label}, the label an index of `class_names`. Retrieval: {key, image, captions}. Compositional: also group
    and category, one caption per row, a group's two rows in sequence. An image is bytes, or a path relative to the folder that was read.
    """

    rows: Iterable[ManifestRow]
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class OfficialLayout:
    """How to read one official layout, and what to tell users who lack the data."""

    kind: Literal["classification", "retrieval", "compositional"]
    read: Callable[[Path], Official]  # DataError for inconsistent lists
    files: tuple[str, ...]  # must be there, relative to the task's folder
    what: str  # the files and their official source, in words
    traps: Mapping[str, str] = field(default_factory=dict)  # wrong data that people often have: path, and why it does not work

    def missing(self, place: Path) -> list[str]:
        """Return the required files that are missing."""
        return [name for name in self.files if not (place / name).exists()]

    def trap(self, place: Path) -> str:
        """Return why known wrong data in `place` does not work, or "" if there is none."""
        return next((why for name, why in self.traps.items() if os.path.exists(os.path.normpath(place / name))), "")


def own_names(folder: Path, count: int) -> tuple[str, ...]:
    """Return the class names in the folder's `classnames.txt`, or () without that file; DataError unless there are `count`."""
    path = folder / OWN_NAMES
    if not path.is_file():
        return ()
    names = read_lines(path)
    if len(names) != count:
        raise DataError(f"{path} names {len(names)} classes, the data has {count}; mend or remove it")
    return names


def columns(path: Path, count: int) -> Iterator[tuple[str, ...]]:
    """Yield the `count` fields of each line of a list file. Only the last may contain spaces. DataError for a line with fewer."""
    for number, line in enumerate(read_lines(path), start=1):
        found = line.split(maxsplit=count - 1)
        if len(found) != count:
            raise DataError(f"{path}, line {number}: expected {count} fields, found {line!r}; get the file again")
        yield tuple(found)


def class_number(text: Any, count: int, path: Path) -> int:
    """Return the 0-based class of a 1-based label in the file `path`; DataError if it is not 1 to `count`."""
    if not str(text).isdecimal() or not 1 <= int(text) <= count:
        raise DataError(f"{path}: {text!r} is no class; expected 1 to {count}. Get the file again.")
    return int(text) - 1


def class_of(name: str, known: Mapping[str, int], path: Path) -> int:
    """Return the class number of `name` in a list file; DataError with the nearest known name."""
    if name not in known:
        raise DataError(f"{path}: {name!r} is not a known class; {nearest(name, sorted(known))}")
    return known[name]


def numbered(names: Iterable[str]) -> dict[str, int]:
    """Return the number of each name, from 0."""
    return {name: number for number, name in enumerate(names)}


def class_folders(place: Path, count: int, ignored: str = "") -> list[str]:
    """Return the sorted folder names in `place`; DataError unless there are `count`, because a missing one would shift every label."""
    found = sorted(entry.name for entry in os.scandir(place) if entry.is_dir() and not entry.name.startswith(".") and entry.name != ignored)
    if len(found) != count:
        has = f"{len(found)} class folders ({', '.join(found[:3])}, ...)" if found else "0 class folders (only files)"
        raise DataError(f"{place} has {has}, the official set has {count}; unpack all of it, one folder a class")
    return found


def images_of_folders(place: Path, below: str, labels: Mapping[str, int]) -> Iterator[ManifestRow]:
    """Yield the rows of the images in each class folder of `place`, by class and name. Their paths begin with `below`."""
    for folder, label in labels.items():
        for name in sorted(os.listdir(place / folder)):
            if name.lower().endswith(IMAGE_ENDINGS):
                yield image_row(f"{folder}/{name}", below, label)


def image_row(name: str, below: str, label: int) -> ManifestRow:
    """Return the row of the image file `below`/`name`; its key is the name without the suffix."""
    return {"key": os.path.splitext(name)[0], "image": os.path.join(below, name), "label": label}


def load_mat(path: Path, variable: str) -> list[Any]:
    """Return a variable of a MATLAB file as a list of numbers, texts or (for a struct) dicts; DataError if it cannot be read."""
    if importlib.util.find_spec("scipy") is None:
        raise UsageError(f"reading {path} needs scipy: pip install scipy")
    # in a child process, because scipy's reader can crash on a damaged file instead of raising
    command = [sys.executable, "-c", _READ_MAT, str(path), variable]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=_MAT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{path} could not be read in {_MAT_SECONDS} seconds; get the file again") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise DataError(f"{path}: no {variable!r} could be read ({said[0]}); get the file again")
    return list(json.loads(done.stdout))
