"""A run folder never loads half a state: the newest checkpoint that verifies wins, and says what it passed over."""

import random

import pytest
import torch

from align.common.errors import DamagedError
from align.common.files import arm_failpoint
from align.runtime.checkpoints import (
    clean_checkpoints,
    commit_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    newest_committed,
    save_checkpoint,
)
from tests.support.flipped_bits import refuses_a_flipped_bit


def tensors(step):
    return {"w": torch.full((3, 2), float(step)), "m": torch.arange(4) + step}


def save(folder, *steps, keep=5):
    for step in steps:
        save_checkpoint(folder, step, tensors(step), {"note": f"at {step}"}, keep)


def test_what_was_saved_is_loaded_and_old_ones_are_deleted(tmp_path):
    save(tmp_path, 10, 20, 30, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000030"]
    path, loaded, state, problems = newest_checkpoint(tmp_path)
    assert path.name == "step-00000030" and state == {"note": "at 30", "step": 30} and problems == []
    assert all(torch.equal(loaded[name], value) for name, value in tensors(30).items())


def test_no_checkpoint_is_a_fresh_start(tmp_path):
    assert newest_checkpoint(tmp_path / "nothing")[0] is None


def damage(path, kind):
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    else:
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 4
        tail = content[: len(content) // 2] + bytes(len(content) - len(content) // 2)
        path.write_bytes({"empty": b"", "cut": content[:-7], "flipped": bytes(flipped), "zero tail": tail}[kind])


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "COMMIT"])
@pytest.mark.parametrize("kind", ["empty", "cut", "flipped", "zero tail", "missing"])
def test_a_damaged_newest_checkpoint_is_passed_over_and_named(tmp_path, name, kind):
    save(tmp_path, 10, 20)
    damage(tmp_path / "step-00000020" / name, kind)
    path, loaded, state, problems = newest_checkpoint(tmp_path)
    assert path.name == "step-00000010" and state["step"] == 10 and "step-00000020" in problems[0]
    damage(tmp_path / "step-00000010" / name, kind)
    with pytest.raises(DamagedError, match="no checkpoint"):
        newest_checkpoint(tmp_path)


def test_random_flipped_bits_never_load(tmp_path):
    save(tmp_path, 10)
    folder = tmp_path / "step-00000010"
    draw = random.Random(0)
    for _ in range(100):
        refuses_a_flipped_bit(draw.choice(sorted(folder.iterdir())), draw, folder, load_checkpoint)
    load_checkpoint(folder)


def save_and_die(folder, failpoint):
    save(folder, 10)
    arm_failpoint(failpoint)
    save(folder, 20)


@pytest.mark.parametrize("failpoint", ["checkpoint-tensors", "checkpoint-state", "checkpoint-commit", "rename:1", "rename:2"])
def test_a_kill_inside_a_checkpoint_write_leaves_the_one_before(tmp_path, forked, failpoint):
    assert forked(save_and_die, tmp_path, failpoint) == -9
    path, _, state, problems = newest_checkpoint(tmp_path)
    assert state["step"] == 10 and problems == []
    save(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000020"], "no leftovers"


def test_a_kill_after_the_commit_keeps_the_new_one(tmp_path, forked):
    assert forked(save_and_die, tmp_path, "checkpoint-saved") == -9
    assert newest_checkpoint(tmp_path)[2]["step"] == 20


def test_checkpoints_written_in_place_count_once_they_are_committed(tmp_path):
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text(str(step))
        assert newest_committed(tmp_path)[1] == (9 if step == 10 else 0), "the newest by its number, not by its name"
        commit_checkpoint(folder)
    assert newest_committed(tmp_path) == (tmp_path / "checkpoint-10", 10, [])
    (tmp_path / "checkpoint-10" / "weights").write_text("11")
    path, step, problems = newest_committed(tmp_path)
    assert path.name == "checkpoint-9" and step == 9 and "does not have the content that was committed" in problems[0]
    (tmp_path / "checkpoint-9" / "weights").unlink()
    with pytest.raises(DamagedError, match="no checkpoint .* verifies: .*weights is missing"):
        newest_committed(tmp_path)


def test_cleaning_removes_what_does_not_count_and_nothing_that_is_not_a_checkpoint(tmp_path):
    save(tmp_path, 10)
    for name in ("step-00000020.partial", "step-00000010.retired", "checkpoint-5", "model.retired", "cache"):
        (tmp_path / name).mkdir()
    clean_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "checkpoint-5", "model.retired", "step-00000010"]
    clean_checkpoints(tmp_path, uncommitted=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "model.retired", "step-00000010"]
