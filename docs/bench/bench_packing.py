"""Measure training on packed rows against padded ones and write the result beside this file as `packing.md`.

    python docs/bench/bench_packing.py
    python docs/bench/bench_packing.py --rows 400 --max-length 512

The same rows (lengths log-normal, as of instruction data) go through a small random Llama forward and backward three ways: padded
batches in random order, padded batches of like length, packs. Times are CPU seconds of one thread; what counts is the ratio within one run.
"""

import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from bench_loss import machine
from transformers import LlamaConfig, LlamaForCausalLM

from align.common.hardware import reuse_freed_memory
from mllm.conversations.batches import collate
from mllm.conversations.packing import fill_rate, length_grouped, pack


@dataclass(frozen=True)
class BenchConfig:
    """What to measure; the defaults take about two minutes."""

    rows: int = 240
    """Rows, each seen once a way."""
    max_length: int = 256
    """Longest row, and length of a pack, in tokens."""
    batch: int = 8
    """Rows of a padded batch; packs come one by one."""
    width: int = 256
    """Hidden size of the model."""
    layers: int = 6
    """Its layers."""
    output: Path = Path(__file__).with_name("packing.md")
    """Where the table is written."""


def main() -> None:
    """Measure the three ways, print the table and write it with command and machine."""
    config = tyro.cli(BenchConfig)
    reuse_freed_memory()
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    lengths = np.clip(np.exp(random.normal(np.log(config.max_length / 4), 0.7, config.rows)), 8, config.max_length).astype(int)
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=4096, hidden_size=config.width, intermediate_size=4 * config.width, num_hidden_layers=config.layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=config.max_length, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(settings)
    items = []
    for length in lengths:
        ids = torch.from_numpy(random.integers(0, 4096, length))
        items.append({"input_ids": ids, "labels": ids, "position_ids": torch.arange(length), "pixel_values": []})

    def rows(numbers: list[int]) -> dict[str, torch.Tensor]:
        return collate([items[number] for number in numbers], 0, packed=False)

    def packed(numbers: list[int]) -> dict[str, torch.Tensor]:
        joined = {name: torch.cat([items[number][name] for number in numbers]) for name in ("input_ids", "labels", "position_ids")}
        joined["labels"] = torch.where(joined["position_ids"] == 0, -100, joined["labels"])  # nothing is learned across rows
        return collate([{**joined, "pixel_values": []}], 0, packed=True)

    order = random.permutation(config.rows)
    shuffled = [order[start : start + config.batch].tolist() for start in range(0, config.rows, config.batch)]
    megabatch = length_grouped(lengths, np.zeros(config.rows, dtype=bool), 4 * config.batch, random).reshape(-1, config.batch)
    packs = pack(lengths, config.max_length, random)
    ways = {
        "padded, random order": (shuffled, rows),
        "padded, like length (of 4 batches)": (megabatch.tolist(), rows),
        f"packed to {config.max_length}": (packs, packed),
    }
    lines = ["| way | tokens that are rows | row tokens/s | ratio |", "|---|---|---|---|"]
    base = 0.0
    for name, (batches, make) in ways.items():
        model(**make(batches[0])).loss.backward()  # warms up
        used = slots = 0
        began = time.process_time()
        for numbers in batches:
            batch = make(numbers)
            model(**batch).loss.backward()
            model.zero_grad(set_to_none=True)
            used += int(lengths[numbers].sum())
            slots += batch["input_ids"].numel()
        rate = used / (time.process_time() - began)
        base = base or rate
        lines.append(f"| {name} | {used / slots:.0%} | {rate:.0f} | {rate / base:.2f} |")
        print(lines[-1])
    command = shlex.join(["python", "docs/bench/bench_packing.py", *sys.argv[1:]])
    filled = f"Fill rate of the packs when all have {config.max_length} tokens: {fill_rate(packs, lengths, config.max_length):.1%}."
    text = ["# Packed against padded rows", "", f"`{command}` on {machine()}", "", *lines, "", filled, ""]
    config.output.write_text("\n".join(text))


if __name__ == "__main__":
    main()
