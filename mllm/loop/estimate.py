"""Estimates a run before it starts: memory from the model's shapes, time from one measured micro-batch."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from align.common.files import human_bytes
from mllm.loop.flops import Collate
from mllm.loop.parameter_groups import group_sizes, unwrapped
from mllm.loop.trainer import MicroBatches


def predicted_bytes(
    model: nn.Module, tokens: int, *, bf16: bool, checkpointing: bool, optimizer: str, zero_stage: int, world: int
) -> dict[str, float]:
    """Return the bytes a process needs: weights, gradients, optimizer state and activations of `tokens` in a forward pass.

    Activations follow Korthikanti et al. (arXiv 2205.05198) with fused attention: 34 bytes per token, layer and unit of width in 16
    bit; with checkpointing 2, plus one full layer.
    """
    total, trained = (sum(counts) for counts in zip(*group_sizes(model).values(), strict=True))
    text = unwrapped(model).config.text_config
    layers, width = text.num_hidden_layers, text.hidden_size
    masters = bf16 and zero_stage > 0  # DeepSpeed trains bf16 weights; its optimizer keeps float32 copies
    weights = (total - trained) * (2 if bf16 else 4) + trained * (2 if masters else 4)
    state = trained * (8 if optimizer == "adamw" else 4) + (trained * 4 if masters else 0)
    per_token = (34 * layers if not checkpointing else 2 * layers + 34) * width * (1 if bf16 else 2)
    whole = {"weights": weights, "gradients": trained * (2 if masters else 4), "optimizer": state}
    split_from = {"weights": 3, "gradients": 2, "optimizer": 1}  # ZeRO stage from which each process keeps only a share
    needed = {name: size / (world if zero_stage >= split_from[name] else 1) for name, size in whole.items()}
    return needed | {"activations": float(tokens * per_token)}


def estimate(
    model: nn.Module, dataset: Any, collate: Collate, micro_batches: MicroBatches, settings: TrainingArguments, optimizer: str
) -> Iterator[str]:
    """Yield lines on the memory of a process and, except under DeepSpeed, on the duration of the run."""
    items = next(iter(micro_batches))
    batch = collate([dataset[item] for item in items])
    counts, bf16 = batch.pop("counts"), settings.bf16
    deepspeed: Any = settings.hf_deepspeed_config if settings.deepspeed else None
    stage = deepspeed.get_value("zero_optimization.stage", 0) if deepspeed else 0
    needed = predicted_bytes(
        model, int(counts["slots"]), bf16=bf16, checkpointing=bool(settings.activation_checkpointing), optimizer=optimizer,
        zero_stage=stage, world=settings.world_size,
    )  # fmt: skip
    yield "memory a process: " + ", ".join(f"{name} {human_bytes(value)}" for name, value in needed.items())
    yield f"compute: {counts['flops'] / 1e12:.3g} TFLOP a micro-batch, {len(micro_batches)} micro-batches a process"
    if deepspeed:
        yield "time: not measured under DeepSpeed; run --dry-run without --deepspeed on one device"
        return
    seconds = _step_seconds(model, batch, settings.device, bf16)
    yield (
        f"time: {seconds:.2f} s for the first micro-batch ({counts['flops'] / seconds / 1e12:.3g} TFLOP/s), "
        f"about {seconds * len(micro_batches) / 60:.1f} min in all, reading not counted"
    )


def _step_seconds(model: nn.Module, batch: dict[str, Any], device: torch.device, bf16: bool) -> float:
    """Return the seconds of one forward and backward pass, measured after a first one that warms up."""
    model.to(device).train()
    inputs = {name: value.to(device) for name, value in batch.items()}
    for _ in range(2):
        began = time.monotonic()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = model(**inputs).loss
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - began
        model.zero_grad()
    return seconds
