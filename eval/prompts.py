"""Prompts of zero-shot classification: template sets by exact id, template files, and sentences written for each class.

A template holds `{c}` where the class name goes. Results record which set was used (`PromptSet.id`), and numbers of different
sets never share a table column.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.cli import nearest
from align.errors import DataError, UsageError
from align.files import hash_bytes

_MEDIA = (
    "bad photo", "good photo", "blurry photo", "bright photo", "dark photo", "cropped photo", "close-up photo",
    "low resolution photo", "pixelated photo", "jpeg corrupted photo", "black and white photo",
    "painting", "drawing", "sketch", "doodle", "sculpture", "rendering", "rendition", "tattoo",
)  # fmt: skip
_LOOKS = ("clean", "dirty", "cool", "nice", "weird", "large", "small", "hard to see")
_MADE_AS = ("embroidered", "plastic", "origami", "toy", "cartoon", "plushie")


def _imagenet80() -> tuple[str, ...]:
    """Return the 80 templates of CLIP's published ImageNet protocol (arXiv 2103.00020); their order does not matter."""
    templates = [f"a photo of {one} {{c}}." for one in ("many", "my", "one")] + ["itap of my {c}."]
    for article in ("a", "the"):
        templates += [f"a photo of {article} {{c}}.", f"{article} {{c}} in a video game."]
        templates += [f"{medium} of {article} {{c}}." for medium in ("itap", "graffiti", "art")]
        templates += [f"a {medium} of {article} {{c}}." for medium in _MEDIA]
        templates += [f"a photo of {article} {look} {{c}}." for look in _LOOKS]
        templates += [f"{article} {made} {{c}}." for made in _MADE_AS]
    return tuple(templates)


TEMPLATES: dict[str, tuple[str, ...]] = {
    "plain": ("{c}",),
    "simple": ("a photo of a {c}.",),
    "sprites": ("a {c}", "one {c}", "a picture of a {c}", "a {c} on a plain background", "an emoji of a {c}"),
    "imagenet80": _imagenet80(),
}


@dataclass(frozen=True)
class PromptSet:
    """The sentences of every class: `sentences[i]` are those of class i; `id` is what results record."""

    id: str
    sentences: tuple[tuple[str, ...], ...]


def fill(templates: tuple[str, ...], class_name: str) -> tuple[str, ...]:
    """Return the templates with `{c}` replaced by the class name; other braces, in either, are plain text."""
    return tuple(template.replace("{c}", class_name) for template in templates)


def read_lines(path: Path) -> tuple[str, ...]:
    """Return the lines of a UTF-8 file without their line ends; blank lines at its end are dropped, others refused."""
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    if not lines or not all(line.strip() for line in lines):
        raise DataError(f"{path}: expected one entry a line, and no blank line between them")
    return tuple(line.strip() for line in lines)


def read_templates(path: Path) -> tuple[str, ...]:
    """Return the templates of a file, one a line, each with `{c}` (CLIP_benchmark's zeroshot_classification_templates.txt)."""
    templates = read_lines(path)
    for number, template in enumerate(templates, start=1):
        if "{c}" not in template:
            raise DataError(f"{path}, line {number}: {template!r} has no {{c}} where the class name goes")
    return templates


def read_sentences(path: Path, class_names: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Return the sentences of each class, in the order of `class_names`, from a JSON file {class: [sentence, ...]}."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object of class name -> list of sentences")
    for name in class_names:
        sentences = content.get(name)
        if not isinstance(sentences, list) or not sentences or not all(isinstance(s, str) and s.strip() for s in sentences):
            raise DataError(f"{path}: class {name!r} needs a list of at least one sentence")
    return tuple(tuple(content[name]) for name in class_names)


def prompt_set(templates: str, class_names: tuple[str, ...], folder: Path) -> PromptSet:
    """Return the sentences of every class for a template set's id or a file in `folder`.

    A `.txt` file holds templates, a `.json` file sentences for each class; their id carries the hash of what was read, so that
    two versions of a file are never taken for the same prompts.
    """
    if templates in TEMPLATES:
        return PromptSet(templates, tuple(fill(TEMPLATES[templates], name) for name in class_names))
    path = folder / templates
    if path.suffix not in (".txt", ".json"):
        known = sorted(TEMPLATES)
        raise UsageError(f"unknown templates {templates!r}: a .txt or .json file, or a set; {nearest(templates, known)}")
    if not path.is_file():
        raise DataError(f"prompts {templates!r} not found: put the file at {path}, or name a set: {', '.join(sorted(TEMPLATES))}")
    if path.suffix == ".txt":
        read = read_templates(path)
        return PromptSet(f"templates:{path.name}@{_digest(read)}", tuple(fill(read, name) for name in class_names))
    sentences = read_sentences(path, class_names)
    return PromptSet(f"sentences:{path.name}@{_digest(sentences)}", sentences)


def _digest(texts: Any) -> str:
    return hash_bytes(json.dumps(texts).encode())[:8]
