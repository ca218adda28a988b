"""Upgrading keeps the LLM bit for bit, replaces what it says, and refuses parts that do not fit together."""

import json
import random
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from align.common.errors import DamagedError, DataError, FingerprintError, UsageError
from align.common.files import hash64, hash_bytes, read_json
from align.model.dual_encoder import SailModel
from mllm import finetune, upgrade
from mllm.assembly import described, warmstart
from mllm.assembly.config import UpgradeConfig
from mllm.assembly.join import load_projector
from mllm.conversations.described import FILE
from mllm.conversations.tokens import Chat
from mllm.loop.config import FinetuneConfig
from mllm.model.saving import load_mllm, save_mllm
from tests.support.flipped_bits import refuses_a_flipped_bit
from tests.support.tiny_encoders import TIMM_CASES, save_timm
from tests.support.tiny_mllm import SIZE, tiny_llava, tiny_llm, tiny_sail, tiny_tokenizer, tiny_vision

OWN = (
    "{% for message in messages %}<s>[{{ message['role'] }}] {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>[assistant] {% endif %}"
)
# like those on the hub: parts only, images first
LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ part['text'] + eos_token }}{% endgeneration %}{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is there?"}]}]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders: two LLMs, an encoder, a stage-one run."""
    folder = tmp_path_factory.mktemp("parts")
    tiny_llm(folder / "llama")
    tiny_llm(folder / "qwen2", "qwen2", tie=True, rows=410, chatml=True, template=OWN)
    tiny_vision(folder / "vision", "dinov2")
    tiny_sail(folder / "run" / "best", folder / "vision")
    return folder


@pytest.fixture(scope="module")
def llava(parts):
    """A stock LLaVA checkpoint: CLIP tower, llama in bf16, processor with a chat template."""
    return tiny_llava(parts / "llava", LLAVA)


def assemble(**fields):
    """Return (model, processor, report): what mllm/upgrade.py makes with these flags."""
    return upgrade.assembled(UpgradeConfig(**fields))


def state_of(report):
    return {line.name: line.state for line in report}


@torch.no_grad()
def test_an_llm_is_kept_bit_for_bit_and_gets_one_row(parts):
    model, processor, report = assemble(llm=str(parts / "llama"), sail=(str(parts / "run"),))
    stock = AutoModelForCausalLM.from_pretrained(parts / "llama").eval()
    kept = model.model.language_model.state_dict()
    for name, value in stock.model.state_dict().items():
        found = kept[name][:400] if name == "embed_tokens.weight" else kept[name]
        assert torch.equal(found, value), name
    assert torch.equal(model.lm_head.weight[:400], stock.lm_head.weight) and model.lm_head.weight.shape[0] == 401
    for grown, before in ((kept["embed_tokens.weight"], stock.model.embed_tokens.weight), (model.lm_head.weight, stock.lm_head.weight)):
        torch.testing.assert_close(grown[400], before.mean(0))
    ids = torch.randint(0, 400, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(input_ids=ids).logits[..., :400], stock(ids).logits)
    states = state_of(report)
    assert states == {
        "language model": "kept", "embedding rows": "new", "vision tower": "new", "alignment head": "new", "projector": "new",
        "chat template": "new",
    }  # fmt: skip
    assert sum(line.parameters for line in report) == sum(p.numel() for p in model.parameters())
    assert next(line for line in report if line.name == "language model").parameters == sum(p.numel() for p in stock.parameters())
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_index == 400
    assert processor.tokenizer("<image>", add_special_tokens=False)["input_ids"] == [400]
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"model.vision_tower.embeddings.mask_token"}


@torch.no_grad()
def test_spare_rows_are_used_and_tied_weights_stay_tied(parts, tmp_path):
    model, processor, report = assemble(llm=str(parts / "qwen2"), sail=(str(parts / "run" / "best"),))
    stock = AutoModelForCausalLM.from_pretrained(parts / "qwen2")
    assert torch.equal(model.lm_head.weight, stock.lm_head.weight) and "embedding rows" not in state_of(report)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight and model.config.tie_word_embeddings
    save_mllm(model, processor, tmp_path / "m")
    again, _ = load_mllm(tmp_path / "m")
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert "_name_or_path" not in (tmp_path / "m/config.json").read_text()


def test_head_encoder_and_fingerprint_are_the_runs(parts):
    model, _, _ = assemble(llm=str(parts / "llama"), sail=(str(parts / "run"),))
    stage_one = SailModel.from_pretrained(parts / "run/best")
    trained = stage_one.vision_head.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in model.model.sail_head.state_dict().items())
    tower = stage_one.vision_encoder.backbone.model.state_dict()
    assert all(torch.equal(value, tower[name]) for name, value in model.model.vision_tower.state_dict().items())
    assert model.config.sail_fingerprint == stage_one.config.vision_fingerprint


def test_controls_differ_in_the_head_only(parts):
    def built(**options):
        return assemble(llm=str(parts / "llama"), sail=(str(parts / "run"),), **options)[0]

    trained, random = built(), built(sail_head="random", seed=7)
    assert sum(p.numel() for p in trained.parameters()) == sum(p.numel() for p in random.parameters())
    assert not torch.equal(trained.model.sail_head.gate.weight, random.model.sail_head.gate.weight)
    assert torch.equal(trained.model.vision_tower.layernorm.weight, random.model.vision_tower.layernorm.weight)
    torch.manual_seed(99)
    again = built(sail_head="random", seed=7)
    for part in ("sail_head", "multi_modal_projector"):
        pairs = zip(getattr(random.model, part).parameters(), getattr(again.model, part).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(built(seed=8).model.multi_modal_projector.linear_1.weight, random.model.multi_modal_projector.linear_1.weight)
    none = built(sail_head="none")
    assert none.model.multi_modal_projector.linear_1.in_features == 64 and not list(none.model.sail_head.parameters())
    weight = random.model.multi_modal_projector.linear_2.weight
    assert 0.9 / 32**0.5 < weight.abs().max().item() <= 1 / 32**0.5


@torch.no_grad()
def test_a_stock_llava_keeps_its_llm_and_template(parts, llava, tmp_path):
    model, processor, report = assemble(llava=str(llava), sail=(str(parts / "run"),))
    stock = LlavaForConditionalGeneration.from_pretrained(llava)
    kept = model.model.language_model.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in stock.model.language_model.state_dict().items())
    assert torch.equal(model.lm_head.weight, stock.lm_head.weight) and model.lm_head.weight.dtype == torch.bfloat16
    assert type(model.model.vision_tower).__name__ == "Dinov2Model"
    assert state_of(report) == {
        "language model": "kept", "vision tower": "replaced", "alignment head": "new", "projector": "replaced", "chat template": "kept",
    }  # fmt: skip
    theirs = LlavaProcessor.from_pretrained(llava)
    question = [*QUESTION, {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]}]
    assert processor.apply_chat_template(question) == theirs.apply_chat_template(question)
    plain = [{"role": "user", "content": "hello"}]
    assert theirs.apply_chat_template(plain) == "USER: " and processor.apply_chat_template(plain) == "USER: hello "
    assert processor.image_seq_length == 9 and processor.image_processor.image_mean == pytest.approx([0.485, 0.456, 0.406])
    save_mllm(model, processor, tmp_path / "m")
    again, _ = load_mllm(tmp_path / "m", dtype="auto")
    assert torch.equal(again.lm_head.weight, stock.lm_head.weight) and again.dtype == torch.bfloat16


def test_templates(parts):
    def template_of(llm, **options):
        model, processor, report = assemble(llm=str(parts / llm), sail=(str(parts / "run"),), **options)
        return model, processor, state_of(report)["chat template"]

    model, processor, state = template_of("llama")  # none of its own
    assert state == "new" and processor.apply_chat_template(QUESTION, add_generation_prompt=True).endswith(" ASSISTANT:")
    assert model.generation_config.eos_token_id == [2]
    _, processor, state = template_of("qwen2")  # knows only texts
    assert state == "kept" and processor.apply_chat_template(QUESTION) == "<s>[user] <image>\nwhat is there?</s>"
    model, processor, state = template_of("qwen2", template="chatml")
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert state == "replaced" and end in model.generation_config.eos_token_id
    model, processor, _ = template_of("llama", template="chatml")  # gets the two tokens, with rows
    assert model.lm_head.weight.shape[0] == 403 and model.config.image_token_index == 400
    assert model.generation_config.eos_token_id == [2, 402]
    assert Chat.of_processor(processor).prompt(QUESTION) == processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    endless = assemble(llm=str(parts / "llama"), sail=(str(parts / "run"),), template="plain")[2]
    assert "does not learn to end answers" in endless[-1].weights
    with pytest.raises(UsageError, match="no chat template"):
        template_of("llama", template="own")


def test_an_image_has_to_leave_room_for_words(parts, tmp_path):
    shutil.copytree(parts / "llama", tmp_path / "llm")
    config = json.loads((tmp_path / "llm/config.json").read_text())
    (tmp_path / "llm/config.json").write_text(json.dumps({**config, "max_position_embeddings": 9}))
    with pytest.raises(UsageError, match="9 visual tokens, and llm was made for 9 in all: give --grid"):
        assemble(llm=str(tmp_path / "llm"), sail=(str(parts / "run"),))
    assemble(llm=str(tmp_path / "llm"), sail=(str(parts / "run"),), grid=(2, 2))


def test_fewer_tokens_other_sizes_and_inner_layers(parts, tmp_path):
    model, processor, _ = assemble(
        llm=str(parts / "llama"), vision=(str(parts / "vision"),), sail_head="random", head="mlp", expansion=1, width=16, layer=2,
        image_size=(70,), grid=(2, 5), image_aspect_ratio="resize",
    )  # fmt: skip
    config = model.config
    assert (config.sail_patch_grid, config.sail_grid, config.image_tokens(), config.sail_layer) == ([5, 5], [2, 5], 10, 2)
    assert len(model.model.vision_tower.encoder.layer) == 2
    save_mllm(model, processor, tmp_path / "m")
    again, processor = load_mllm(tmp_path / "m")
    pixels = torch.randn(1, 3, 70, 70)
    assert torch.equal(again.model.get_patch_features(pixels), model.model.get_patch_features(pixels))
    assert processor.image_seq_length == 10 and processor.image_processor.image_aspect_ratio == "resize"
    with pytest.raises(UsageError, match="3 x 3 patches"):
        assemble(llm=str(parts / "llama"), sail=(str(parts / "run"),), grid=(4, 3))


def test_places_are_written_in_words(parts, tmp_path):
    """The model reads its places after training and loading, and each image keeps its visual tokens."""
    upgraded = {}
    for name, flag in (("plain", False), ("placed", True)):
        config = UpgradeConfig(
            llm=str(parts / "llama"),
            sail=(str(parts / "run"),),
            grid=(1, 2),
            place_words=flag,
            template="vicuna_v1",
            output=str(tmp_path / name),
        )
        upgrade.main(config)
        model, processor = load_mllm(tmp_path / name)
        text = Chat.of_processor(processor).prompt(QUESTION)
        inputs = processor(text=text, images=Image.new("RGB", (SIZE, SIZE), "red"), return_tensors="pt")
        assert (inputs["input_ids"] == model.config.image_token_index).sum() == 2
        upgraded[name] = processor.tokenizer.decode(inputs["input_ids"][0])
        assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    assert "on the left,<image> on the right," in upgraded["placed"].replace("<image>  ", "<image> ") and "on the" not in upgraded["plain"]


def test_a_timm_vit_at_another_size_is_rebuilt_at_that_size(parts, tmp_path):
    architecture, arguments, _ = TIMM_CASES["vit with cls and registers"]
    vision = save_timm(tmp_path / "vit", architecture, arguments)
    model, processor, _ = assemble(llm=str(parts / "llama"), vision=(vision,), sail_head="none", image_size=(56,))
    save_mllm(model, processor, tmp_path / "m")
    again, _ = load_mllm(tmp_path / "m")
    pixels = torch.randn(1, 3, 56, 56)
    assert torch.equal(again.model.get_patch_features(pixels), model.model.get_patch_features(pixels))
    assert again.config.image_tokens() == 16


def test_what_is_never_trained_is_frozen(parts, tmp_path):
    mae = assemble(llm=str(parts / "llama"), vision=(str(tiny_vision(tmp_path / "mae", "vit_mae")),), sail_head="none")[0]
    assert mae.config.sail_unread == ["embeddings.position_embeddings"]  # fixed sines
    stage = assemble(llm=str(parts / "llama"), vision=(str(tiny_vision(tmp_path / "resnet", "resnet")),), sail_head="none", layer=2)[0]
    unread = stage.config.sail_unread
    assert unread and all(name.startswith(("encoder.stages.2.", "encoder.stages.3.")) for name in unread)
    stage.train()
    stage.get_image_features(torch.randn(2, 3, SIZE, SIZE)).pooler_output[0].sum().backward()
    lacking = {name for name, p in stage.model.vision_tower.named_parameters() if p.grad is None}
    assert lacking == set(unread)


def test_an_encoder_that_changed_since_training_is_refused(parts, tmp_path):
    shutil.copytree(parts / "run", tmp_path / "run")
    path = tmp_path / "run/best/config.json"
    config = json.loads(path.read_text())
    config["vision"]["name"] = str(tiny_vision(tmp_path / "other", "dinov2_with_registers"))
    path.write_text(json.dumps(config))
    path.with_name("COMMIT.json").unlink()
    with pytest.raises(FingerprintError, match="weights"):
        assemble(llm=str(parts / "llama"), sail=(str(tmp_path / "run"),))


def test_models_that_llava_cannot_hold_are_refused(parts, llava, tmp_path):
    tokenizer = tiny_tokenizer()
    small = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    wide = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    cases = {
        "GPT2": (transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, **small), transformers.GPT2LMHeadModel, "output layer"),
        "soft-capped": (
            transformers.Gemma2Config(**wide, head_dim=8, final_logit_softcapping=0.05, **small), transformers.Gemma2ForCausalLM,
            "soft-capping",
        ),
    }  # fmt: skip
    for name, (config, kind, message) in cases.items():
        kind(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(UsageError, match=message):
            assemble(llm=str(tmp_path / name), sail=(str(parts / "run"),))
    with pytest.raises(UsageError, match="model_type 'llama'"):
        assemble(llava=str(parts / "llama"), sail=(str(parts / "run"),))
    with pytest.raises(UsageError, match="llava"):
        assemble(llm=str(llava), sail=(str(parts / "run"),))
    with pytest.raises(UsageError, match="neither an aligned model"):
        assemble(llm=str(parts / "llama"), sail=(str(parts / "vision"),))
    shutil.copytree(parts / "llama", tmp_path / "other shape")
    config = json.loads((tmp_path / "other shape/config.json").read_text())
    (tmp_path / "other shape/config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(DamagedError, match="does not describe"):
        assemble(llm=str(tmp_path / "other shape"), sail=(str(parts / "run"),))
    (tmp_path / "other shape/config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UsageError, match="lacks"):
        assemble(llm=str(tmp_path / "other shape"), sail=(str(parts / "run"),))


@pytest.mark.parametrize("flag", ["llm", "llava"])
def test_code_that_ships_with_an_llm_is_neither_run_nor_asked_about(parts, tmp_path, monkeypatch, flag):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    shutil.copytree(parts / "llama", tmp_path / "own")
    (tmp_path / "own/evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((tmp_path / "own/config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "own/config.json").write_text(json.dumps(config))
    with pytest.raises((UsageError, DamagedError)):
        assemble(**{flag: str(tmp_path / "own")}, sail=(str(parts / "run"),))
    assert not (tmp_path / "ran").exists()


@torch.no_grad()
def test_gguf_weights_are_unpacked(parts, tmp_path):
    write_gguf(parts / "llama", tmp_path / "packed")
    model, processor, _ = assemble(llm=str(tmp_path / "packed"), gguf_file="model.gguf", sail=(str(parts / "run"),))
    stock = AutoModelForCausalLM.from_pretrained(parts / "llama").eval()
    ids = torch.arange(5, 12)[None]
    torch.testing.assert_close(model(input_ids=ids).logits[..., :400], stock(ids).logits, rtol=1e-4, atol=1e-4)
    save_mllm(model, processor, tmp_path / "m")
    assert "quantization_config" not in (tmp_path / "m/config.json").read_text()
    again, _ = load_mllm(tmp_path / "m")
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(UsageError, match="no file"):
        assemble(llm=str(tmp_path / "packed"), gguf_file="other.gguf", sail=(str(parts / "run"),))


def write_gguf(llm, folder):
    """Write the tiny llama as llama.cpp would: rows of queries and keys in its own order, byte-level BPE."""
    import gguf

    folder.mkdir()
    stock = AutoModelForCausalLM.from_pretrained(llm)
    config, tokenizer = stock.config, json.loads((llm / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    vocabulary = tokenizer["model"]["vocab"]
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([3 if n < 4 else 1 for n in range(len(vocabulary))])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    for name, tensor in stock.state_dict().items():
        place = name.removeprefix("model.").removesuffix(".weight")
        if place.startswith("layers."):
            _, number, inner = place.split(".", 2)
            heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}.get(inner)
            if heads:
                tensor = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
            target = f"blk.{number}.{names[inner]}"
        else:
            target = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[place]
        writer.add_tensor(f"{target}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_entry_writes_a_model_and_says_what_was_kept(parts, llava, tmp_path, capsys):
    config = UpgradeConfig(llava=str(llava), sail=(str(parts / "run"),), output=str(tmp_path / "out"))
    upgrade.main(config)
    said = capsys.readouterr().out
    for words in ("language model", "kept", "vision tower", "replaced", "alignment head", "new", "9 visual tokens", "mllm/finetune.py"):
        assert words in said
    model, _ = load_mllm(tmp_path / "out")
    assert model.config.sail_head == "trained"
    assert json.loads((tmp_path / "out/manifest.json").read_text())["launches"][0]["parts"][0]["state"] == "kept"
    for name in ("manifest.json", "config.yaml"):
        refuses_a_flipped_bit(tmp_path / "out" / name, random.Random(0), tmp_path / "out", load_mllm)
    upgrade.main(config)  # again, over its own output
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("precious")
    with pytest.raises(UsageError, match="not a model folder"):
        upgrade.main(UpgradeConfig(llm=str(parts / "llama"), sail=(str(parts / "run"),), output=str(tmp_path / "mine")))


@pytest.fixture
def from_texts(parts, tmp_path, monkeypatch):
    """A config that starts the projector from texts and 60 images."""

    class Side:  # the run has no text encoder
        def __init__(self, sail, device):
            assert sail == str(parts / "run")
            self.fingerprint = {}

        def embed(self, batch, kept):
            texts = [batch.texts[place] for place in kept]
            return torch.tensor([[int(hash_bytes(f"{text} {n}".encode())[:4], 16) / 65536 for n in range(24)] for text in texts])

    for module in (warmstart, described):
        monkeypatch.setattr(module, "TextSide", Side)
    (tmp_path / "photos").mkdir()
    for n in range(60):
        Image.new("RGB", (50, 50), (4 * n, 255 - 2 * n, n)).save(tmp_path / f"photos/{n}.png")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"key": str(n), "words": f"a photo of {n}"}) + "\n" for n in range(400)))
    return UpgradeConfig(
        llm=str(parts / "llama"), sail=(str(parts / "run"),), output=str(tmp_path / "out"), features="both",
        texts=(str(tmp_path / "texts.jsonl"),), template="vicuna_v1",
        text_columns=("words",), text_rows=300, images=str(tmp_path / "photos"), words=7,
    )  # fmt: skip


def test_texts_and_images_start_the_projector(from_texts, tmp_path, capsys):
    upgrade.main(from_texts)
    assert "7 words, solved from 300 texts, with 60 images without captions" in " ".join(capsys.readouterr().out.split())
    model, _ = load_mllm(tmp_path / "out")
    projector = model.model.multi_modal_projector
    assert model.config.sail_raw and projector.linear_raw.weight.shape == (7, 64)
    given = model.model.get_patch_features(torch.randn(2, 3, SIZE, SIZE))
    assert given.shape == (2, 9, 24 + 64)
    before = projector(given)
    projector.linear_raw.weight.data.normal_()
    assert not torch.equal(projector(given), before), "the raw block does not reach the LLM"


def test_a_model_is_trained_on_described_images(from_texts, tmp_path):
    said = [{"from": "human", "value": "<image> what is there?"}, {"from": "gpt", "value": "a dog"}]
    cells = [
        {"text": "a photo of 1"},
        {"regions": [{"text": "a photo of 2", "box": [0, 0, 0.5, 1]}, {"text": "a dog", "box": [0, 0, 1, 1]}]},
    ]
    rows = [{"id": f"row{n}", "image": cells[n % 2], "conversations": said} for n in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    upgrade.main(replace(from_texts, described=(str(tmp_path / "rows.json"),)))
    written = load_file(tmp_path / "out" / FILE)
    assert sorted(written["keys"].tolist()) == sorted(hash64(["a photo of 1", "a photo of 2", "a dog"]).tolist())
    assert written["tokens"].shape == (60, 9, 24 + 64) and written["vectors"].shape == (3, 24)
    assert FILE in read_json(tmp_path / "out/COMMIT.json")["files"]
    upgrade.main(replace(from_texts, output=str(tmp_path / "other")))
    run = FinetuneConfig(
        data=(str(tmp_path / "rows.json"),), model=str(tmp_path / "out"), output=str(tmp_path / "run"), steps=2, batch_size=4,
        micro_batch_size=2, max_length=128, workers=0, precision="fp32", lr_vision=0, lr_head=0, lr_projector=1e-2,
    )  # fmt: skip
    finetune.main(run)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "run/model"))
    assert not torch.equal(before["model.multi_modal_projector.linear_1.weight"], after["model.multi_modal_projector.linear_1.weight"])
    with pytest.raises(UsageError, match="--described"):
        finetune.main(replace(run, model=str(tmp_path / "other"), output=str(tmp_path / "none")))
    elsewhere = replace(run, model=str(tmp_path / "other"), output=str(tmp_path / "none"), described=str(tmp_path / "out"))
    finetune.main(elsewhere)
    save_file({**written, "mean": written["mean"] + 1}, tmp_path / "out" / FILE)
    with pytest.raises(FingerprintError, match="described"):
        finetune.main(elsewhere)
    with pytest.raises(DataError, match="no image is described"):
        (tmp_path / "rows.json").write_text(json.dumps([{"conversations": [{**said[0], "value": "hi"}, said[1]]}]))
        upgrade.main(replace(from_texts, output=str(tmp_path / "third"), described=(str(tmp_path / "rows.json"),)))


@pytest.mark.parametrize("fields", [{"sail_head": "random"}, {"sail_head": "none"}, {"images": None}, {"projector": "p"}])
def test_texts_that_could_reach_no_image_are_refused(fields):
    given = {"llm": "a", "sail": ("b",), "texts": ("t.txt",), "images": "photos"} | fields
    with pytest.raises(UsageError, match="only through a trained head|show where images lie|not both"):
        UpgradeConfig(**given)


def test_raw_features_are_those_without_a_head():
    for fields in ({"features": "raw"}, {"features": "both", "sail_head": "none"}, {"features": "head", "sail_head": "none"}):
        with pytest.raises(UsageError, match="--features"):
            UpgradeConfig(llm="a", sail=("b",), **fields)
    assert UpgradeConfig(llm="a", sail=("b",), features="raw", sail_head="none").sail_head == "none"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"llm": "a", "llava": "b", "sail": ("c",)},
        {"llm": "a"},
        {"llm": "a", "sail": ("b", "c"), "vision": ("d",)},
        {"llm": "a", "vision": ("b",)},
    ],
)
def test_contradicting_flags_are_refused(fields):
    with pytest.raises(UsageError, match="--"):
        UpgradeConfig(**fields)


UNREAD = [{"head": "mlp"}, {"expansion": 2}, {"width": 8}, {"layer": 3}, {"image_root": "x"}, {"caption_rows": 9}]


@pytest.mark.parametrize("unread", UNREAD)
def test_a_flag_that_nothing_would_read_is_refused(unread):
    with pytest.raises(UsageError, match="has an effect only with --(vision|captions)"):
        UpgradeConfig(llm="a", sail=("b",), **unread)
    with pytest.raises(UsageError, match="--gguf-file w.gguf: has an effect only with --llm"):
        UpgradeConfig(llava="a", sail=("b",), gguf_file="w.gguf")


def test_a_trained_projector_is_put_in_strictly(parts, tmp_path):
    model, _, _ = assemble(llm=str(parts / "llama"), sail=(str(parts / "run"),))
    projector = model.model.multi_modal_projector
    trained = {name: torch.randn_like(tensor) for name, tensor in projector.state_dict().items()}
    save_file(trained, tmp_path / "projector.safetensors")
    load_projector(model, tmp_path / "projector.safetensors")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in projector.state_dict().items())
    save_file({**trained, "linear_1.weight": torch.zeros(3, 3)}, tmp_path / "shape.safetensors")
    with pytest.raises(UsageError, match="need"):
        load_projector(model, tmp_path / "shape.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "names.safetensors")
    (tmp_path / "no.safetensors").write_bytes(b"pickle")
    for name in ("names.safetensors", "no.safetensors"):
        with pytest.raises(DamagedError):
            load_projector(model, tmp_path / name)
