"""Measure the streamed top-M of curation against sorting the full matrix and write the result beside this file as `curate.md`.

    python docs/bench/bench_curate.py
    python docs/bench/bench_curate.py --rows 524288 --concepts 3000 --width 1024

Candidates are read from a feature store on disk, as align/curate.py reads them. Times are CPU seconds of one thread, on which other
work on the machine has little influence. M is rows / 2000, the ratio of 50,000 places to 100M candidates, so that candidates enter
the lists as often as they would there; what lists of 50,000 cost beyond that is measured by itself.
"""

import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.nn.functional import normalize

from align.common.hardware import reuse_freed_memory
from align.curation.assignment import assign
from align.curation.pool import CandidatePool
from align.curation.scoring import chunk_rows, score_shard
from align.curation.toplists import TopLists
from align.features.store import FeatureStore, StoreHeader
from align.features.writer import StoreWriter

NOTABLE_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")
CANDIDATES, CONCEPTS, PLACES, PER_CONCEPT = 100_000_000, 3000, 50_000, 2000  # what is extrapolated to
NAIVE_ROWS, NAIVE_CONCEPTS, NAIVE_PLACES = 65_536, 300, 500
SHARD_ROWS = 32_768


@dataclass(frozen=True)
class BenchConfig:
    """Sizes to measure; the defaults take about a minute and 300 MB of disk."""

    rows: int = 131_072
    """Candidates."""
    concepts: int = 3000
    """Concepts."""
    width: int = 768
    """Feature width."""
    output: Path = Path(__file__).with_name("curate.md")
    """Where the table is written."""


def machine() -> str:
    """Return one line about the processor and torch, without names of hosts."""
    flags: list[str] = []
    if Path("/proc/cpuinfo").exists():
        listed = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "").split()
        flags = [flag for flag in NOTABLE_FLAGS if flag in listed]
    return f"{platform.machine()} ({', '.join(flags)}), {os.cpu_count()} cores, torch {torch.__version__}"


def write_store(folder: Path, rows: int, width: int) -> CandidatePool:
    """Write a store of random rows and return it as candidates."""
    random = np.random.default_rng(0)
    shards = -(-rows // SHARD_ROWS)
    writer = StoreWriter(folder, StoreHeader("image", {}, {}, width, "bench", shards, rows))
    for shard in range(shards):
        count = min(SHARD_ROWS, rows - shard * SHARD_ROWS)
        keys = [f"{shard * SHARD_ROWS + n:09d}" for n in range(count)]
        writer.write(shard, random.standard_normal((count, width), dtype=np.float32), keys, [0] * count, [])
    writer.finish()
    return CandidatePool([FeatureStore(folder)])


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def stream(candidates: CandidatePool, prototypes: torch.Tensor, places: int) -> TopLists:
    """Return the lists of all candidates."""
    lists = TopLists(len(prototypes), places, chunk_rows(len(prototypes)))
    for shard in range(len(candidates.shards)):
        score_shard(candidates, shard, prototypes, normalize, lists)
    return lists


def naive(candidates: CandidatePool, prototypes: torch.Tensor, places: int) -> np.ndarray:
    """Return (C, M) the best rows, from the full matrix of scores and a stable sort of it."""
    features = normalize(torch.from_numpy(candidates.features(np.arange(len(candidates)))).float())
    return np.argsort(-(prototypes @ features.T).numpy(), axis=1, kind="stable")[:, :places]


def products(rows: int, prototypes: torch.Tensor) -> None:
    """Do the matrix products alone."""
    block = torch.randn(chunk_rows(len(prototypes)), prototypes.shape[1])
    for _ in range(rows // len(block)):
        block @ prototypes.T


def large_lists(concepts: int = 30) -> tuple[float, float]:
    """Return CPU seconds a concept of (sorting newcomers into a list of 50,000 once, ranking it and choosing 2,000 of it)."""
    random = np.random.default_rng(0)
    lists = TopLists(concepts, PLACES, 1024)
    rows = 0
    while lists.held[0] + 1024 <= lists.scores.shape[1]:
        lists.add(random.standard_normal((1024, concepts), dtype=np.float32), np.arange(rows, rows + 1024))
        rows += 1024
    cut = seconds(lists.last_scores) / concepts
    return cut, seconds(lambda: assign(lists, PER_CONCEPT, np.zeros(rows, dtype=bool))) / concepts


def duration(value: float) -> str:
    """Return seconds as text in seconds, minutes or hours."""
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def main() -> None:
    """Measure, print and write the tables."""
    config = tyro.cli(BenchConfig)
    torch.set_num_threads(1)
    reuse_freed_memory()
    prototypes = normalize(torch.randn(config.concepts, config.width, generator=torch.Generator().manual_seed(0)))
    lines = ["# Streamed top-M of curation", "", f"Command: `python {shlex.join(['docs/bench/bench_curate.py', *sys.argv[1:]])}`", ""]
    lines += [f"Machine: {machine()}. Width {config.width}, float32, CPU seconds of one thread, candidates read from a store.", ""]
    with tempfile.TemporaryDirectory() as folder:
        candidates = write_store(Path(folder) / "all", config.rows, config.width)
        small = write_store(Path(folder) / "small", NAIVE_ROWS, config.width)
        few = prototypes[:NAIVE_CONCEPTS]
        stream(small, few, 10)  # warm-up
        lines += [
            "| what | candidates | concepts | M | s | candidates x concepts a second |",
            "|---|---|---|---|---|---|",
        ]
        print("\n".join(lines))

        def measured(what: str, rows: int, concepts: int, places: int, work: Callable[[], object]) -> float:
            took = seconds(work)
            lines.append(f"| {what} | {rows:,} | {concepts:,} | {places:,} | {took:.1f} | {rows * concepts / took:.3g} |")
            print(lines[-1], flush=True)
            return took

        ours = measured("streamed", NAIVE_ROWS, NAIVE_CONCEPTS, NAIVE_PLACES, lambda: stream(small, few, NAIVE_PLACES))
        full = measured("full matrix, sorted", NAIVE_ROWS, NAIVE_CONCEPTS, NAIVE_PLACES, lambda: naive(small, few, NAIVE_PLACES))
        bound = measured("matrix products alone", config.rows, config.concepts, 0, lambda: products(config.rows, prototypes))
        places = max(1, config.rows * PLACES // CANDIDATES)
        took = measured("streamed", config.rows, config.concepts, places, lambda: stream(candidates, prototypes, places))
    cut, choosing = large_lists()
    scale = CANDIDATES * CONCEPTS / config.rows / config.concepts
    # expected newcomers of a list of M in a stream of N in random order: M (1 + ln(N / M)); an eighth of M are sorted in at a time
    cuts = 8 * np.log(CANDIDATES / PLACES) * CONCEPTS * cut
    size = TopLists.nbytes(CONCEPTS, PLACES, chunk_rows(CONCEPTS))
    flops = 2 * config.width * CANDIDATES * CONCEPTS
    lines += [
        "",
        f"At the small size streaming takes {ours / full:.2f} of the time of the full sort, which would need "
        f"{CANDIDATES * CONCEPTS * 12 / 1e12:.1f} TB of scores and indices at {CANDIDATES / 1e6:.0f}M x {CONCEPTS:,}. At the large size "
        f"the matrix products are {bound / took:.0%} of the streamed time ({flops / scale / took / 1e9:.0f} GFLOP/s net).",
        "",
        f"Extrapolated to {CANDIDATES / 1e6:.0f}M candidates x {CONCEPTS:,} concepts, M = {PLACES:,}, {PER_CONCEPT:,} a concept, width "
        f"{config.width}: {flops / 1e12:,.0f} TFLOP. Not measured as a whole; candidates in random order are assumed.",
        "",
        "| step | on this one core | from |",
        "|---|---|---|",
        f"| scoring and entering | {duration(took * scale)} | the streamed row above x {scale:,.0f} |",
        f"| sorting newcomers into lists of {PLACES:,} | {duration(cuts)} | {cut * 1e3:.1f} ms a time x 8 ln(N / M) x {CONCEPTS:,} |",
        f"| ranking and assignment | {duration(choosing * CONCEPTS)} | {choosing * 1e3:.1f} ms a concept x {CONCEPTS:,} |",
        "",
        f"Memory: {size / 1e9:.2f} GB of lists (12 bytes a place, {PLACES:,} places and an eighth more, {CONCEPTS:,} lists; for 2,754 "
        f"concepts {TopLists.nbytes(2754, PLACES, chunk_rows(2754)) / 1e9:.2f} GB, of which 1.65 GB are places), {CANDIDATES / 1e9:.1f} GB "
        f"of marks for taken samples, {8 * CANDIDATES / 1e9:.1f} GB more with --images; twice the lists while a killed run loads them or "
        f"parts are joined. Disk: twice the lists. Reading: {2 * config.width * CANDIDATES / 1e9:,.0f} GB of features once, and once more "
        "for the coverage after. K processes with --parts K share scoring; a GPU does the products.",
    ]
    print("\n".join(lines[-12:]))
    config.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
