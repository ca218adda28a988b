"""Prompts of zero-shot classification: template sets by exact id, template files, and sentences for each class.

`{c}` in a template stands for the class name. Numbers of different sets (`PromptSet.id`) never share a table column.
`clip:<data set>` names the templates that the package clip_benchmark (MIT) ships for a data set.
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.common.errors import DataError, UsageError
from align.common.files import hash_bytes
from align.runtime.recipes_yaml import nearest

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


def _ucf101() -> tuple[str, ...]:
    """Return the 48 templates of CLIP's published UCF101 protocol (arXiv 2103.00020), worded as published."""
    doings = ("", "using ", "doing ", "during ", "performing ", "practicing ")
    media = ("photo", "video", "example", "demonstration")
    return tuple(f"a {medium} of {who} person {doing}{{c}}." for doing in doings for who in ("a", "the") for medium in media)


TEMPLATES: dict[str, tuple[str, ...]] = {
    "plain": ("{c}",),
    "simple": ("a photo of a {c}.",),
    "sprites": ("a {c}", "one {c}", "a picture of a {c}", "a {c} on a plain background", "an emoji of a {c}"),
    "imagenet80": _imagenet80(),
    "ucf101": _ucf101(),
    "cub": ("a photo of a {c}, a type of bird.",),
}
PACKAGED = "clip:"  # prefix of a data set's name: the templates that clip_benchmark ships for it


@dataclass(frozen=True)
class PromptSet:
    """The sentences of every class: `sentences[i]` for class i. Results record `id`, which has a content hash unless built in."""

    id: str
    sentences: tuple[tuple[str, ...], ...]


def fill(templates: tuple[str, ...], class_name: str) -> tuple[str, ...]:
    """Return the templates with `{c}` replaced by the class name. Other braces are plain text."""
    return tuple(template.replace("{c}", class_name) for template in templates)


def read_lines(path: Path) -> tuple[str, ...]:
    """Return the lines of a UTF-8 file without surrounding spaces; DataError for blank lines, except at the end."""
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    if not lines or not all(line.strip() for line in lines):
        raise DataError(f"{path}: expected one entry a line, and no blank line between them")
    return tuple(line.strip() for line in lines)


def read_templates(path: Path) -> tuple[str, ...]:
    """Return the templates of a file, one per line, each with `{c}` (CLIP_benchmark's zeroshot_classification_templates.txt)."""
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


def package_classes(data_set: str) -> tuple[str, ...]:
    """Return clip_benchmark's class names of a data set, in label order; UsageError without the package."""
    return _packaged("en_classnames.json", data_set)


def package_templates(data_set: str) -> tuple[str, ...]:
    """Return clip_benchmark's templates of a data set; UsageError for an unknown one or without the package."""
    return _packaged("en_zeroshot_classification_templates.json", data_set)


def prompt_set(templates: str, class_names: tuple[str, ...], folder: Path) -> PromptSet:
    """Return every class's sentences from a template set's id, or a .txt (templates) or .json (sentences by class) file in `folder`."""

    def filled(name: str, texts: tuple[str, ...]) -> PromptSet:
        return PromptSet(name, tuple(fill(texts, class_name) for class_name in class_names))

    if templates in TEMPLATES:
        return filled(templates, TEMPLATES[templates])
    if templates.startswith(PACKAGED):
        read = package_templates(templates.removeprefix(PACKAGED))
        return filled(f"{templates}@{_digest(read)}", read)
    path = folder / templates
    known = [*sorted(TEMPLATES), f"{PACKAGED}<data set>"]
    if path.suffix not in (".txt", ".json"):
        raise UsageError(f"unknown templates {templates!r}: a .txt or .json file, or a set; {nearest(templates, known)}")
    if not path.is_file():
        raise DataError(f"prompts {templates!r} not found: put the file at {path}, or name a set: {', '.join(known)}")
    if path.suffix == ".txt":
        read = read_templates(path)
        return filled(f"templates:{path.name}@{_digest(read)}", read)
    sentences = read_sentences(path, class_names)
    return PromptSet(f"sentences:{path.name}@{_digest(sentences)}", sentences)


def _packaged(file: str, data_set: str) -> tuple[str, ...]:
    """Return a data set's list from clip_benchmark's JSON files without importing the package, which takes seconds."""
    found = importlib.util.find_spec("clip_benchmark")
    if found is None or not found.submodule_search_locations:
        own = "classnames.txt and zeroshot_classification_templates.txt in the data set's folder"
        raise UsageError(f"{file} of {data_set!r} comes with clip-benchmark: pip install 'sail-upgrade-kit[clip]', or put {own}")
    content = json.loads((Path(found.submodule_search_locations[0]) / "datasets" / file).read_text(encoding="utf-8"))
    if data_set not in content:
        raise UsageError(f"clip_benchmark's {file} has no {data_set!r}; {nearest(data_set, sorted(content))}")
    return tuple(content[data_set])


def _digest(texts: Any) -> str:
    return hash_bytes(json.dumps(texts).encode())[:8]
