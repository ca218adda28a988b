"""lmms-eval as a child process: its jobs file, its log, and what each model scored."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from align.common.errors import DataError, UsageError
from align.common.files import TEMPORARY, atomic_bytes
from align.common.folders import move_into_place
from align.common.hardware import choose_device
from eval.harness.config import LmmsConfig
from eval.harness.local import LocalTask
from eval.harness.output import TaskRun, model_record, read_run
from eval.results.records import RESULTS, ModelRecord, file_name, load_results
from mllm.model.saving import mllm_folder

INCOMPLETE = ".incomplete"  # suffix of the newest files that lack a task
NAME = "MLLM"  # prefix of column names, because eval/run.py may also have a model called trained


@dataclass(frozen=True)
class AskedModel:
    """A model to ask: its column in the results, and its folder."""

    record: ModelRecord
    folder: Path

    def place(self, output: Path) -> Path:
        """Return the folder for lmms-eval's files of this model, below a results folder."""
        return output / "lmms" / file_name(self.record.name)


def asked_models(given: Sequence[str]) -> list[AskedModel]:
    """Return the models of `--mllm`; UsageError for a folder without a model and for equal names."""
    pairs = [one.rpartition("=")[::2] for one in given]
    names = [name or ("trained" if len(pairs) == 1 else path) for name, path in pairs]
    if len({file_name(name) for name in names}) < len(names):
        raise UsageError(f"two models have the same name ({', '.join(names)}); name them: --mllm NAME=PATH NAME=PATH")
    found = []
    for name, (_, path) in zip(names, pairs, strict=True):
        folder = mllm_folder(Path(path))
        found.append(AskedModel(model_record(f"{NAME} {name}", folder), folder))
    return found


def check_ready(config: LmmsConfig, known: dict[str, LocalTask]) -> None:
    """Raise before any model is loaded: lmms-eval or data is missing, or existing results cannot be extended."""
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


def ask(
    config: LmmsConfig, models: Sequence[AskedModel], tasks: Path, console: Console
) -> tuple[list[tuple[ModelRecord, list[TaskRun]]], list[str]]:
    """Run lmms-eval on all models; return what it measured, and a sentence for each incomplete model or task.

    `tasks`: folder of YAML tasks. If lmms-eval does not finish for a model, it asks that model once more, each task on its own. Its files
    of a model stay until new ones are complete; incomplete ones are kept beside them, in NAME.incomplete.
    """
    output = Path(config.output)
    names = ", ".join(model.record.name for model in models)
    console.print(f"lmms-eval asks {names}: {', '.join(config.tasks)} (log: {output / 'lmms' / 'log.txt'})")
    fresh = {model.record.name: _begun(model.place(output)) for model in models}
    log, code = _launch(
        config, [_job(config, model, config.tasks, tasks, fresh[model.record.name]) for model in models], "log.txt", console
    )
    stuck = [model for model in models if len(config.tasks) > 1 and not list(fresh[model.record.name].rglob("*_results.json"))]
    if stuck:
        names = ", ".join(model.record.name for model in stuck)
        console.print(f"lmms-eval did not finish with {names} (exit code {code}). {_last_error(log)} Each task is asked on its own")
        jobs = [
            _job(config, model, [task], tasks, fresh[model.record.name] / file_name(task))
            for model in stuck for task in config.tasks
        ]  # fmt: skip
        log, code = _launch(config, jobs, "log-by-task.txt", console)
    answered, failures = [], list[str]()
    for model in models:
        place, failed = _ended(model.place(output)), list[str]()
        runs = _read_by_task(place, config, failed) if model in stuck else _read(place, config.tasks, config.limit, failed)
        if runs:
            answered.append((model.record, runs))
        if failed:
            failures.append(f"{model.record.name}: {'; '.join(failed)}")
        else:
            move_into_place(place, model.place(output), "lmms")
    if failures:
        failures.append(f"lmms-eval ended with exit code {code}. {_last_error(log)}")
    return answered, failures


def _begun(place: Path) -> Path:
    """Return an empty folder for new files beside those in `place`; what is left in it of a dead run is deleted."""
    fresh = place.with_name(place.name + TEMPORARY)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    return fresh


def _ended(place: Path) -> Path:
    """Return the folder of the new files, renamed to what they are until they are read: incomplete."""
    incomplete = place.with_name(place.name + INCOMPLETE)
    shutil.rmtree(incomplete, ignore_errors=True)
    place.with_name(place.name + TEMPORARY).rename(incomplete)
    return incomplete


def _read(place: Path, tasks: Sequence[str], limit: int | None, failed: list[str]) -> list[TaskRun]:
    """Return the tasks that were measured; sentences on the others are added to `failed`."""
    try:
        return read_run(place, tasks, limit, failed)
    except DataError as error:
        failed.append(str(error))
        return []


def _read_by_task(place: Path, config: LmmsConfig, failed: list[str]) -> list[TaskRun]:
    """Return what `_read` does for tasks that were asked one by one."""
    runs = []
    for task in config.tasks:
        missing = list[str]()
        runs += _read(place / file_name(task), [task], config.limit, missing)
        failed += [f"task {task}: {said}" for said in missing]
    return runs


def _launch(config: LmmsConfig, jobs: list[dict[str, Any]], log_name: str, console: Console) -> tuple[Path, int]:
    """Run lmms-eval on `jobs`. Return its log and its exit code."""
    folder = Path(config.output) / "lmms"
    jobs_file, log = folder / "jobs.yaml", folder / log_name
    atomic_bytes(jobs_file, yaml.safe_dump(jobs, sort_keys=False).encode())
    spread = ["-m", "torch.distributed.run", "--nproc_per_node", str(config.processes)] if config.processes > 1 else []
    return log, _run([sys.executable, *spread, "-m", "lmms_eval", "--config", str(jobs_file)], log, console)


def _job(config: LmmsConfig, model: AskedModel, asked: Sequence[str], tasks: Path, place: Path) -> dict[str, Any]:
    """Return lmms-eval's job: `model` is asked the tasks `asked`, the files go to `place`."""
    place.mkdir(parents=True, exist_ok=True)
    settings = {
        "pretrained": model.folder,
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
    return {
        "model": "sail_llava",
        "model_args": ",".join(f"{name}={value}" for name, value in settings.items()),
        "tasks": ",".join(asked),
        "include_path": str(tasks),
        "batch_size": config.batch_size,
        "output_path": str(place),
        "log_samples": True,
        **({"limit": config.limit} if config.limit else {}),
    }


def _run(command: Sequence[str], log: Path, console: Console) -> int:
    """Run a command, write its output to `log`, show the newest progress line, and return its exit code."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if choose_device().type == "cpu":
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
