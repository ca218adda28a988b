"""Settings for Hugging Face's Trainer: its arguments, DeepSpeed's JSON and the optimizer."""

import os
from collections.abc import Callable
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from align.common.checks import batch_for, check, check_divides
from align.common.files import read_json
from align.common.hardware import Arithmetic, choose_device
from mllm.loop.config import FinetuneConfig

STEPS_OF_LITTLE_DATA = 4  # an epoch, where the batch asked for is larger than the data
FLAGS_OF_SECTIONS = {  # of a DeepSpeed JSON: who decides instead
    "optimizer": "--optimizer, --lr-projector, --lr-llm, --betas and --weight-decay decide",
    "scheduler": "--schedule, --warmup and the --lr flags decide",
    "fp16": "--precision decides, and this kit trains in fp32 or bf16",
    "amp": "--precision decides",
    "torch_autocast": "--precision decides",
    "data_efficiency": "the order of the data is that of --seed and --packing",
    "curriculum_learning": "the order of the data is that of --seed and --packing",
    "progressive_layer_drop": "the --lr flags decide what is trained",
    "compression_training": "the --lr flags decide what is trained",
    "quantize_training": "--precision decides",
}
# Sections that concern memory, communication and logs, or are compared with the flags. DeepSpeed drops a name that it does not know.
SECTIONS = (
    "zero_optimization", "bf16", "gradient_clipping", "gradient_accumulation_steps", "train_batch_size", "train_micro_batch_size_per_gpu",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "activation_checkpointing", "aio", "checkpoint", "comet",
    "communication_data_type", "comms_logger", "compile", "csv_monitor", "data_types", "disable_allgather", "disable_python_gc",
    "dump_state", "flops_profiler", "gradient_predivide_factor", "log_level", "memory_breakdown", "prescale_gradients",
    "seq_parallel_communication_data_type", "steps_per_print", "tensorboard", "timers", "wall_clock_breakdown", "wandb",
)  # fmt: skip


def deepspeed_settings(name: str | None) -> str | None:
    """Return the path of a DeepSpeed JSON: a shipped one (zero2, zero3, zero3_offload) or the user's file."""
    if name is None:
        return None
    folder = Path(str(files("mllm"))) / "zero"
    path = folder / f"{name}.json" if (folder / f"{name}.json").is_file() else Path(name)
    known = ", ".join(sorted(file.stem for file in folder.glob("*.json")))
    check(path.is_file(), f"--deepspeed {name}", f"neither a file nor one of {known}")
    if choose_device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
            False  # would compile for minutes at the first start, with the same results
        )
    return str(path)


def refuse_contradictions(settings: Any, config: FinetuneConfig, precision: Arithmetic, micro: int, world: int) -> None:
    """Raise UsageError if a DeepSpeed JSON decides what the flags decide: DeepSpeed would follow it without a word.

    What is "auto" or equal to the flags is no contradiction.
    """
    given = f"--deepspeed {config.deepspeed}"
    check(isinstance(settings, dict), given, "expected a JSON object of DeepSpeed's settings")
    for section, flags in FLAGS_OF_SECTIONS.items():
        value = settings.get(section)
        on = value.get("enabled", True) if isinstance(value, dict) else value
        check(not on, f"{given} has the section {section!r}", f"{flags}: take the section out of the JSON")
    for section in [section for section, value in settings.items() if value and section not in (*FLAGS_OF_SECTIONS, *SECTIONS)]:
        near = get_close_matches(section.lower(), (*FLAGS_OF_SECTIONS, *SECTIONS), 1)
        what = f"did you mean {near[0]!r}? " if near else ""
        check(section[0] in "_$/#", f"{given} has the section {section!r}", f"{what}known are {', '.join(SECTIONS)}")
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    check(type(stage) is int and 0 <= stage <= 3, f"{given} says zero_optimization {zero!r}"[:200], 'expected {"stage": 0, 1, 2 or 3}')
    decided = {
        "gradient_clipping": (config.max_grad_norm, "--max-grad-norm"),
        "train_micro_batch_size_per_gpu": (micro, "--micro-batch-size"),
        "train_batch_size": (config.batch_size, "--batch-size"),
        "gradient_accumulation_steps": (config.batch_size // (micro * world), "--batch-size / --micro-batch-size / processes"),
        "bf16.enabled": (precision == "bf16", f"--precision {config.precision}"),
    }
    for name, (wanted, flag) in decided.items():
        section, _, field = name.partition(".")
        value = settings.get(section, "auto")
        value = value.get(field, "auto") if field and isinstance(value, dict) else value
        said = f"{given} says {name} {value!r}"
        check(value == "auto" or value == wanted, said, f'{flag} says {wanted!r}: write "auto" in the JSON, or the same in both')


def micro_batch_for(batch_size: int, asked: int, world: int) -> int:
    """Return the rows of a forward pass of one process: the most up to `asked` that divide its share of the batch."""
    check_divides(batch_size, world)
    share = batch_size // world
    return next(rows for rows in range(min(asked, share), 0, -1) if share % rows == 0)


def fit_batch(settings: TrainingArguments, config: FinetuneConfig, items: int, tell: Callable[[str], None]) -> tuple[int, int]:
    """Return rows (or packs) of a step, and of a forward pass of one process, for data with `items` of them an epoch.

    Where they are fewer than the flags say, Trainer's arguments and DeepSpeed's settings made from them are changed, and `tell` is
    called with a sentence.
    """
    batch_size, world = batch_for(config.batch_size, items, STEPS_OF_LITTLE_DATA), settings.world_size
    micro = micro_batch_for(batch_size, config.micro_batch_size, world)
    if batch_size < config.batch_size:
        tell(f"--batch-size {config.batch_size} is more than the {items} rows or packs of an epoch: each step takes {batch_size}")
        settings.per_device_train_batch_size, settings.gradient_accumulation_steps = micro, batch_size // (micro * world)
        made = getattr(settings, "hf_deepspeed_config", None)
        if made is not None:
            made.config["train_batch_size"], made.config["train_micro_batch_size_per_gpu"] = batch_size, micro
            made.config["gradient_accumulation_steps"] = settings.gradient_accumulation_steps
    if micro < config.micro_batch_size:
        share = f"the {batch_size // world} rows of a process"
        tell(f"--micro-batch-size {config.micro_batch_size} does not divide {share}: it takes {micro} at once")
    return batch_size, micro


def training_arguments(config: FinetuneConfig, precision: Arithmetic, world: int) -> TrainingArguments:
    """Return Trainer's arguments for `world` processes. Making them starts the process group, and zero.Init for ZeRO-3.

    `max_steps` is set later if the data decides it. Trainer itself logs and saves nothing: `SailTrainer` does.
    """
    cpu = choose_device().type == "cpu"
    micro = micro_batch_for(config.batch_size, config.micro_batch_size, world)
    deepspeed_json = deepspeed_settings(config.deepspeed)
    if deepspeed_json is not None:
        refuse_contradictions(read_json(Path(deepspeed_json)), config, precision, micro, world)
    settings = TrainingArguments(
        output_dir=config.output, max_steps=config.steps or 1, seed=config.seed,
        per_device_train_batch_size=micro, gradient_accumulation_steps=config.batch_size // (micro * world),
        lr_scheduler_type=config.schedule, warmup_steps=config.warmup,
        weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm,
        bf16=precision == "bf16", use_cpu=cpu, deepspeed=deepspeed_json,
        activation_checkpointing=config.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        dataloader_num_workers=config.workers, remove_unused_columns=False, ddp_find_unused_parameters=False,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, logging_nan_inf_filter=False,
    )  # fmt: skip
    if config.deepspeed:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo" if cpu else None)  # zero.Init must know the number of processes
    return settings


def make_optimizer(groups: list[dict[str, Any]], *, name: str, betas: tuple[float, float], fused: bool) -> torch.optim.Optimizer:
    """Return AdamW or Lion (arXiv 2302.06675). Each group has its own learning rate and weight decay."""
    if name == "lion":
        from lion_pytorch import Lion

        return Lion(groups, lr=1e-4, betas=betas)
    return torch.optim.AdamW(groups, lr=1e-3, betas=betas, fused=fused)
