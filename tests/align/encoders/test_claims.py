"""A config may claim anything: what its weight files cannot fill is refused at once, before memory or time is spent."""

import json
import resource
import shutil
import time
from pathlib import Path

import pytest

from align.common.errors import KitError, MemoryFullError, UsageError
from align.encoders.text import load_text_encoder
from align.encoders.vision import load_vision_encoder
from mllm.assembly.language import load_llava, load_llm
from mllm.model.saving import load_mllm, save_mllm
from tests.support.tiny_encoders import save, save_bert, save_timm
from tests.support.tiny_mllm import tiny_llava, tiny_llm, tiny_model


def mllm(folder):
    model, processor = tiny_model()
    processor.chat_template = "{{ messages[0]['content'] }}"
    save_mllm(model, processor, folder)
    return folder


PARTS = {  # what makes a folder, what opens it, and claims of its config by dotted name
    "vision": (lambda f: save(f / "v", "dinov2"), load_vision_encoder, ["num_hidden_layers", "hidden_size", "image_size"]),
    "timm": (lambda f: save_timm(f / "t", "vit_tiny_patch16_224", {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32}),
             load_vision_encoder, ["model_args.depth", "model_args.embed_dim"]),
    "text": (lambda f: save_bert(f)[1], load_text_encoder, ["num_hidden_layers", "intermediate_size", "vocab_size"]),
    "llm": (lambda f: tiny_llm(f / "l", "qwen2"), load_llm, ["num_hidden_layers", "vocab_size", "intermediate_size"]),
    "llava": (lambda f: tiny_llava(f / "l"), load_llava, ["text_config.num_hidden_layers", "text_config.hidden_size"]),
    "mllm": (lambda f: mllm(f / "m"), load_mllm, ["text_config.num_hidden_layers", "sail_width", "vision_config.num_hidden_layers"]),
}  # fmt: skip
CASES = [(part, claim) for part, (_, _, claims) in PARTS.items() for claim in claims]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder_of(part):
        if part not in made:
            made[part] = Path(PARTS[part][0](tmp_path_factory.mktemp(part)))
        return made[part]

    return folder_of


def change(folder, name, value):
    config = json.loads((folder / "config.json").read_text())
    *outer, last = name.split(".")
    place = config
    for part in outer:
        place = place[part]
    place[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "COMMIT.json").unlink(missing_ok=True)  # a folder of somebody else, who wrote no hashes


@pytest.mark.parametrize(("part", "claim"), CASES)
def test_a_claim_that_the_weights_cannot_fill_is_refused(folders, part, claim, tmp_path):
    folder = Path(shutil.copytree(folders(part), tmp_path / "folder"))
    change(folder, claim, 10**12 if "layers" in claim or "depth" in claim else 64 * 10**6)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(KitError) as refused:
        PARTS[part][1](str(folder))
    assert isinstance(refused.value, MemoryFullError | UsageError) and "\n" not in str(refused.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20, "less than a GiB"
    assert time.process_time() - began < 60


@pytest.mark.parametrize("part", PARTS)
def test_what_the_weights_fill_is_opened(folders, part):
    PARTS[part][1](str(folders(part)))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("content", ["[]", "7", '"text"', "null", "[" * 100_000, "{", '{"model_type": 5}', '{"model_type": ["a"]}', ""])
def test_a_config_of_another_type_is_refused_in_one_line(folders, part, content, tmp_path):
    folder = Path(shutil.copytree(folders(part), tmp_path / "folder"))
    (folder / "config.json").write_text(content)
    with pytest.raises(KitError) as refused:
        PARTS[part][1](str(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("part", ["llava", "mllm"])
@pytest.mark.parametrize("kind", ["evil", 7, None, "bert-but-not"])
def test_an_unknown_vision_config_is_refused(folders, part, kind, tmp_path):
    folder = Path(shutil.copytree(folders(part), tmp_path / "folder"))
    change(folder, "vision_config.model_type", kind)
    with pytest.raises(KitError) as refused:
        PARTS[part][1](str(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["llava", "llava_llama", "llava_qwen"])
@pytest.mark.parametrize("load", [load_llava, load_llm, load_mllm])
def test_the_original_llava_layout_is_named(folders, kind, load, tmp_path):
    folder = Path(shutil.copytree(folders("llm"), tmp_path / "folder"))
    config = json.loads((folder / "config.json").read_text())
    original = {"model_type": kind, "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "mlp2x_gelu"}
    (folder / "config.json").write_text(json.dumps({**config, **original}))
    with pytest.raises(UsageError, match="layout of the original LLaVA.*-hf"):
        load(str(folder))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("lacking", [("pad_token",), ("pad_token", "eos_token", "unk_token")])
def test_a_decoder_without_padding_token_reads_texts(tmp_path, kind, lacking):
    tiny_llm(tmp_path / "llm", kind)
    plain = load_text_encoder(str(tmp_path / "llm"))
    path = tmp_path / "llm/tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in lacking}))
    bare = load_text_encoder(str(tmp_path / "llm"))
    texts = ["a dog", "a red dog on the left of a cat", "a"]
    assert (bare.encode(texts, 3) - plain.encode(texts, 3)).abs().max() < 1e-5
    assert (bare.encode(texts, 3)[0] - bare.encode(texts[:1], 1)[0]).abs().max() < 1e-5
