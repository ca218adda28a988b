"""Train a multimodal LLM: pretrain the projector on captions, then tune everything on conversations.

    deepspeed mllm/finetune.py --config mllm/recipes/llava_sail_l.yaml --stage pretrain
    accelerate launch mllm/finetune.py --stage instruct --model runs/mine/pretrain/model --data llava_v1_5_mix665k.json \
        --image-root data --output runs/mine/instruct
    torchrun --nproc_per_node 8 mllm/finetune.py --config mllm/recipes/llava_sail_l.yaml --stage instruct --deepspeed zero3
    python mllm/finetune.py --config mllm/recipes/quickstart.yaml --stage pretrain --dry-run   # memory and time; trains nothing

Leaves in --output: model/ (opens anywhere), adapter/ (LoRA), checkpoint-N/, metrics.jsonl, speed.jsonl, tensorboard/,
manifest.json, config.yaml. Killed at any moment, the same command goes on from the newest checkpoint that verifies. On SIGTERM
it saves a checkpoint and exits with code 75.
"""

import os
import time
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter
from transformers import PrinterCallback, TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from align.common.commandline import run
from align.common.console import plain_console
from align.common.errors import Preempted, UsageError
from align.common.files import atomic_bytes, human_bytes
from align.common.hardware import resolve_precision, reuse_freed_memory, use_cores
from align.common.recipes_yaml import load_yaml, refuse_other_config, to_recipe
from align.common.runs import JsonLines, add_launch
from mllm.conversations.batches import ConversationDataset
from mllm.conversations.index import build_index
from mllm.conversations.packing import EpochPlan
from mllm.conversations.table import open_conversations
from mllm.conversations.tokens import Chat
from mllm.loop.config import FinetuneConfig
from mllm.loop.trainer import MicroBatches, SailTrainer, Watch, newest_committed, remove_uncommitted
from mllm.model.export import export
from mllm.model.flops import StepCost, image_flops, peak_tflops, predicted_bytes, step_cost
from mllm.model.modeling import SailLlavaConfig
from mllm.model.parts import Lora, part_table, prepare_parts, trained_tensors
from mllm.model.saving import load_mllm, require_mllm

STAGES = ("pretrain", "instruct")
FREE_ON_RESUME = {
    "micro_batch_size", "gradient_checkpointing", "workers", "log_every", "save_every", "keep", "report_to", "peak_tflops",
    "dry_run", "output", "cache",
}  # fmt: skip


def deepspeed_settings(name: str | None) -> str | None:
    """Return the path of a DeepSpeed JSON: one that is shipped (zero2, zero3, zero3_offload) or a file of the user's."""
    if name is None:
        return None
    shipped = Path(str(files("mllm"))) / "zero" / f"{name}.json"
    if shipped.is_file():
        path = shipped
    elif Path(name).is_file():
        path = Path(name)
    else:
        known = ", ".join(sorted(file.stem for file in shipped.parent.glob("*.json")))
        raise UsageError(f"--deepspeed {name}: neither a file nor one of {known}")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for minutes at the first start, same numbers
    return str(path)


def accumulation(config: FinetuneConfig) -> int:
    """Return how many micro-batches of a process make a step, from the number of processes that the launcher announces."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch_size % (config.micro_batch_size * world):
        raise UsageError(
            f"--batch-size {config.batch_size} is not a multiple of {config.micro_batch_size} rows x {world} process(es); "
            "change --micro-batch-size"
        )
    return config.batch_size // (config.micro_batch_size * world)


def arguments(config: FinetuneConfig, steps: int, precision: str) -> TrainingArguments:
    """Return Trainer's own settings; making them starts the process group, and zero.Init if ZeRO-3 is asked for."""
    cpu = not torch.cuda.is_available()
    settings = TrainingArguments(
        output_dir=config.output,
        max_steps=steps,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=accumulation(config),
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=precision == "bf16",
        use_cpu=cpu,
        activation_checkpointing=config.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        deepspeed=deepspeed_settings(config.deepspeed),
        dataloader_num_workers=config.workers,
        remove_unused_columns=False,
        seed=config.seed,
        logging_strategy="no",
        save_strategy="no",
        report_to=list(config.report_to) or "none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        logging_nan_inf_filter=False,
    )
    if config.deepspeed:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo" if cpu else None)  # zero.Init must know the number of processes
    return settings


def make_optimizer(config: FinetuneConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return AdamW or Lion over the groups."""
    if config.optimizer == "lion":
        from lion_pytorch import Lion

        return Lion(groups, lr=1e-4, betas=config.betas)
    return torch.optim.AdamW(groups, lr=1e-3, betas=config.betas, fused=torch.cuda.is_available() and config.deepspeed is None)


class Collate:
    """Makes a batch of items with a count of what it holds, for the meters."""

    def __init__(self, collate: Any, cost: StepCost) -> None:
        self.collate, self.cost = collate, cost

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(items)
        lengths: list[int] = []  # of rows, those of a pack one by one
        for item in items:
            starts = (item["position_ids"] == 0).nonzero().flatten().tolist()
            lengths += [stop - start for start, stop in zip(starts, [*starts[1:], len(item["position_ids"])], strict=True)]
        images, labels = sum(len(item["pixel_values"]) for item in items), batch["labels"]
        supervised = int((labels[:, 1:] != -100).sum())
        batch["counts"] = {
            "tokens": float(sum(lengths)), "slots": float(labels.numel()), "supervised": float(supervised), "images": float(images),
            "flops": self.cost.flops(lengths, supervised, images),
        }  # fmt: skip
        return batch


class Log:
    """Writes metrics and speed to JSON lines, TensorBoard and the console; silent on all processes but the first."""

    def __init__(self, config: FinetuneConfig, console: Console, steps: int, first: int, peak: float | None, writing: bool) -> None:
        self.console, self.steps, self.peak, self.writing = console, steps, peak, writing
        self.began, self.first = time.monotonic(), first
        folder = Path(config.output)
        self.metrics, self.speed = JsonLines(folder / "metrics.jsonl"), JsonLines(folder / "speed.jsonl")
        if writing:
            for lines in (self.metrics, self.speed):
                lines.cut(first if first else -1)
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first or None)

    def __call__(self, row: dict[str, Any], speed: dict[str, Any]) -> None:
        if not self.writing:
            return
        step = row["step"]
        if self.peak:
            speed["mfu"] = speed["flops_per_second"] / (self.peak * 1e12)
        self.metrics.append(row)
        self.speed.append({"step": step, **speed})
        for name, value in {**row, **speed}.items():
            if name != "step" and value is not None:
                self.board.add_scalar(name, value, step)
        left = (self.steps - step) * (time.monotonic() - self.began) / max(1, step - self.first)
        loss = "not finite, weights left as they were" if row["loss"] is None else f"{row['loss']:.3f}"
        mfu = f", MFU {speed['mfu']:.0%}" if "mfu" in speed else ""
        self.console.print(
            f"step {step}/{self.steps} loss {loss} | {speed['supervised_tokens_per_second']:.0f} supervised tokens/s, "
            f"{speed['images_per_second']:.1f} images/s, padding {speed['padding']:.0%}, waited {speed['data_wait']:.0%}{mfu}, "
            f"{left:.0f} s left"
        )


def show_parts(console: Console, rows: list[tuple[str, int, int, float]]) -> None:
    """Print what is trained and what is frozen."""
    table = Table("part", "parameters", "trained", "learning rate")
    for part, total, trained, rate in rows:
        table.add_row(part, f"{total:,}", f"{trained:,}" if trained else "frozen", f"{rate:g}" if trained else "-")
    console.print(table)


def main(config: FinetuneConfig) -> None:
    """Read the data, load and freeze the model, train, export."""
    reuse_freed_memory()
    disable_progress_bar()
    set_verbosity_error()
    precision = resolve_precision(config.precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rates = config.learning_rates()
    require_mllm(Path(config.model))
    image = image_flops(SailLlavaConfig.from_pretrained(config.model), rates)
    settings = arguments(config, config.steps or 1, precision)  # before the model: it starts the process group
    use_cores(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    rank, world = settings.process_index, settings.world_size
    console = plain_console(quiet=rank != 0)
    folder = Path(config.output)
    refuse_other_config(config, folder, config.stage, FREE_ON_RESUME)
    half = precision == "bf16"
    model, processor = load_mllm(Path(config.model), dtype=torch.bfloat16 if half and config.deepspeed else torch.float32)
    model.config.text_config.use_cache = False  # a cache would hide the restarts of position ids from packed rows
    lora = Lora(config.lora_rank, config.lora_alpha or 2 * config.lora_rank, config.lora_dropout) if config.lora_rank else None
    prepared = prepare_parts(model, rates, lora, config.seed)
    if half and not config.deepspeed:
        for parameter in prepared.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    template = config.template or ("plain" if config.stage == "pretrain" else str(processor.chat_template))
    chat = Chat(processor.tokenizer, template, processor.image_token, model.config.image_tokens())
    cache = Path(config.cache) if config.cache else folder / "cache"
    with settings.main_process_first(desc="index of the data"):
        conversations = open_conversations(config.data, config.image_root, cache)
        index = build_index(
            conversations, chat, config.max_length, cache=cache, max_reject_fraction=config.max_reject_fraction, workers=config.workers
        )
    plan = EpochPlan(index, config.batch_size, packing=config.packing, seed=config.seed)
    steps = config.steps or max(1, round(config.epochs * len(plan.batches(0))))
    settings.max_steps = steps
    micro_batches = MicroBatches(plan.batches, steps, config.micro_batch_size, rank, world)
    cost = step_cost(prepared, image)
    show_parts(console, part_table(prepared, rates))
    pieces = f"{micro_batches.accumulate} x {config.micro_batch_size} x {world} process(es)"
    console.print(f"{index.summary()}; {steps} steps of {config.batch_size} ({pieces})")
    dataset = ConversationDataset(
        conversations,
        index,
        chat,
        processor.image_processor,
        max_pixels=config.max_pixels,
        rejects=folder / "rejects.jsonl",
        max_reject_fraction=config.max_reject_fraction,
    )
    collate = Collate(partial(dataset.collate, packed=config.packing), cost)
    if config.dry_run:
        estimate(config, prepared, dataset, collate, micro_batches, cost, half, world, console)
        return
    checkpoint, first, problems = newest_committed(folder)
    for problem in problems:
        console.print(f"passed over a checkpoint: {problem}")
    if checkpoint is not None:
        console.print(f"going on from {checkpoint}")
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        remove_uncommitted(folder)
        atomic_bytes(folder / "config.yaml", to_recipe(config, config.stage).encode())
        facts = {"rows": len(index.lengths), "data": index.fingerprint, "processes": world, "precision": precision}
        add_launch(folder, {"config": yaml.safe_load(to_recipe(config, config.stage))[config.stage], **facts})
    peak = config.peak_tflops or peak_tflops(settings.device)
    watch = Watch(folder, Log(config, console, steps, first, peak and peak * world, rank == 0), config.log_every, config.save_every)
    trainer = SailTrainer(
        model=prepared, args=settings, data_collator=collate, train_dataset=dataset, callbacks=[watch], micro_batches=micro_batches,
        rates=rates, make_optimizer=partial(make_optimizer, config), max_nonfinite=config.max_nonfinite, keep=config.keep,
    )  # fmt: skip
    watch.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    if first < steps:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if watch.stopped and trainer.state.global_step < steps:
        raise Preempted(f"stopped by SIGTERM at step {trainer.state.global_step}, state saved; run the same command to go on")
    export_run(config, trainer, checkpoint if first >= steps else None, lora, console)


def export_run(config: FinetuneConfig, trainer: SailTrainer, finished: Path | None, lora: Lora | None, console: Console) -> None:
    """Write model/ (and adapter/): the start model with what was trained."""
    folder = Path(config.output)
    if finished is not None and (folder / "model" / "config.json").is_file():
        console.print(f"{folder}/model is complete; nothing to do")
        return
    if finished is not None:
        trainer.train(resume_from_checkpoint=str(finished))  # loads the weights; there is no step left
    assert trainer.model is not None
    tensors = trained_tensors(trainer.model)
    if config.deepspeed:
        unset_hf_deepspeed_config()  # or the model that is exported would be partitioned again
    if trainer.is_world_process_zero():
        export(Path(config.model), tensors, config.learning_rates(), lora, folder)
    trainer.accelerator.wait_for_everyone()
    console.print(f"done: {folder}/model")


def estimate(
    config: FinetuneConfig, model: Any, dataset: Any, collate: Collate, micro_batches: MicroBatches, cost: StepCost, half: bool,
    world: int, console: Console,
) -> None:  # fmt: skip
    """Print predicted memory, and the time of the run from one measured forward and backward pass (if it fits)."""
    stage = {"zero2": 2, "zero3": 3, "zero3_offload": 3}.get(config.deepspeed or "", 0)
    items = next(iter(micro_batches))
    batch = collate([dataset[item] for item in items])
    counts = batch.pop("counts")
    needed = predicted_bytes(
        model, config.learning_rates(), int(counts["slots"]), bf16=half, checkpointing=config.gradient_checkpointing,
        optimizer=config.optimizer, zero_stage=stage, world=world,
    )  # fmt: skip
    console.print("memory a process: " + ", ".join(f"{name} {human_bytes(value)}" for name, value in needed.items()))
    console.print(f"compute: {counts['flops'] / 1e12:.3g} TFLOP a micro-batch, {len(micro_batches)} micro-batches a process")
    if stage:
        console.print("time: not measured under DeepSpeed; run --dry-run without --deepspeed on one device")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    inputs = {name: value.to(device) for name, value in batch.items()}
    seconds = 0.0
    for _ in range(2):  # the first one warms up
        began = time.monotonic()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            loss = model(**inputs).loss
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - began
        model.zero_grad()
    console.print(
        f"time: {seconds:.2f} s for the first micro-batch ({counts['flops'] / seconds / 1e12:.3g} TFLOP/s), "
        f"about {seconds * len(micro_batches) / 60:.1f} min in all, reading not counted"
    )


def section(argv: list[str]) -> str:
    """Return the section of a recipe to read: what --stage says, or the only one of the two that the recipe has."""
    words = [word for argument in argv for word in (argument.split("=", 1) if argument.startswith("--") else [argument])]
    values = dict(zip(words, [*words[1:], ""], strict=False))
    stage, recipe = values.get("--stage"), values.get("--config")
    if stage in STAGES:
        return stage
    content = load_yaml(Path(recipe)) if recipe else {"instruct": {}}
    found = [name for name in STAGES if isinstance(content, dict) and name in content]
    if len(found) == 2:
        raise UsageError(f"{recipe} has both stages; add --stage pretrain or --stage instruct")
    return found[0] if found else "instruct"


if __name__ == "__main__":
    run(main, FinetuneConfig, section)
