"""Measure the forward pass of an embedded encoder with and without kept memory, and write the result beside this file as `encode.md`.

    python docs/bench/bench_encode.py
    python docs/bench/bench_encode.py --encoder embedded:vit-s14-focus --batches 4 16

Each case runs in a process of its own: one warm-up, then all images once. What counts is the ratio within one run.
"""

import multiprocessing
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from bench_loss import machine
from PIL import Image

from align.common.hardware import Precision, resolve_precision, reuse_freed_memory, use_cores
from align.encoders.spec import VisionSpec
from align.encoders.vision import load_vision_encoder


@dataclass(frozen=True)
class BenchConfig:
    """What to measure; the defaults take about a minute."""

    encoder: str = "embedded:efficientnet-lite0"
    """Vision encoder."""
    batches: list[int] = field(default_factory=lambda: [8, 32, 64])
    """Images a forward pass."""
    images: int = 192
    """Images timed in each case."""
    precision: Precision = "auto"
    """Arithmetic of the encoder."""
    output: Path = Path(__file__).with_name("encode.md")
    """Where the table is written."""


def measure(config: BenchConfig, batch: int, keep: bool) -> float:
    """Return images a second for one batch size, with or without `reuse_freed_memory`."""
    use_cores(1)
    if keep:
        reuse_freed_memory()
    encoder = load_vision_encoder(VisionSpec(config.encoder, precision=resolve_precision(config.precision, torch.device("cpu"))))
    pixels = encoder.transform(Image.new("RGB", (256, 256)))[None].repeat(batch, 1, 1, 1)
    encoder(pixels)
    begin = time.perf_counter()
    for _ in range(config.images // batch):
        encoder(pixels)
    return config.images // batch * batch / (time.perf_counter() - begin)


def main() -> None:
    """Measure every batch size both ways, print the table and write it with command and machine."""
    config = tyro.cli(BenchConfig)
    lines = ["| batch | images/s, memory given back | images/s, memory kept | ratio |", "|---|---|---|---|"]
    for batch in config.batches:
        rates = []
        for keep in (False, True):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                rates.append(pool.submit(measure, config, batch, keep).result())
        lines.append(f"| {batch} | {rates[0]:.1f} | {rates[1]:.1f} | {rates[1] / rates[0]:.2f} |")
        print(lines[-1])
    command = shlex.join(["python", "docs/bench/bench_encode.py", *sys.argv[1:]])
    title = f"# Forward pass of {config.encoder}: `align.common.hardware.reuse_freed_memory`"
    config.output.write_text("\n".join([title, "", f"`{command}` on {machine()}", "", *lines, ""]))


if __name__ == "__main__":
    main()
