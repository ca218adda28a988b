"""Predicted memory is what the arithmetic of mixed precision and ZeRO says."""

import pytest

from mllm.loop.estimate import predicted_bytes
from mllm.loop.parameter_groups import set_trainable
from tests.support.tiny_mllm import tiny_model


@pytest.mark.parametrize(
    ("settings", "weights", "gradients", "optimizer"),  # bytes of: a frozen and a trained weight, a gradient, an optimizer state
    [
        ({}, (4, 4), 4, 8),
        ({"optimizer": "lion"}, (4, 4), 4, 4),
        ({"bf16": True}, (2, 4), 4, 8),
        ({"bf16": True, "zero_stage": 2, "world": 4}, (2, 2), 2 / 4, 12 / 4),
        ({"bf16": True, "zero_stage": 3, "world": 4}, (2 / 4, 2 / 4), 2 / 4, 12 / 4),
    ],
)
def test_bytes_of_weights_gradients_and_states(settings, weights, gradients, optimizer):
    model = set_trainable(tiny_model()[0], {"projector": 1.0, "raw": 1.0, "head": 1.0, "llm": 0.0, "vision": 0.0}, None, seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    plain = {"bf16": False, "checkpointing": False, "optimizer": "adamw", "zero_stage": 0, "world": 1}
    found = predicted_bytes(model, 10, **{**plain, **settings})
    assert found["weights"] == frozen * weights[0] + trained * weights[1]
    assert found["gradients"] == trained * gradients and found["optimizer"] == trained * optimizer
    assert found["activations"] == 10 * 34 * 2 * 32 * (1 if settings.get("bf16") else 2)  # two layers of width 32


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer():
    plain = {"bf16": True, "optimizer": "adamw", "zero_stage": 0, "world": 1}
    kept = predicted_bytes(tiny_model()[0], 10, checkpointing=True, **plain)["activations"]
    assert kept == 10 * (2 * 2 + 34) * 32
