"""Files of a source: patterns with `*` and `{00000..00012}`, folders, and the layout by their endings."""

import glob
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from align.common.errors import DataError
from align.common.reject_codes import Reject
from align.sources.safe_files import parse_json

SUFFIXES = {
    ".tar": "webdataset", ".parquet": "parquet", ".arrow": "arrow", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv",
}  # fmt: skip
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}  # by first bytes
MAX_PATTERNS = 100_000  # that braces may stand for
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?")
_SPLITS, _STATE = "dataset_dict.json", "state.json"  # what save_to_disk of `datasets` writes


def find_files(data: str, layout: str) -> tuple[str, list[str]]:
    """Return the layout and the sorted files of `data`: a file, a folder, or a pattern. Of the layout `folder`, the only file is it."""
    inside = os.path.isdir(data)
    if inside and layout == "folder":
        return layout, [data]
    if layout == "folder":
        raise DataError(f"{data} is not a folder, which the layout 'folder' needs")
    if inside and layout in ("auto", "arrow") and (saved := _saved(data)):
        return "arrow", saved
    if inside:
        files = sorted(os.path.join(data, name) for name in os.listdir(data) if not name.startswith("."))
        files = [file for file in files if _suffix(file) in SUFFIXES and layout in ("auto", SUFFIXES[_suffix(file)])]
    else:
        files = [data] if os.path.exists(data) else _matching(data)
    if not files and not (inside and layout == "auto"):
        raise DataError(f"{data} matches no file (layout: {layout}); give a file, a folder or a pattern such as 'data/*.tar'")
    return (layout, files) if layout != "auto" else _recognized(data, files)


def expand_braces(pattern: str) -> list[str]:
    """Return the patterns that one with braces stands for, as a shell writes them: `{00000..00012}`, `{0..9..3}` and `{a,b}`."""
    if math.prod(max(1, len(_choices(braces[1]))) for braces in _BRACES.finditer(pattern)) > MAX_PATTERNS:
        raise DataError(f"{pattern} stands for more than {MAX_PATTERNS} files; give a pattern with *")
    for braces in _BRACES.finditer(pattern):
        if choices := _choices(braces[1]):
            before, after = pattern[: braces.start()], pattern[braces.end() :]
            return [one for choice in choices for one in expand_braces(f"{before}{choice}{after}")]
    return [pattern]


def _choices(text: str) -> Sequence[str]:
    """Return what a text between braces stands for; nothing if it is no range and no list."""
    if not (numbers := _RANGE.fullmatch(text)):
        return text.split(",") if "," in text else []
    first, last, step = int(numbers[1]), int(numbers[2]), max(1, int(numbers[3] or 1))
    if abs(last - first) // step >= MAX_PATTERNS:
        return [""] * (MAX_PATTERNS + 1)
    width = max(len(number) if number.startswith("0") else 0 for number in (numbers[1], numbers[2]))
    width = max(width, len(numbers[1]), len(numbers[2])) if width > 1 else 0
    turned = 1 if last >= first else -1
    return [f"{number:0{width}d}" for number in range(first, last + turned, step * turned)]


def _matching(pattern: str) -> list[str]:
    """Return the sorted files that match a pattern. DataError if some that braces name are not there."""
    patterns = expand_braces(pattern)
    found = {one: [one] if os.path.exists(one) else glob.glob(one, recursive=True) for one in patterns}
    missing = [one for one, files in found.items() if not files]
    if missing and len(missing) < len(found):
        raise DataError(
            f"{len(missing)} of {len(found)} files of {pattern} are missing, for example {missing[0]}; get them, or give another range"
        )
    return sorted(set(chain.from_iterable(found.values())))


def _saved(folder: str) -> list[str]:
    """Return the files of a data set that `datasets` saved in a folder, or none. DataError if there are several data sets, or indices."""
    if os.path.isfile(splits := os.path.join(folder, _SPLITS)):
        names = _json(splits).get("splits") or [name for name in os.listdir(folder) if os.path.isdir(os.path.join(folder, name))]
        raise DataError(
            f"{folder} holds several data sets ({', '.join(map(str, names))}); give one of them: {os.path.join(folder, str(names[0]))}"
        )
    if not os.path.isfile(state := os.path.join(folder, _STATE)):
        return []
    facts = _json(state)
    names = [entry.get("filename") for entry in facts.get("_data_files") or [] if isinstance(entry, dict)]
    if facts.get("_indices_data_files") or facts.get("_indices_files"):
        made = f"load_from_disk({folder!r}).to_parquet({folder.rstrip('/') + '.parquet'!r})"
        raise DataError(f'{folder} is a selection of rows; write them out: python -c "from datasets import load_from_disk; {made}"')
    return sorted(os.path.join(folder, os.path.basename(str(name))) for name in names)


def _json(path: str) -> dict[str, Any]:
    try:
        return parse_json(Path(path).read_bytes())
    except Reject as reject:
        raise DataError(f"{path} cannot be read ({reject}); save the data set again") from reject


def _recognized(data: str, files: list[str]) -> tuple[str, list[str]]:
    """Return the layout of files by their endings. Without any, `data` is a folder of images."""
    kinds = {SUFFIXES.get(_suffix(file), "unknown") for file in files}
    stems = {kind: {os.path.splitext(file)[0] for file in files if SUFFIXES.get(_suffix(file)) == kind} for kind in kinds}
    if kinds == {"webdataset", "parquet"} and stems["parquet"] <= stems["webdataset"]:
        return "webdataset", [file for file in files if _suffix(file) == ".tar"]  # img2dataset's metadata beside its tars
    if len(kinds) == 1 and kinds != {"unknown"}:
        return kinds.pop(), files
    if not kinds:
        return "folder", [data]
    seen = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in Counter(map(_suffix, files)).most_common())
    raise DataError(
        f"cannot tell the layout of {data} from its files ({seen}). Known: {', '.join(SUFFIXES)}; all must be of one kind. "
        "Name the layout, or give a pattern that matches one kind."
    )


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def refuse_compressed(file: str) -> None:
    """Raise DataError for a file that a compressor wrote."""
    with open(file, "rb") as opened:
        first = opened.read(6)
    for mark, command in COMPRESSED.items():
        if first.startswith(mark):
            raise DataError(f"{file} is compressed, so rows in it cannot be reached directly; unpack it first: {command} {file}")
