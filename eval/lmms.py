"""Ask MLLMs questions through lmms-eval, check its results, and put them beside the zero-shot numbers in one report.

    python eval/lmms.py --mllm trained=runs/mllm untrained=runs/mllm-random --tasks sprites_yesno sprites_what --output runs/quickstart/eval
    python eval/lmms.py --mllm runs/mine --tasks my_vqa --include my_tasks --output runs/mine/eval
    python eval/lmms.py --mllm runs/mine --tasks sail_parity_gqa sail_parity_pope mme --processes 8 --output runs/mine/eval
    python eval/lmms.py --list-tasks

results.json in --output is extended: the same models and tasks are replaced, all others stay. lmms-eval's files and logs are
in OUTPUT/lmms. lmms-eval exits with code 0 even if it failed; this command reports that as an error.
"""

import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from align.common.errors import DataError
from align.runtime.commandline import run
from align.runtime.console import plain_console
from eval.harness.config import LmmsConfig

if TYPE_CHECKING:
    from rich.console import Console

    from eval.harness.local import LocalTask


def main(config: LmmsConfig) -> None:
    """List the tasks; or check, take the output folder and measure."""
    from align.runtime.runs import run_folder
    from eval.harness.launch import check_ready
    from eval.harness.local import local_tasks

    console = plain_console()
    known = local_tasks(config.include, config.data)
    if config.list_tasks:
        for task in known.values():
            console.print(f"{task.name}: {', '.join(map(str, task.data)) or 'lmms-eval downloads it'}")
        return
    check_ready(config, known)
    with run_folder(Path(config.output), waiting=console.print):
        measure(config, known, console)


def measure(config: LmmsConfig, known: "dict[str, LocalTask]", console: "Console") -> None:
    """Ask every model, merge, report."""
    from eval.harness.launch import ask, asked_models
    from eval.harness.local import write_wrappers
    from eval.harness.output import collect, write_examples
    from eval.page.page import write_report
    from eval.results.records import RESULTS, load_results, merge_results, save_results
    from eval.results.tables import results_table

    output = Path(config.output)
    models = asked_models(config.mllm)
    tasks = write_wrappers(output / "lmms" / "tasks", [known[task] for task in config.tasks if task in known])
    began = time.monotonic()
    answered, failures = ask(config, models, tasks, console)
    if not answered:
        raise DataError("; ".join(failures))
    command, seconds = shlex.join(["python", "eval/lmms.py", *sys.argv[1:]]), time.monotonic() - began
    measured = collect(output, answered, command, seconds, config.seed, config.confidence, config.baseline)
    results = merge_results(load_results(output), measured) if (output / RESULTS).is_file() else measured
    write_examples(output, results, measured, config.examples, config.seed)
    saved = save_results(output, results)
    console.print(results_table(replace(measured, models=tuple(m for m in results.models if m in measured.models)), "questions"))
    if config.report:
        page = write_report(output, output, [Path(folder) for folder in config.train_runs])
        console.print(f"report: {page} (figures as PNG in {output / 'figures'})")
    console.print(f"results: {saved}")
    if failures:
        raise DataError("; ".join([*failures, "the other models' and tasks' results were kept"]))


if __name__ == "__main__":
    run(main, LmmsConfig, "lmms")
