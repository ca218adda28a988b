"""Code in a model folder never runs without the flag, not even if somebody at the terminal answers yes."""

import json
import shutil
from pathlib import Path

import pytest

from align.assessment.candidates import random_copy
from align.common.errors import KitError
from align.encoders.text import load_text_encoder
from align.encoders.vision import load_vision_encoder
from eval.models.transformers_clip import load_transformers_clip
from mllm.assembly.language import load_llava, load_llm
from mllm.check import main as check
from mllm.conversations.config import CheckConfig
from mllm.model.saving import load_mllm, save_mllm
from tests.support.tiny_clip import save_hugging_face
from tests.support.tiny_encoders import save, save_bert
from tests.support.tiny_mllm import tiny_llava, tiny_llm, tiny_model

EVIL = """
from pathlib import Path
Path({flag!r}).touch()
from transformers import *
class Evil(PreTrainedConfig):
    model_type = "evil"
class EvilModel(BertModel): pass
class EvilTokenizer(PreTrainedTokenizerFast): pass
class EvilProcessor(ProcessorMixin): pass
class EvilImages(BaseImageProcessor): pass
def generate(*args, **kwargs): pass
"""
AUTO_MAP = {
    "AutoConfig": "evil.Evil", "AutoModel": "evil.EvilModel", "AutoModelForCausalLM": "evil.EvilModel",
    "AutoModelForImageTextToText": "evil.EvilModel", "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
    "AutoProcessor": "evil.EvilProcessor", "AutoImageProcessor": "evil.EvilImages",
}  # fmt: skip
CONFIGS = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


def mllm(folder):
    model, processor = tiny_model(chatml=True)
    processor.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    save_mllm(model, processor, folder)
    return folder


def checked(folder):
    data = Path(folder) / "rows.jsonl"
    data.write_text("{}\n")
    check(CheckConfig(data=(str(data),), model=str(folder), output=str(Path(folder) / "check")))


# what makes a good folder, and what opens it
PARTS = {
    "vision": (lambda folder: save(folder / "v", "dinov2"), lambda folder: load_vision_encoder(folder)),
    "random vision": (lambda folder: save(folder / "v", "dinov2"), lambda folder: random_copy(folder, Path(folder) / "random", 0)),
    "text": (lambda folder: save_bert(folder)[1], load_text_encoder),
    "sentence transformer": (lambda folder: save_bert(folder)[0], load_text_encoder),
    "llm": (lambda folder: tiny_llm(folder / "l"), load_llm),
    "llava": (lambda folder: tiny_llava(folder / "l"), load_llava),
    "clip": (lambda folder: save_hugging_face(folder / "c", "clip") and folder / "c", load_transformers_clip),
    "mllm": (lambda folder: mllm(folder / "m"), load_mllm),
    "check": (lambda folder: mllm(folder / "m"), checked),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder_of(part):
        maker = PARTS[part][0]
        if maker not in made:
            made[maker] = Path(maker(tmp_path_factory.mktemp("parts")))
        return made[maker]

    return folder_of


def poison(folder, flag, unknown):
    """Put code into every place of a folder where transformers looks for some; `unknown` classes exist only there."""
    for place in (folder, folder / "custom_generate"):
        place.mkdir(exist_ok=True)
        for name in ("evil.py", "generate.py", "modeling_sail_llava.py", "processing_sail_llava.py"):
            (place / name).write_text(EVIL.format(flag=str(flag)))
    for name in CONFIGS:
        content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        nested = [part for part in content.values() if isinstance(part, dict) and ("model_type" in part or "image_processor_type" in part)]
        for part in (content, *nested):
            part["auto_map"] = AUTO_MAP
        if unknown == name:
            named = {"model_type": "evil", "tokenizer_class": "EvilTokenizer", "processor_class": "EvilProcessor"}
            named |= {"image_processor_type": "EvilImages"}
            content |= {key: value for key, value in named.items() if key in content}
        (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("unknown", [None, *CONFIGS])
@pytest.mark.parametrize("part", PARTS)
def test_no_code_runs_though_the_terminal_says_yes(folders, part, unknown, tmp_path, monkeypatch):
    asked = []

    def yes(question=""):
        asked.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", yes)
    flag, folder = tmp_path / "code-ran", tmp_path / "folder"
    shutil.copytree(folders(part), folder)
    poison(folder, flag, unknown)
    try:
        PARTS[part][1](str(folder))
    except KitError as refused:
        assert "\n" not in str(refused)
    assert not flag.exists() and not asked
