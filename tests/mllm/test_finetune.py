"""Stage two trains exactly: accumulation and packing change nothing, a killed run is the uninterrupted one, exports are equal."""

import json
import os
import shutil
import signal
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from align.common.errors import DiskFullError, FingerprintError, UsageError
from align.common.files import arm_failpoint
from align.runtime.checkpoints import checkpoints, newest_committed
from align.runtime.commandline import parse
from mllm.conversations.templates import TEMPLATES
from mllm.conversations.tokens import Chat
from mllm.finetune import main, section
from mllm.loop.config import FinetuneConfig
from mllm.model.saving import load_mllm, save_mllm
from tests.support.tiny_mllm import tiny_model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model folder, and 24 conversations about 12 pictures, two of them about none."""
    folder = tmp_path_factory.mktemp("mllm")
    model, processor = tiny_model()
    processor.chat_template = TEMPLATES["vicuna_v1"]
    save_mllm(model, processor, folder / "init")
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    rows = []
    for n in range(24):
        turns = []
        for turn in range(1 + n % 3):
            turns += [{"from": "human", "value": f"what is left of the {n} dog"}, {"from": "gpt", "value": f"red cat {turn} {n}"}]
        row = {"id": f"row{n}", "conversations": turns}
        if n % 12:
            name = f"images/{n % 12}.png"
            Image.fromarray(random.integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(folder / name)
            row["image"] = name
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
        rows.append(row)
    (folder / "instruct.json").write_text(json.dumps(rows))
    captions = [
        {**row, "conversations": [{"from": "human", "value": "<image>"}, row["conversations"][1]]} for row in rows if "image" in row
    ]
    (folder / "pretrain.json").write_text(json.dumps(captions))
    return folder


def train(world, output, failpoint=None, stage="instruct", **changes):
    values = {
        "model": world / "init", "data": world / f"{stage}.json", "image-root": world, "output": output, "stage": stage,
        "batch-size": 4, "micro-batch-size": 4, "max-length": 192, "epochs": 2, "lr-projector": 1e-2, "warmup": 0.1, "workers": 0,
        "log-every": 1, "save-every": 3, "precision": "fp32", "cache": world / "cache", **changes,
    }  # fmt: skip
    if stage == "instruct":
        values = {"lr-llm": 1e-3, "lr-head": 1e-3, "lr-vision": 1e-3, **values}
    if failpoint:
        arm_failpoint(failpoint)
    flags = []
    for name, value in values.items():
        flags += [f"--{name}" if value is True else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    main(parse(FinetuneConfig, stage, flags))


def result(output):
    return load_file(output / "model" / "model.safetensors"), (output / "metrics.jsonl").read_text()


def same(one, other, rtol=0.0, atol=0.0):
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], rtol=rtol, atol=atol) for name in one)


@pytest.fixture(scope="module")
def straight(world):
    from tests.support.forking import exit_codes, fork

    assert exit_codes([fork(train, world, world / "straight")]) == [0]
    return result(world / "straight")


def test_it_learns_and_changes_what_it_should(world, straight):
    losses = [json.loads(line)["loss"] for line in straight[1].splitlines()]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    before, after = load_file(world / "init/model.safetensors"), straight[0]
    unread = {"model.vision_tower.embeddings.mask_token"}
    same_names = {name for name in before if torch.equal(before[name], after[name])}
    assert same_names <= unread | {"model.language_model.embed_tokens.weight"}


@pytest.mark.parametrize("failpoint", ["mllm-checkpoint:2", "mllm-written:1", "mllm-written:2", "mllm-committed:2"])
def test_killed_anywhere_the_same_command_gives_the_same_run(world, straight, forked, tmp_path, failpoint):
    assert forked(train, world, tmp_path / "run", failpoint) == -signal.SIGKILL
    assert forked(train, world, tmp_path / "run") == 0
    weights, metrics = result(tmp_path / "run")
    assert metrics == straight[1]
    same(weights, straight[0])


def test_a_killed_pretrain_stage_resumes_exactly_and_trains_the_projector_only(world, forked, tmp_path):
    run = partial(train, world, stage="pretrain")
    assert forked(partial(run, tmp_path / "a")) == 0
    assert forked(partial(run, tmp_path / "b", "mllm-committed:2")) == -signal.SIGKILL
    assert forked(partial(run, tmp_path / "b")) == 0
    one, other = result(tmp_path / "a"), result(tmp_path / "b")
    assert one[1] == other[1]
    same(one[0], other[0])
    before = load_file(world / "init/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], one[0][name])}
    assert changed and all(name.startswith("model.multi_modal_projector.") for name in changed)


def test_a_run_that_is_complete_is_left_alone_and_one_without_its_model_is_exported_again(world, straight, forked, tmp_path):
    shutil.copytree(world / "straight", tmp_path / "run")
    before = (tmp_path / "run/model/config.json").stat().st_mtime_ns
    assert forked(train, world, tmp_path / "run") == 0
    assert (tmp_path / "run/model/config.json").stat().st_mtime_ns == before and result(tmp_path / "run")[1] == straight[1]
    shutil.rmtree(tmp_path / "run/model")
    assert forked(train, world, tmp_path / "run") == 0
    same(result(tmp_path / "run")[0], straight[0])


def change(what, world):
    """Change one input of a run under the same path."""
    rows = json.loads((world / "instruct.json").read_text())
    if what == "data":
        rows[3]["conversations"][-1]["value"] = "blue cat"
        (world / "instruct.json").write_text(json.dumps(rows))
    elif what == "images":
        Image.new("RGB", (40, 56), "red").save(world / "images/3.png")
    else:
        model, processor = tiny_model(seed=1 if what == "model" else 0)
        processor.chat_template = TEMPLATES["vicuna_v1"] if what == "model" else TEMPLATES["vicuna_v1"].replace("USER", "ASKS")
        save_mllm(model, processor, world / "init")


@pytest.mark.parametrize("what", ["data", "images", "model", "template"])
@pytest.mark.parametrize("finished", [False, True])
def test_other_content_under_the_same_path_is_refused_by_field(world, straight, forked, tmp_path, what, finished):
    mine = tmp_path / "world"
    for name in ("init", "images"):
        shutil.copytree(world / name, mine / name)
    shutil.copy(world / "instruct.json", mine)
    run = partial(train, mine, mine / "run", steps=4)
    assert forked(run) == 0 if finished else forked(partial(run, failpoint="mllm-committed:1")) == -signal.SIGKILL
    change(what, mine)
    with pytest.raises(FingerprintError, match=f"checkpoint-. was trained on other inputs .*{what}: "):
        run()


def test_a_damaged_checkpoint_is_passed_over(world, straight, forked, tmp_path):
    assert forked(train, world, tmp_path / "run", "mllm-committed:3") == -signal.SIGKILL
    newest = checkpoints(tmp_path / "run", committed=True)[-1]
    with open(newest / "trained.safetensors", "r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    path, step, problems = newest_committed(tmp_path / "run")
    assert path != newest and step < int(newest.name.split("-")[1]) and "that was committed" in problems[0]
    assert forked(train, world, tmp_path / "run") == 0
    same(result(tmp_path / "run")[0], straight[0])


def stopped(world, output):
    from mllm.loop.trainer import SailTrainer

    original = SailTrainer.training_step

    def step(self, *arguments, **named):
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments, **named)

    SailTrainer.training_step = step
    from align.common.errors import KitError

    try:
        train(world, output)
    except KitError as error:
        raise SystemExit(error.exit_code) from error


def test_sigterm_saves_exits_75_and_resumes_exactly(world, straight, forked, tmp_path):
    assert forked(stopped, world, tmp_path / "run") == 75
    assert newest_committed(tmp_path / "run")[1] == 5
    assert forked(train, world, tmp_path / "run") == 0
    assert result(tmp_path / "run")[1] == straight[1]
    same(result(tmp_path / "run")[0], straight[0])


def test_accumulation_and_checkpointing_equal_one_batch(world, straight, forked, tmp_path):
    run = partial(train, world, **{"micro-batch-size": 1, "gradient-checkpointing": True})
    assert forked(partial(run, tmp_path / "run")) == 0
    same(result(tmp_path / "run")[0], straight[0], rtol=1e-3, atol=2e-5)


def test_packing_trains_on_the_same_tokens(world, forked, tmp_path):
    assert forked(partial(train, world, tmp_path / "run", packing=True, steps=2, epochs=1, **{"batch-size": 2, "micro-batch-size": 1})) == 0
    speed = [json.loads(line) for line in (tmp_path / "run/speed.jsonl").read_text().splitlines()]
    assert all(row["padding"] < 0.35 for row in speed) and all(row["tokens_per_second"] > 0 for row in speed)


def test_lora_merged_and_exported_equals_the_trained_model(world, forked, tmp_path):
    changes = {"lora-rank": 4, "lr-vision": 0, "lr-llm": 1e-2}
    assert forked(partial(train, world, tmp_path / "run", **changes)) == 0
    exported, processor = load_mllm(tmp_path / "run/model")
    from peft import PeftModel

    base, _ = load_mllm(world / "init")
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "run/adapter")).eval()
    names = {name for name, _ in adapted.named_parameters()}
    assert any("multi_modal_projector.modules_to_save" in name for name in names) and any(
        "sail_head.modules_to_save" in name for name in names
    )
    inputs = processor(images=Image.new("RGB", (50, 40), "red"), text="<image>\nwhat is this", return_tensors="pt")
    with torch.no_grad():
        ours, theirs = exported(**inputs).logits, adapted(**inputs).logits
        plain = load_mllm(world / "init")[0](**inputs).logits
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5) and not torch.allclose(ours, plain, atol=1e-2)


def test_a_template_of_the_run_is_that_of_its_model(world, forked, tmp_path):
    assert forked(partial(train, world, tmp_path / "run", template="brief", steps=1)) == 0
    model, processor = load_mllm(tmp_path / "run/model")
    assert processor.chat_template == TEMPLATES["brief"] != load_mllm(world / "init")[1].chat_template
    assert set(Chat.of_processor(processor).stop_ids) <= set(model.generation_config.eos_token_id)


def poisoned(world, output, persistent, stop=None, **changes):
    from align.common.errors import KitError
    from mllm.loop.trainer import SailTrainer

    original = SailTrainer.training_step

    def step(self, model, inputs, *rest):
        if self.state.global_step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.state.global_step == 4 or (persistent and self.state.global_step > 4):
            inputs["pixel_values"][:] = float("nan")
        return original(self, model, inputs, *rest)

    SailTrainer.training_step = step
    try:
        train(world, output, **changes)
    except KitError as error:
        raise SystemExit(error.exit_code) from error


def test_a_non_finite_step_is_skipped_and_three_in_a_row_stop_the_run(world, forked, tmp_path):
    assert forked(poisoned, world, tmp_path / "once", False) == 0
    rows = [json.loads(line) for line in (tmp_path / "once/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["loss"] is None] == [5] and np.isfinite(rows[-1]["loss"])
    assert json.loads((tmp_path / "once/nonfinite-step-00000005.json").read_text())["rows"]
    assert forked(poisoned, world, tmp_path / "always", True) == 8
    path, step, _ = newest_committed(tmp_path / "always")
    assert step == 4 and all(torch.isfinite(value).all() for value in load_file(path / "trained.safetensors").values())


def test_a_series_of_non_finite_steps_begins_anew_when_it_is_resumed(world, forked, tmp_path):
    often = {"save-every": 1, "keep": 9}
    assert forked(partial(poisoned, world, tmp_path / "always", True, **often)) == 8
    assert newest_committed(tmp_path / "always")[1] == 4
    assert forked(partial(poisoned, world, tmp_path / "always", True, **often)) == 8
    assert forked(partial(poisoned, world, tmp_path / "whole", False, **often)) == 0
    assert forked(partial(poisoned, world, tmp_path / "broken", False, stop=4, **often)) == 75
    assert newest_committed(tmp_path / "broken")[1] == 4
    assert forked(partial(poisoned, world, tmp_path / "broken", False, **often)) == 0
    (one, log), (other, log_of_other) = result(tmp_path / "whole"), result(tmp_path / "broken")
    same(one, other)
    assert log == log_of_other


def out_of_space(world, output):
    """Fail like torch's writer on a full disk, in the second checkpoint."""
    from align.common.errors import KitError

    original, calls = torch.save, []

    def save(*arguments, **named):
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError(
                "[enforce fail at inline_container.cc:783] . PytorchStreamWriter failed writing file data/0: file write failed"
            )
        return original(*arguments, **named)

    torch.save = save
    try:
        train(world, output)
    except KitError as error:
        sys.stderr.write(str(error))
        raise SystemExit(error.exit_code) from error


def test_a_full_disk_in_a_checkpoint_is_named_and_the_one_before_is_resumed_from(world, straight, forked, tmp_path, capfd):
    assert forked(out_of_space, world, tmp_path / "run") == 7
    assert "disk full while writing" in capfd.readouterr().err
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-3"]  # nothing half-written
    assert forked(train, world, tmp_path / "run") == 0
    assert result(tmp_path / "run")[1] == straight[1]


def test_space_for_checkpoints_and_the_model_is_asked_for_beforehand(world, tmp_path, monkeypatch):
    monkeypatch.setattr("align.common.files.free_bytes", lambda path: 100_000)
    with pytest.raises(DiskFullError, match=r"MiB needed, 97.7 KiB free"):
        train(world, tmp_path / "run")


def tracked(world, output):
    from accelerate import tracking

    from align.runtime import runs

    class Recorder:
        def __init__(self, name):
            self.rows = []

        def start(self):
            pass

        def log(self, values, step):
            self.rows.append([step, values["loss"], values["tokens_per_second"]])

        def finish(self):
            (output / "tracked.json").write_text(json.dumps(self.rows))

    tracking.LOGGER_TYPE_TO_CLASS["trackio"] = Recorder
    runs.version = lambda name: "1.0"  # as if it were installed
    train(world, output, steps=2, **{"report-to": "trackio"})


def test_a_tracker_gets_every_row(world, forked, tmp_path):
    assert forked(tracked, world, tmp_path / "run") == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    found = json.loads((tmp_path / "run/tracked.json").read_text())
    assert [row[:2] for row in found] == [[row["step"], row["loss"]] for row in rows] and all(row[2] > 0 for row in found)


def test_settings_that_cannot_work_are_refused(world, tmp_path):
    with pytest.raises(UsageError, match="nothing would be trained"):
        FinetuneConfig(data=("a.json",), stage="pretrain", lr_projector=0)
    with pytest.raises(UsageError, match="zero3_offload"):
        train(world, tmp_path / "run", deepspeed="zero9")


def test_little_data_is_trained_with_smaller_batches(world, forked, tmp_path):
    assert forked(partial(train, world, tmp_path / "asked", **{"batch-size": 4, "micro-batch-size": 4})) == 0
    assert forked(partial(train, world, tmp_path / "fitted", **{"batch-size": 128, "micro-batch-size": 8})) == 0
    one, other = result(tmp_path / "asked"), result(tmp_path / "fitted")
    assert one[1] == other[1], "24 rows are trained as with --batch-size 4"
    same(one[0], other[0])


def test_dry_run_predicts_and_trains_nothing(world, tmp_path, capsys):
    train(world, tmp_path / "run", **{"dry-run": True})
    shown = capsys.readouterr().out
    assert "optimizer" in shown and "min in all" in shown and not (tmp_path / "run/model").exists()


def test_the_stage_decides_which_section_of_a_recipe_is_read(tmp_path):
    (tmp_path / "both.yaml").write_text("pretrain:\n  stage: pretrain\ninstruct:\n  stage: instruct\n")
    (tmp_path / "one.yaml").write_text("pretrain:\n  stage: pretrain\n")
    assert section(["--config", str(tmp_path / "one.yaml")]) == "pretrain"
    assert section([f"--config={tmp_path}/both.yaml", "--stage", "pretrain"]) == "pretrain"
    assert section(["--stage=instruct"]) == section([]) == "instruct"
    with pytest.raises(UsageError, match="both stages"):
        section(["--config", str(tmp_path / "both.yaml")])
