"""Put an aligned vision encoder into an LLM, or into an existing LLaVA: a model folder that mllm/finetune.py can train.

    python mllm/upgrade.py --llm embedded:smollm2-135m --sail runs/quickstart/train --output runs/mllm-init
    python mllm/upgrade.py --llm Qwen/Qwen2.5-0.5B --sail runs/mine --sail-head random --output runs/control
    python mllm/upgrade.py --llava llava-hf/llava-1.5-7b-hf --sail runs/mine --output runs/llava-sail
    python mllm/upgrade.py --llm Qwen/Qwen2.5-0.5B --sail runs/mine --captions captions.jsonl     # projector solved, not random
    python mllm/upgrade.py --llm Qwen/Qwen2.5-0.5B --sail runs/mine --texts captions.txt --images 'photos/*.tar' --features both
    python mllm/upgrade.py --llava llava-hf/llava-1.5-7b-hf --keep-tower --join sequence --sail runs/mine --output runs/llava-both
    python mllm/upgrade.py --llm models/smollm2 --gguf-file model.gguf --vision facebook/dinov2-small --sail-head none

The LLM keeps its weights bit for bit. The folder opens anywhere with AutoModelForImageTextToText and trust_remote_code=True.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.runtime.commandline import run, set_up
from mllm.assembly.config import UpgradeConfig

if TYPE_CHECKING:
    from rich.console import Console

    from mllm.assembly.join import Component
    from mllm.assembly.warmstart import Fit
    from mllm.model.modeling import SailLlavaForConditionalGeneration
    from mllm.model.processing import SailLlavaProcessor


def main(config: UpgradeConfig) -> None:
    """Take the place of the model's folder, which is replaced as a whole, and upgrade."""
    from align.common.locks import locked
    from mllm.model.saving import require_free_place

    console, folder = set_up(), Path(config.output)
    require_free_place(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f"{folder.name}.lock"), keep=False):
        upgrade(config, folder, console)


def upgrade(config: UpgradeConfig, folder: Path, console: "Console") -> None:
    """Load the components, join them, start the projector, save the model and say what was kept."""
    from align.runtime.recipes_yaml import write_recipe
    from align.runtime.runs import add_launch
    from mllm.assembly.described import write_described
    from mllm.assembly.join import PROJECTORS, ends_answers, load_projector, parameter_count, report_table
    from mllm.conversations.tokens import Chat
    from mllm.model.answer_ends import NEVER_ENDS
    from mllm.model.saving import save_mllm

    model, processor, report = assembled(config)
    weights: dict[str, str] = {}
    fits: dict[str, Fit] = {}
    if config.projector:
        load_projector(model, Path(config.projector))
        weights = {"projector": f"trained, from {config.projector}"}
    elif config.captions or config.texts:
        fits = solved(config, model, processor, console)
        weights = {name: fit.weights() for name, fit in fits.items()}
    sizes = dict(zip(PROJECTORS, map(parameter_count, model.model.projectors), strict=False))  # solving makes new ones
    report = [replace(line, weights=weights[line.name], parameters=sizes[line.name]) if line.name in weights else line for line in report]
    crossing = next(iter(fits.values())).crossing if fits else None

    def add(into: Path) -> None:
        write_described(into, config, crossing, model.model.projectors[0], console)
        write_recipe(config, into, "upgrade")
        add_launch(into, {"parts": [vars(line) for line in report]})

    save_mllm(model, processor, folder, add)
    console.print(report_table(report))
    if not ends_answers(Chat.of_processor(processor)):
        console.print(NEVER_ENDS)
    height, width = model.config.sail_image_size or (0, 0)
    console.print(
        f"{folder}: images of {height} x {width} pixels ({config.image_aspect_ratio}) become {model.config.image_tokens()} visual tokens; "
        f"train it with mllm/finetune.py --model {folder}"
    )


def assembled(config: UpgradeConfig) -> "tuple[SailLlavaForConditionalGeneration, SailLlavaProcessor, list[Component]]":
    """Return (model, processor, report): an LLM, or what a LLaVA has of one, with the encoders and heads asked for."""
    from mllm.assembly.join import assemble
    from mllm.assembly.language import load_llava, load_llm
    from mllm.assembly.vision import kept_tower, load_aligned_encoder

    if config.llm is not None:
        language = load_llm(config.llm, config.gguf_file, config.revision)
    else:
        language = load_llava(str(config.llava), config.revision)
    head: dict[str, Any] = {"head": config.head, "expansion": config.expansion, "width": config.width, "raw": config.raw_beside_head}
    vision = [load_aligned_encoder(**one, **head, seed=config.seed) for one in config.encoders()]
    if config.keep_tower:
        vision.append(kept_tower(language))
    return assemble(
        language, vision, how=config.join, image_aspect_ratio=config.image_aspect_ratio, grid=config.grid,
        place_words=config.place_words, template=config.template, seed=config.seed,
    )  # fmt: skip


def solved(
    config: UpgradeConfig, model: "SailLlavaForConditionalGeneration", processor: "SailLlavaProcessor", console: "Console"
) -> "dict[str, Fit]":
    """Solve the new projectors from --captions, --texts or both, on a GPU if there is one; return by name how it went."""
    from torch import nn

    from align.common.hardware import choose_device
    from align.runtime.console import Progress
    from mllm.assembly.join import PROJECTORS
    from mllm.assembly.texts import Texts
    from mllm.assembly.warmstart import fit_projector
    from mllm.conversations.table import open_conversations

    module: nn.Module = model
    module.to(choose_device())
    fits = {}
    with tempfile.TemporaryDirectory() as cache:
        conversations = open_conversations(config.captions, config.image_root, Path(cache), config.seed) if config.captions else None
        texts = Texts(config.texts, config.text_columns, config.text_rows) if config.texts else None
        for number in range(len(config.encoders()) if config.join == "sequence" else 1):  # a tower that is kept has its own projector
            run = config.sail[number] if number < len(config.sail) else None
            fits[PROJECTORS[number]] = fit = fit_projector(
                model,
                processor,
                number=number,
                conversations=conversations,
                rows=config.caption_rows,
                texts=texts if run else None,
                most_words=config.words,
                sail=run,
                images=config.images,
                seed=config.seed,
                progress=lambda what: Progress(console, what),
            )
            console.print(f"{PROJECTORS[number].removesuffix('projector')}{fit.summary()}")
    module.to("cpu")
    return fits


if __name__ == "__main__":
    run(main, UpgradeConfig, "upgrade")
