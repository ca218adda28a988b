"""Trainer is told what the flags say."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from align.common.errors import UsageError
from mllm.loop.config import FinetuneConfig
from mllm.loop.settings import deepspeed_settings, fit_batch, make_optimizer, refuse_contradictions, training_arguments


def config(folder, **changes):
    return FinetuneConfig(data=("a.json",), output=str(folder), **changes)


def test_a_step_is_accumulated_over_processes(tmp_path):
    settings = training_arguments(config(tmp_path, batch_size=12, micro_batch_size=2, steps=7, schedule="linear"), "fp32", world=3)
    assert (settings.per_device_train_batch_size, settings.gradient_accumulation_steps, settings.max_steps) == (2, 2, 7)
    assert settings.lr_scheduler_type == "linear" and not settings.bf16
    fewer = training_arguments(config(tmp_path, batch_size=12, micro_batch_size=8), "fp32", world=3)
    assert (fewer.per_device_train_batch_size, fewer.gradient_accumulation_steps) == (4, 1), "the most that divide a process's 4 rows"
    with pytest.raises(UsageError, match="--batch-size 12: does not divide by 5 processes"):
        training_arguments(config(tmp_path, batch_size=12), "fp32", world=5)


def test_little_data_makes_batch_and_micro_batch_smaller_and_says_so(tmp_path):
    settings, said = training_arguments(config(tmp_path), "fp32", world=1), list[str]()
    settings.hf_deepspeed_config = SimpleNamespace(config={"train_batch_size": 128})
    assert fit_batch(settings, config(tmp_path), 128, said.append) == (128, 8) and not said
    assert fit_batch(settings, config(tmp_path), 20, said.append) == (4, 4)
    assert (settings.per_device_train_batch_size, settings.gradient_accumulation_steps) == (4, 1)
    assert settings.hf_deepspeed_config.config == {
        "train_batch_size": 4, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    assert [line.partition(":")[0] for line in said] == [
        "--batch-size 128 is more than the 20 rows or packs of an epoch",
        "--micro-batch-size 8 does not divide the 4 rows of a process",
    ]


def test_deepspeed_takes_a_shipped_name_or_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # without a GPU DeepSpeed itself would be set up
    shipped = [json.loads(Path(deepspeed_settings(name)).read_text()) for name in ("zero2", "zero3", "zero3_offload")]
    assert [settings["zero_optimization"]["stage"] for settings in shipped] == [2, 3, 3] and deepspeed_settings(None) is None
    (tmp_path / "mine.json").write_text("{}")
    assert deepspeed_settings(str(tmp_path / "mine.json")) == str(tmp_path / "mine.json")
    with pytest.raises(UsageError, match="--deepspeed zero9: neither a file nor one of zero2, zero3, zero3_offload"):
        deepspeed_settings("zero9")


@pytest.mark.parametrize(("name", "kind"), [("adamw", "AdamW"), ("lion", "Lion")])
def test_the_optimizer_is_the_one_asked_for(name, kind):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 0.5, "weight_decay": 0.1}]
    made = make_optimizer(groups, name=name, betas=(0.8, 0.9), fused=False)
    assert type(made).__name__ == kind
    assert [made.param_groups[0][key] for key in ("lr", "weight_decay", "betas")] == [0.5, 0.1, (0.8, 0.9)]


AGREEING = [
    {"_comment": "mine", "tensorboard": {"enabled": False}},
    {}, {"optimizer": None}, {"fp16": {"enabled": False}}, {"gradient_clipping": "auto"}, {"gradient_clipping": 1.0},
    {"train_batch_size": 12},
    {"train_micro_batch_size_per_gpu": 2}, {"gradient_accumulation_steps": 3}, {"bf16": {"enabled": "auto"}}, {"bf16": {"enabled": True}},
    {"zero_optimization": {"stage": 2}},
]  # fmt: skip
CONTRADICTING = [
    ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "'optimizer'.*--optimizer.*--lr-llm"),
    ({"scheduler": {"type": "WarmupLR"}}, "'scheduler'.*--schedule"),
    ({"fp16": {"enabled": "auto"}}, "'fp16'.*--precision"),
    ({"amp": {"enabled": True}}, "'amp'.*--precision"),
    ({"curriculum_learning": {"enabled": True}}, "order of the data"),
    ({"gradient_clipping": 0.5}, "gradient_clipping 0.5.*--max-grad-norm says 1.0"),
    ({"train_batch_size": 24}, "train_batch_size 24.*--batch-size says 12"),
    ({"train_micro_batch_size_per_gpu": 4}, "--micro-batch-size says 2"),
    ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 2.*says 3"),
    ({"bf16": {"enabled": False}}, "bf16.enabled False.*--precision bf16"),
    ({"Scheduler": {"type": "WarmupLR"}}, "'Scheduler'.*did you mean 'scheduler'"),
    ({"lr_scheduler": {"type": "WarmupLR"}}, "'lr_scheduler'.*did you mean 'scheduler'"),
    ({"bfloat16": {"enabled": True}}, "'bfloat16'.*known are zero_optimization"),
    ({"zero_optimisation": {"stage": 3}}, "did you mean 'zero_optimization'"),
    ({"gradient_allreduce_op": "sum"}, "'gradient_allreduce_op'"),
    ({"zero_optimization": {"stage": "3"}}, "stage.*expected"),
    ({"zero_optimization": True}, "expected"),
    ([1], "a JSON object"),
    ("text", "a JSON object"),
]


@pytest.mark.parametrize("settings", AGREEING)
def test_a_deepspeed_json_that_agrees_with_the_flags_is_taken(tmp_path, settings):
    given = config(tmp_path, batch_size=12, micro_batch_size=2, precision="bf16", deepspeed="mine.json")
    refuse_contradictions(settings, given, "bf16", micro=given.micro_batch_size, world=2)


@pytest.mark.parametrize(("settings", "message"), CONTRADICTING)
def test_a_deepspeed_json_that_contradicts_the_flags_is_refused_naming_both(tmp_path, settings, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(settings))
    given = config(tmp_path, batch_size=12, micro_batch_size=2, precision="bf16", deepspeed=str(path))
    with pytest.raises(UsageError, match=f"mine.json.*{message}"):
        training_arguments(given, "bf16", world=2)


def test_the_shipped_settings_contradict_no_flag(tmp_path):
    for path in (Path(deepspeed_settings.__code__.co_filename).parents[1] / "zero").glob("*.json"):
        refuse_contradictions(json.loads(path.read_text()), config(tmp_path, deepspeed=path.stem), "bf16", micro=8, world=4)
