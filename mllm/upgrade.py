"""Put an aligned vision encoder into an LLM, or into an existing LLaVA: a model folder that mllm/finetune.py can train.

    python mllm/upgrade.py --llm embedded:smollm2-135m --sail runs/quickstart/train --output runs/mllm-init
    python mllm/upgrade.py --llm Qwen/Qwen2.5-0.5B --sail runs/mine --sail-head random --output runs/control
    python mllm/upgrade.py --llava llava-hf/llava-1.5-7b-hf --sail runs/mine --output runs/llava-sail
    python mllm/upgrade.py --llm Qwen/Qwen2.5-0.5B --sail runs/mine --captions captions.jsonl     # projector solved, not random
    python mllm/upgrade.py --llm models/smollm2 --gguf-file model.gguf --vision facebook/dinov2-small --sail-head none

The LLM keeps its weights bit for bit. The folder opens anywhere with AutoModelForImageTextToText and trust_remote_code=True.
"""

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from align.common.commandline import run
from align.common.console import plain_console
from align.common.files import atomic_bytes
from align.common.hardware import reuse_freed_memory, use_cores
from align.common.recipes_yaml import to_recipe
from align.common.runs import add_launch
from mllm.assembly.config import UpgradeConfig
from mllm.assembly.join import Part, assemble, load_projector
from mllm.assembly.warmstart import fit_projector
from mllm.conversations.table import open_conversations
from mllm.model.modeling import SailLlavaForConditionalGeneration
from mllm.model.processing import SailLlavaProcessor
from mllm.model.saving import require_free_place, save_mllm

PROGRESS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def report_table(parts: list[Part]) -> Table:
    """Return what became of each part of the given model, with its number of parameters, as a table for the terminal."""
    table = Table(title="kept, replaced and new parts", title_justify="left")
    for heading in ("part", "state", "parameters", "weights"):
        table.add_column(heading, justify="right" if heading == "parameters" else "left", overflow="fold")
    for part in parts:
        table.add_row(part.name, part.state, f"{part.parameters:,}" if part.parameters else "", part.weights)
    table.add_section()
    table.add_row("in all", "", f"{sum(part.parameters for part in parts):,}", "")
    return table


def warm_start(config: UpgradeConfig, model: SailLlavaForConditionalGeneration, processor: SailLlavaProcessor, console: Console) -> str:
    """Solve the projector from captioned images, say how well it fits, and return where its weights come from."""
    with tempfile.TemporaryDirectory() as cache, Progress(*PROGRESS, console=console) as bar:
        conversations = open_conversations(config.captions, config.image_root, Path(cache), seed=config.seed)
        show = partial(bar.update, bar.add_task("images", total=None))
        fit = fit_projector(
            model, processor, conversations, config.caption_rows, config.seed, lambda done, total: show(completed=done, total=total)
        )
    console.print(
        f"projector solved from {fit.images} captioned images ({fit.rejected} unusable); of {fit.held_out} held-out images "
        f"{fit.found:.0%} are nearest to their own caption's words"
    )
    return f"solved from {fit.images} captions"


def main(config: UpgradeConfig) -> None:
    """Open the parts, join them, save the model and say what was kept."""
    reuse_freed_memory()
    use_cores(1)
    disable_progress_bar()  # of transformers, for every file it reads and writes
    console = plain_console()
    folder = Path(config.output)
    require_free_place(folder)
    model, processor, parts = assemble(
        llm=config.llm, llava=config.llava, sail=config.sail, vision=config.vision, sail_head=config.sail_head, head=config.head,
        expansion=config.expansion, width=config.width, layer=config.layer, image_aspect_ratio=config.image_aspect_ratio,
        image_size=config.image_size, grid=config.grid, template=config.template, gguf_file=config.gguf_file,
        revision=config.revision, seed=config.seed,
    )  # fmt: skip
    weights = ""
    if config.projector:
        load_projector(model, Path(config.projector))
        weights = f"trained, from {config.projector}"
    elif config.captions:
        weights = warm_start(config, model, processor, console)
    if weights:
        parts = [replace(part, weights=weights) if part.name == "projector" else part for part in parts]
    save_mllm(model, processor, folder)
    atomic_bytes(folder / "config.yaml", to_recipe(config, "upgrade").encode())
    add_launch(folder, {"parts": [vars(part) for part in parts]})
    console.print(report_table(parts))
    height, width = model.config.sail_image_size or (0, 0)
    console.print(
        f"{folder}: images of {height} x {width} pixels ({config.image_aspect_ratio}) become {model.config.image_tokens()} visual tokens; "
        f"train it with mllm/finetune.py --model {folder}"
    )


if __name__ == "__main__":
    run(main, UpgradeConfig, "upgrade")
