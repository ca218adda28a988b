"""The run folder: what a training run leaves behind and how it goes on after a crash.

run/
  manifest.json          config, command, versions, git commit and data fingerprints of every launch
  config.yaml            the resolved recipe: `--config run/config.yaml` repeats the run
  metrics.jsonl          what was learnt, a row a log or validation step; identical whether the run was killed or not
  speed.jsonl            rates and waiting times, which are never identical
  checkpoints/step-N/    state for resuming: tensors.safetensors, state.json and COMMIT (their hashes), written last
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save_file
from torch import Tensor

from align.common.errors import DamagedError, UsageError
from align.common.files import (
    TEMPORARY,
    atomic_bytes,
    atomic_json,
    disk_full_named,
    failpoint,
    hash_bytes,
    hash_file,
    read_json,
    sync_file,
    sync_folder,
)

COMMIT = "COMMIT"
PACKAGES = (
    "sail-upgrade-kit",
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "sentence-transformers",
    "timm",
    "safetensors",
    "numpy",
)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit() -> str | None:
    """Return the commit of the source tree (with `+changes` if it was edited), or None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        shown = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+changes", "--abbrev=12"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return shown.stdout.strip() or None if shown.returncode == 0 else None


def generator(*seeds: int) -> np.random.Generator:
    """Return an independent random generator that is a pure function of the given whole numbers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([len(seeds), *(seed & 0xFFFFFFFF for seed in seeds)])))


def add_launch(folder: Path, facts: dict[str, Any]) -> None:
    """Append one launch (command, time, versions, commit and the given facts) to the run's manifest."""
    path = folder / "manifest.json"
    manifest = read_json(path) if path.exists() else {"launches": []}
    launch = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": git_commit(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        **facts,
    }
    manifest["launches"].append(launch)
    atomic_json(path, manifest)


class JsonLines:
    """A file of one JSON object a line, appended to and cut back to a step on resume."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut(self, step: int) -> None:
        """Drop every row after `step`, and a last line that a crash cut short."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or row["step"] > step:
                break
            kept.append(line)
        atomic_bytes(self.path, b"".join(kept))

    def append(self, row: dict[str, Any]) -> None:
        """Add one row; it is flushed to the operating system, so that kill -9 does not lose it."""
        with disk_full_named(self.path), open(self.path, "ab") as file:
            file.write((json.dumps(row, allow_nan=False) + "\n").encode())

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write and commit `folder/step-N`, then delete all but the newest `keep` checkpoints; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{final.name}.{os.getpid()}{TEMPORARY}"
    clean_checkpoints(folder)
    with disk_full_named(final, sum(tensor.nbytes for tensor in tensors.values())):
        temporary.mkdir()
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / "tensors.safetensors")
            failpoint("checkpoint-tensors")
            atomic_json(temporary / "state.json", {**state, "step": step})
            failpoint("checkpoint-state")
            atomic_json(temporary / COMMIT, {name: hash_file(temporary / name) for name in ("tensors.safetensors", "state.json")})
            sync_file(temporary / "tensors.safetensors")
            failpoint("checkpoint-commit")
            if final.exists():  # an older attempt at the same step that did not verify
                shutil.rmtree(final)
            os.replace(temporary, final)
            sync_folder(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    failpoint("checkpoint-saved")
    for old in sorted(folder.glob("step-????????"))[:-keep]:
        shutil.rmtree(old)
    return final


def clean_checkpoints(folder: Path) -> None:
    """Remove half-written checkpoints of killed processes."""
    for leftover in folder.glob(f"*{TEMPORARY}"):
        shutil.rmtree(leftover, ignore_errors=True)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and state of one checkpoint; DamagedError unless every file has its committed hash."""
    commit = read_json(path / COMMIT) if (path / COMMIT).exists() else None
    if not isinstance(commit, dict) or set(commit) != {"tensors.safetensors", "state.json"}:
        raise DamagedError(f"{path} has no usable COMMIT record")
    contents = {}
    for name, digest in commit.items():
        try:
            contents[name] = (path / name).read_bytes()
        except OSError as error:
            raise DamagedError(f"{path / name} cannot be read ({error.strerror})") from error
        if hash_bytes(contents[name]) != digest:
            raise DamagedError(f"{path / name} does not have its committed hash")
    try:
        return tensors_from_bytes(contents["tensors.safetensors"]), json.loads(contents["state.json"])
    except (SafetensorError, ValueError) as error:
        raise DamagedError(f"{path} cannot be read ({error})") from error


def newest_checkpoint(folder: Path) -> tuple[Path | None, dict[str, Tensor], dict[str, Any], list[str]]:
    """Return (path, tensors, state, problems) of the newest checkpoint that verifies; path is None if there is none.

    `problems` says, one sentence each, which newer checkpoints were passed over and why. DamagedError if there are
    checkpoints but none verifies.
    """
    problems: list[str] = []
    for path in sorted(folder.glob("step-????????"), reverse=True):
        try:
            tensors, state = load_checkpoint(path)
        except DamagedError as error:
            problems.append(str(error))
            continue
        return path, tensors, state, problems
    if problems:
        raise DamagedError(f"no checkpoint in {folder} verifies: {'; '.join(problems)}. Delete the folder to start again.")
    return None, {}, {}, []


def model_folder(path: Path) -> Path:
    """Return the aligned model's folder at `path`: itself, or the `best` or `last` model of a run; UsageError if there is none."""
    for place in (path, path / "best", path / "last"):
        if (place / "config.json").is_file() and read_json(place / "config.json").get("model_type") == "sail":
            return place
    raise UsageError(f"{path} is neither an aligned model (config.json) nor a run with best/ or last/; make one with align/train.py")
