"""Building a folder of prepared data: its settings, lock, files and commit."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from align.common.errors import UsageError
from align.common.files import failpoint, hash_file, read_object, require_free
from align.common.folders import COMMIT, check_folder, commit_folder, replaced_folder
from align.common.locks import locked
from align.demo.config import KINDS, PrepareConfig
from align.demo.rendering import OPTIONAL, Renderer, World, end_with_parent
from align.demo.writing import (
    write_captioned,
    write_classification,
    write_described,
    write_mllm,
    write_retrieval,
    write_segmentation,
    write_swapped,
)

FORMAT = 2
BYTES_PER_SCENE = 16_000  # a JPEG of 224 px, its captions and the tar's padding; measured 13 KB on average
TEST_COPIES = 7  # pictures of a test scene: one per file of questions, over all groups
PNG_COPIES = 2  # times BYTES_PER_SCENE for a PNG and its label map; measured 1.4 on average


def settings(config: PrepareConfig, sprites: Path) -> dict[str, Any]:
    """Return the settings that decide the written bytes, as JSON values."""
    names = ("train", "val", "retrieval", "held_out", "per_class", "image_size", "seed")
    optional = {name: getattr(config, name) for name in OPTIONAL if getattr(config, name)}
    if config.mllm_sprites and any(name.startswith("mllm") for name in optional):
        optional["mllm_sprites"] = config.mllm_sprites
    if config.mllm_kinds and (config.mllm_instruct or config.mllm_described):
        optional["mllm_kinds"] = sorted(config.mllm_kinds)
    chosen = {name: getattr(config, name) for name in names} | optional
    return {**chosen, "sprites": hash_file(sprites / "sprites.json"), "format": FORMAT}


def is_done(output: Path, wanted: dict[str, Any]) -> bool:
    """Return whether `output` is finished and intact. Raise UsageError if it holds anything else, DamagedError if it was changed."""
    if not output.exists() or not any(output.iterdir()):
        return False
    if not (output / COMMIT).is_file():
        raise UsageError(f"{output} is not empty and was not written by this command; choose another --output")
    made = read_object(output / COMMIT)["settings"]
    pairs = {name: (made.get(name, 0), wanted.get(name, 0)) for name in {**wanted, **made}}
    differing = [f"{name} {there!r} there, {asked!r} asked" for name, (there, asked) in pairs.items() if there != asked]
    if differing:
        raise UsageError(f"{output} was made with other settings ({'; '.join(differing)}); choose another --output or delete it")
    check_folder(output, True, f"delete the folder {output} and run again")
    return True


def predicted_bytes(config: PrepareConfig) -> int:
    """Return the disk space in bytes that the data of a config need."""
    scenes = config.train + config.val + config.retrieval + 2 * config.held_out * config.per_class
    scenes += config.mllm_pretrain + config.mllm_instruct + config.mllm_described // 10 + TEST_COPIES * config.mllm_test
    scenes += 2 * config.swapped + PNG_COPIES * config.segmentation
    return scenes * BYTES_PER_SCENE


def build(config: PrepareConfig, output: Path, world: World, wanted: dict[str, Any], console: Console) -> int:
    """Render, write, commit and rename into place the data of `config`; return their bytes. `wanted`: the settings of `config`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    require_free(output.parent, predicted_bytes(config))
    with locked(output.with_name(f"{output.name}.lock"), keep=False):
        if not is_done(output, wanted):  # another process may have written it meanwhile
            with replaced_folder(output, "prepare") as folder:
                spawn = multiprocessing.get_context("spawn")
                workers = ProcessPoolExecutor(config.workers or os.cpu_count(), mp_context=spawn, initializer=end_with_parent)
                with workers as pool:
                    _write(config, folder, Renderer(world, pool, console))
                commit_folder(folder, {"settings": wanted})
                failpoint("prepare-rename")
    return sum(entry["bytes"] for entry in read_object(output / COMMIT)["files"].values())


def _write(config: PrepareConfig, folder: Path, renderer: Renderer) -> None:
    tasks = folder / "tasks"
    write_captioned(renderer, folder / "train", "train", config.train)
    write_captioned(renderer, folder / "val", "val", config.val)
    for part in ("seen", "unseen"):
        write_classification(renderer, tasks / f"sprites-{part}", part)
    write_retrieval(renderer, tasks / "sprites-retrieval", config.retrieval)
    if config.swapped:
        write_swapped(renderer, tasks / "sprites-swapped", config.swapped)
    if config.segmentation:
        write_segmentation(renderer, tasks / "sprites-segmentation", config.segmentation)
    if config.mllm_pretrain or config.mllm_instruct or config.mllm_test:
        write_mllm(renderer, folder / "mllm", config.mllm_pretrain, config.mllm_instruct, config.mllm_test, config.mllm_kinds or KINDS)
    if config.mllm_described:
        write_described(renderer, folder / "mllm", config.mllm_described, config.mllm_kinds or KINDS)
