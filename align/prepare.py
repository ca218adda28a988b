"""Fetch the embedded default (encoders, graphics) and write the sprite-scene data sets: what the quickstart trains and tests on.

    python align/prepare.py --output runs/quickstart/data
    python align/prepare.py --output runs/quickstart/data --train 20000 --val 1000 --seed 1
    python align/prepare.py --output runs/mllm/data --mllm-pretrain 4000 --mllm-instruct 4000 --mllm-test 300

Written below --output:
    train/000000.tar ...         webdataset as img2dataset writes it: KEY.jpg, KEY.json with key, short and long caption
    val/000000.tar ...           other scenes of the same sprites
    tasks/sprites-seen/          zero-shot classification in CLIP_benchmark's layout: one sprite a picture, trained on
    tasks/sprites-unseen/        the same with sprites that are in no training picture or caption
    tasks/sprites-retrieval/     images/ and retrieval.jsonl: key, image, captions [short, long]
    tasks/sprites-swapped/       images/ and pairs.jsonl: key, two images whose objects have changed places, their captions, category
    tasks/sprites-segmentation/  images/, labels/ (PNG, class number of every pixel, 255 where no object is) and classes.txt
    mllm/                        with --mllm-pretrain, --mllm-instruct, --mllm-test: stage two, again other scenes of the same sprites
                                 (of some of them with --mllm-sprites)
        images/, pretrain.json, instruct.json    LLaVA's format: captions, conversations; image paths are relative to mllm/
        yesno.parquet, open.parquet, caption.parquet    test questions: id, image (bytes, path), question, answer, kind
    COMMIT.json                  settings and hashes, written last

The same settings give the same bytes. Run again, it verifies what is there; killed half-way, run the same command again.
"""

import fcntl
import io
import itertools
import json
import multiprocessing
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from align.common.commandline import run
from align.common.errors import DataError, LeaseError, UsageError
from align.common.files import TEMPORARY, disk_full_named, failpoint, hash_file, human_bytes, read_json, require_free, sync_folder
from align.demo.config import PrepareConfig
from align.demo.questions import Question, Shown, conversations, single_questions
from align.demo.rendering import (
    NO_OBJECT,
    OPTIONAL,
    Rendered,
    Renderer,
    World,
    encoded,
    end_with_parent,
    generator,
    mllm_subset,
    render_segmented,
    render_swapped,
)
from align.demo.scenes import read_sprites, split_sprites
from align.demo.writing import conversation_row, question_row, write_conversations, write_questions
from align.embedded.assets import COMMIT, check, commit, fetch

FORMAT = 1
SCENES_PER_TAR = 1000
BYTES_PER_SCENE = 16_000  # a JPEG of 224 px, its captions and the tar's padding; measured 13 KB on average
TEST_COPIES = 3  # of a picture in the test questions: one a file
TEST_FILES = {"yesno": ("exists", "relation"), "open": ("what", "where", "count"), "caption": ("caption",)}
TEMPLATES = ("a picture of a {c}", "an image of a {c}", "a {c}", "{c}")
PNG_COPIES = 2  # BYTES_PER_SCENE that a PNG and its label map take; measured 1.4 on average

TESTED = (
    "embedded:efficientnet-lite0",
    "embedded:efficientnet-lite1",
    "embedded:efficientnet-lite2",
    "embedded:vit-s14-focus",
    "embedded:minilm",
    "embedded:smollm2-135m",
)


def write_tars(folder: Path, pattern: str, per_tar: int, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Write samples (key, content by extension) to numbered tars; the same samples give the same bytes (no times, no owners)."""
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


def settings(config: PrepareConfig, sprites: Path) -> dict[str, Any]:
    """Return what the written bytes depend on, as JSON values."""
    names = ("train", "val", "retrieval", "held_out", "per_class", "image_size", "seed")
    optional = {name: getattr(config, name) for name in OPTIONAL if getattr(config, name)}
    if config.mllm_sprites and any(name.startswith("mllm") for name in optional):
        optional["mllm_sprites"] = config.mllm_sprites
    chosen = {name: getattr(config, name) for name in names} | optional
    return {**chosen, "sprites": hash_file(sprites / "sprites.json"), "format": FORMAT}


def is_done(output: Path, wanted: dict[str, Any]) -> bool:
    """Return whether `output` is finished and intact; UsageError if it holds anything else, DamagedError if it was changed."""
    if not output.exists() or not any(output.iterdir()):
        return False
    if not (output / COMMIT).is_file():
        raise UsageError(f"{output} is not empty and was not written by this command; choose another --output")
    made = read_json(output / COMMIT)["settings"]
    pairs = {name: (made.get(name, 0), wanted.get(name, 0)) for name in {**wanted, **made}}
    differing = [f"{name} {there!r} there, {asked!r} asked" for name, (there, asked) in pairs.items() if there != asked]
    if differing:
        raise UsageError(f"{output} was made with other settings ({'; '.join(differing)}); choose another --output or delete it")
    check(output, contents=True)
    return True


@contextmanager
def only_writer(output: Path) -> Iterator[Path]:
    """Yield the empty folder to build in, held by this process alone; LeaseError if another one is at work."""
    folder = output.with_name(f"{output.name}{TEMPORARY}")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LeaseError(f"another process is writing {output}; wait for it, then run the same command again") from error
        if not folder.exists() or not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise LeaseError(f"another process has just finished {output}; run the same command again")
        for leftover in folder.iterdir():  # of a killed run
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


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
    """Write a retrieval task of `count` scenes, no two of which show the same objects (else two answers would be right)."""
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
    """Write `count` pairs of scenes that differ in the places of their two objects, with captions in the same words."""
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
    numbers = np.full(256, NO_OBJECT, dtype=np.uint8)  # of the kept classes, by their number among all
    numbers[kept] = np.arange(len(kept))
    for path in (folder / "labels").iterdir():
        with Image.open(path) as labels:
            renumbered = numbers[np.asarray(labels)]
        path.write_bytes(encoded(Image.fromarray(renumbered), "PNG"))
    classes = generator(renderer.world, "segmentation")[1]
    (folder / "classes.txt").write_text("".join(f"{classes[number]}\n" for number in kept))
    failpoint("prepare-segmentation")


def write_mllm(renderer: Renderer, folder: Path, pretrain: int, instruct: int, test: int) -> None:
    """Write captions and conversations to train an MLLM on, and questions to test it: `pretrain`, `instruct`, `test` scenes."""
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
        asked = conversations([known(scene) for scene in scenes], seed)
        rows = [row(scene, [(turn.question, turn.answer) for turn in turns]) for scene, turns in zip(scenes, asked, strict=True)]
        write_conversations(folder / "instruct.json", rows)
    if test:
        scenes = list(renderer.scenes("mllm_test", 0, test))
        pairs = list(zip(scenes, single_questions([known(scene) for scene in scenes], seed), strict=True))
        for name, kinds in TEST_FILES.items():
            chosen = [(scene, [turn for turn in turns if turn.kind in kinds]) for scene, turns in pairs]
            write_questions(folder / f"{name}.parquet", [line for scene, turns in chosen for line in question_rows(scene, turns)])
    failpoint("prepare-mllm")


def known(scene: Rendered) -> Shown:
    """Return what a rendered scene shows."""
    assert scene.shown is not None
    return scene.shown


def question_rows(scene: Rendered, turns: list[Question]) -> Iterator[dict[str, Any]]:
    """Yield a scene's rows of a question table."""
    for number, turn in enumerate(turns):
        yield question_row(f"{scene.key}-{number}", (f"{scene.key}.jpg", scene.jpeg), turn.question, turn.answer, turn.kind)


def main(config: PrepareConfig) -> None:
    """Fetch the assets, then render, commit and rename into place."""
    cache = Path(config.cache) if config.cache else None
    for asset in TESTED if config.assets_only else config.assets:
        print(f"{asset}: {fetch(asset, cache, progress=print)}")
    sprites = fetch("embedded:twemoji", cache, progress=print)
    if config.assets_only:
        return
    output, wanted = Path(config.output), settings(config, sprites)
    world = World(str(sprites), config.seed, config.image_size, config.held_out, config.per_class, wanted.get("mllm_sprites", 0))
    mllm_subset(split_sprites(read_sprites(sprites), config.seed, config.held_out)[0], world)  # before hours of rendering
    if is_done(output, wanted):
        print(f"{output} is complete and verified; nothing to do")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    scenes = config.train + config.val + config.retrieval + 2 * config.held_out * config.per_class
    stage_two = config.mllm_pretrain, config.mllm_instruct, config.mllm_test
    scenes += config.mllm_pretrain + config.mllm_instruct + TEST_COPIES * config.mllm_test
    scenes += 2 * config.swapped + PNG_COPIES * config.segmentation
    require_free(output.parent, scenes * BYTES_PER_SCENE)
    columns = (TextColumn("{task.description:>13}"), BarColumn(), MofNCompleteColumn())
    timing = (TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with only_writer(output) as folder, disk_full_named(folder):
        spawn = multiprocessing.get_context("spawn")
        workers = ProcessPoolExecutor(config.workers or os.cpu_count(), mp_context=spawn, initializer=end_with_parent)
        with workers as pool, Progress(*columns, *timing) as progress:
            renderer = Renderer(world, pool, progress)
            write_captioned(renderer, folder / "train", "train", config.train)
            write_captioned(renderer, folder / "val", "val", config.val)
            for part in ("seen", "unseen"):
                write_classification(renderer, folder / "tasks" / f"sprites-{part}", part)
            write_retrieval(renderer, folder / "tasks" / "sprites-retrieval", config.retrieval)
            if config.swapped:
                write_swapped(renderer, folder / "tasks" / "sprites-swapped", config.swapped)
            if config.segmentation:
                write_segmentation(renderer, folder / "tasks" / "sprites-segmentation", config.segmentation)
            if any(stage_two):
                write_mllm(renderer, folder / "mllm", *stage_two)
        commit(folder, {"settings": wanted})
        failpoint("prepare-rename")
        if output.exists():
            output.rmdir()  # empty: checked by is_done
        os.rename(folder, output)
        sync_folder(output.parent)
    written = sum(entry["bytes"] for entry in read_json(output / COMMIT)["files"].values())
    mllm = f"{stage_two[0]} + {stage_two[1]} + {stage_two[2]} scenes for an MLLM, " if any(stage_two) else ""
    tasks = 3 + bool(config.swapped) + bool(config.segmentation)
    print(f"wrote {output}: {config.train} training and {config.val} validation scenes, {tasks} tasks, {mllm}{human_bytes(written)}")


if __name__ == "__main__":
    run(main, PrepareConfig, "prepare")
