"""The run folder: the files that a training run writes.

run/
  manifest.json          config, command, versions, git commit and data fingerprints of every launch
  config.yaml            the resolved recipe: `--config run/config.yaml` repeats the run
  metrics.jsonl          losses and scores, one row per log or validation step; the same after an interruption
  speed.jsonl            rates and waiting times; different in each run
  tensorboard/           curves of both files
  checkpoints/step-N/    state for resuming (see `align.runtime.checkpoints`)
  .work/status.json      whether the run goes on, or its exit code (launchers replace it by their own) and its last message
  .work/leases/          the process that writes here
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from pathlib import Path
from typing import Any

from align.common.errors import DamagedError, KitError, LeaseError, UsageError
from align.common.failures import explained
from align.common.files import atomic_bytes, atomic_json, disk_full_named, read_object
from align.common.folders import WORK, clean_tree
from align.common.locks import Lease

PACKAGES = (
    "sail-upgrade-kit", "torch", "torchvision", "transformers", "accelerate", "sentence-transformers", "timm", "safetensors", "numpy",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit() -> str | None:
    """Return the commit of the source tree (with `+changes` if it was edited), or None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).resolve().parents[2]), "describe", "--always", "--dirty=+changes", "--abbrev=12"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return shown.stdout.strip() or None if shown.returncode == 0 else None


def add_launch(folder: Path, facts: dict[str, Any]) -> None:
    """Append one launch to the run's manifest: command, time, versions, commit and `facts`."""
    import torch  # imported here: result pages use `versions` without torch

    path = folder / "manifest.json"
    manifest = read_object(path) if path.exists() else {"launches": []}
    started, command = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), [Path(sys.argv[0]).name, *sys.argv[1:]]
    launch = {"started": started, "command": command, "commit": git_commit(), "versions": versions()}
    manifest["launches"].append({**launch, "threads": torch.get_num_threads(), **facts})
    atomic_json(path, manifest)


@contextmanager
def run_folder(
    folder: Path, writing: bool = True, waiting: Callable[[str], object] = lambda line: None, job: str | None = None
) -> Iterator[Lease | None]:
    """Hold the lease of a run's folder, keep .work/status.json, and, unless a `job` shares it, clean up what a dead run left half-written.

    Not `writing`: do nothing. Raises LeaseError if a living process of another job has the folder.
    """
    if not writing:
        yield None
        return
    with Lease(folder, job, waiting) as lease:
        if job is None:
            clean_tree(folder)
        _write_status(folder, None)
        try:
            yield lease
        except BaseException as error:
            if not isinstance(error, LeaseError):  # another job has the folder now
                _write_status(folder, error)
            raise
        _write_status(folder, SystemExit(0))


def _write_status(folder: Path, end: BaseException | None) -> None:
    """Write .work/status.json: the run goes on (None), or how it ended."""
    ended = None if end is None or isinstance(end, SystemExit | KeyboardInterrupt) else explained(end)
    code = ended.exit_code if ended else 130 if isinstance(end, KeyboardInterrupt) else None if end is None else 0
    state = {None: "running", 0: "done", 75: "preempted"}.get(code, "failed")
    process = {"pid": os.getpid(), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    message = str(ended) if ended else ""
    with suppress(OSError, KitError):  # a full disk must not hide why the run ended
        atomic_json(folder / WORK / "status.json", {"state": state, "exit_code": code, "message": message, **process})


class JsonLines:
    """A JSON-lines file that is appended to, and cut back to a step on resume."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut(self, step: int) -> None:
        """Delete the rows after `step`, and a last line that a crash cut short."""
        if self.path.exists():
            kept = takewhile(lambda read: read[1].endswith(b"\n") and read[0]["step"] <= step, self._read(stepped=True))
            atomic_bytes(self.path, b"".join([line for _, line in kept]))

    def append(self, row: dict[str, Any]) -> None:
        """Append one row. It reaches the operating system at once, so kill -9 does not lose it."""
        with disk_full_named(self.path), open(self.path, "ab") as file:
            file.write((json.dumps(row, allow_nan=False) + "\n").encode())

    def rows(self, stepped: bool = False) -> list[dict[str, Any]]:
        """Return all rows but a last one that is cut short. DamagedError for a line that is no row; `stepped`: each needs a step."""
        return [row for row, _ in self._read(stepped)]

    def _read(self, stepped: bool = False) -> Iterator[tuple[dict[str, Any], bytes]]:
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else (), 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                if not line.endswith(b"\n"):
                    return  # a crash cut it short, or it is being written
                row = None
            if not isinstance(row, dict) or (stepped and type(row.get("step")) is not int):
                wanted = "a JSON object with a step" if stepped else "a JSON object"
                raise DamagedError(f"{self.path}, line {number}: expected {wanted}, found {line[:80]!r}; take the line out")
            yield row, line


def require_trackers(names: Sequence[str]) -> None:
    """Raise UsageError if a tracker of `names` is not installed; call it before anything is loaded."""
    for name in names:
        try:
            version(name)
        except PackageNotFoundError as error:
            raise UsageError(f"--report-to {name}: {name} is not installed; run `pip install {name}`, or leave the flag out") from error


class RunLog:
    """Log of a run: metrics.jsonl, speed.jsonl, TensorBoard and the requested trackers (see `require_trackers`)."""

    def __init__(self, folder: Path, resumed: int | None = None, trackers: Sequence[str] = (), writing: bool = True) -> None:
        """Drop rows after step `resumed` (None: all). `trackers`: accelerate's names. Not `writing`: log nothing."""
        self.metrics, self.speed = JsonLines(folder / "metrics.jsonl"), JsonLines(folder / "speed.jsonl")
        self.writing = writing
        if not writing:
            return
        from torch.utils.tensorboard import SummaryWriter

        for lines in (self.metrics, self.speed):
            lines.cut(-1 if resumed is None else resumed)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed or None)
        self._trackers = [_started(name) for name in trackers]

    def log(self, row: dict[str, Any], speed: dict[str, Any] | None = None) -> None:
        """Write a row of metrics, with its `step`, and its rates. None means no value."""
        if not self.writing:
            return
        self.metrics.append(row)
        if speed is not None:
            self.speed.append({"step": row["step"], **speed})
        shown = {name: value for name, value in {**row, **(speed or {})}.items() if name != "step" and value is not None}
        for name, value in shown.items():
            self._board.add_scalar(name, value, row["step"])
        for tracker in self._trackers:
            tracker.log(shown, step=row["step"])

    def close(self) -> None:
        """Close TensorBoard and the trackers."""
        if self.writing:
            self._board.close()
            for tracker in self._trackers:
                tracker.finish()


def _started(name: str) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    tracker: Any = LOGGER_TYPE_TO_CLASS[name]("sail-upgrade-kit")
    tracker.start()
    return tracker
