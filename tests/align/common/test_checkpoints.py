"""A run folder never loads half a state: the newest checkpoint that verifies wins, and says what it passed over."""

import random

import pytest
import torch

from align.common.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from align.common.errors import DamagedError
from align.common.files import arm_failpoint


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
        path = draw.choice(sorted(folder.iterdir()))
        good = path.read_bytes()
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(DamagedError):
            load_checkpoint(folder)
        path.write_bytes(good)
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
