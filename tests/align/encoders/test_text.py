"""Text encoders against plain transformers on tiny random models: same embeddings, honest fingerprints."""

import ast
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from align.common.errors import UsageError
from align.encoders import text as text_module
from align.encoders import vision as vision_module
from align.encoders.spec import TextSpec
from align.encoders.text import load_text_encoder
from tests.support.tiny_encoders import (
    WORDS,
    change_weight,
    close,
    save_bert,
    shake,
    without_weight,
)

CAPTIONS = ["a dog", "a big red dog on the left of a small blue car and a tree", "cats", "", "the the the", "a photo of a cat"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


@torch.no_grad()
def stock_mean(folder, text, max_length=16, side="right"):
    """Return the mean of one text's token vectors by plain transformers, without a batch or padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, truncation_side=side)
    tokens = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
    return AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state.mean(1)[0]


@torch.no_grad()
def test_text_embeddings_are_the_stock_masked_mean(bert):
    folder, plain = bert
    for name in (folder, plain):
        encoder = load_text_encoder(name)
        actual = encoder.encode(CAPTIONS, batch_size=4)
        assert (actual.dtype, actual.shape) == (torch.float32, (len(CAPTIONS), encoder.width))
        close(actual, torch.stack([stock_mean(plain, text) for text in CAPTIONS]))
        assert (actual.norm(dim=1) - 1).abs().min() > 0.1  # not normalized
        assert '"pooling_mode": "mean"' in encoder.fingerprint["pooling"]
        assert "Normalize" not in encoder.fingerprint["pooling"]


@torch.no_grad()
def test_text_embeddings_do_not_depend_on_the_batch(bert):
    encoder = load_text_encoder(bert[0])
    one_by_one = torch.cat([encoder.encode([text], batch_size=1) for text in CAPTIONS])
    for batch_size in (1, 2, 16):
        close(encoder.encode(CAPTIONS, batch_size), one_by_one)
    close(encoder.encode(CAPTIONS[::-1], 3), one_by_one.flip(0))
    assert encoder.encode([], batch_size=4).shape == (0, 32)


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["", "a photo of "])
def test_text_forward_is_encode(bert, prompt):
    encoder = load_text_encoder(TextSpec(bert[0], prompt=prompt))
    batch = encoder.tokenizer([prompt + text for text in CAPTIONS], padding=True, truncation=True, return_tensors="pt")
    close(encoder(batch["input_ids"], batch["attention_mask"]), encoder.encode(CAPTIONS, 8))
    close(encoder.encode(CAPTIONS, 8), load_text_encoder(bert[0]).encode([prompt + text for text in CAPTIONS], 8))


@torch.no_grad()
def test_text_tokens_average_to_the_embedding(bert):
    encoder = load_text_encoder(TextSpec(bert[0], prompt="the "))
    tokens, mask = encoder.encode_tokens(CAPTIONS)
    assert (tokens.ndim, mask.dtype, tokens.shape[:2]) == (3, torch.bool, mask.shape)
    close((tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), encoder.encode(CAPTIONS, 8))


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 2, -1])
def test_an_inner_layer_of_a_text_encoder_is_that_hidden_state(bert, layer):
    encoder = load_text_encoder(TextSpec(bert[0], layer=layer))
    tokenizer, stock = transformers.AutoTokenizer.from_pretrained(bert[1]), transformers.BertModel.from_pretrained(bert[1]).eval()
    for text, found in zip(CAPTIONS, encoder.encode(CAPTIONS, 8), strict=True):
        batch = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
        close(found, stock(**batch, output_hidden_states=True).hidden_states[layer][0].mean(0))  # [0] are the embeddings
    assert encoder.fingerprint.get("layer") == (1 if layer == 1 else None), "the last layer is the same by number"


@torch.no_grad()
def test_an_inner_layer_of_a_decoder_goes_through_its_closing_norm(tmp_path):
    from tests.support.tiny_mllm import tiny_llm

    folder = tiny_llm(tmp_path / "llm")
    encoder = load_text_encoder(TextSpec(str(folder), layer=1, max_length=16))
    model, tokenizer = transformers.AutoModel.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer("a dog", return_tensors="pt")
    hidden = model(**batch, output_hidden_states=True).hidden_states[1]
    close(encoder.encode(["a dog"], 1)[0], model.norm(hidden)[0, -1])  # sentence-transformers pools a decoder's last token
    assert encoder.layers == 1 < model.config.num_hidden_layers == load_text_encoder(TextSpec(str(folder), max_length=16)).layers


@pytest.mark.parametrize("layer", [0, 3, -2])
def test_text_layers_that_are_not_there_are_refused(bert, layer):
    with pytest.raises(UsageError, match="has blocks 1 to 2"):
        load_text_encoder(TextSpec(bert[0], layer=layer))


@torch.no_grad()
def test_text_is_truncated_at_max_length_on_the_recorded_side(bert, tmp_path):
    long = "a dog and a cat and a car and a tree"
    short = load_text_encoder(TextSpec(bert[0], max_length=5))
    close(short.encode([long], 1)[0], stock_mean(bert[1], long, max_length=5))
    assert (short.max_length, short.fingerprint["max_length"]) == (5, 5)
    left = load_text_encoder(TextSpec(save_bert(tmp_path, truncation_side="left")[0], max_length=5))
    assert left.fingerprint["truncation_side"] == "left"
    close(left.encode([long], 1)[0], stock_mean(bert[1], long, max_length=5, side="left"))
    assert load_text_encoder(TextSpec(bert[0], max_length=24)).max_length == 24  # more than the tokenizer says, within the positions
    with pytest.raises(UsageError, match="max_length=25 is more than"):
        load_text_encoder(TextSpec(bert[0], max_length=25))
    with pytest.raises(UsageError, match="at least 1"):
        load_text_encoder(TextSpec(bert[0], max_length=0))


@torch.no_grad()
def test_text_heads_of_the_folder_are_kept(tmp_path):
    folder, plain = save_bert(tmp_path, pooling="cls", dense=True)
    encoder = load_text_encoder(folder)
    tokens = transformers.AutoTokenizer.from_pretrained(plain)(CAPTIONS[:1], return_tensors="pt")
    cls = AutoModel.from_pretrained(plain).eval()(**tokens).last_hidden_state[:, 0]
    head = load_file(tmp_path / "st" / "2_Dense" / "model.safetensors")
    close(encoder.encode(CAPTIONS[:1], 1), torch.tanh(cls @ head["linear.weight"].T + head["linear.bias"]))
    assert encoder.width == 20


@torch.no_grad()
def test_decoders_are_pooled_at_their_last_token(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    _, plain = save_bert(tmp_path / "bert")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
    )
    model = shake(transformers.Qwen3Model(config))
    model.save_pretrained(tmp_path / "qwen")
    tokenizer = transformers.AutoTokenizer.from_pretrained(plain, padding_side="left")
    tokenizer.save_pretrained(tmp_path / "qwen")
    SentenceTransformer(modules=[Transformer(str(tmp_path / "qwen")), Pooling(32, "lasttoken")], device="cpu").save(str(tmp_path / "st"))
    encoder = load_text_encoder(str(tmp_path / "st"))
    expected = [
        model(**tokenizer(text, truncation=True, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0, -1]
        for text in CAPTIONS
    ]
    close(encoder.encode(CAPTIONS, 4), torch.stack(expected))
    batch = encoder.tokenizer(CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    close(encoder(batch["input_ids"], batch["attention_mask"]), torch.stack(expected))


@torch.no_grad()
def test_text_bf16_is_close_and_frozen(bert):
    exact, fast = load_text_encoder(bert[0]), load_text_encoder(TextSpec(bert[0], precision="bf16"))
    expected, actual = exact.encode(CAPTIONS, 4), fast.encode(CAPTIONS, 4)
    assert actual.dtype == torch.float32
    assert 0 < (actual - expected).norm() / expected.norm() < 0.02
    exact.train()
    assert not any(module.training for module in exact.modules())
    assert not any(parameter.requires_grad for parameter in exact.parameters())


def test_a_head_can_train_on_text_embeddings(bert):
    torch.nn.Linear(32, 4)(load_text_encoder(bert[0]).encode(CAPTIONS, 4)).sum().backward()


def test_text_fingerprint_follows_settings_and_folder(bert, tmp_path):
    before = load_text_encoder(bert[0]).fingerprint
    assert all(isinstance(value, str | int) for value in before.values())
    assert before["normalized"] == "no"

    def changed(name=bert[0], **settings):
        after = load_text_encoder(TextSpec(name, **settings)).fingerprint
        return {key for key in before if before[key] != after[key]}

    assert changed(prompt="query: ") == {"prompt"}
    assert changed(max_length=8) == {"max_length"}
    assert changed(precision="bf16") == {"precision"}
    assert changed(save_bert(tmp_path / "side", truncation_side="left")[0]) == {"truncation_side"}
    assert changed(save_bert(tmp_path / "pooling", pooling="cls")[0]) == {"pooling"}
    assert changed(save_bert(tmp_path / "unnormalized", normalize=False)[0]) == set()  # the closing Normalize is left out
    assert changed(save_bert(tmp_path / "words", do_lower_case=False)[0]) == {"preprocessing"}
    copy = tmp_path / "copy" / "st"
    shutil.copytree(bert[0], copy)
    assert changed(str(copy)) == set()
    change_weight(copy, "encoder.layer.0.output.dense.weight")
    assert changed(str(copy)) == {"weights"}


def test_text_checkpoints_without_weights_are_refused(bert, tmp_path):
    folder = tmp_path / "st"
    shutil.copytree(bert[0], folder)
    weights = load_file(folder / "model.safetensors")
    pooler = {key: value for key, value in weights.items() if not key.startswith("pooler.")}
    save_file(pooler, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_text_encoder(str(folder)).fingerprint == load_text_encoder(bert[0]).fingerprint  # no pooling reads the pooler
    without_weight(folder, "encoder.layer.1.output.dense.weight")
    with pytest.raises(UsageError, match="lacks 1 weights"):
        load_text_encoder(str(folder))


def test_sentence_transformers_is_imported_only_when_a_text_encoder_is_loaded():
    top = [node for module in (vision_module, text_module) for node in ast.parse(Path(module.__file__).read_text()).body]
    modules = [node.module for node in top if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in top if isinstance(node, ast.Import) for alias in node.names]
    assert "torch" in modules
    assert not any(module.startswith("sentence_transformers") for module in modules)
