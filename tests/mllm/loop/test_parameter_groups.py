"""Parameter groups hold every parameter once, rates decide which are trained, and what was trained goes in and out exactly."""

from io import StringIO
from itertools import product

import pytest
import torch
from rich.console import Console

from align.common.errors import UsageError
from mllm.loop.config import Lora
from mllm.loop.parameter_groups import (
    GROUPS,
    group_sizes,
    group_table,
    load_trained,
    merged,
    named_groups,
    optimizer_groups,
    set_trainable,
    trained_tensors,
    untouched,
)
from tests.support.tiny_mllm import tiny_model


def test_trained_tensors_go_in_and_out_exactly():
    model, _ = tiny_model(seed=1)
    rates = {"projector": 1.0, "raw": 1.0, "head": 1.0, "llm": 1.0, "vision": 0.0}
    one = set_trainable(model, rates, Lora(2, 4), seed=0)
    with torch.no_grad():
        for parameter in one.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    other = set_trainable(tiny_model(seed=1)[0], rates, Lora(2, 4), seed=5)
    load_trained(other, trained_tensors(one), "here")
    inputs = {"input_ids": torch.arange(12)[None], "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    with torch.no_grad():
        assert torch.equal(one.eval()(**inputs).logits, other.eval()(**inputs).logits)
        assert torch.allclose(merged(other).eval()(**inputs).logits, one(**inputs).logits, atol=1e-5)


def test_adapters_only_on_the_layers_asked_for():
    model = set_trainable(tiny_model()[0], dict.fromkeys(GROUPS, 1.0), Lora(2, 4, targets=("q_proj", "down_proj")), seed=0)
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted == {"q_proj", "down_proj"} and "self_attn.v_proj.weight" in untouched(model)
    with pytest.raises(UsageError, match=r"query: no such .* k_proj"):
        set_trainable(tiny_model()[0], dict.fromkeys(GROUPS, 1.0), Lora(2, 4, targets=("q_proj", "query")), seed=0)


def test_every_parameter_belongs_to_one_group():
    for lora, join in product((None, Lora(2, 4)), (None, "channel", "sequence")):
        model, _ = tiny_model(tie=True, join=join)
        prepared = set_trainable(model, dict.fromkeys(GROUPS, 1.0), lora, seed=0)
        named = [name for listed in named_groups(prepared).values() for name, _ in listed]
        assert sorted(named) == sorted(name for name, _ in prepared.named_parameters()) and len(set(named)) == len(named)


def test_a_rate_of_0_freezes_a_group_and_vectors_do_not_decay():
    rates = {"projector": 1e-3, "raw": 0.0, "head": 0.0, "llm": 2e-5, "vision": 0.0}
    model = set_trainable(tiny_model()[0], rates, None, seed=0)
    sizes = group_sizes(model)
    assert sum(total for total, _ in sizes.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert [sizes[group][1] for group in GROUPS] == [sizes["projector"][0], 0, 0, sizes["llm"][0], 0]
    groups = optimizer_groups(model, rates, 0.1)
    found = [(group["name"], group["lr"], group["weight_decay"], {p.ndim for p in group["params"]}) for group in groups]
    assert found == [("projector", 1e-3, 0.1, {2}), ("projector", 1e-3, 0.0, {1}), ("llm", 2e-5, 0.1, {2}), ("llm", 2e-5, 0.0, {1})]


@pytest.mark.parametrize("lora", [None, Lora(2, 4)], ids=["whole", "lora"])
@pytest.mark.parametrize("rate", [0.0, 1e-4])
def test_raw_patches_have_a_rate_of_their_own(lora, rate):
    rates = {"projector": 1e-3, "raw": rate, "head": 0.0, "llm": 2e-5, "vision": 0.0}
    model = set_trainable(tiny_model(raw=True)[0], rates, lora, seed=0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "linear_raw" in name]
    assert len(trained) == (1 if rate else 0)
    assert all("original_module" not in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    groups = {group["name"]: group["lr"] for group in optimizer_groups(model, rates, 0.1)}
    assert groups.get("raw", 0.0) == rate and groups["projector"] == 1e-3


def test_what_adapters_leave_alone_is_named_and_nothing_is_counted_twice():
    assert untouched(set_trainable(tiny_model()[0], dict.fromkeys(GROUPS, 1.0), Lora(2, 4), seed=0)) == {}
    for kind in ("mixtral", "qwen2_moe"):
        model = tiny_model(llm=kind)[0]
        before = {group: total for group, (total, _) in group_sizes(model).items()}
        prepared = set_trainable(model, dict.fromkeys(GROUPS, 1.0) | {"vision": 0.0}, Lora(2, 4), seed=0)
        experts = {name: count for name, count in untouched(prepared).items() if "experts" in name}
        assert sum(experts.values()) > 10_000 and not any(name.startswith("layers") for name in experts), experts
        sizes = group_sizes(prepared)
        assert sizes["projector"][0] == before["projector"] == sizes["projector"][1] and sizes["head"][0] == before["head"]
        assert sizes["llm"][0] - sizes["llm"][1] == before["llm"]
        table = Console(width=150, file=StringIO())
        table.print(group_table(prepared, dict.fromkeys(GROUPS, 1.0)))
        assert "without adapters" in table.file.getvalue()
