"""A saved model is the same model: here, in a fresh process without this kit, in a pipeline, and after a crash."""

import ast
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from align.common.errors import DamagedError, UsageError
from align.common.files import arm_failpoint
from mllm.conversations.templates import TEMPLATES
from mllm.model import saving
from mllm.model.modeling import SailLlavaForConditionalGeneration
from mllm.model.processing import SailLlavaProcessor
from mllm.model.saving import CODE, context_length, fitting_length, load_mllm, mllm_folder, portable_source, save_mllm
from tests.support.flipped_bits import refuses_every_flipped_bit
from tests.support.tiny_mllm import tiny_model

QUESTION = "USER: <image>\nWhat is left of the dog? ASSISTANT:"
MESSAGES = [{"role": "user", "content": [{"type": "image", "image": "photo.png"}, {"type": "text", "text": "What is left of the dog?"}]}]


def complete(**arguments):
    model, processor = tiny_model(**arguments)
    processor.chat_template = processor.tokenizer.chat_template = TEMPLATES["vicuna_v1"]
    return model, processor


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    save_mllm(*complete(), folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("case", [{}, {"tie": True, "llm": "qwen2"}, {"kind": "resnet", "grid": [1, 2]}])
def test_a_reload_is_bit_identical(tmp_path, photo, case):
    model, processor = complete(**case)
    save_mllm(model, processor, tmp_path / "m")
    again, processor_again = load_mllm(tmp_path / "m")
    assert type(again) is SailLlavaForConditionalGeneration and type(processor_again) is SailLlavaProcessor and not again.training
    expected = model.state_dict()
    assert expected.keys() == again.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == bool(case.get("tie"))
    assert ("lm_head.weight" in load_file(tmp_path / "m/model.safetensors")) != bool(case.get("tie"))
    frozen = [name for name, parameter in again.named_parameters() if not parameter.requires_grad]
    assert frozen == [f"model.vision_tower.{name}" for name in model.config.sail_unread]
    inputs, same = (p(text=QUESTION, images=photo, return_tensors="pt") for p in (processor, processor_again))
    assert all(torch.equal(inputs[name], same[name]) for name in inputs)
    assert torch.equal(model(**inputs).logits, again(**same).logits)
    assert processor_again.tokenizer.padding_side == "left" and processor_again.chat_template == processor.chat_template
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id


FRESH = """
import json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("align", "mllm", "eval"):
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)")
sys.meta_path.insert(0, Block())
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
torch.set_num_threads(1)
folder, question, messages = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(text=question, images=Image.open("photo.png"), return_tensors="pt")
with torch.no_grad():
    torch.save((dict(inputs), model(**inputs).logits), "there.pt")
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
answer = pipe(text=messages, max_new_tokens=6, return_full_text=False)[0]["generated_text"]
print("ANSWER", json.dumps([answer, sorted({name.split(".")[0] for name in sys.modules} & {"align", "mllm", "eval"})]))
"""


@torch.no_grad()
def test_a_fresh_process_without_the_kit_gives_the_same_logits(saved, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    shutil.copytree(saved, tmp_path / "moved model")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", FRESH, "moved model", QUESTION, json.dumps(MESSAGES)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stderr
    answer, kit = json.loads(next(line for line in ran.stdout.splitlines() if line.startswith("ANSWER")).removeprefix("ANSWER"))
    assert kit == []
    inputs, logits = torch.load(tmp_path / "there.pt", weights_only=True)
    model, processor = load_mllm(saved)
    here = processor(text=QUESTION, images=photo, return_tensors="pt")
    assert all(torch.equal(here[name], inputs[name]) for name in here)
    assert torch.equal(model(**here).logits, logits)
    here = processor(text=processor.apply_chat_template(MESSAGES, add_generation_prompt=True), images=photo, return_tensors="pt")
    ids = model.generate(**here, max_new_tokens=6, do_sample=False)[0, here["input_ids"].shape[1] :]
    assert answer == processor.decode(ids, skip_special_tokens=True)


@torch.no_grad()
def test_auto_classes_and_pipeline_use_the_kit_where_it_is(saved, photo, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(saved)
    assert type(model) is SailLlavaForConditionalGeneration and type(AutoProcessor.from_pretrained(saved)) is SailLlavaProcessor
    photo.save(tmp_path / "photo.png")
    messages = [{**MESSAGES[0], "content": [{"type": "image", "image": str(tmp_path / "photo.png")}, MESSAGES[0]["content"][1]]}]
    answer = pipeline("image-text-to-text", model=str(saved))(text=messages, max_new_tokens=6, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str)
    processor = load_mllm(saved)[1]
    listed = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    plain = [{"role": "user", "content": "<image>\nWhat is left of the dog?"}]
    assert listed == processor.apply_chat_template(plain, add_generation_prompt=True)
    assert listed.endswith("USER: <image>\nWhat is left of the dog? ASSISTANT:")


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape", "cut"])
def test_weights_that_do_not_fit_are_refused(saved, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder, ignore=shutil.ignore_patterns("COMMIT.json"))
    path, name = folder / "model.safetensors", "model.sail_head.gate.weight"
    weights = load_file(path)
    if damage == "missing":
        del weights[name]
    elif damage == "unexpected":
        weights["extra"] = torch.zeros(2)
    elif damage == "shape":
        weights[name] = weights[name][:, :-1].contiguous()
    save_file(weights, path, {"format": "pt"})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedError, match="extra|gate|cannot be read"):
        load_mllm(folder)


def test_a_crash_while_saving_leaves_the_old_model_or_the_new(saved, tmp_path, forked):
    model, processor = complete(seed=1)

    def killed_at(boundary, folder):
        arm_failpoint(boundary)
        save_mllm(model, processor, folder)

    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    before = (saved / "model.safetensors").read_bytes()
    assert forked(killed_at, "mllm-saved", folder) != 0
    assert (folder / "model.safetensors").read_bytes() == before
    assert forked(killed_at, "mllm-retired", folder) != 0
    assert (tmp_path / "model.retired/model.safetensors").read_bytes() == before and not folder.exists()
    save_mllm(model, processor, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert torch.equal(load_mllm(folder)[0].lm_head.weight, model.lm_head.weight)


def test_a_model_is_saved_with_the_code_of_its_classes(saved):
    assert {path.name for path in saved.glob("*.py")} == set(CODE)


def test_large_models_are_sharded(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "SHARD_SIZE", "100KB")
    model, processor = load_mllm(saved)
    save_mllm(model, processor, tmp_path / "m")
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 1 and (tmp_path / "m/model.safetensors.index.json").is_file()
    again = load_mllm(tmp_path / "m", dtype=torch.bfloat16)[0]
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.bfloat16())


@pytest.mark.parametrize("name", CODE)
def test_copied_code_stands_alone(name):
    source = portable_source(CODE[name])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = {alias.name.split(".")[0] for alias in node.names}
            assert modules <= set(sys.stdlib_module_names) | {"torch", "transformers", "numpy"}, modules
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert f"{node.module}.py" in CODE
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in {*sys.stdlib_module_names, "torch", "transformers", "PIL"}, node.module
    assert ".register(" not in source


def test_a_folder_without_a_model_says_what_is_there_instead(saved, tmp_path):
    (tmp_path / "runs/instruct").mkdir(parents=True)
    (tmp_path / "runs/instruct/model").symlink_to(saved)
    assert mllm_folder(tmp_path / "runs/instruct") == tmp_path / "runs/instruct/model"
    (tmp_path / "half/checkpoint-3").mkdir(parents=True)
    (tmp_path / "aligned/best").mkdir(parents=True)
    (tmp_path / "aligned/best/config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name, says in {
        "runs": "there is .*runs/instruct/model", "half": "not finished", "aligned": "run of stage one.*--sail", "empty": "make one with",
        "absent": "no such folder",
    }.items():  # fmt: skip
        with pytest.raises(UsageError, match=says):
            mllm_folder(tmp_path / name)


@pytest.mark.parametrize(
    ("rope", "tokens"),
    [
        ({}, 512),
        ({"rope_type": "default", "rope_theta": 10000.0}, 512),
        ({"rope_type": "linear", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}, 512),
        ({"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": {"rope_type": "default"}}, 1024),
    ],
)
def test_the_context_of_an_llm(rope, tokens):
    assert context_length(SimpleNamespace(max_position_embeddings=512, rope_parameters=rope)) == tokens
    assert context_length(SimpleNamespace()) is None


def test_rows_are_at_most_as_long_as_the_llms_context(saved):
    folder = saved
    notices = []
    assert fitting_length(folder, 512, notices.append) == 512 and not notices
    assert fitting_length(folder, 2048, notices.append) == 512 and "made for 512 tokens, an image takes" in notices[0]


def test_folders_of_something_else_are_left_alone(saved, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="not a model folder"):
        save_mllm(*complete(), tmp_path / "notes")
    assert (tmp_path / "notes/thesis.txt").read_text() == "precious"
    with pytest.raises(UsageError, match=r"neither an MLLM folder \(with config\.json\) nor a run"):
        load_mllm(tmp_path / "notes")
    for model_type in ("llava", "llama"):
        (tmp_path / model_type).mkdir()
        (tmp_path / model_type / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(UsageError, match="--llava" if model_type == "llava" else "make one with"):
            load_mllm(tmp_path / model_type)


def test_a_flipped_bit_in_any_file_of_the_folder_never_loads(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "m")
    refuses_every_flipped_bit(tmp_path / "m", load_mllm)
