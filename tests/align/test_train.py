"""A run is exact: killed, stopped or not, the same command gives the same log, weights and checkpoints."""

import json
import os
import signal
from functools import partial

import numpy as np
import pytest

from align.common.checkpoints import newest_checkpoint
from align.common.commandline import parse
from align.common.errors import NonFiniteError, UsageError
from align.common.files import arm_failpoint
from align.train import main
from align.training.config import TrainConfig
from align.training.step import Stepper


def flags(folder, output, **changes):
    values = {
        "images": folder / "images", "captions": [folder / "captions-short", folder / "captions-long"], "output": output,
        "val-images": folder / "images", "val-captions": [folder / "captions-short"],
        "head": "glu", "expansion": 2, "width": 16, "batch-size": 32, "steps": 12, "optimizer": "adamw", "lr": 0.01,
        "precision": "fp32", "log-every": 2, "val-every": 4, "save-every": 3, **changes,
    }  # fmt: skip
    listed = []
    for name, value in values.items():
        if value is None:
            continue
        listed += [f"--{name}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return listed


def train(folder, output, failpoint=None, **changes):
    if failpoint:
        arm_failpoint(failpoint)
    main(parse(TrainConfig, "train", flags(folder, output, **changes)))


def evidence(output):
    path, tensors, state, _ = newest_checkpoint(output / "checkpoints")
    models = {name: (output / name / "model.safetensors").read_bytes() for name in ("best", "last")}
    return path.name, {k: v.numpy().tobytes() for k, v in tensors.items()}, state, (output / "metrics.jsonl").read_bytes(), models


@pytest.fixture
def straight(paired_folders, forked):
    assert forked(train, paired_folders, paired_folders / "straight") == 0
    return evidence(paired_folders / "straight")


def test_it_learns(paired_folders, straight):
    rows = [json.loads(line) for line in straight[3].decode().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    recalls = [row["val_mean_recall"] for row in rows if "val_mean_recall" in row]
    assert losses[-1] < losses[0] and recalls[-1] > recalls[0] + 0.2
    last = [row for row in rows if "loss" in row][-1]
    assert last["step"] == 12 and last["positive_logit"] > last["negative_logit"] and last["epoch"] == 4


@pytest.mark.parametrize(
    "failpoint",
    [
        "checkpoint-tensors:2",
        "checkpoint-state:3",
        "checkpoint-commit:1",
        "checkpoint-saved:2",
        "renamed:5",
        "rename:9",
        "model-saved:3",
        "model-retired:2",
    ],
)
def test_kill_anywhere_then_the_same_command_gives_the_same_run(paired_folders, forked, straight, failpoint):
    output = paired_folders / "killed"
    assert forked(train, paired_folders, output, failpoint) == -signal.SIGKILL
    assert forked(train, paired_folders, output) == 0
    assert evidence(output) == straight
    assert not list(output.rglob("*.partial")) and not list(output.rglob("*.retired"))


def test_a_resumed_run_that_is_killed_again_still_arrives(paired_folders, forked, straight):
    output = paired_folders / "killed"
    for failpoint in ("checkpoint-saved:1", "checkpoint-tensors:2", "checkpoint-commit:1"):
        assert forked(train, paired_folders, output, failpoint) == -signal.SIGKILL
    assert forked(train, paired_folders, output) == 0
    assert evidence(output) == straight


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "lion", "lr": 1e-3, "feature-dropout": 0.1},
        {"loss": "infonce", "accumulate": 3, "positives": "same_key"},
        {"val-images": None, "val-rows": 20},
    ],
)
def test_other_recipes_resume_exactly_too(paired_folders, forked, changes):
    if "val-rows" in changes:
        changes = {**changes, "val-captions": None}
    assert forked(partial(train, paired_folders, paired_folders / "a", **changes)) == 0
    assert forked(partial(train, paired_folders, paired_folders / "b", failpoint="checkpoint-saved:2", **changes)) == -signal.SIGKILL
    assert forked(partial(train, paired_folders, paired_folders / "b", **changes)) == 0
    assert evidence(paired_folders / "b") == evidence(paired_folders / "a")


def stopped(folder, output):
    steps = []
    original = Stepper.step

    def step(self, batch, number):
        steps.append(number)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, number)

    Stepper.step = step
    try:
        train(folder, output)
    except Exception as error:
        raise SystemExit(error.exit_code) from error


def test_sigterm_saves_exits_75_and_resumes_exactly(paired_folders, forked, straight):
    output = paired_folders / "preempted"
    assert forked(stopped, paired_folders, output) == 75
    assert newest_checkpoint(output / "checkpoints")[2]["step"] == 5
    assert forked(train, paired_folders, output) == 0
    ours, theirs = evidence(output), straight
    assert ours == theirs


def test_another_config_in_the_same_folder_is_refused_by_field(paired_folders, straight):
    with pytest.raises(UsageError, match="batch_size: 32 there, 16 given"):
        train(paired_folders, paired_folders / "straight", **{"batch-size": 16})


def poisoned(folder, output):
    original = Stepper.step

    def step(self, batch, number):
        if number >= 6:
            batch.images[0] = np.inf
        return original(self, batch, number)

    Stepper.step = step
    try:
        train(folder, output)
    except NonFiniteError as error:
        raise SystemExit(error.exit_code) from error


def test_three_non_finite_steps_stop_the_run_with_state_and_keys(paired_folders, forked):
    output = paired_folders / "poisoned"
    assert forked(poisoned, paired_folders, output) == 8
    assert newest_checkpoint(output / "checkpoints")[2]["step"] == 6
    dumped = json.loads((output / "nonfinite-step-00000007.json").read_text())
    assert len(dumped["keys"]) == 32 and dumped["keys"][0].startswith("k0")
