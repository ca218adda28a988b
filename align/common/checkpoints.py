"""Checkpoints of a training run: `folder/step-N/` with tensors.safetensors, state.json and COMMIT (their hashes), written last."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save_file
from torch import Tensor

from align.common.errors import DamagedError
from align.common.files import (
    TEMPORARY,
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
