"""An end token that a model cannot write is found before training; new tokens are distinct and trained, with adapters too."""

import json

import pytest
import torch

from align.common.errors import UsageError
from mllm.assembly.config import UpgradeConfig
from mllm.conversations.tokens import IGNORED, Chat
from mllm.loop.config import Lora
from mllm.loop.parameter_groups import load_trainable, merged, set_trainable, trained_rows
from mllm.model.answer_ends import answer_ends, can_win, ends_under_lora, output_rows, require_ends
from mllm.model.saving import load_mllm, save_mllm
from mllm.upgrade import assembled
from tests.support.tiny_mllm import tiny_llm, tiny_model, tiny_vision

TALK = [{"role": "user", "content": "what is there?"}, {"role": "assistant", "content": "a dog"}]
RATES = {"projector": 1e-3, "raw": 1e-3, "head": 0.0, "llm": 2e-4, "vision": 0.0}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The LLMs `llama` (no chatml tokens) and `tied`, and models made of them with and without new tokens."""
    folder = tmp_path_factory.mktemp("ends")
    vision = tiny_vision(folder / "vision")
    for name, tie in (("llama", False), ("tied", True)):
        tiny_llm(folder / name, tie=tie)
        for template in ("chatml", "vicuna_v1"):
            fields = {"llm": str(folder / name), "vision": (str(vision),), "sail_head": "random", "template": template}
            model, processor, _ = assembled(UpgradeConfig(**fields))
            save_mllm(model, processor, folder / f"{name}-{template}")
    return folder


def chat_of(folder):
    model, processor = load_mllm(folder)
    return model, Chat.of_processor(processor)


def test_a_row_wins_unless_it_is_in_the_hull_of_the_others():
    rows = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([rows, rows.mean(0, keepdim=True), rows[:1], rows[:2].mean(0, keepdim=True), 0 * rows[:1]])
    assert not any(can_win(rows, token) for token in (0, 300, 301, 302, 303))
    corners = [int((rows @ direction).argmax()) for direction in torch.randn(20, 16, generator=torch.Generator().manual_seed(1))]
    corners = [token for token in corners if token != 0]
    assert corners and all(can_win(rows, token) for token in corners)
    assert can_win(rows.bfloat16(), corners[0]) and not can_win(rows.bfloat16(), 301)
    assert not can_win(torch.zeros(5, 4), 2)


@pytest.mark.parametrize("llm", ["llama", "tied"])
def test_new_tokens_are_distinct_and_known_as_untrained(parts, llm):
    model, chat = chat_of(parts / f"{llm}-chatml")
    new = [chat.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")]
    assert model.config.sail_untrained_tokens == new
    for weight in (model.lm_head.weight, model.get_input_embeddings().weight):
        assert not torch.equal(weight[new[0]], weight[new[1]]) and not torch.equal(weight[new[1]], weight[model.config.image_token_id])
    assert not set(chat_of(parts / f"{llm}-vicuna_v1")[0].config.sail_untrained_tokens) & set(new)


@pytest.mark.parametrize("llm", ["llama", "tied"])
def test_adapters_train_the_rows_of_new_tokens_until_answers_stop(parts, llm):
    model, chat = chat_of(parts / f"{llm}-chatml")
    encoded = chat.encode(TALK)
    ids, labels = torch.tensor([encoded.input_ids]), torch.tensor([encoded.labels])
    wrapped = set_trainable(model, RATES, Lora(4, 8), seed=0)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(60):
        wrapped(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    plain = merged(wrapped).eval()
    end = [label for label in encoded.labels if label != IGNORED][-1]
    prompt = torch.tensor([chat.prompt_ids(TALK[:1])])
    written = plain.generate(input_ids=prompt, max_new_tokens=30, do_sample=False, eos_token_id=end, pad_token_id=0)[0]
    assert written[-1] == end and len(written) < prompt.shape[1] + 30
    assert plain.lm_head.weight is plain.get_input_embeddings().weight or llm == "llama"


def test_the_rows_that_end_answers_are_proved_on_rows_of_the_data(parts):
    for name in ("llama-chatml", "llama-vicuna_v1"):
        _, chat = chat_of(parts / name)
        ends = answer_ends(chat, [TALK, TALK[:1], TALK])
        [end] = ends
        assert end in chat.stop_ids
        model, _ = load_trainable(parts / name, RATES, Lora(2, 4), 0, bf16=False, deepspeed=False)
        assert "its output row is" in require_ends(chat, ends, parts / name, trained_rows(model))
        assert "its output row is" in ends_under_lora(chat, ends, parts / name)
        whole, _ = load_trainable(parts / name, RATES, None, 0, bf16=False, deepspeed=False)
        assert "trained" in require_ends(chat, ends, parts / name, trained_rows(whole))
    assert answer_ends(chat, [TALK[:1]]) == [] and "no token" in require_ends(chat, [], parts, None)


def test_an_end_token_that_stays_frozen_and_cannot_win_is_refused(parts, tmp_path):
    _, processor = load_mllm(parts / "llama-chatml")
    model, chat = chat_of(parts / "llama-chatml")
    model.config.sail_untrained_tokens = None  # as in models made before such rows were trained
    end = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        model.lm_head.weight[end] = model.lm_head.weight.mean(0)
    save_mllm(model, processor, tmp_path / "old")
    for lora, rates in ((Lora(2, 4), RATES), (None, {**RATES, "llm": 0.0})):
        prepared, _ = load_trainable(tmp_path / "old", rates, lora, 0, bf16=False, deepspeed=False)
        with pytest.raises(UsageError, match=r"<\|im_end\|>.*can never win.*upgrade"):
            require_ends(chat, answer_ends(chat, [TALK]), tmp_path / "old", trained_rows(prepared))
    assert "would be refused" in ends_under_lora(chat, [end], tmp_path / "old")


def test_a_known_token_that_was_never_trained_is_found_when_the_model_is_made(parts, tmp_path):
    """Base models have their chat tokens' rows, all equal."""
    tiny_llm(tmp_path / "base", chatml=True)
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        base.lm_head.weight[4:6] = base.lm_head.weight[4:6].mean(0)
    base.save_pretrained(tmp_path / "base")
    fields = {"llm": str(tmp_path / "base"), "vision": (str(parts / "vision"),), "sail_head": "random", "template": "chatml"}
    model, _, _ = assembled(UpgradeConfig(**fields))
    assert set(model.config.sail_untrained_tokens) >= {4, 5}


def test_the_output_matrix_is_read_alone(parts):
    for name in ("llama-chatml", "tied-chatml"):
        assert torch.equal(output_rows(parts / name), load_mllm(parts / name)[0].lm_head.weight)
    assert json.loads((parts / "tied-chatml/config.json").read_text())["sail_untrained_tokens"]
    assert tiny_model()[0].config.sail_untrained_tokens is None
