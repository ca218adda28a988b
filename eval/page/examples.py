"""Examples for the report: drawn by a seed, not picked.

`examples/<task>.json` holds what was asked and what each model answered, `examples/<task>/N.jpg` is a thumbnail of the task's
image number N.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from align.common.files import atomic_bytes, atomic_json, hash_bytes
from eval.measures.retrieval import RetrievalAnswers
from eval.measures.zeroshot import ClassificationAnswers
from eval.results.records import file_name

THUMB_SIDE = 168  # pixels: twice the size shown, for sharp screens
MATRIX_SIDE = 8  # images and captions of the similarity matrix
SHOWN_ANSWERS = 5


def classification_examples(
    answers: Mapping[str, ClassificationAnswers],
    labels: np.ndarray,
    class_names: Sequence[str],
    count: int,
    generator: np.random.Generator,
) -> dict[str, Any]:
    """Return `count` random images with the classes each model named first; `answers` maps model names to answers."""
    items = []
    for image in _draw(len(labels), count, generator):
        label = int(labels[image])
        said = {
            name: {
                "rank": int(given.ranks[image]),
                "top": [
                    {"class": class_names[number], "score": round(float(score), 4), "right": int(number) == label}
                    for number, score in zip(given.top[image], given.top_scores[image], strict=True)
                ],
            }
            for name, given in answers.items()
        }
        items.append({"image": image, "label": class_names[label], "answers": said})
    return {"items": items}


def retrieval_examples(
    answers: Mapping[str, RetrievalAnswers],
    embeddings: Mapping[str, tuple[Tensor, Tensor]],
    captions: Sequence[str],
    caption_image: np.ndarray,
    count: int,
    generator: np.random.Generator,
) -> dict[str, Any]:
    """Return `count` random queries each way with every model's answers, and a matrix of cosines.

    For an image, `best` is the one of its own captions that the model ranks first.

    `embeddings` maps model names to L2-normalised images (N, E) and captions (M, E); caption j belongs to image
    `caption_image[j]` (M,), and the captions of an image follow one another.
    """
    images = int(caption_image.max()) + 1
    first = np.searchsorted(caption_image, np.arange(images))  # each image's first caption
    chosen = _draw(images, MATRIX_SIDE, generator) if count else []
    rows = first[chosen]
    cosines = {name: c[rows] @ i[chosen].T for name, (i, c) in embeddings.items()}
    matrix = {
        "images": chosen,
        "captions": [captions[int(row)] for row in rows],
        "scores": {name: values.double().numpy().round(4).tolist() for name, values in cosines.items()},
    }
    t2i, i2t = [], []
    for caption in _draw(len(captions), count, generator):
        own = int(caption_image[caption])
        said = {
            name: {
                "rank": int(given.t2i_ranks[caption]),
                "top": [
                    {"image": int(image), "score": round(float(score), 4), "right": int(image) == own}
                    for image, score in _best(given.t2i_top[caption], given.t2i_scores[caption])
                ],
            }
            for name, given in answers.items()
        }
        t2i.append({"caption": captions[caption], "image": own, "answers": said})
    for image in _draw(images, count, generator):
        mine = np.flatnonzero(caption_image == image)
        said = {
            name: {
                "rank": int(given.i2t_ranks[image]),
                "best": captions[int(mine[int((embeddings[name][1][mine] @ embeddings[name][0][image]).argmax())])],
                "top": [
                    {"caption": captions[number], "score": round(float(score), 4), "right": int(caption_image[number]) == image}
                    for number, score in _best(given.i2t_top[image], given.i2t_scores[image])
                ],
            }
            for name, given in answers.items()
        }
        i2t.append({"image": image, "answers": said})
    return {"t2i": t2i, "i2t": i2t, "matrix": matrix}


def drawn_questions(task: str, numbers: Iterable[int], count: int, seed: int) -> list[int]:
    """Return `count` of a task's question numbers: those that come first by hash of seed, task and number.

    Processes that know only their own share of the numbers agree: the choice is among the choices of all.
    """
    return sorted(numbers, key=lambda number: hash_bytes(f"{seed}:{task}:{number}".encode()))[:count]


def generation_examples(
    numbers: Sequence[int], answers: Mapping[str, Mapping[int, Mapping[str, Any]]], pictured: Iterable[int]
) -> dict[str, Any]:
    """Return the questions `numbers` with what each model answered and the score of the answer (None if it has no score of its own).

    `answers` maps model names to number -> row of `eval.harness.output.answers_table`; `pictured` are the numbers with a picture.
    """
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
    """Return the numbers of all images that examples show, in ascending order."""
    found = {item["image"] for part in ("items", "t2i", "i2t") for item in examples.get(part, [])}
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
    path.parent.mkdir(parents=True, exist_ok=True)
    small = image.convert("RGB")
    small.thumbnail((THUMB_SIDE, THUMB_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85, optimize=True)
    atomic_bytes(path, buffer.getvalue())
    return path


def _draw(total: int, count: int, generator: np.random.Generator) -> list[int]:
    return [int(number) for number in generator.choice(total, size=min(count, total), replace=False)]


def _best(targets: np.ndarray, scores: np.ndarray) -> list[tuple[Any, Any]]:
    return list(zip(targets[:SHOWN_ANSWERS], scores[:SHOWN_ANSWERS], strict=True))
