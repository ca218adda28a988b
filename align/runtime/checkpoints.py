"""Checkpoints of both stages: a folder per step, valid once its COMMIT (hashes of all files) is written; and the newest valid one."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save_file
from torch import Tensor

from align.common.errors import DamagedError
from align.common.files import TEMPORARY, atomic_json, failpoint, read_object, sync_folder
from align.common.folders import RETIRED, damage, hashes_below, replaced_folder, sync_tree

COMMIT = "COMMIT"
TENSORS, STATE = "tensors.safetensors", "state.json"
Content = TypeVar("Content")


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint folder, or -1 if it is not one."""
    found = re.fullmatch(r"(?:step|checkpoint)-(\d+)", path.name)  # step-N: the heads; checkpoint-N: Trainer, for an MLLM
    return int(found[1]) if found else -1


def checkpoints(folder: Path, committed: bool = False) -> list[Path]:
    """Return the checkpoints in a folder, oldest first. `committed`: only those with a COMMIT."""
    found = [path for path in folder.glob("*-*") if step_of(path) >= 0 and ((path / COMMIT).is_file() or not committed)]
    return sorted(found, key=step_of)


def commit_checkpoint(folder: Path) -> None:
    """Flush every file of a checkpoint to disk, then write their hashes to COMMIT."""
    sync_tree(folder)
    atomic_json(folder / COMMIT, hashes_below(folder, COMMIT))
    sync_folder(folder.parent)


def verify_checkpoint(folder: Path) -> None:
    """Raise DamagedError unless every file of the checkpoint has its committed hash."""
    record = read_object(folder / COMMIT) if (folder / COMMIT).is_file() else None
    if not isinstance(record, dict) or not record:
        raise DamagedError(f"{folder} has no usable COMMIT record")
    for name, digest in record.items():
        if problem := damage(folder / name, digest):
            raise DamagedError(problem)


def newest_readable(folder: Path, found: Sequence[Path], read: Callable[[Path], Content]) -> tuple[Path | None, Content | None, list[str]]:
    """Return (path, content, problems) of the newest of `found` that `read` accepts; (None, None, []) if `found` is empty.

    `problems` holds one sentence for each newer checkpoint that raised DamagedError. If all raise it, this function does too.
    """
    problems: list[str] = []
    for path in reversed(found):
        try:
            return path, read(path), problems
        except DamagedError as error:
            problems.append(str(error))
    if problems:
        raise DamagedError(f"no checkpoint in {folder} verifies: {'; '.join(problems)}. Delete the folder to start again.")
    return None, None, []


def newest_committed(folder: Path) -> tuple[Path | None, int, list[str]]:
    """Return (path, step, problems) of the newest committed checkpoint that verifies; (None, 0, []) if none is committed."""
    path, _, problems = newest_readable(folder, checkpoints(folder, committed=True), verify_checkpoint)
    return path, step_of(path) if path else 0, problems


def delete_all_but(keep: int, found: Sequence[Path]) -> None:
    """Delete all but the newest `keep` of the checkpoints `found`, given oldest first."""
    for old in found[:-keep]:
        shutil.rmtree(old)


def clean_checkpoints(folder: Path, uncommitted: bool = False) -> None:
    """Delete temporary folders of killed processes. `uncommitted`: delete checkpoints without a COMMIT too."""
    leftovers = [path for suffix in (TEMPORARY, RETIRED) for path in folder.glob(f"step-*{suffix}")]
    if uncommitted:
        leftovers += set(checkpoints(folder)) - set(checkpoints(folder, committed=True))
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write and commit `folder/step-N`, delete all but the newest `keep` checkpoints, and return the new path."""
    folder.mkdir(parents=True, exist_ok=True)
    clean_checkpoints(folder)
    final = folder / f"step-{step:08d}"
    with replaced_folder(final, "checkpoint-folder", sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / TENSORS)
        failpoint("checkpoint-tensors")
        atomic_json(temporary / STATE, {**state, "step": step})
        failpoint("checkpoint-state")
        commit_checkpoint(temporary)
        failpoint("checkpoint-commit")
    failpoint("checkpoint-saved")
    delete_all_but(keep, checkpoints(folder))
    return final


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and state of a checkpoint. Raise DamagedError unless every file has its committed hash."""
    verify_checkpoint(path)
    try:
        return tensors_from_bytes((path / TENSORS).read_bytes()), json.loads((path / STATE).read_bytes())
    except (OSError, SafetensorError, ValueError) as error:
        raise DamagedError(f"{path} cannot be read ({error})") from error


def newest_checkpoint(folder: Path) -> tuple[Path | None, dict[str, Tensor], dict[str, Any], list[str]]:
    """Return (path, tensors, state, problems) of the newest checkpoint that verifies; see `newest_readable`."""
    path, content, problems = newest_readable(folder, checkpoints(folder), load_checkpoint)
    return path, *(content or ({}, {})), problems
