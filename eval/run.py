"""Measure aligned models on tasks, and write results.json, per-sample answers and a report.

    python eval/run.py --config align/recipes/quickstart.yaml
    python eval/run.py --model runs/flickr8k --tasks my_photos.yaml --data-root data --output runs/flickr8k/eval
    python eval/run.py --model glu=runs/glu linear=runs/linear --tasks sprites-unseen sprites-retrieval --no-baseline
    python eval/run.py --model runs/mine openclip:ViT-L-14/openai SigLIP=hf:google/siglip-base-patch16-224 --tasks imagenet1k
    python eval/run.py --compare runs/a/eval runs/b/eval:trained --output runs/comparison
    python eval/run.py --list-tasks

Each aligned model is also measured with untrained heads, and chance and majority rates are added (--no-baseline turns this off).
CLIP and SigLIP models (openclip:ARCH/TAG, openclip:ARCH/FILE.safetensors, hf:FOLDER) are measured on the same samples.
Frozen features are cached by content and encoder, so a second run needs no encoder.
"""

import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from align.runtime.commandline import run, set_up
from align.runtime.console import plain_console
from eval.measures.config import EvalConfig

if TYPE_CHECKING:
    from rich.console import Console


def main(config: EvalConfig) -> None:
    """List the tasks, compare two results, or measure."""
    from align.runtime.runs import run_folder

    if config.list_tasks:
        list_tasks()
    elif config.compare:
        compare_results(config)
    else:
        console = set_up()
        with run_folder(Path(config.output), waiting=console.print):
            measure(config, console)


def list_tasks() -> None:
    """Print the built-in tasks."""
    from eval.tasks.registry import TASKS, describe

    for task in TASKS.values():
        plain_console().print(describe(task))


def compare_results(config: EvalConfig) -> None:
    """Test the differences between two results; write the comparison and its page."""
    from align.common.seeds import generator
    from eval.page.page import write_comparison
    from eval.results.compare import compare, comparison_table, save_comparison

    first, second = config.compare
    comparison = compare(first, second, generator(config.seed, 13), config.seed, config.confidence)
    saved = save_comparison(Path(config.output), comparison)
    console = plain_console()
    console.print(comparison_table(comparison))
    console.print(f"report: {write_comparison(comparison, saved.parent)}")


def measure(config: EvalConfig, console: "Console") -> None:
    """Read the tasks, load the models, measure, save, report."""
    from align.common.hardware import choose_device
    from eval.measures.measurement import Measurement, read_task
    from eval.measures.windows import Windows
    from eval.models.features import FeatureCache
    from eval.models.measured import load_models
    from eval.page.page import write_report
    from eval.results.records import generated_half, merge_results, save_results
    from eval.results.tables import results_table
    from eval.tasks.registry import find_task

    output = Path(config.output)
    cache = Path(config.cache) if config.cache else output / "cache"
    tasks = [find_task(name) for name in config.tasks]
    # read all tasks first, so that wrong data fails before hours of encoding
    data = [read_task(task, Path(config.data_root), cache, config.max_reject_fraction) for task in tasks]
    for one in data:
        for remark in one.remarks:
            console.print(f"{one.task.id}: {remark}")
    device = str(choose_device(config.device))
    output.mkdir(parents=True, exist_ok=True)
    answered = generated_half(output, config.seed, config.confidence)
    job = Measurement(
        load_models(config.model, device, untrained=config.baseline, seed=config.seed, trust_remote_code=config.trust_remote_code),
        FeatureCache(cache, config.batch_size, config.text_batch_size, config.workers, config.max_reject_fraction),
        output,
        console,
        templates=config.templates,
        windows=Windows(*config.windows),
        baseline=config.baseline,
        examples=config.examples,
        seed=config.seed,
        confidence=config.confidence,
    )
    for one in data:
        job.measure(one)
    measured = job.results(shlex.join(["python", "eval/run.py", *sys.argv[1:]]))
    results = merge_results(answered, measured) if answered else measured
    saved = save_results(output, results)
    console.print(results_table(measured, "images or queries"))
    if config.report:
        began = time.monotonic()
        page = write_report(output, output, [Path(folder) for folder in config.train_runs])
        save_results(output, replace(results, seconds={**results.seconds, "report": round(time.monotonic() - began, 2)}))
        console.print(f"report: {page} (figures as PNG in {output / 'figures'})")
    console.print(f"results: {saved}")


if __name__ == "__main__":
    run(main, EvalConfig, "eval")
