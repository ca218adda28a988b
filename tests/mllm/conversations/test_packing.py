"""Packs and plans: best fit, exact when packed, a pure function of seed and epoch."""

import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from align.common.errors import UsageError
from mllm.conversations.batches import ConversationDataset
from mllm.conversations.index import build_index
from mllm.conversations.packing import EpochPlan, fill_rate, length_grouped, pack
from mllm.conversations.table import Conversations
from mllm.conversations.tokens import IGNORED
from tests.support.short_conversations import PROCESSOR, chat, conversation, varied


def brute_best_fit(lengths, size):
    """Best fit decreasing by looking at every pack each time; returns the sorted fills."""
    free = []
    for length in sorted(lengths, reverse=True):
        fitting = [place for place, space in enumerate(free) if space >= length]
        if fitting:
            free[min(fitting, key=lambda place: free[place])] -= length
        else:
            free.append(size - length)
    return sorted(free)


@pytest.mark.parametrize("size, count", [(1, 5), (16, 300), (100, 400), (2048, 500)])
def test_packs_are_best_fit_decreasing_and_never_split(size, count):
    random = np.random.default_rng(size)
    lengths = random.integers(1, size + 1, count)
    packs = pack(lengths, size, np.random.default_rng(0))
    assert sorted(position for positions in packs for position in positions) == list(range(count))
    fills = [int(lengths[positions].sum()) for positions in packs]
    assert max(fills) <= size
    assert sorted(size - fill for fill in fills) == brute_best_fit(lengths.tolist(), size)
    assert fill_rate(packs, lengths, size) == pytest.approx(lengths.sum() / (size * len(packs)))
    other = pack(lengths, size, np.random.default_rng(1))
    assert len(other) == len(packs) and other != packs and pack(lengths, size, np.random.default_rng(0)) == packs


def test_packs_of_realistic_lengths_are_nearly_full():
    random = np.random.default_rng(0)
    lengths = np.minimum(2048, 280 + random.lognormal(5, 0.8, 20_000).astype(int))  # 256 visual tokens in each row
    lengths[::16] = random.integers(30, 200, len(lengths[::16]))  # some without an image
    assert fill_rate(pack(lengths, 2048, random), lengths, 2048) > 0.97
    assert pack([], 10, random) == [] and fill_rate([], [], 10) == 0
    for bad in ([11], [0, 3]):
        with pytest.raises(UsageError, match="a pack takes those of 1 to 10"):
            pack(bad, 10, random)


def language_model(kind):
    shape = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 401, "initializer_range": 0.3, "use_cache": False,
    }  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape)) if kind == "llama" else Qwen2ForCausalLM(Qwen2Config(**shape))
    return model.double().eval()


def token_losses(model, batch):
    """Sum of the cross entropies of learned tokens, and their number."""
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask") if name in batch}
    logits = model(**inputs).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses[batch["labels"][:, 1:].flatten() != IGNORED]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_packed_equals_one_by_one_forward_and_backward(make, kind):
    data = make(varied(12))
    index = build_index(data, chat(), 600)
    dataset = ConversationDataset(data, index, chat(), PROCESSOR)
    model = language_model(kind)
    packs = pack(index.lengths, 600, np.random.default_rng(0))
    assert any(len(positions) > 2 for positions in packs) and len(packs) > 1

    def run(batches):
        model.zero_grad()
        losses = [token_losses(model, batch) for batch in batches]
        torch.cat(losses).sum().backward()
        return torch.cat(losses), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    order = [row for positions in packs for row in positions]
    single, single_gradient = run([dataset.collate([dataset[row]], packed=False) for row in order])
    together = dataset.collate([dataset[positions] for positions in packs], packed=True)
    assert "attention_mask" not in together
    packed, packed_gradient = run([together])
    assert (packed - single).abs().max() < 1e-6 and (packed_gradient - single_gradient).abs().max() < 1e-6
    padded, padded_gradient = run([dataset.collate([dataset[row] for row in order], packed=False)])
    assert (padded - single).abs().max() < 1e-6 and (padded_gradient - single_gradient).abs().max() < 1e-6
    sloppy = {**together, "position_ids": torch.arange(together["input_ids"].shape[1]).expand_as(together["input_ids"])}
    leaked, _ = run([sloppy])
    assert (leaked - single).abs().max() > 1e-3, "without restarting positions rows see each other: the test would notice"


def test_batches_are_of_one_kind_and_sorted_inside():
    random = np.random.default_rng(0)
    lengths, multimodal = random.integers(5, 500, 203), random.random(203) < 0.7
    batches = length_grouped(lengths, multimodal, 8, np.random.default_rng(1))
    assert batches.shape == (25, 8) and len(np.unique(batches)) == 200, "each row at most once, the rest is less than a batch"
    kinds = multimodal[batches].mean(axis=1)
    assert ((kinds != 0) & (kinds != 1)).sum() <= 2 and 0 in kinds and 1 in kinds
    assert (np.diff(lengths[batches], axis=1) <= 0).all()
    means = lengths[batches].mean(axis=1)
    assert means.std() < 3 * lengths.std() / np.sqrt(8), "which rows share a batch does not depend on their length"


@pytest.mark.parametrize("packing", [False, True])
def test_a_plan_is_a_pure_function_of_seed_and_epoch(make, packing):
    rows = [*varied(60), conversation(60, words=400)]
    index = build_index(make(rows), chat(), 200)
    plan = EpochPlan(index, 4, packing, seed=3)
    epochs = [plan.batches(epoch) for epoch in range(3)]
    assert [EpochPlan(index, 4, packing, seed=3).batches(epoch) for epoch in (2, 0)] == [epochs[2], epochs[0]]
    assert epochs[0] != epochs[1] and EpochPlan(index, 4, packing, seed=4).batches(0) != epochs[0]
    for batches in epochs:
        assert {len(batch) for batch in batches} == {4} and len(batches) == len(epochs[0])
        used = [row for batch in batches for item in batch for row in (item if packing else [item])]
        assert len(used) == len(set(used)) and set(used) <= set(index.good.tolist()) and 60 not in used
        if packing:
            assert max(int(index.lengths[item].sum()) for batch in batches for item in batch) <= 200
        else:
            assert len(used) == 60
    json.dumps(epochs[0])
    with pytest.raises(UsageError, match="larger than the data: 60 conversations"):
        EpochPlan(index, 61, packing)


def test_planning_reads_no_image(make, monkeypatch):
    def refuse(*_):
        raise AssertionError("an image was read")

    monkeypatch.setattr(Conversations, "read_image", refuse)
    monkeypatch.setattr("mllm.conversations.batches.gate_image", refuse)
    index = build_index(make(varied(30)), chat(), 200)
    assert EpochPlan(index, 4).batches(0) and EpochPlan(index, 4, packing=True).batches(0)
