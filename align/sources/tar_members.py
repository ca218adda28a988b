"""Members of tars by what their names say, and what is said where they are not a webdataset's: scattered samples, dots in names."""

import os
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from align.common.errors import DataError
from align.sources.row import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from align.sources.tar import Member, TarSample

TEXT_SUFFIXES = ("txt", "text", "caption", "captions")  # of members that are captions, as the last part of the suffix
FIELD_SUFFIXES = (*TEXT_SUFFIXES, "json", "cls")  # of members that are read into fields
_SHOWN = 12  # suffixes in a message
_DOTS = (
    "If dots are part of the names, pack again without them, for example after: "
    'for f in *.*.*; do s=${f%.*}; mv "$f" "${s//./_}.${f##*.}"; done'
)


def last_of(suffix: str) -> str:
    """Return the last part of a suffix, which says what a member is: `txt` of `outputs.txt`."""
    return suffix.rpartition(".")[2]


def images_of(sample: "TarSample") -> list["Member"]:
    """Return a sample's images: those with a plain suffix, else those whose last part is one (`input.jpg`)."""
    plain = [member for member in sample.members if member.suffix in IMAGE_SUFFIXES]
    return plain or [member for member in sample.members if last_of(member.suffix) in IMAGE_SUFFIXES]


def is_half(sample: "TarSample") -> bool:
    """Return whether a sample has no image, but a text or a label whose image may lie elsewhere in the tar."""
    return not images_of(sample) and any(last_of(member.suffix) in FIELD_SUFFIXES for member in sample.members)


def refuse_scattered(file: str, samples: Iterable["TarSample"], halves: int) -> None:
    """Raise DataError if the members of samples are not neighbors in a tar, or lie in different folders of it.

    `halves`: how many of the samples are a half (`is_half`).
    """
    seen = dict[str, tuple[int, frozenset[str]]]()
    apart, example = set[str](), ""
    for number, sample in enumerate(samples, 1):
        suffixes = frozenset(member.suffix for member in sample.members)
        first, others = seen.setdefault(sample.key, (number, suffixes))
        if first != number and not suffixes & others:
            apart.add(sample.key)
            example = example or f"{sample.key}.{min(others)} at place {first} and {sample.key}.{min(suffixes)} at place {number}"
    if apart:
        folder = f"{os.path.splitext(file)[0]}-sorted"
        old, new = shlex.quote(file), shlex.quote(folder)
        raise DataError(
            f"{file}: the members of {len(apart)} samples are not neighbors, for example {example}. In a webdataset the members of a "
            f"sample follow each other. Sort them (with GNU tar): mkdir {new} && tar -xf {old} -C {new} && tar --sort=name -cf {new}.tar "
            f"-C {new} ."
        )
    stems = dict[str, list[str]]()
    for key in seen:
        stems.setdefault(os.path.basename(key), []).append(key)
    twice = [keys for keys in stems.values() if len(keys) > 1 and not seen[keys[0]][1] & seen[keys[1]][1]]
    if 2 * len(twice) > halves:
        names = " and ".join(f"{key}.{min(seen[key][1])}" for key in twice[0][:2])
        raise DataError(
            f"{file}: the members of {len(twice)} samples lie in different folders, for example {names}. A key is the path up to the "
            "first dot of the file name, so theirs differ: pack the members of a sample under one path, such as 1.jpg and 1.txt"
        )


def members_told(samples: Sequence["TarSample"]) -> str:
    """Return which members samples have, and what to do if a column is not among them."""
    seen = Counter(member.suffix for sample in samples for member in sample.members)
    some = ", ".join(f".{suffix} ({count})" for suffix, count in seen.most_common(_SHOWN)) + (", ..." if len(seen) > _SHOWN else "")
    said = f"Members of its first {len(samples)} samples: {some}. A name up to its first dot is the sample's key, the rest is the column."
    if len(seen) > _SHOWN and any("." in suffix for suffix in seen):
        return f"{said} {_DOTS}"
    if not any(last_of(suffix) in TEXT_SUFFIXES for suffix in seen):
        return f"{said} Texts are members that end in .{', .'.join(TEXT_SUFFIXES)}, or names in a .json."
    return f"{said} Name one that exists."
