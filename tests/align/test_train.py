"""A run is exact: killed, stopped or not, the same command gives the same log, weights and checkpoints."""

import json
import os
import shutil
import signal
import time
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.common.errors import DiskFullError, FingerprintError, KitError, LeaseError, UsageError
from align.common.files import arm_failpoint
from align.runtime.checkpoints import newest_checkpoint
from align.runtime.commandline import parse
from align.train import main
from align.training.config import TrainConfig
from align.training.step import Stepper
from tests.support.flags import as_flags
from tests.support.forking import exit_codes, fork
from tests.support.stores import build_paired_stores


def flags(folder, output, **changes):
    values = {
        "images": folder / "images", "captions": [folder / "captions-short", folder / "captions-long"], "output": output,
        "val-images": folder / "images", "val-captions": [folder / "captions-short"],
        "head": "glu", "expansion": 2, "width": 16, "batch-size": 32, "steps": 12, "optimizer": "adamw", "lr": 0.01,
        "precision": "fp32", "log-every": 2, "val-every": 4, "save-every": 3, **changes,
    }  # fmt: skip
    return as_flags(values)


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


def test_little_data_is_trained_with_fewer_pairs_at_once_and_held_out(paired_folders, forked, capfd):
    little = {"val-images": None, "val-captions": None, "val-rows": 1000}
    assert forked(partial(train, paired_folders, paired_folders / "a", **{**little, "batch-size": 4096})) == 0
    said = capfd.readouterr().out
    assert "--val-rows 1000 is more than half of the" in said and "--batch-size 4096 is more than the" in said and "few_photos" in said
    fitted = int(said.partition("each step takes ")[2].partition(".")[0])
    held = int(said.partition("pairs: ")[2].partition(" ")[0])
    assert forked(partial(train, paired_folders, paired_folders / "b", **{**little, "batch-size": fitted, "val-rows": held})) == 0
    assert evidence(paired_folders / "a") == evidence(paired_folders / "b")


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
    status = json.loads((output / ".work/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 75) and "step 5, state saved" in status["message"]
    assert forked(train, paired_folders, output) == 0
    ours, theirs = evidence(output), straight
    assert ours == theirs


def slow(folder, output):
    def step(self, batch, number):
        (output / "training").write_text("")
        signal.pause()

    Stepper.step = step
    train(folder, output)


def test_a_second_run_on_the_folder_is_refused_and_a_killed_one_is_taken_over(paired_folders, forked, straight):
    output = paired_folders / "shared"
    first = fork(slow, paired_folders, output)
    while not (output / "training").exists():
        time.sleep(0.05)
    (output / "half.1-dead.partial").write_text("")
    with pytest.raises(LeaseError, match=f"being written by process {first} on "):
        train(paired_folders, output)
    assert (output / "half.1-dead.partial").exists()  # not the second one's to clean up
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert json.loads((output / ".work/status.json").read_text())["state"] == "running"
    assert forked(train, paired_folders, output) == 0
    assert evidence(output) == straight and not list(output.rglob("*.partial"))
    assert json.loads((output / ".work/status.json").read_text())["exit_code"] == 0


def change(place, folder):
    """Change one input of a run under the same path."""
    if place == "keys":
        pq.write_table(pa.table({"key": [f"k{n:03d}" for n in range(48, 96)]}), folder / "keys.parquet")
    else:
        other = folder / "other"
        build_paired_stores(other, seed=1)
        shutil.rmtree(folder / place)
        shutil.copytree(other / place, folder / place)


@pytest.mark.parametrize(
    ("place", "field"),
    [("images", r"images\[0\]: "), ("captions-long", r"captions\[1\]: "), ("captions-short", r"val_captions\[0\]: "), ("keys", "keys: ")],
)
@pytest.mark.parametrize("finished", [False, True])
def test_other_content_under_the_same_path_is_refused_by_field(tmp_path, forked, capfd, place, field, finished):
    build_paired_stores(tmp_path)
    pq.write_table(pa.table({"key": [f"k{n:03d}" for n in range(64)]}), tmp_path / "keys.parquet")
    run = partial(train, tmp_path, tmp_path / "run", keys=tmp_path / "keys.parquet", steps=6)
    assert forked(run) == 0 if finished else forked(partial(run, failpoint="checkpoint-saved:1")) == -signal.SIGKILL
    before = evidence(tmp_path / "run") if finished else None
    change(place, tmp_path)
    with pytest.raises(FingerprintError, match=f"was trained on other inputs .*{field}"):
        run()
    assert not finished or evidence(tmp_path / "run") == before


def test_another_config_in_the_same_folder_is_refused_by_field(paired_folders, straight):
    with pytest.raises(UsageError, match="batch_size: 32 there, 16 given"):
        train(paired_folders, paired_folders / "straight", **{"batch-size": 16})


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Stores, a function that trains on them for four steps in a child, and the metrics of the plain run."""
    folder = tmp_path_factory.mktemp("short")
    build_paired_stores(folder)

    def run(output, **changes):
        flags = {"steps": 4, "log-every": 1, "val-every": 4, "warmup": 0.25, **changes}
        assert exit_codes([fork(partial(train, folder, folder / output, **flags))]) == [0]
        return [json.loads(line) for line in (folder / output / "metrics.jsonl").read_text().splitlines()]

    return folder, run, run("plain")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("reduction", "sum_over_batch"), ("bias", -5), ("log-scale", 2), ("log-scale-range", [2.9957, 2.9958]), ("betas", [0.5, 0.6]),
        ("weight-decay", 0.5), ("warmup", 0.5), ("min-lr", 0.005), ("max-grad-norm", 1e-9), ("seed", 1), ("optimizer", "lion"),
        ("lr", 0.02), ("feature-dropout", 0.5), ("loss", "infonce"), ("head", "mlp"), ("expansion", 4), ("width", 8), ("batch-size", 24),
    ],
)  # fmt: skip
def test_each_setting_of_the_heads_and_of_their_training_changes_the_log(short_run, flag, value):
    _, run, plain = short_run
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (plain, run(flag, **{flag: value}))]
    assert len(losses[1]) == 4 and losses[0] != losses[1]


@pytest.mark.slow
def test_dropout_is_that_of_the_heads(short_run):
    _, run, _ = short_run
    token = [run(f"sharelock-{dropout}", head="sharelock", width=12, expansion=None, dropout=dropout) for dropout in (0, 0.5)]
    assert token[0] != token[1]


def test_linear_heads_start_from_correlations(short_run):
    _, run, _ = short_run
    first = {}
    for start in ("random", "cca"):
        first[start] = run(f"start-{start}", head="linear", expansion=None, width=8, start=start, steps=1)[0]
    assert first["cca"]["step"] == 0 and first["cca"]["val_mean_recall"] > 1.5 * first["random"]["val_mean_recall"]


@pytest.mark.parametrize("foreign", [{"head": "glu"}, {"head": "linear", "images": None, "data": "a.jsonl", "vision": "v", "text": "t"}])
def test_the_closed_form_start_is_for_linear_heads_on_stores(foreign):
    with pytest.raises(UsageError, match="--start cca .*cca needs --head linear and --images"):
        TrainConfig(captions=("c",), output="o", steps=1, start="cca", **{"images": ("i",), **foreign})


def test_how_often_a_run_logs_validates_and_saves(short_run):
    folder, run, plain = short_run
    rows = run("often", **{"log-every": 2, "val-every": 1, "save-every": 1, "keep": 3})
    assert [row["step"] for row in rows if "loss" in row] == [2, 4] and [row["step"] for row in plain if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "val_i2t_r1" in row] == [0, 1, 2, 3, 4]
    assert [path.name[-1] for path in sorted((folder / "often/checkpoints").iterdir())] == ["2", "3", "4"]
    assert [path.name[-1] for path in sorted((folder / "plain/checkpoints").iterdir())] == ["3", "4"]


def test_the_last_line_says_so_if_nothing_beat_the_untrained_heads(short_run, capfd):
    folder, run, _ = short_run
    run("idle", lr=1e-30)
    assert capfd.readouterr().out.splitlines()[-1] == (
        f"done: {folder}/idle/best (step 0: NO validation was better than that of the untrained heads, which this folder holds) "
        f"and {folder}/idle/last"
    )
    run("learning", steps=12)
    assert capfd.readouterr().out.splitlines()[-1] == f"done: {folder}/learning/best (step 12) and {folder}/learning/last"


def test_epochs_are_passes_over_the_data(short_run):
    _, run, _ = short_run
    assert run("epochs", epochs=2, steps=None)[-1]["step"] == 2 * 96 // 32


def test_validation_sees_at_most_so_many_images(short_run):
    _, run, plain = short_run
    assert [row for row in run("limit", **{"val-limit": 10}) if "loss" in row] == [row for row in plain if "loss" in row]
    assert run("few", **{"val-limit": 1})[0]["val_mean_recall"] == 1  # one image has no rival


def test_a_dry_run_writes_nothing(short_run, capfd):
    folder, _, _ = short_run
    train(folder, folder / "dry", **{"batch-size": 10, "dry-run": True})
    assert not (folder / "dry").exists() and "9 steps an epoch, about" in capfd.readouterr().out


@pytest.mark.parametrize("tile", [5, 4096])
def test_the_loss_is_computed_in_tiles_of_the_given_side(paired_folders, monkeypatch, tile):
    def stop(*_, **options):
        raise InterruptedError(options["tile"])

    monkeypatch.setattr("align.training.step.sigmoid_loss", stop)
    with pytest.raises(InterruptedError, match=f"^{tile}$"):
        train(paired_folders, paired_folders / "tiles", tile=tile)


def test_encoders_are_embedded_in_saved_models_if_asked_for(paired_folders, monkeypatch):
    """Also in best/, and by the same command in a run that was finished without."""
    embedded, asked = [], []
    monkeypatch.setattr("align.training.run.package", lambda source, folder, moved: embedded.append((source.name, folder.name)))
    monkeypatch.setattr("align.model.saving.require_whole", lambda config: asked.append(len(embedded)))
    train(paired_folders, paired_folders / "own", steps=1)
    assert not embedded and not asked
    train(paired_folders, paired_folders / "own", **{"steps": 1, "embed-encoders": True})
    assert embedded == [("best", "best"), ("last", "last")] and asked == [0], "asked before training whether it can be done"


def poisoned(folder, output, limit=3, stop=None, bad=range(6, 99), **changes):
    """Train with steps `bad` (from 0) on an infinite feature; SIGTERM in step number `stop`."""
    original = Stepper.step

    def step(self, batch, number):
        if number == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        if number in bad:
            batch.images[0] = np.inf
        return original(self, batch, number)

    Stepper.step = step
    try:
        train(folder, output, **{"max-nonfinite": limit, **changes})
    except KitError as error:
        raise SystemExit(error.exit_code) from error


def test_no_checkpoint_inside_a_series_of_non_finite_steps_is_resumed_from(paired_folders, forked):
    """Saved at every step, killed or stopped inside the series: the series begins anew, with the count that an unbroken run has."""
    often, output = {"save-every": 1, "keep": 9}, paired_folders / "series"
    assert forked(partial(poisoned, paired_folders, output, **often)) == 8
    assert newest_checkpoint(output / "checkpoints")[2]["step"] == 6
    assert newest_checkpoint(output / "checkpoints")[2]["run"]["skipped"] == 0
    assert forked(partial(poisoned, paired_folders, output, **often)) == 8  # it does not get past the series by being started again
    assert forked(partial(poisoned, paired_folders, paired_folders / "stopped", stop=7, **often)) == 75
    _, _, state, _ = newest_checkpoint(paired_folders / "stopped/checkpoints")
    assert (state["step"], state["run"]["skipped"]) == (6, 0)
    two = {"bad": (6, 7), "limit": 3, **often}
    assert forked(partial(poisoned, paired_folders, paired_folders / "whole", **two)) == 0
    assert forked(partial(poisoned, paired_folders, paired_folders / "broken", stop=7, **two)) == 75
    assert forked(partial(poisoned, paired_folders, paired_folders / "broken", **two)) == 0
    assert evidence(paired_folders / "broken") == evidence(paired_folders / "whole")


def test_space_for_checkpoints_and_models_is_asked_for_beforehand(paired_folders, monkeypatch):
    monkeypatch.setattr("align.common.files.free_bytes", lambda path: 1000)
    with pytest.raises(DiskFullError, match=r"KiB needed, 1000 B free"):
        train(paired_folders, paired_folders / "full")
    assert not (paired_folders / "full/metrics.jsonl").exists()


def test_three_non_finite_steps_stop_the_run_with_state_and_keys(paired_folders, forked):
    output = paired_folders / "poisoned"
    assert forked(poisoned, paired_folders, output) == 8
    assert newest_checkpoint(output / "checkpoints")[2]["step"] == 6
    dumped = json.loads((output / "nonfinite-step-00000007.json").read_text())
    assert len(dumped["keys"]) == 32 and dumped["keys"][0].startswith("k0")
    assert sorted(path.name[-6] for path in output.glob("nonfinite-*")) == ["7", "8", "9"]


def test_after_how_many_non_finite_steps_a_run_stops_can_be_chosen(paired_folders, forked):
    assert forked(poisoned, paired_folders, paired_folders / "poisoned", 1) == 8
    assert [path.name[-6] for path in (paired_folders / "poisoned").glob("nonfinite-*")] == ["7"]
