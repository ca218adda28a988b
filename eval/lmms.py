"""Ask MLLMs questions through lmms-eval, check its results, and put them beside the zero-shot numbers in one report.

    python eval/lmms.py --mllm trained=runs/mllm untrained=runs/mllm-random --tasks sprites_yesno sprites_what --output runs/quickstart/eval
    python eval/lmms.py --mllm runs/mine --tasks my_vqa --include my_tasks --output runs/mine/eval
    python eval/lmms.py --mllm runs/mine --tasks sail_parity_gqa sail_parity_pope mme --processes 8 --output runs/mine/eval
    python eval/lmms.py --list-tasks

results.json in --output is extended: other models and tasks stay, the same ones are replaced. lmms-eval's own files and logs are
kept in OUTPUT/lmms. It ends with exit code 0 even if it failed; here that is an error.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points, version
from pathlib import Path

import torch
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table

from align.common.commandline import run
from align.common.console import plain_console
from align.common.errors import DataError, UsageError
from align.common.files import atomic_bytes
from align.common.runs import git_commit, versions
from align.common.seeds import generator
from eval.harness.config import LmmsConfig
from eval.harness.local import LocalTask, local_tasks, write_wrappers
from eval.harness.output import TaskRun, answers_table, majority_entry, model_record, read_run, run_entries, task_record
from eval.page.page import shown_metrics, shown_value, write_report
from eval.results.examples import drawn_questions, generation_examples, save_examples
from eval.results.records import (
    RESULTS,
    Entry,
    ModelRecord,
    Results,
    file_name,
    load_answers,
    load_results,
    merge_results,
    save_answers,
    save_results,
)

NAME = "MLLM"  # before the name of every column, so that both halves may have a model called trained


@dataclass(frozen=True)
class Candidate:
    """A model to ask: its column in the results, and its folder."""

    record: ModelRecord
    folder: Path


Asked = tuple[Candidate, list[TaskRun]]


def candidates(given: Sequence[str]) -> list[Candidate]:
    """Return the models of `--mllm`; UsageError for a folder that is none and for names that are not different."""
    pairs = [one.rpartition("=")[::2] for one in given]
    names = [name or ("trained" if len(pairs) == 1 else path) for name, path in pairs]
    if len({file_name(name) for name in names}) < len(names):
        raise UsageError(f"two models have the same name ({', '.join(names)}); name them: --mllm NAME=PATH NAME=PATH")
    found = []
    for name, (_, path) in zip(names, pairs, strict=True):
        folder = next((place for place in (Path(path), Path(path) / "model") if (place / "config.json").is_file()), None)
        if folder is None:
            raise UsageError(f"{path} is neither an MLLM folder (config.json) nor a run with model/; make one with mllm/finetune.py")
        found.append(Candidate(model_record(f"{NAME} {name}", folder), folder))
    return found


def check_ready(config: LmmsConfig, known: dict[str, LocalTask]) -> None:
    """Raise before any model is loaded: lmms-eval missing, data missing, results that cannot be extended."""
    if not any(point.name == "sail_llava" for point in entry_points(group="lmms_eval.models")):
        raise UsageError("lmms-eval does not know sail_llava; install this project again: pip install -e '.[mllm,lmms]'")
    for task in config.tasks:
        for path in known[task].data if task in known else ():
            if not path.is_file():
                made = " (`make quickstart` makes it)" if task.startswith("sprites_") else ""
                raise DataError(f"task {task} has no data: put {path} there{made}, or give --data FOLDER")
    if (Path(config.output) / RESULTS).is_file():
        there = load_results(Path(config.output))
        if (there.seed, there.confidence) != (config.seed, config.confidence):
            said = f"--seed {there.seed} --confidence {there.confidence:g}"
            raise UsageError(f"the results in {config.output} were made with {said}; give the same, or another --output")


def ask(config: LmmsConfig, models: Sequence[Candidate], tasks: Path, console: Console) -> tuple[list[Asked], list[str]]:
    """Run lmms-eval on all models, in one process, and return what it measured and, a sentence each, which models are incomplete.

    lmms-eval goes on with the next model if one fails, so what is complete can be kept.
    """
    folder = Path(config.output) / "lmms"
    jobs = []
    for candidate in models:
        place = _place(config, candidate)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        settings = {
            "pretrained": candidate.folder,
            "dtype": config.precision,
            "device": config.device,
            "max_new_tokens": config.max_new_tokens,
            "thumbnails": place / "thumbnails",
            "examples": config.examples,
            "seed": config.seed,
            **({"template": config.template} if config.template else {}),
        }
        for name, value in settings.items():
            if re.search(r"[,'\"{}\[\]]", str(value)):
                raise UsageError(f"{name} is {str(value)!r}: lmms-eval cannot be given commas, quotes and brackets; rename the folder")
        jobs.append(
            {
                "model": "sail_llava",
                "model_args": ",".join(f"{name}={value}" for name, value in settings.items()),
                "tasks": ",".join(config.tasks),
                "include_path": str(tasks),
                "batch_size": config.batch_size,
                "output_path": str(place),
                "log_samples": True,
                **({"limit": config.limit} if config.limit else {}),
            }
        )
    atomic_bytes(folder / "jobs.yaml", yaml.safe_dump(jobs, sort_keys=False).encode())
    spread = ["-m", "torch.distributed.run", "--nproc_per_node", str(config.processes)] if config.processes > 1 else []
    command = [sys.executable, *spread, "-m", "lmms_eval", "--config", str(folder / "jobs.yaml")]
    log = folder / "log.txt"
    names = ", ".join(candidate.record.name for candidate in models)
    console.print(f"lmms-eval asks {names}: {', '.join(config.tasks)} (log: {log})")
    code = _run(command, log, console)
    asked, failures = [], []
    for candidate in models:
        try:
            asked.append((candidate, read_run(_place(config, candidate), config.tasks, config.limit)))
        except DataError as error:
            failures.append(f"{candidate.record.name}: {error}")
    if failures:
        failures.append(f"lmms-eval ended with exit code {code}. {_last_error(log)}")
    return asked, failures


def _place(config: LmmsConfig, candidate: Candidate) -> Path:
    return Path(config.output) / "lmms" / file_name(candidate.record.name)


def _run(command: Sequence[str], log: Path, console: Console) -> int:
    """Run a command, write what it says to `log`, show the newest progress line, and return its exit code."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    assert process.stdout is not None
    try:
        with log.open("wb") as file, console.status("starting lmms-eval") as status:
            while block := process.stdout.read1(1 << 16):  # type: ignore[attr-defined]
                file.write(block)
                lines = [line for line in re.split(r"[\r\n]+", block.decode(errors="replace")) if "it/s" in line or "s/it" in line]
                if lines:
                    status.update(lines[-1].strip()[:100])
        return process.wait()
    finally:
        if process.poll() is None:  # interrupted
            process.terminate()
            process.wait()


def _last_error(log: Path) -> str:
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in log.read_text(errors="replace").splitlines()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line) and "RetryError" not in line]
    return f"Its last error: {errors[-1][:500]} (all of it: {log})" if errors else f"See {log}"


def collect(config: LmmsConfig, runs: Sequence[Asked], seconds: float) -> Results:
    """Return what was measured as results, with the majority rates, and write the answers of all models."""
    entries: list[Entry] = []
    for candidate, measured in runs:
        for task_run in measured:
            entries += run_entries(task_run, candidate.record.name, generator(config.seed, 11), config.confidence)
            save_answers(Path(config.output), task_run.task, candidate.record.name, answers_table(task_run))
    first = runs[0][1]
    if config.baseline:
        entries += [entry for task_run in first for entry in majority_entry(task_run, config.confidence)]
    records = [candidate.record for candidate, _ in runs]
    if any(entry.model == "majority" for entry in entries):
        records.append(ModelRecord("majority", "majority", "always names the most frequent classes or answers", "", {}))
    return Results(
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        command=shlex.join(["python", "eval/lmms.py", *sys.argv[1:]]),
        versions={**versions(), "lmms-eval": version("lmms-eval"), "source": git_commit() or "no git checkout"},
        seed=config.seed,
        confidence=config.confidence,
        seconds={"generated answers": round(seconds, 2)},
        models=tuple(records),
        tasks=tuple(task_record(task_run) for task_run in first),
        entries=tuple(entries),
    )


def write_examples(config: LmmsConfig, results: Results, measured: Results) -> None:
    """Write the examples of the tasks just measured, with the answers of every model of `results` that was asked."""
    output = Path(config.output)
    for task in measured.tasks:
        asked = {entry.model for entry in results.entries if entry.task == task.id} - {"majority"}
        tables = {model.name: load_answers(output, task.id, model.name) for model in results.models if model.name in asked}
        answers = {name: {int(row["key"]): row for row in table.to_pylist()} for name, table in tables.items()}
        numbers = drawn_questions(task.id, next(iter(answers.values())), config.examples, config.seed)
        found = {path.stem: path for path in (output / "lmms").glob(f"*/thumbnails/{file_name(task.id)}/*.jpg")}
        pictures = {number: Image.open(found[str(number)]) for number in numbers if str(number) in found}
        save_examples(output, task.id, generation_examples(numbers, answers, pictures), pictures.items())


def results_table(results: Results) -> Table:
    """Return the results of the generation tasks as a table for the terminal: percents with their intervals."""
    table = Table(title="percent, with intervals; n = questions", title_justify="left")
    for heading in ("task", "metric", *(model.name for model in results.models), "n"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right", overflow="fold")
    for task in results.tasks:
        for metric, label in shown_metrics(results, task).items():
            row = [results.value(task.id, metric, model.name) for model in results.models]
            n = next(entry.n for entry in row if entry)
            table.add_row(task.id, label, *(" ".join(shown_value(entry)) if entry else "-" for entry in row), str(n))
        table.add_section()
    return table


def main(config: LmmsConfig) -> None:
    """Check, ask every model, merge, report."""
    console = plain_console()
    known = local_tasks(config.include, config.data)
    if config.list_tasks:
        for task in known.values():
            where = ", ".join(map(str, task.data)) or "lmms-eval downloads it"
            console.print(f"{task.name}: {where}")
        return
    check_ready(config, known)
    output = Path(config.output)
    models = candidates(config.mllm)
    tasks = write_wrappers(output / "lmms" / "tasks", [known[task] for task in config.tasks if task in known])
    began = time.monotonic()
    asked, failures = ask(config, models, tasks, console)
    if not asked:
        raise DataError("; ".join(failures))
    measured = collect(config, asked, time.monotonic() - began)
    there = (output / RESULTS).is_file()
    results = merge_results(load_results(output), measured) if there else measured
    write_examples(config, results, measured)
    saved = save_results(output, results)
    console.print(results_table(replace(measured, models=tuple(m for m in results.models if m in measured.models))))
    if config.report:
        page = write_report(output, output, [Path(folder) for folder in config.train_runs])
        console.print(f"report: {page} (figures as PNG in {output / 'figures'})")
    console.print(f"results: {saved}")
    if failures:
        raise DataError("; ".join([*failures, "the other models' results were kept"]))


if __name__ == "__main__":
    run(main, LmmsConfig, "lmms")
