"""Measure what each score of one candidate costs once its features are encoded, and write the table beside this file as `assess.md`.

    python docs/bench/bench_assess.py
    python docs/bench/bench_assess.py --pairs 5000 --patch-images 500

Features are made up: images and captions share a part of a latent vector, so that a probe reaches a middling recall and converges
as on real features. Seconds are of the wall clock, and in brackets of the CPU (over all cores), which other programs do not blur.
"""

import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from bench_loss import machine

from align.assessment.probing import Training
from align.assessment.scores import SCORES, Score, Scorer, Settings, TextSide
from align.common.hardware import reuse_freed_memory, use_cores


@dataclass(frozen=True)
class BenchConfig:
    """What to measure; the defaults take about a minute on two cores."""

    pairs: int = 10_000
    """Pairs, two captions each."""
    widths: tuple[int, int] = (1280, 384)
    """Image and caption feature widths."""
    labelled: int = 2000
    """Labelled images, of 10 classes."""
    patch_images: int = 1000
    """Images compared by their 7 x 7 patches."""
    output: Path = Path(__file__).with_name("assess.md")
    """Where the table is written."""


def main() -> None:
    """Take every score of one candidate, print what it cost and write it with command and machine."""
    config = tyro.cli(BenchConfig)
    reuse_freed_memory()
    cores = use_cores(1)
    random = np.random.default_rng(0)
    meaning = random.normal(size=(config.pairs, 64)).astype(np.float32)
    owners = np.repeat(np.arange(config.pairs), 2)

    def seen(rows: np.ndarray, width: int) -> np.ndarray:
        """Return features (n, width) float16 of latent vectors (n, 64), most of each hidden by noise."""
        latent = rows + 1.5 * random.normal(size=rows.shape)
        return (latent @ random.normal(size=(64, width)) + 3 * random.normal(size=(len(rows), width))).astype(np.float16)

    images, captions = seen(meaning, config.widths[0]), seen(meaning[owners], config.widths[1])
    scorer = Scorer(Settings(Training()), config.pairs, torch.device("cpu"))
    side = TextSide(captions, owners, scorer.sample, torch.device("cpu"))
    sides = (side.linear, side.rbf, side.cosine)  # once for all candidates
    assert all(len(matrix) == len(scorer.sample) for matrix in sides)
    labels = random.integers(0, 10, config.labelled)
    classes = (0.2 * random.normal(size=(10, config.widths[0]))[labels] + random.normal(size=(config.labelled, config.widths[0]))).astype(
        np.float16
    )
    patches = random.normal(size=(config.patch_images, 49 * config.widths[0])).astype(np.float16)
    parts: dict[str, Callable[[], dict[str, Score]]] = {
        "alignment probing": lambda: scorer.probing(images, side),
        "CKA (three) and mutual k-NN": lambda: scorer.relations(images, side),
        "weighted k-NN and linear probe": lambda: scorer.with_labels(classes, labels),
        "patch neighborhoods": lambda: scorer.patches(patches, config.widths[0], side.mean_of(np.arange(config.patch_images))),
    }
    lines = ["| scores | seconds (of CPU) | |", "|---|---|---|"]
    wall, used, found = 0.0, 0.0, {}
    for name, compute in parts.items():
        begin, cpu = time.perf_counter(), time.process_time()
        scores = compute()
        spent, spent_cpu = time.perf_counter() - begin, time.process_time() - cpu
        wall, used, found = wall + spent, used + spent_cpu, {**found, **scores}
        told = ", ".join(f"{key} {100 * score.value:.1f}" for key, score in scores.items())
        if "probing" in scores:
            told += f", best after {scores['probing'].details['steps']} of {scores['probing'].details['history'][-1][0]} steps"
        lines.append(f"| {name} | {spent:.1f} ({spent_cpu:.1f}) | {told} |")
        print(lines[-1], flush=True)
    assert found.keys() == SCORES.keys()
    lines.append(f"| all | {wall:.1f} ({used:.1f}) | |")
    print(lines[-1])
    command = shlex.join(["python", "docs/bench/bench_assess.py", *sys.argv[1:]])
    title = f"# Assessing one candidate: {config.pairs} pairs, {config.widths[0]} x {config.widths[1]}"
    config.output.write_text("\n".join([title, "", f"`{command}` on {machine()}, {cores} in use", "", *lines, ""]))


if __name__ == "__main__":
    main()
