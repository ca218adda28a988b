"""Files of the prepared data: captioned tars, tasks, conversations and test questions. The same scenes give the same bytes."""

import io
import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from align.common.errors import DataError
from align.common.files import failpoint
from align.demo.config import KINDS
from align.demo.questions import Shown, conversations, single_questions
from align.demo.rendering import NO_OBJECT, Rendered, Renderer, encoded, generator, question_groups, render_segmented, render_swapped
from align.demo.wording import article

SCENES_PER_TAR = 1000
TEST_FILES: dict[str, tuple[str, ...]] = {"yesno": ("exists", "relation"), "open": ("what", "where", "count"), "caption": ("caption",)}
GROUP_FILES: dict[str, tuple[str, ...]] = {
    "yesno": ("exists",),
    "open": ("what",),
}  # what can be asked about sprites that stage two never showed
TEMPLATES = ("a picture of a {c}", "an image of a {c}", "a {c}", "{c}")


def write_tars(folder: Path, pattern: str, per_tar: int, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Write samples (key, content by extension) to numbered tars without times and owners: the same samples give the same bytes."""
    folder.mkdir(parents=True)
    left = iter(samples)
    for number in itertools.count():
        first = next(left, None)
        if first is None:
            return
        with tarfile.open(folder / pattern.format(number), "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, files in itertools.chain([first], itertools.islice(left, per_tar - 1)):
                for extension, content in files.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")  # mtime, uid and gid are 0
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def write_captioned(renderer: Renderer, folder: Path, part: str, count: int) -> None:
    """Write `count` scenes with their captions as img2dataset-style tars."""

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for scene in renderer.scenes(part, 0, count):
            fields = {"key": scene.key, "short": scene.short, "long": scene.long}
            yield scene.key, {"jpg": scene.jpeg, "json": json.dumps(fields).encode()}

    write_tars(folder, "{:06d}.tar", SCENES_PER_TAR, samples())
    failpoint(f"prepare-{part}")


def write_classification(renderer: Renderer, folder: Path, part: str) -> None:
    """Write a zero-shot classification task in CLIP_benchmark's webdataset layout."""
    classes, per_class = generator(renderer.world, part)[1], renderer.world.per_class
    scenes = enumerate(renderer.scenes(part, 0, len(classes) * per_class))
    samples = ((scene.key, {"jpg": scene.jpeg, "cls": str(number // per_class).encode()}) for number, scene in scenes)
    write_tars(folder / "test", "{}.tar", len(classes) * per_class, samples)
    (folder / "test" / "nshards.txt").write_text("1\n")
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in classes))
    (folder / "zeroshot_classification_templates.txt").write_text("".join(f"{template}\n" for template in TEMPLATES))


def write_retrieval(renderer: Renderer, folder: Path, count: int) -> None:
    """Write a retrieval task of `count` scenes. No two show the same objects, else two answers would be right."""
    (folder / "images").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    shown: set[tuple[str, ...]] = set()
    start, step = 0, count + count // 4 + 1
    while len(rows) < count:
        if start > 20 * step:
            raise DataError(f"too few sprites for {count} scenes with different objects; lower --retrieval")
        for scene in renderer.scenes("retrieval", start, start + step):
            if len(rows) < count and scene.names not in shown:
                shown.add(scene.names)
                (folder / "images" / f"{scene.key}.jpg").write_bytes(scene.jpeg)
                rows.append({"key": scene.key, "image": f"images/{scene.key}.jpg", "captions": [scene.short, scene.long]})
        start += step
    (folder / "retrieval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_swapped(renderer: Renderer, folder: Path, count: int) -> None:
    """Write `count` pairs of scenes whose two objects have exchanged places, with captions in the same words."""
    (folder / "images").mkdir(parents=True)
    with open(folder / "pairs.jsonl", "w") as file:
        for pair in renderer.drawn(render_swapped, "swapped", 0, count):
            images = [f"images/{pair.key}-{number}.jpg" for number in (0, 1)]
            for name, jpeg in zip(images, pair.jpegs, strict=True):
                (folder / name).write_bytes(jpeg)
            row = {"key": pair.key, "images": images, "captions": pair.captions, "category": pair.relation}
            file.write(json.dumps(row) + "\n")
    failpoint("prepare-swapped")


def write_segmentation(renderer: Renderer, folder: Path, count: int) -> None:
    """Write `count` scenes, the class of every pixel, and the names of the classes that occur."""
    found: set[int] = set()
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for scene in renderer.drawn(render_segmented, "segmentation", 0, count):
        (folder / "images" / f"{scene.key}.png").write_bytes(scene.png)
        (folder / "labels" / f"{scene.key}.png").write_bytes(scene.labels)
        found.update(scene.classes)
    kept = sorted(found)
    numbers = np.full(256, NO_OBJECT, dtype=np.uint8)  # new number of a class by its old one
    numbers[kept] = np.arange(len(kept))
    for path in (folder / "labels").iterdir():
        with Image.open(path) as labels:
            renumbered = numbers[np.asarray(labels)]
        path.write_bytes(encoded(Image.fromarray(renumbered), "PNG"))
    classes = generator(renderer.world, "segmentation")[1]
    (folder / "classes.txt").write_text("".join(f"{classes[number]}\n" for number in kept))
    failpoint("prepare-segmentation")


def write_mllm(renderer: Renderer, folder: Path, pretrain: int, instruct: int, test: int, kinds: Sequence[str] = KINDS) -> None:
    """Write `pretrain` captions and `instruct` conversations to train an MLLM, and questions about `test` scenes of each group.

    The conversations have turns of `kinds`.
    """
    seed = renderer.world.seed

    def kept(part: str, count: int) -> Iterator[Rendered]:
        for scene in renderer.scenes(part, 0, count):
            (folder / "images" / f"{scene.key}.jpg").write_bytes(scene.jpeg)
            yield replace(scene, jpeg=b"")

    def row(scene: Rendered, turns: list[tuple[str, str]]) -> dict[str, Any]:
        return conversation_row(scene.key, f"images/{scene.key}.jpg", turns)

    (folder / "images").mkdir(parents=True)
    if pretrain:
        write_conversations(folder / "pretrain.json", [row(scene, [("", scene.short)]) for scene in kept("mllm_pretrain", pretrain)])
    if instruct:
        scenes = list(kept("mllm_instruct", instruct))
        asked = conversations([scene.shown for scene in scenes], seed, kinds)
        rows = [row(scene, [(turn.question, turn.answer) for turn in turns]) for scene, turns in zip(scenes, asked, strict=True)]
        write_conversations(folder / "instruct.json", rows)
    if test:
        _write_tests(renderer, folder, "mllm_test", "", test, TEST_FILES)
        for group in question_groups(renderer.world):
            _write_tests(renderer, folder, f"mllm_{group}", f"-{group}", test, GROUP_FILES)
    failpoint("prepare-mllm")


def write_described(renderer: Renderer, folder: Path, count: int, kinds: Sequence[str] = KINDS) -> None:
    """Write conversations with turns of `kinds` about `count` scenes of all training sprites.

    Their images are descriptions (mllm/conversations/described.py).
    """
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [replace(scene, jpeg=b"") for scene in renderer.scenes("mllm_described", 0, count)]
    asked = conversations([scene.shown for scene in scenes], renderer.world.seed + 1, kinds)  # by other draws than those about pictures
    rows = [
        conversation_row(scene.key, {"regions": _regions(scene.shown)}, [(turn.question, turn.answer) for turn in turns])
        for scene, turns in zip(scenes, asked, strict=True)
    ]
    write_conversations(folder / "described.json", rows)


def _regions(shown: Shown) -> list[dict[str, Any]]:
    """Return each sprite's name, with an article, and box, in shares of the picture's side."""
    return [
        {"text": article(sprite.name), "box": [round(edge / shown.size, 3) for edge in box]}
        for sprite, box in zip(shown.sprites, shown.boxes, strict=True)
    ]


def _write_tests(renderer: Renderer, folder: Path, part: str, suffix: str, count: int, files: dict[str, tuple[str, ...]]) -> None:
    """Write the questions about `count` scenes of a part, a table for each group of kinds."""
    scenes = list(renderer.scenes(part, 0, count))
    pairs = list(zip(scenes, single_questions([scene.shown for scene in scenes], renderer.world.seed), strict=True))
    for name, kinds in files.items():
        rows = [
            question_row(f"{scene.key}-{number}", (f"{scene.key}.jpg", scene.jpeg), turn.question, turn.answer, turn.kind)
            for scene, turns in pairs
            for number, turn in enumerate(turn for turn in turns if turn.kind in kinds)
        ]
        write_questions(folder / f"{name}{suffix}.parquet", rows)


def conversation_row(key: str, image: str | dict[str, Any], turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return LLaVA's row: (human, gpt) turns, `<image>` before the first question (may be empty).

    `image`: path below the image root, or a description.
    """
    said = []
    for number, (question, answer) in enumerate(turns):
        marked = f"<image>\n{question}".rstrip() if number == 0 else question
        said += [{"from": "human", "value": marked}, {"from": "gpt", "value": answer}]
    return {"id": key, "image": image, "conversations": said}


def write_conversations(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows one per line, as JSON lines if `path` ends with .jsonl, else as a JSON array."""
    lines = [json.dumps(row) for row in rows]
    text = "".join(f"{line}\n" for line in lines) if path.suffix == ".jsonl" else "[\n" + ",\n".join(lines) + "\n]\n"
    path.write_text(text)


def question_row(key: str, image: tuple[str, bytes], question: str, answer: str | list[str], kind: str) -> dict[str, Any]:
    """Return a row of a question table. `image`: file name and content. `answer`: one right text or a list. `kind` groups questions."""
    return {"id": key, "image": {"bytes": image[1], "path": image[0]}, "question": question, "answer": answer, "kind": kind}


def write_questions(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of `question_row` as parquet, all answers texts or all lists. Consecutive rows store the same picture once."""
    several = bool(rows) and isinstance(rows[0]["answer"], list)
    columns = {
        "id": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "question": pa.string(),
        "answer": pa.list_(pa.string()) if several else pa.string(),
        "kind": pa.string(),
    }
    pq.write_table(pa.Table.from_pylist(list(rows), schema=pa.schema(columns)), path, compression="zstd", row_group_size=500)
