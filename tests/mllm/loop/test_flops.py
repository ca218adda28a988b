"""The FLOPs of a step are those that torch itself counts; the counts of a micro-batch are those of its rows, padding apart."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mllm.conversations.batches import collate
from mllm.loop.config import Lora
from mllm.loop.flops import Collate, StepCost, image_flops, step_cost
from mllm.loop.parameter_groups import set_trainable
from tests.support.tiny_mllm import tiny_model


@pytest.mark.parametrize(
    ("kind", "join", "llm"),
    [
        ("dinov2", None, "llama"), ("resnet", None, "llama"), ("dinov2", "channel", "llama"), ("dinov2", "sequence", "llama"),
        ("dinov2", None, "mixtral"), ("dinov2", None, "qwen2_moe"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("rates", "lora"), [((1, 1, 1, 1), None), ((1, 0, 0, 0), None), ((1, 1, 1, 0), Lora(4, 8))])
@pytest.mark.parametrize("untrained", [None, [5, 7]])
def test_a_step_costs_what_torch_counts(kind, join, llm, rates, lora, untrained):
    model, _ = tiny_model(kind, llm, join=join)
    model.config.sail_untrained_tokens = untrained
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # torch counts no grouped products
    rates = dict(zip(("projector", "head", "llm", "vision"), rates, strict=True))
    rates["raw"] = rates["projector"]
    prepared = set_trainable(model, rates, lora, seed=0).train()
    tokens = model.config.image_tokens()
    ids = torch.cat([torch.full((1, tokens), model.config.image_token_id), torch.arange(30)[None]], dim=1)
    labels = ids.clone()
    labels[:, : tokens + 10] = -100
    pixels = torch.rand(1, *model.config.pixel_shape())
    with FlopCounterMode(display=False) as counter:
        prepared(input_ids=ids, pixel_values=pixels, labels=labels, attention_mask=torch.ones_like(ids)).loss.backward()
    counted = counter.get_total_flops()
    predicted = step_cost(prepared, image_flops(model.config, rates)).flops([ids.shape[1]], 20, 1)
    assert predicted == pytest.approx(counted, rel=0.03)


def item(lengths, learned, images):
    """A row, or a pack of rows, whose last `learned` tokens are learned."""
    labels = torch.full((sum(lengths),), -100)
    labels[len(labels) - learned :] = 7
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {
        "input_ids": torch.ones(sum(lengths)).long(),
        "labels": labels,
        "position_ids": positions,
        "pixel_values": [torch.zeros(3, 2, 2)] * images,
        "is_described": [False] * images,
    }


def test_rows_of_a_pack_are_counted_one_by_one():
    cost = StepCost(token=1, pair=10, label=100, image=1000)
    counts = Collate(partial(collate, pad_id=0, packed=True), cost)([item([3, 2], 2, 1), item([4], 4, 0)])["counts"]
    # of the second item the first token is not predicted: 2 + 3 supervised ones; 2 x 5 slots, one of them padding
    assert counts == {"tokens": 9, "slots": 10, "supervised": 5, "images": 1, "flops": 9 + 10 * (9 + 4 + 16) + 100 * 5 + 1000}


def test_unpacked_rows_have_the_same_counts():
    cost = StepCost(token=1, pair=0, label=0, image=0)
    batch = Collate(partial(collate, pad_id=0, packed=False), cost)([item([5], 1, 1), item([2], 1, 1)])
    assert batch["counts"] == {"tokens": 7, "slots": 10, "supervised": 2, "images": 2, "flops": 7}
    assert batch["input_ids"].shape == (2, 5) and len(batch["pixel_values"]) == 2
