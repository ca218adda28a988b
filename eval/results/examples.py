"""Examples for the report: drawn by a seed, not picked. No model and no score here.

`examples/<task>.json` holds the questions and each model's answers. `examples/<task>/N.jpg` is a thumbnail of the task's image N.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from align.common.files import atomic_bytes, atomic_json, hash_bytes, read_object
from eval.results.records import file_name

THUMB_SIDE = 168  # pixels: twice the size shown, for sharp screens


def drawn_numbers(total: int, count: int, generator: np.random.Generator) -> list[int]:
    """Return `count` different random numbers below `total`, or all of them in random order if there are fewer."""
    return [int(number) for number in generator.choice(total, size=min(count, total), replace=False)]


def ranked(what: str, shown: Iterable[Any], scores: Iterable[float], right: Iterable[bool]) -> list[dict[str, Any]]:
    """Return a model's best answers for the report. `what` is the key under which each answer is stored."""
    return [{what: one, "score": round(float(s), 4), "right": bool(good)} for one, s, good in zip(shown, scores, right, strict=True)]


def drawn_questions(task: str, numbers: Iterable[int], count: int, seed: int) -> list[int]:
    """Return the `count` question numbers with the smallest hash of seed, task and number, so that processes choose alike."""
    return sorted(numbers, key=lambda number: hash_bytes(f"{seed}:{task}:{number}".encode()))[:count]


def generation_examples(
    numbers: Sequence[int], answers: Mapping[str, Mapping[int, Mapping[str, Any]]], pictured: Iterable[int]
) -> dict[str, Any]:
    """Return the questions `numbers` with each model's answer and score. `answers`: model -> number -> row; `pictured`: with an image."""
    known = set(pictured)
    items = []
    for number in numbers:
        rows = {name: said[number] for name, said in answers.items() if number in said}
        first = next(iter(rows.values()))
        given = {name: {"text": row["answer"], "score": row["score"]} for name, row in rows.items()}
        image = number if number in known else None
        items.append({"image": image, "question": first["question"], "expected": first["expected"], "answers": given})
    return {"items": items}


def shown_images(examples: Mapping[str, Any]) -> list[int]:
    """Return the numbers of all images in the examples, in ascending order."""
    items = [item for part in ("items", "t2i", "i2t") for item in examples.get(part, [])]
    found = {image for item in items for image in item.get("images", [item.get("image")])}
    found |= set(examples.get("matrix", {}).get("images", []))
    for item in examples.get("t2i", []):
        found |= {one["image"] for said in item["answers"].values() for one in said["top"]}
    return sorted(found)


def save_examples(folder: Path, task: str, examples: Mapping[str, Any], images: Iterable[tuple[int, Image.Image]]) -> Path:
    """Write a task's examples and the thumbnails of `images` (number, RGB picture) below `folder`; return the JSON's path."""
    place = folder / "examples" / file_name(task)
    place.mkdir(parents=True, exist_ok=True)
    thumbs = {}
    for number, image in images:
        save_thumbnail(folder / "examples", task, number, image)
        thumbs[str(number)] = f"{place.name}/{number}.jpg"
    path = place.with_name(f"{place.name}.json")
    atomic_json(path, {**examples, "thumbs": thumbs})
    return path


def save_thumbnail(folder: Path, task: str, number: int, image: Image.Image) -> Path:
    """Write a small JPEG of a task's picture `number` below `folder` and return its path."""
    path = folder / file_name(task) / f"{number}.jpg"
    small = image.convert("RGB")
    small.thumbnail((THUMB_SIDE, THUMB_SIDE))
    save_jpeg(path, small)
    return path


def save_jpeg(path: Path, picture: Image.Image) -> None:
    """Write a picture as JPEG for the report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=85, optimize=True)
    atomic_bytes(path, buffer.getvalue())


def load_examples(folder: Path, task: str) -> dict[str, Any] | None:
    """Return a task's examples, or None if there are none."""
    path = folder / "examples" / f"{file_name(task)}.json"
    return read_object(path) if path.is_file() else None
