"""Rendering of the prepared data's scenes on all cores, as encoded images. The seed and a part's place in PARTS decide its scenes."""

import io
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from rich.console import Console

from align.common.errors import UsageError
from align.demo.questions import Shown
from align.demo.scenes import OBJECT_COUNTS, Sprite, SpriteScenes, read_sprites, split_sprites
from align.demo.wording import relation
from align.runtime.console import Progress

SCENES_PER_JOB = 50
JPEG_QUALITY = 90
OPTIONAL = ("mllm_pretrain", "mllm_instruct", "mllm_test", "swapped", "segmentation", "mllm_described")  # parts that may be left out
GROUPS = ("aligned", "unseen")  # test scenes of sprites that stage two never shows: stage one's training scenes do, or none does
PARTS = ("train", "val", "retrieval", "seen", "unseen", *OPTIONAL[:5], *(f"mllm_{group}" for group in GROUPS), *OPTIONAL[5:])
FIRST_INDEX = {part: number << 33 for number, part in enumerate(PARTS)}  # never the same scene twice
SEGMENTATION_SPRITES = 24  # at most: few classes, so that each has some scenes
NO_OBJECT = 255  # in label maps
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Settings that all scenes of a run share."""

    folder: str
    seed: int
    size: int
    held_out: int
    per_class: int
    mllm_sprites: int = 0  # in stage two; 0: all


@dataclass(frozen=True)
class Job:
    """Scenes to render in one go: numbers `start` to `stop` of a part (a key of FIRST_INDEX)."""

    world: World
    part: str
    start: int
    stop: int


@dataclass(frozen=True)
class Rendered:
    """A rendered scene: key, JPEG, captions, names of its objects, and what questions can be about."""

    key: str
    jpeg: bytes
    short: str
    long: str
    names: tuple[str, ...]
    shown: Shown


@dataclass(frozen=True)
class Swapped:
    """Two rendered scenes with exchanged objects: JPEGs, the caption of each, and the relation in both captions."""

    key: str
    jpegs: tuple[bytes, bytes]
    captions: tuple[str, str]
    relation: str


@dataclass(frozen=True)
class Segmented:
    """A rendered scene as PNG, its label map as PNG (class number or NO_OBJECT), and the numbers of its classes."""

    key: str
    png: bytes
    labels: bytes
    classes: tuple[int, ...]


def mllm_subset(sprites: Sequence[Sprite], world: World) -> list[Sprite]:
    """Return the first `mllm_sprites` of a seeded permutation (0: all), so larger sets include smaller ones. UsageError if too few."""
    if not world.mllm_sprites:
        return list(sprites)
    if world.mllm_sprites > len(sprites):
        raise UsageError(
            f"--mllm-sprites is {world.mllm_sprites}, but scenes of the training data show {len(sprites)} sprites; ask for fewer"
        )
    rng = np.random.Generator(np.random.Philox(key=[world.seed, 0], counter=[0, 0, 3, 9]))
    return [sprites[int(number)] for number in rng.permutation(len(sprites))[: world.mllm_sprites]]


def sprites_of(world: World, part: str) -> list[Sprite]:
    """Return the sprites that a part's scenes show."""
    sprites, unseen = split_sprites(read_sprites(Path(world.folder)), world.seed, world.held_out)
    if part in ("unseen", "mllm_unseen"):
        return unseen
    if part == "seen":
        return split_sprites(sprites, world.seed + 1, world.held_out)[1]
    if part == "segmentation":
        return mllm_subset(sprites, replace(world, mllm_sprites=min(SEGMENTATION_SPRITES, len(sprites))))
    if part in ("mllm_pretrain", "mllm_instruct", "mllm_test"):
        return mllm_subset(sprites, world)
    if part == "mllm_aligned":
        taught = set(mllm_subset(sprites, world))
        return [sprite for sprite in sprites if sprite not in taught]
    return sprites


def question_groups(world: World) -> list[str]:
    """Return the groups that have sprites enough for scenes."""
    return [group for group in GROUPS if len(sprites_of(world, f"mllm_{group}")) >= 2 * len(OBJECT_COUNTS)]


@lru_cache(maxsize=4)
def generator(world: World, part: str) -> tuple[SpriteScenes, list[str]]:
    """Return a part's scene generator and, for classification and segmentation, its class names in order (else [])."""
    sprites = sprites_of(world, part)
    single = part in ("seen", "unseen")
    classes = sorted(sprite.name for sprite in sprites) if single or part == "segmentation" else []
    return SpriteScenes(Path(world.folder), world.seed, world.size, sprites, max_objects=1 if single else len(OBJECT_COUNTS)), classes


def render(job: Job) -> list[Rendered]:
    """Return the scenes of a job. Runs in worker processes."""
    scenes, classes = generator(job.world, job.part)
    by_name = {sprite.name: sprite for sprite in scenes.sprites}
    rendered = []
    for number in range(job.start, job.stop):
        sprite = by_name[classes[number // job.world.per_class]] if classes else None
        scene = scenes.scene(FIRST_INDEX[job.part] + number, sprite)
        jpeg = encoded(scene.image, "JPEG", quality=JPEG_QUALITY)
        names = tuple(sorted(placed.sprite.name for placed in scene.objects))
        key = f"{job.part}-{number:07d}"
        rendered.append(Rendered(key, jpeg, scene.short, scene.long, names, Shown.of(scene)))
    return rendered


def render_swapped(job: Job) -> list[Swapped]:
    """Return the pairs of swapped scenes of a job. Runs in worker processes."""
    scenes = generator(job.world, job.part)[0]
    rendered = []
    for number in range(job.start, job.stop):
        one, other = scenes.swapped(FIRST_INDEX[job.part] + number)
        words = relation(one.objects[0].box, one.objects[1].box)
        assert words is not None
        jpegs = encoded(one.image, "JPEG", quality=JPEG_QUALITY), encoded(other.image, "JPEG", quality=JPEG_QUALITY)
        rendered.append(Swapped(f"{job.part}-{number:07d}", jpegs, (one.short, other.short), words))
    return rendered


def render_segmented(job: Job) -> list[Segmented]:
    """Return the scenes of a job with their label maps. Runs in worker processes."""
    scenes, classes = generator(job.world, job.part)
    rendered = []
    for number in range(job.start, job.stop):
        scene = scenes.scene(FIRST_INDEX[job.part] + number)
        shown = tuple(classes.index(placed.sprite.name) for placed in scene.objects)
        labels = np.array([NO_OBJECT, *shown], dtype=np.uint8)[scene.mask()]  # (H, W)
        pictures = encoded(scene.image, "PNG"), encoded(Image.fromarray(labels), "PNG")
        rendered.append(Segmented(f"{job.part}-{number:07d}", *pictures, shown))
    return rendered


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return `image` as a file of that kind."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def end_with_parent() -> None:
    """Make this worker process end when its parent does, or a killed run would leave workers that wait forever."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Renderer:
    """Renders parts on all cores, in order, and reports progress."""

    def __init__(self, world: World, pool: ProcessPoolExecutor, console: Console) -> None:
        self.world, self.pool, self.console = world, pool, console

    def scenes(self, part: str, start: int, stop: int) -> Iterator[Rendered]:
        """Yield scenes `start` to `stop` of a part in order."""
        return self.drawn(render, part, start, stop)

    def drawn(self, draw: Callable[[Job], list[T]], part: str, start: int, stop: int) -> Iterator[T]:
        """Yield what `draw` makes of numbers `start` to `stop` of a part, in order."""
        firsts = range(start, stop, SCENES_PER_JOB)
        jobs = [Job(self.world, part, first, min(first + SCENES_PER_JOB, stop)) for first in firsts]
        progress, done = Progress(self.console, f"rendered scenes of {part}", stop - start), 0
        for batch in self.pool.map(draw, jobs):
            yield from batch
            done += len(batch)
            progress(done)
