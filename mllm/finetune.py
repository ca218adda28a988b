"""Train a multimodal LLM: first the projector on captions (pretrain), then everything on conversations (instruct).

    deepspeed mllm/finetune.py --config mllm/recipes/llava_sail_l.yaml --stage pretrain
    accelerate launch mllm/finetune.py --stage instruct --model runs/mine/pretrain/model --data llava_v1_5_mix665k.json \
        --image-root data --output runs/mine/instruct
    torchrun --nproc_per_node 8 mllm/finetune.py --config mllm/recipes/llava_sail_l.yaml --stage instruct --deepspeed zero3
    python mllm/finetune.py --config mllm/recipes/quickstart.yaml --stage instruct --dry-run   # memory and time; trains nothing

Writes to --output: model/ (opens anywhere), adapter/ (LoRA), checkpoint-N/, metrics.jsonl, speed.jsonl, tensorboard/,
manifest.json, config.yaml. The same command resumes an interrupted run from the newest checkpoint that verifies. SIGTERM saves a
checkpoint and exits with code 75.
"""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from align.common.errors import UsageError
from align.runtime.commandline import run, set_up
from align.runtime.recipes_yaml import load_yaml, refuse_other_config
from mllm.loop.config import FinetuneConfig

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import TrainingArguments

    from mllm.conversations.batches import ConversationDataset
    from mllm.model.processing import SailLlavaProcessor

STAGES = ("pretrain", "instruct")
FREE_ON_RESUME = {
    "micro_batch_size", "gradient_checkpointing", "workers", "log_every", "save_every", "keep", "report_to", "peak_tflops",
    "dry_run", "output", "cache",
}  # fmt: skip


def main(config: FinetuneConfig) -> None:
    """Start the process group, refuse other settings, take the run's folder, train."""
    from align.runtime.runs import require_trackers, run_folder

    require_trackers(config.report_to)  # before torch is loaded
    from transformers.utils.logging import set_verbosity_error

    from align.common.folders import check_model_folder, dry_view
    from align.common.hardware import choose_device, resolve_precision
    from align.encoders.loading import load_errors_named
    from mllm.loop.flops import image_flops
    from mllm.loop.settings import training_arguments
    from mllm.model.modeling import SailLlavaConfig
    from mllm.model.saving import NEEDED, require_mllm

    set_verbosity_error()
    folder = Path(config.output)
    model = require_mllm(Path(config.model))
    config = config if model == Path(config.model) else replace(config, model=str(model))  # a run's folder holds its model
    check_model_folder(model)
    with load_errors_named(config.model, NEEDED):  # before DeepSpeed is set up, which would partition the copy that is counted
        image_cost = image_flops(SailLlavaConfig.from_pretrained(config.model, trust_remote_code=False), config.learning_rates())
    precision = resolve_precision(config.precision, choose_device())
    settings = training_arguments(config, precision, int(os.environ.get("WORLD_SIZE", "1")))  # starts the process group: before the model
    console = set_up(quiet=settings.process_index != 0)
    refuse_other_config(config, folder, config.stage, FREE_ON_RESUME)
    if config.dry_run:
        with dry_view(folder) as view, dry_view(Path(config.cache) if config.cache else folder / "cache") as cache:
            finetune(replace(config, output=str(view), cache=str(cache)), settings, image_cost, console)
        return
    with run_folder(folder, settings.process_index == 0, console.print):
        finetune(config, settings, image_cost, console)


def finetune(config: FinetuneConfig, settings: "TrainingArguments", image_cost: float, console: "Console") -> None:
    """Load and freeze the model, read the data, train, export."""
    from mllm.conversations.packing import EpochPlan, items_an_epoch
    from mllm.loop.estimate import estimate
    from mllm.loop.flops import Collate, step_cost
    from mllm.loop.parameter_groups import group_table, load_trainable, trained_rows
    from mllm.loop.run import train
    from mllm.loop.settings import fit_batch
    from mllm.loop.trainer import MicroBatches
    from mllm.model.answer_ends import ROWS, answer_ends, require_ends

    rates, start, world = config.learning_rates(), Path(config.model), settings.world_size
    model, processor = load_trainable(start, rates, config.lora(), config.seed, bf16=settings.bf16, deepspeed=bool(config.deepspeed))
    with settings.main_process_first(desc="index of the data"):
        dataset = read_data(config, processor, console)
    items = items_an_epoch(dataset.index, config.packing, config.seed)
    batch_size, micro = fit_batch(settings, config, items, console.print)
    plan = EpochPlan(dataset.index, batch_size, packing=config.packing, seed=config.seed)
    steps = settings.max_steps = config.steps or max(1, round(config.epochs * len(plan.batches(0))))
    micro_batches = MicroBatches(plan.batches, steps, micro, settings.process_index, world)
    collate = Collate(partial(dataset.collate, packed=config.packing), step_cost(model, image_cost))
    console.print(group_table(model, rates))
    if config.stage == "instruct":
        ends = answer_ends(dataset.chat, (dataset.conversations[int(row)].messages for row in dataset.index.good[:ROWS]))
        console.print(require_ends(dataset.chat, ends, start, trained_rows(model)))
    pieces = f"{micro_batches.accumulate} x {micro} x {world} process(es)"
    console.print(f"{dataset.index.summary()}; {steps} steps of {batch_size} ({pieces})")
    if config.dry_run:
        for line in estimate(model, dataset, collate, micro_batches, settings, config.optimizer):
            console.print(line)
    else:
        train(config, model, dataset, collate, micro_batches, settings, console)


def read_data(config: FinetuneConfig, processor: "SailLlavaProcessor", console: "Console") -> "ConversationDataset":
    """Return the dataset of token ids, labels and pixels, with its index."""
    from align.runtime.console import Progress
    from mllm.conversations.batches import ConversationDataset
    from mllm.conversations.described import DescribedImages
    from mllm.conversations.index import build_index
    from mllm.conversations.table import open_conversations
    from mllm.conversations.tokens import Chat
    from mllm.model.saving import fitting_length

    folder = Path(config.output)
    cache = Path(config.cache) if config.cache else folder / "cache"
    chat = Chat.of_processor(processor, config.template or ("plain" if config.stage == "pretrain" else None))
    conversations = open_conversations(config.data, config.image_root, cache, ignored=config.ignore_keys)
    for remark in conversations.remarks:
        console.print(remark)
    length = fitting_length(Path(config.model), config.max_length, console.print)
    index = build_index(
        conversations, chat, length, cache=cache, max_reject_fraction=config.max_reject_fraction, workers=config.workers,
        progress=Progress(console, "tokenized"),
    )  # fmt: skip
    return ConversationDataset(
        conversations, index, chat, processor.image_processor, max_pixels=config.max_pixels, rejects=folder / "rejects.jsonl",
        max_reject_fraction=config.max_reject_fraction,
        described=DescribedImages(Path(config.described or config.model)) if conversations.any_described else None,
    )  # fmt: skip


def section(argv: list[str]) -> str:
    """Return the section of a recipe to read: the value of --stage, or the only stage that the recipe has."""
    words = [word for argument in argv for word in (argument.split("=", 1) if argument.startswith("--") else [argument])]
    values = dict(zip(words, [*words[1:], ""], strict=False))
    stage, recipe = values.get("--stage"), values.get("--config")
    if stage in STAGES:
        return stage
    content = load_yaml(Path(recipe).expanduser()) if recipe else {"instruct": {}}
    found = [name for name in STAGES if isinstance(content, dict) and name in content]
    if len(found) == 2:
        raise UsageError(f"{recipe} has both stages; add --stage pretrain or --stage instruct")
    return found[0] if found else "instruct"


if __name__ == "__main__":
    run(main, FinetuneConfig, section)
