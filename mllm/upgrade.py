"""Put an aligned vision encoder into an LLM, or into an existing LLaVA: a model folder that mllm/finetune.py can train.

    python mllm/upgrade.py --llm embedded:smollm2-135m --sail runs/quickstart/train --output runs/mllm-init
    python mllm/upgrade.py --llm Qwen/Qwen2.5-0.5B --sail runs/mine --sail-head random --output runs/control
    python mllm/upgrade.py --llava llava-hf/llava-1.5-7b-hf --sail runs/mine --output runs/llava-sail
    python mllm/upgrade.py --llm Qwen/Qwen2.5-0.5B --sail runs/mine --captions captions.jsonl     # projector solved, not random
    python mllm/upgrade.py --llm Qwen/Qwen2.5-0.5B --sail runs/mine --texts captions.txt --images 'photos/*.tar' --features both
    python mllm/upgrade.py --llm models/smollm2 --gguf-file model.gguf --vision facebook/dinov2-small --sail-head none

The LLM keeps its weights bit for bit. The folder opens anywhere with AutoModelForImageTextToText and trust_remote_code=True.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from align.common.commandline import run, set_up
from mllm.assembly.config import UpgradeConfig

if TYPE_CHECKING:
    from rich.console import Console

    from mllm.assembly.join import Component
    from mllm.assembly.warmstart import Fit
    from mllm.model.modeling import SailLlavaForConditionalGeneration
    from mllm.model.processing import SailLlavaProcessor


def main(config: UpgradeConfig) -> None:
    """Load the components, join them, start the projector, save the model and say what was kept."""
    from align.common.recipes_yaml import write_recipe
    from align.common.runs import add_launch
    from mllm.assembly.join import load_projector, report_table
    from mllm.model.saving import require_free_place, save_mllm

    console = set_up()
    folder = Path(config.output)
    require_free_place(folder)
    model, processor, report = assembled(config)
    weights = ""
    if config.projector:
        load_projector(model, Path(config.projector))
        weights = f"trained, from {config.projector}"
    elif config.captions or config.texts:
        fit = solved(config, model, processor, console)
        console.print(fit.summary())
        weights = fit.weights()
    if weights:
        report = [replace(line, weights=weights) if line.name == "projector" else line for line in report]
    save_mllm(model, processor, folder)
    write_recipe(config, folder, "upgrade")
    add_launch(folder, {"parts": [vars(line) for line in report]})
    console.print(report_table(report))
    height, width = model.config.sail_image_size or (0, 0)
    console.print(
        f"{folder}: images of {height} x {width} pixels ({config.image_aspect_ratio}) become {model.config.image_tokens()} visual tokens; "
        f"train it with mllm/finetune.py --model {folder}"
    )


def assembled(config: UpgradeConfig) -> "tuple[SailLlavaForConditionalGeneration, SailLlavaProcessor, list[Component]]":
    """Return (model, processor, report): an LLM, or what a LLaVA has of one, with the encoder and head asked for."""
    from mllm.assembly.join import assemble
    from mllm.assembly.language import load_llava, load_llm
    from mllm.assembly.vision import load_aligned_encoder

    if config.llm is not None:
        language = load_llm(config.llm, config.gguf_file, config.revision)
    else:
        language = load_llava(str(config.llava), config.revision)
    vision = load_aligned_encoder(
        sail=config.sail, vision=config.vision, sail_head=config.sail_head, head=config.head, expansion=config.expansion,
        width=config.width, layer=config.layer, image_size=config.image_size, raw=config.raw_beside_head, seed=config.seed,
    )  # fmt: skip
    aspect = config.image_aspect_ratio
    return assemble(language, vision, image_aspect_ratio=aspect, grid=config.grid, template=config.template, seed=config.seed)


def solved(config: UpgradeConfig, model: "SailLlavaForConditionalGeneration", processor: "SailLlavaProcessor", console: "Console") -> "Fit":
    """Solve the projector from --captions, --texts or both, on a GPU if there is one; return how it went."""
    from torch import nn

    from align.common.console import Progress
    from align.common.hardware import choose_device
    from mllm.assembly.texts import Texts
    from mllm.assembly.warmstart import fit_projector
    from mllm.conversations.table import open_conversations

    module: nn.Module = model
    module.to(choose_device())
    with tempfile.TemporaryDirectory() as cache:
        fit = fit_projector(
            model,
            processor,
            conversations=open_conversations(config.captions, config.image_root, Path(cache), config.seed) if config.captions else None,
            rows=config.caption_rows,
            texts=Texts(config.texts, config.text_columns, config.text_rows) if config.texts else None,
            sail=config.sail,
            images=config.images,
            seed=config.seed,
            progress=lambda what: Progress(console, what),
        )
    module.to("cpu")
    return fit


if __name__ == "__main__":
    run(main, UpgradeConfig, "upgrade")
