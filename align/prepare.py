"""Fetch the embedded encoders and graphics, and write the sprite-scene data sets of the quickstart.

    python align/prepare.py --output runs/quickstart/data
    python align/prepare.py --output runs/quickstart/data --train 20000 --val 1000 --seed 1
    python align/prepare.py --output runs/mllm/data --mllm-pretrain 4000 --mllm-instruct 4000 --mllm-test 300

Written below --output:
    train/000000.tar ...         webdataset as img2dataset writes it: KEY.jpg, KEY.json with key, short and long caption
    val/000000.tar ...           other scenes of the same sprites
    tasks/sprites-seen/          zero-shot classification in CLIP_benchmark's layout: one sprite per picture, seen in training
    tasks/sprites-unseen/        the same with sprites that training never shows or names
    tasks/sprites-retrieval/     images/ and retrieval.jsonl: key, image, captions [short, long]
    tasks/sprites-swapped/       images/ and pairs.jsonl: key, two images with exchanged objects, their captions, category
    tasks/sprites-segmentation/  images/, labels/ (PNG, class number of every pixel, 255 where no object is) and classes.txt
    mllm/                        stage two (--mllm-pretrain, --mllm-instruct, --mllm-test): other scenes, --mllm-sprites limits the sprites
        described.json           (--mllm-described) conversations about scenes of all training sprites, given by names and boxes alone
        images/, pretrain.json, instruct.json    LLaVA's format: captions, conversations; image paths are relative to mllm/
        yesno.parquet, open.parquet, caption.parquet    test questions: id, image (bytes, path), question, answer, kind
    COMMIT.json                  settings and hashes, written last

The same settings give the same bytes. A second run verifies the files. After an interruption, run the same command again.
"""

from pathlib import Path

from align.demo.config import PrepareConfig
from align.runtime.commandline import run

TESTED = (
    "embedded:efficientnet-lite0", "embedded:efficientnet-lite1", "embedded:efficientnet-lite2", "embedded:vit-s14-focus",
    "embedded:minilm", "embedded:smollm2-135m",
)  # fmt: skip


def main(config: PrepareConfig) -> None:
    """Fetch the assets, then render, commit and rename into place."""
    from align.common.files import human_bytes
    from align.demo.building import build, is_done, settings
    from align.demo.rendering import World, mllm_subset
    from align.demo.scenes import read_sprites, split_sprites
    from align.embedded.assets import fetch
    from align.runtime.console import plain_console

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
    written = build(config, output, world, wanted, plain_console())
    stage_two = config.mllm_pretrain, config.mllm_instruct, config.mllm_test
    mllm = f"{stage_two[0]} + {stage_two[1]} + {stage_two[2]} scenes for an MLLM, " if any(stage_two) else ""
    mllm += f"{config.mllm_described} described ones, " if config.mllm_described else ""
    tasks = 3 + bool(config.swapped) + bool(config.segmentation)
    print(f"wrote {output}: {config.train} training and {config.val} validation scenes, {tasks} tasks, {mllm}{human_bytes(written)}")


if __name__ == "__main__":
    run(main, PrepareConfig, "prepare")
