"""Measure the tiled losses against dense ones and write the result beside this file as `loss.md`.

    python docs/bench/bench_loss.py
    python docs/bench/bench_loss.py --rows 8192 16384 32768 --width 1024 --dtypes float32 bfloat16

Every case runs in a process of its own: one warm-up, then the fastest of `repeats` forward and backward passes, and the memory that
the process gained at its peak. Times are CPU seconds of one thread, on which other work on the machine has little influence.
The bound is the time of the matrix products that the tiled loss cannot do without.
"""

import multiprocessing
import os
import platform
import resource
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from torch.nn import functional

from align.model.losses import info_nce_loss, sigmoid_loss

NOTABLE_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")
PRODUCTS = {"sigmoid": 3, "InfoNCE": 4}  # B x B x E matrix products: logits (twice for InfoNCE), gradients of images and captions


@dataclass(frozen=True)
class BenchConfig:
    """Sizes to measure; the defaults take about three minutes."""

    rows: list[int] = field(default_factory=lambda: [4096, 8192])
    """Batch sizes B."""
    width: int = 512
    """Aligned width E."""
    dtypes: list[Literal["float32", "bfloat16"]] = field(default_factory=lambda: ["float32"])
    """Types of the embeddings and so of the matrix products (bfloat16 is only fast with avx512_bf16 or amx_bf16)."""
    tile: int = 1024
    """Side of the tiles: 1024 suits the caches of a CPU."""
    repeats: int = 3
    """Passes of which the fastest counts."""
    output: Path = Path(__file__).with_name("loss.md")
    """Where the table is written."""


def dense_sigmoid(images: Tensor, captions: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    """Return the sigmoid loss over B^2 from a full matrix of logits."""
    logits = (images @ captions.T) * log_scale.exp() + bias  # (B, B)
    labels = 2 * torch.eye(len(images)) - 1
    return -functional.logsigmoid(labels * logits).sum() / len(images) ** 2


def dense_info_nce(images: Tensor, captions: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    """Return the symmetric cross-entropy from a full matrix of logits; the bias is not used."""
    logits = (images @ captions.T) * log_scale.exp()  # (B, B)
    targets = torch.arange(len(images))
    return (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2


def measure(loss: str, kind: str, rows: int, dtype: torch.dtype, config: BenchConfig) -> tuple[float, int, float]:
    """Return (seconds of the fastest pass, bytes of memory gained at the peak, loss) of one case."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    images, captions = [
        functional.normalize(torch.randn(rows, config.width, generator=generator), dim=1).to(dtype).requires_grad_() for _ in range(2)
    ]
    log_scale, bias = torch.tensor(20.0).log().requires_grad_(), torch.tensor(-10.0).requires_grad_()
    cases: dict[tuple[str, str], Callable[[], Tensor]] = {
        ("sigmoid", "dense"): lambda: dense_sigmoid(images, captions, log_scale, bias),
        ("sigmoid", "tiled"): lambda: sigmoid_loss(images, [captions], log_scale, bias, tile=config.tile),
        ("InfoNCE", "dense"): lambda: dense_info_nce(images, captions, log_scale, bias),
        ("InfoNCE", "tiled"): lambda: info_nce_loss(images, [captions], log_scale, tile=config.tile),
    }
    block = images.detach()[: config.tile]

    def products() -> float:
        for _ in range(PRODUCTS[loss] * (rows // len(block)) ** 2):
            block @ block.T
        return 0.0

    def step() -> float:
        value = cases[loss, kind]()
        value.backward()
        return value.item()

    work = products if kind == "products" else step
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    value = work()
    seconds = []
    for _ in range(config.repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    gained = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return min(seconds), gained, value


def in_new_process(*arguments: Any) -> tuple[float, int, float]:
    """Return what `measure` finds in a process of its own, so that memory peaks do not mix."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def machine() -> str:
    """Return one line about the processor and torch, without names of hosts."""
    flags: list[str] = []
    if Path("/proc/cpuinfo").exists():
        listed = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "").split()
        flags = [flag for flag in NOTABLE_FLAGS if flag in listed]
    return f"{platform.machine()} ({', '.join(flags)}), {os.cpu_count()} cores, torch {torch.__version__}"


def main() -> None:
    """Measure all cases, print the table and write it."""
    config = tyro.cli(BenchConfig)
    lines = [
        "# Tiled against dense losses",
        "",
        f"Command: `python {shlex.join(['docs/bench/bench_loss.py', *sys.argv[1:]])}`",
        "",
        f"Machine: {machine()}. E = {config.width}, tile = {config.tile}, t = 20, b = -10, forward and backward.",
        "Times are CPU seconds of one thread; bound = the matrix products alone; memory = gained at the peak, without the embeddings.",
        "",
        "| loss | dtype | B | dense s | tiled s | dense / tiled | bound / tiled | dense MiB | tiled MiB | losses differ by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for loss in PRODUCTS:
        for name in config.dtypes:
            for rows in config.rows:
                arguments = rows, getattr(torch, name), config
                bound, _, _ = in_new_process(loss, "products", *arguments)
                dense, dense_bytes, dense_value = in_new_process(loss, "dense", *arguments)
                tiled, tiled_bytes, tiled_value = in_new_process(loss, "tiled", *arguments)
                lines.append(
                    f"| {loss} | {name} | {rows:,} | {dense:.2f} | {tiled:.2f} | {dense / tiled:.2f} | {bound / tiled:.0%} | "
                    f"{dense_bytes / 2**20:,.0f} | {tiled_bytes / 2**20:,.0f} | {abs(tiled_value / dense_value - 1):.0e} |"
                )
                print(lines[-1], flush=True)
    config.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
