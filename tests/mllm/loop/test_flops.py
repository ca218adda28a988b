"""The FLOPs of a step are those that torch itself counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mllm.loop.config import Lora
from mllm.loop.flops import image_flops, step_cost
from mllm.loop.parameter_groups import set_trainable
from tests.support.tiny_mllm import tiny_model


@pytest.mark.parametrize("kind", ["dinov2", "resnet"])
@pytest.mark.parametrize(("rates", "lora"), [((1, 1, 1, 1), None), ((1, 0, 0, 0), None), ((1, 1, 1, 0), Lora(4, 8))])
def test_a_step_costs_what_torch_counts(kind, rates, lora):
    model, _ = tiny_model(kind)
    model.set_attn_implementation("eager")
    rates = dict(zip(("projector", "head", "llm", "vision"), rates, strict=True))
    prepared = set_trainable(model, rates, lora, seed=0).train()
    tokens = model.config.image_tokens()
    ids = torch.cat([torch.full((1, tokens), model.config.image_token_id), torch.arange(30)[None]], dim=1)
    labels = ids.clone()
    labels[:, : tokens + 10] = -100
    pixels = torch.rand(1, 3, *model.config.sail_image_size)
    with FlopCounterMode(display=False) as counter:
        prepared(input_ids=ids, pixel_values=pixels, labels=labels, attention_mask=torch.ones_like(ids)).loss.backward()
    counted = counter.get_total_flops()
    predicted = step_cost(prepared, image_flops(model.config, rates)).flops([ids.shape[1]], 20, 1)
    assert predicted == pytest.approx(counted, rel=0.03)
