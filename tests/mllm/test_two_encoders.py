"""Two encoders at once: joined by channel or in sequence, or beside the tower that a LLaVA keeps; saved, trained and asked like one."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from align.common.errors import UsageError
from align.model.dual_encoder import SailModel
from align.runtime.commandline import parse
from mllm import finetune, upgrade
from mllm.assembly.config import UpgradeConfig
from mllm.loop.config import FinetuneConfig
from mllm.model.answering import Answerer, Conversation, Decoding
from mllm.model.modeling import SailLlavaConfig
from mllm.model.saving import load_mllm, save_mllm
from tests.support.tiny_mllm import SIZE, tiny_llava, tiny_llm, tiny_model, tiny_sail, tiny_vision

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is there?"}]}]
WAYS = ["channel", "sequence", "kept channel", "kept sequence"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders: an LLM, a LLaVA, a ViT (3 x 3 patches) and a CNN (2 x 2) with a stage-one run each, pictures and conversations."""
    folder = tmp_path_factory.mktemp("parts")
    tiny_llm(folder / "llm")
    tiny_llava(folder / "llava")
    for name, kind in (("vit", "dinov2"), ("cnn", "timm_cnn")):
        tiny_sail(folder / f"{name}-run", tiny_vision(folder / name, kind), width=24 if name == "vit" else 16)
    rows, random = [], np.random.default_rng(0)
    for n in range(4):
        Image.fromarray(random.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / f"{n}.png")
        said = [{"from": "human", "value": "<image>\nwhat is there?"}, {"from": "gpt", "value": f"{n} red dogs"}]
        rows.append({"id": str(n), "image": f"{n}.png", "conversations": said})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def flags(parts, way, **changes):
    """The fields of an UpgradeConfig: ViT first, then the CNN or the LLaVA's own tower."""
    given = {"sail": (str(parts / "vit-run"),), "join": way.split()[-1], "template": "vicuna_v1"}
    if way.startswith("kept"):
        return UpgradeConfig(**given | {"llava": str(parts / "llava"), "keep_tower": True} | changes)
    return UpgradeConfig(**given | {"llm": str(parts / "llm"), "sail": (str(parts / "vit-run"), str(parts / "cnn-run"))} | changes)


@pytest.fixture(scope="module")
def made(parts):
    """By way: the model, its processor, the report; and its folder."""
    found = {}
    for way in WAYS:
        model, processor, report = upgrade.assembled(flags(parts, way))
        save_mllm(model, processor, parts / "models" / way)
        found[way] = (model, processor, report)
    return found


@pytest.fixture(scope="module")
def photos(parts):
    return [Image.open(parts / f"{n}.png").convert("RGB") for n in range(4)]


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_each_encoder_sees_its_own_pixels_and_gives_what_it_gives_alone(parts, made, photos, way):
    model, processor, report = made[way]
    pixels = processor(text="<image>", images=photos[0], return_tensors="pt")["pixel_values"]
    one, *_ = upgrade.assembled(UpgradeConfig(llm=str(parts / "llm"), sail=(str(parts / "vit-run"),)))
    alone = SailModel.from_pretrained(parts / "cnn-run")
    assert pixels.shape[1:] == (3, 2 * SIZE**2) and model.config.pixel_shape() == [3, 2 * SIZE**2]
    own, other = pixels.unflatten(2, (2, SIZE, SIZE)).unbind(2)
    first = one.model.get_patch_features(own)  # (1, 9, 24)
    found = torch.stack(list(model.get_image_features(pixels).pooler_output))
    if way.startswith("kept"):
        second = model.model.towers[1].features(other).float()
        assert model.config.sail_beside[0]["sail_head"] == "none"
    else:
        second = alone.vision_head(alone.vision_encoder.dense(other))  # (1, 4, 16)
        torch.testing.assert_close(other.mean(), (processor.image_processor.to_pixels(photos[0])[:, SIZE**2 :]).mean())
        assert not torch.allclose(own, other, atol=0.1), "mean and spread of both encoders are not the same"
    if "channel" in way:
        [projector] = model.model.projectors
        if second.shape[1] == 4:
            second = functional.adaptive_avg_pool2d(second.transpose(1, 2).unflatten(2, (2, 2)), (3, 3)).flatten(2).transpose(1, 2)
        torch.testing.assert_close(model.model.get_patch_features(pixels), torch.cat([first, second], -1))
        first, second = (functional.layer_norm(block, block.shape[-1:]) for block in (first, second))
        hidden = projector.linear_1(first) + projector.linear_raw(second)
        expected = projector.linear_2(functional.gelu(hidden))
    else:
        expected = torch.cat([projector(own.to(projector.linear_1.weight)) for projector, own in
                              zip(model.model.projectors, (first, second), strict=True)], dim=1)  # fmt: skip
    tokens = {"channel": 9, "sequence": 9 + 4, "kept channel": 9, "kept sequence": 9 + 9}[way]
    assert found.shape[1] == tokens == processor.image_seq_length == model.config.image_tokens()
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-3, atol=1e-4)
    assert sum(line.parameters for line in report) == sum(parameter.numel() for parameter in model.parameters())
    states = {line.name: line.state for line in report}
    assert states["vision tower"] == "new" and states["second vision tower"] == ("kept" if "kept" in way else "new")
    assert states.get("second projector") == {"channel": None, "kept channel": None, "sequence": "new"}.get(way, "kept")


@torch.no_grad()
def test_a_kept_tower_and_its_projector_give_exactly_the_llavas_own_tokens(parts, made, photos):
    model, processor, _ = made["kept sequence"]
    stock = LlavaForConditionalGeneration.from_pretrained(parts / "llava", dtype=torch.bfloat16)
    pixels = processor(text="<image>", images=photos[0], return_tensors="pt")["pixel_values"]
    kept = model.get_image_features(pixels).pooler_output[0][9:]
    theirs = stock.get_image_features(pixels[..., SIZE**2 :].unflatten(2, (SIZE, SIZE)).bfloat16()).pooler_output[0]
    assert torch.equal(kept.bfloat16(), theirs)
    assert model.model.beside[0].vision_tower.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_a_reload_is_the_same_model_and_batches_are_single_answers(parts, made, photos, way):
    model, processor, _ = made[way]
    again, processor_again = load_mllm(parts / "models" / way, dtype="auto")
    expected, found = model.state_dict(), again.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name].to(value.dtype)) for name, value in found.items())
    unread = {name for name, parameter in again.named_parameters() if not parameter.requires_grad}
    assert unread == {name for name, parameter in model.named_parameters() if not parameter.requires_grad} and unread
    assert torch.equal(*(one.image_processor.to_pixels(photos[0]) for one in (processor, processor_again)))
    whole, _ = load_mllm(parts / "models" / way)
    answerer = Answerer(whole, processor)
    asked = [Conversation(QUESTION, [photo]) for photo in photos]
    together = answerer.generate(asked, Decoding(6))
    assert together == [answerer.generate([one], Decoding(6))[0] for one in asked] and any(together)


FRESH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("align", "mllm", "eval"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
for number, folder in enumerate(sys.argv[2:]):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(text="USER: <image> what? ASSISTANT:", images=Image.open(sys.argv[1]), return_tensors="pt")
    with torch.no_grad():
        torch.save((dict(inputs), model(**inputs).logits), f"{number}.pt")
"""


@torch.no_grad()
def test_a_fresh_process_without_the_kit_gives_the_same_logits(parts, made, tmp_path, monkeypatch):
    folders = [parts / "models" / way for way in WAYS]
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    ran = subprocess.run([sys.executable, "-c", FRESH, parts / "0.png", *folders], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    for number, folder in enumerate(folders):
        inputs, logits = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert torch.equal(load_mllm(folder)[0](**inputs).logits, logits), folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [("--packing",), ("--lora-rank", "2")], ids=["packed", "lora"])
def test_a_step_trains_both_encoders_heads_and_projectors(parts, made, forked, tmp_path, way, options):
    rates = ["--lr-llm", "1e-2", "--lr-head", "1e-2", "--lr-projector", "1e-2"]
    rates += [] if "--lora-rank" in options else ["--lr-vision", "1e-2"]
    arguments = [
        "--model", str(parts / "models" / way), "--data", str(parts / "rows.json"), "--output", str(tmp_path), "--batch-size", "1",
        "--micro-batch-size", "1", "--max-length", "128", "--steps", "1", "--warmup", "0", "--schedule", "constant_with_warmup",
        "--workers", "0", "--precision", "fp32", *rates, *options,
    ]  # fmt: skip
    assert forked(lambda: finetune.main(parse(FinetuneConfig, "instruct", arguments))) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (parts / "models" / way, tmp_path / "model"))
    assert before.keys() == after.keys()
    changed = {name.removesuffix(".weight") for name in before if not torch.equal(before[name].float(), after[name])}
    inner = ["multi_modal_projector.linear_1", "sail_head.out"]
    inner += ["multi_modal_projector.linear_raw"] if "channel" in way else ["beside.0.multi_modal_projector.linear_1"]
    inner += [] if "kept" in way else ["beside.0.sail_head.out"]
    assert {f"model.{name}" for name in inner} <= changed
    towers = [any(name.startswith(f"model.{place}vision_tower.") for name in changed) for place in ("", "beside.0.")]
    assert towers == [options == ("--packing",)] * 2
    speed = json.loads((tmp_path / "speed.jsonl").read_text().splitlines()[0])
    assert speed


def test_one_grid_or_several(parts):
    def grids(**fields):
        model, processor, _ = upgrade.assembled(flags(parts, fields.pop("way", "channel"), **fields))
        assert processor.image_seq_length == model.config.image_tokens()
        return [tower.sail_grid for tower in model.config.towers], model.config.image_tokens()

    runs = (str(parts / "cnn-run"), str(parts / "vit-run"))
    assert grids(sail=runs) == ([[2, 2], [2, 2]], 4)  # the first one's
    assert grids(sail=runs, grid=(3, 3)) == ([[3, 3], [3, 3]], 9)
    assert grids(way="sequence", grid=(2, 1)) == ([[2, 1], [2, 1]], 4)
    assert grids(image_size=(70, 64)) == ([[5, 5], [5, 5]], 25)
    with pytest.raises(UsageError, match="3 x 3 patches"):
        grids(grid=(4, 3))
    with pytest.raises(UsageError, match="2 x 2 patches"):
        grids(way="sequence", grid=(3, 3))
    with pytest.raises(UsageError, match="the same sail_grid"):
        replace_grid = {"sail_patch_grid": [3, 3], "sail_beside": [{"sail_patch_grid": [2, 2]}]}
        SailLlavaConfig(**replace_grid)


def test_an_encoder_without_a_run_has_no_head_beside_one_that_has(parts):
    given = {"sail": (str(parts / "vit-run"),), "vision": (str(parts / "cnn"),), "layer": 3}
    model, _, _ = upgrade.assembled(flags(parts, "channel", **given))
    assert [tower.sail_head for tower in model.config.towers] == ["trained", "none"]
    assert model.config.towers[1].sail_layer == 3 and model.config.towers[0].sail_layer == 3
    control, _, _ = upgrade.assembled(flags(parts, "channel", **given, sail_head="random"))
    assert [tower.sail_head for tower in control.config.towers] == ["random", "none"]
    plain = replace(flags(parts, "sequence"), sail=(), vision=(str(parts / "vit"), str(parts / "cnn")), sail_head="none")
    assert [tower.sail_head for tower in upgrade.assembled(plain)[0].config.towers] == ["none", "none"]


WRONG = [
    ({"sail": ("a", "b", "c")}, "one or two encoders"),
    ({"sail": ("a", "b"), "llm": None, "llava": "l", "keep_tower": True}, "one or two encoders"),
    ({"sail": ("a",), "join": "sequence"}, "only with two encoders"),
    ({"sail": ("a",), "keep_tower": True}, "only with --llava"),
    ({"sail": ("a",), "vision": ("b",), "head": "mlp"}, "only with --vision alone"),
    ({"sail": ("a", "b"), "image_size": (1, 2, 3)}, "one size for all or one for each"),
    ({"sail": ("a", "b"), "projector": "p"}, "trained for one encoder"),
    ({"vision": ("a", "b")}, "only a run has a trained head"),
    (
        {"sail": ("a",), "vision": ("b",), "join": "sequence", "texts": ("t",), "images": "i"},
        "texts do not reach an encoder without a head: add --captions",
    ),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_what_cannot_be_joined_is_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        UpgradeConfig(**{"llm": "l"} | fields)


@pytest.mark.parametrize("fields", [{"vision_feature_layer": [-2, -1]}, {"vision_feature_select_strategy": "full"}])
def test_a_tower_that_is_read_in_another_way_cannot_be_kept(parts, tmp_path, fields):
    config = flags(parts, "kept sequence", llava=str(tiny_llava(tmp_path / "llava", **fields)))
    with pytest.raises(UsageError, match="leave --keep-tower out"):
        upgrade.assembled(config)


NEWER = {"sail_beside", "sail_join", "sail_words", "sail_positions", "sail_norm", "sail_untrained_tokens"}


@torch.no_grad()
@pytest.mark.parametrize("raw", [False, True], ids=["head", "both"])
def test_a_folder_of_the_version_with_one_encoder_gives_the_same_logits(tmp_path, raw):
    """What was saved before a second encoder was possible lacks these fields and the file towers.py."""
    model, processor = tiny_model(raw=raw)
    save_mllm(model, processor, tmp_path / "old")
    for name in ("config.json", "processor_config.json"):
        content = json.loads((tmp_path / "old" / name).read_text())
        content.get("image_processor", {}).pop("beside", None)
        left = {field: value for field, value in content.items() if field not in NEWER}
        assert name != "config.json" or len(content) - len(left) == len(NEWER)
        (tmp_path / "old" / name).write_text(json.dumps(left))
    for name in ("towers.py", "COMMIT.json"):
        (tmp_path / "old" / name).unlink()
    again, _ = load_mllm(tmp_path / "old")
    ids = torch.cat([torch.full((1, 9), model.config.image_token_index), torch.arange(5, 20)[None]], 1)
    pixels = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(input_ids=ids, pixel_values=pixels).logits, model(input_ids=ids, pixel_values=pixels).logits)
