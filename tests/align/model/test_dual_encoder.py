"""The dual encoder is a Hugging Face model: strict to load, equal after a reload, usable in a pipeline."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, pipeline

from align.common.errors import DamagedError, FingerprintError, KitError, UsageError
from align.encoders.spec import TextSpec, VisionSpec
from align.encoders.text import load_text_encoder
from align.encoders.vision import load_vision_encoder
from align.model.dual_encoder import SailConfig, SailModel
from align.model.saving import save_model
from eval.models.dual_encoder import SailDualEncoder
from eval.models.features import FeatureCache
from eval.tasks.data import load_task
from eval.tasks.task import Task
from tests.support.flipped_bits import refuses_every_flipped_bit
from tests.support.tiny_encoders import save, save_bert

LABELS = ["a red dog", "the cat runs", "blue"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return save(folder / "vision", "dinov2"), save_bert(folder / "text")[0]


def token_model(encoders, seed=0, **changes):
    """A model with token heads whose every parameter is random, in evaluation mode."""
    vision = load_vision_encoder(VisionSpec(encoders[0], feature="tokens"))
    text = load_text_encoder(TextSpec(encoders[1], feature="tokens", max_length=12))
    config = SailConfig(
        vision={"name": encoders[0], "feature": "tokens"}, text={"name": encoders[1], "feature": "tokens", "max_length": 12},
        vision_fingerprint=vision.fingerprint, text_fingerprint=text.fingerprint, vision_width=vision.width, text_width=32,
        vision_cls=vision.has_cls, width=16, head="token", bias=None, **changes,
    )  # fmt: skip
    model = SailModel(config).initialize(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for head in (model.vision_head, model.text_head):
            for parameter in head.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def model_of(encoders, head="glu", width=16, seed=0):
    vision, text = (load(name) for load, name in zip((load_vision_encoder, load_text_encoder), encoders, strict=True))
    config = SailConfig(
        vision={"name": encoders[0]}, text={"name": encoders[1]}, vision_fingerprint=vision.fingerprint, text_fingerprint=text.fingerprint,
        vision_width=vision.feature_width, text_width=text.width, width=vision.feature_width if head == "sharelock" else width, head=head,
    )  # fmt: skip
    return SailModel(config).initialize(seed)


@pytest.fixture(scope="module")
def saved(encoders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    tokenizer = folder.parent / "tokenizer"
    load_text_encoder(encoders[1]).tokenizer.save_pretrained(tokenizer)
    save_model(model_of(encoders), folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))


def test_features_are_encoder_then_head_then_norm(encoders, saved, photo):
    model = SailModel.from_pretrained(saved)
    vision, text = load_vision_encoder(encoders[0]), load_text_encoder(encoders[1])
    pixels = vision.transform(photo)[None]
    cls, patches = vision.encode(pixels)
    for ours, feature in (
        (model.get_image_features(pixels).pooler_output, torch.cat([cls, patches.mean(1)], -1)),
        (model.get_patch_features(pixels), torch.cat([cls[:, None].expand_as(patches), patches], -1)),
    ):
        expected = model.vision_head(feature)
        torch.testing.assert_close(ours, expected / expected.norm(dim=-1, keepdim=True))
    tokens = text.tokenizer(LABELS, padding=True, return_tensors="pt")
    expected = model.text_head(text.encode(LABELS, 4))
    ours = model.get_text_features(**tokens).pooler_output
    torch.testing.assert_close(ours, expected / expected.norm(dim=-1, keepdim=True), rtol=1e-4, atol=1e-5)
    out = model(**tokens, pixel_values=pixels)
    images = model.get_image_features(pixels).pooler_output
    torch.testing.assert_close(out.logits_per_image, 20 * images @ ours.T - 10)
    assert torch.equal(out.logits_per_text, out.logits_per_image.T)


PIPELINE = """
import json, sys
import align.model.dual_encoder
from transformers import pipeline
from PIL import Image
answer = pipeline("zero-shot-image-classification", model=sys.argv[1])(Image.open(sys.argv[2]), candidate_labels=json.loads(sys.argv[3]))
print("ANSWER", json.dumps(answer))
"""


def test_pipeline_gives_the_same_in_a_fresh_process(saved, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    here = pipeline("zero-shot-image-classification", model=str(saved))(photo, candidate_labels=LABELS)
    command = [sys.executable, "-c", PIPELINE, str(saved), str(tmp_path / "photo.png"), json.dumps(LABELS)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    there = json.loads(next(line for line in ran.stdout.splitlines() if line.startswith("ANSWER")).removeprefix("ANSWER"))
    assert [row["label"] for row in here] == [row["label"] for row in there] and {row["label"] for row in here} == set(LABELS)
    assert [row["score"] for row in there] == pytest.approx([row["score"] for row in here], rel=1e-5)  # its own number of threads
    model = SailModel.from_pretrained(saved)
    processor = AutoProcessor.from_pretrained(saved)
    inputs = processor(text=[f"This is a photo of {label}." for label in LABELS], images=photo, padding=True, return_tensors="pt")
    scores = model(**inputs).logits_per_image.softmax(-1)[0]
    for row in here:
        assert row["score"] == pytest.approx(scores[LABELS.index(row["label"])].item(), rel=1e-4)


def test_auto_model_opens_it_and_saving_again_changes_nothing(saved, tmp_path):
    model = AutoModel.from_pretrained(saved)
    assert isinstance(model, SailModel)
    save_model(model, tmp_path / "again", saved.parent / "tokenizer")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads((saved / "config.json").read_text())


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_refused(saved, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder, ignore=shutil.ignore_patterns("COMMIT.json"))
    weights = load_file(folder / "model.safetensors")
    name = "vision_head.gate.weight"
    if damage == "missing":
        del weights[name]
    elif damage == "unexpected":
        weights["extra"] = torch.zeros(2)
    else:
        weights[name] = weights[name][:, :-1].contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DamagedError, match="extra|gate"):
        SailModel.from_pretrained(folder)


def test_another_encoder_under_the_same_name_is_refused(encoders, saved, tmp_path):
    for side in ("vision", "text"):
        folder = tmp_path / side
        shutil.copytree(saved, folder)
        config = json.loads((folder / "config.json").read_text())
        other = save(tmp_path / "other", "dinov2", hidden_size=48) if side == "vision" else save_bert(tmp_path / "bert", pooling="cls")[0]
        config[side]["name"] = str(other)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "COMMIT.json").unlink()
        with pytest.raises(FingerprintError, match="weights|pooling"):
            getattr(SailModel.from_pretrained(folder), f"{side}_encoder")


def test_embedded_encoders_travel_with_the_folder(encoders, saved, photo, tmp_path):
    save_model(SailModel.from_pretrained(saved), tmp_path / "whole", saved.parent / "tokenizer", embed_encoders=True)
    shutil.move(tmp_path / "whole", tmp_path / "moved")
    assert json.loads((tmp_path / "moved/config.json").read_text())["vision"]["name"] == "vision_encoder"
    by_reference = pipeline("zero-shot-image-classification", model=str(saved))(photo, candidate_labels=LABELS)
    assert pipeline("zero-shot-image-classification", model=str(tmp_path / "moved"))(photo, candidate_labels=LABELS) == by_reference


def test_initial_weights_are_xavier_and_follow_the_seed_only(encoders):
    torch.manual_seed(123)
    first = model_of(encoders, seed=5)
    torch.manual_seed(456)
    second, third = model_of(encoders, seed=5), model_of(encoders, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.vision_head.gate.weight, third.vision_head.gate.weight)
    weight = first.vision_head.gate.weight
    bound = (6 / sum(weight.shape)) ** 0.5
    assert 0.95 * bound < float(weight.abs().max()) <= bound and not first.vision_head.out.bias.any()
    assert float(first.logit_scale.exp()) == pytest.approx(20) and float(first.logit_bias) == -10


def test_untrained_keeps_architecture_and_encoders(encoders, saved):
    model = SailModel.from_pretrained(saved)
    other = model.untrained(seed=9)
    assert not torch.equal(other.vision_head.out.weight, model.vision_head.out.weight)
    assert other.config.vision == model.config.vision


def test_sharelock_keeps_the_image_side(encoders):
    model = model_of(encoders, head="sharelock").eval()
    features = torch.randn(3, model.config.vision_width)
    torch.testing.assert_close(model.project_image(features), torch.nn.functional.normalize(features, dim=-1))
    assert model.project_text(torch.randn(3, model.config.text_width)).shape == features.shape


def test_a_model_without_encoders_says_so():
    with pytest.raises(UsageError, match="already encoded"):
        _ = SailModel(SailConfig(vision_width=4, text_width=4, width=4)).vision_encoder


@pytest.fixture(scope="module")
def saved_tokens(encoders, saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("token-model") / "model"
    save_model(token_model(encoders), folder, saved.parent / "tokenizer")
    return folder


def test_a_token_model_embeds_all_tokens_of_image_and_text(encoders, saved_tokens, photo):
    model = SailModel.from_pretrained(saved_tokens)
    vision, text = load_vision_encoder(encoders[0]), load_text_encoder(TextSpec(encoders[1], max_length=12))
    pixels = vision.transform(photo)[None]
    cls, patches = vision.encode(pixels)
    head = model.vision_head
    expected = torch.stack([head.local(patch) for patch in patches[0]]).mean(0) + head.cls(cls[0])
    torch.testing.assert_close(model.get_image_features(pixels).pooler_output[0], expected / expected.norm(), rtol=1e-4, atol=1e-6)
    dense = torch.stack([head.local(patch) + head.cls(cls[0]) for patch in patches[0]])
    torch.testing.assert_close(model.get_patch_features(pixels)[0], dense / dense.norm(dim=-1, keepdim=True), rtol=1e-4, atol=1e-6)
    larger = torch.randn(1, 3, 56, 70, generator=torch.Generator().manual_seed(0))
    assert model.get_patch_features(larger).shape == (1, 20, 16)  # any size that the encoder takes
    found = model.get_text_features(**text.tokenizer(LABELS, padding=True, return_tensors="pt")).pooler_output
    for label, ours in zip(LABELS, found, strict=True):
        tokens, mask = text.encode_tokens([label])
        alone = model.text_head(tokens[mask][None].flatten(1))[0]
        torch.testing.assert_close(ours, alone / alone.norm(), rtol=1e-4, atol=1e-5)


def test_a_token_model_is_saved_strictly_and_works_in_a_pipeline(saved_tokens, photo, tmp_path):
    scores = pipeline("zero-shot-image-classification", model=str(saved_tokens))(photo, candidate_labels=LABELS)
    model = SailModel.from_pretrained(saved_tokens)
    inputs = AutoProcessor.from_pretrained(saved_tokens)(
        text=[f"This is a photo of {label}." for label in LABELS], images=photo, padding=True, return_tensors="pt"
    )
    expected = model(**inputs).logits_per_image.softmax(-1)[0]
    assert {row["label"]: row["score"] for row in scores} == pytest.approx(dict(zip(LABELS, expected.tolist(), strict=True)), rel=1e-4)
    save_model(model, tmp_path / "again", saved_tokens.parent / "none")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (saved_tokens / "model.safetensors").read_bytes()
    weights = load_file(tmp_path / "again/model.safetensors")
    assert "logit_bias" not in weights
    del weights["vision_head.cls.up.weight"]
    save_file(weights, tmp_path / "again/model.safetensors", {"format": "pt"})
    (tmp_path / "again/COMMIT.json").unlink()
    with pytest.raises(DamagedError, match="vision_head.cls.up.weight"):
        SailModel.from_pretrained(tmp_path / "again")


def test_what_evaluation_keeps_of_a_token_model_is_the_heads_output(encoders, saved_tokens, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    rows = [{"key": f"k{n}", "image": "photo.png", "captions": [label]} for n, label in enumerate(LABELS)]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_task(Task(id="mine", kind="retrieval", layout="jsonl", path=".", data="task.jsonl", group="none"), tmp_path)
    cache, model = FeatureCache(tmp_path / "cache", workers=0), SailModel.from_pretrained(saved_tokens)
    kept, images = cache.images(data, SailDualEncoder(model))
    texts = cache.texts(LABELS, SailDualEncoder(model))
    assert len(kept.keys) == 3 and images.shape == (3, 16) and texts.shape == (3, 16)  # E, not all tokens
    pixels = model.vision_encoder.transform(photo)[None]
    dual, other = SailDualEncoder(model), SailDualEncoder(model.untrained(seed=4))
    ours = dual.project_image(torch.from_numpy(images))[:1]
    torch.testing.assert_close(ours, model.get_image_features(pixels).pooler_output, rtol=5e-3, atol=1e-3)
    tokens = model.text_encoder.tokenizer(LABELS, padding=True, return_tensors="pt")
    torch.testing.assert_close(dual.project_text(texts), model.get_text_features(**tokens).pooler_output, rtol=5e-3, atol=1e-3)
    assert other.vision_fingerprint != dual.vision_fingerprint and other.text_fingerprint != dual.text_fingerprint
    assert not np.allclose(cache.images(data, other)[1], images)  # not read from the first model's cache
    pooled = SailDualEncoder(model_of(encoders))
    assert pooled.vision_fingerprint == pooled.sail.config.vision_fingerprint and pooled.vision_encoder is pooled.sail.vision_encoder


def test_a_token_head_projects_the_rows_of_all_tokens_that_encoders_give(saved_tokens, photo):
    model = SailModel.from_pretrained(saved_tokens)
    pixels = model.vision_encoder.transform(photo)[None]
    rows = model.vision_encoder(pixels)
    torch.testing.assert_close(model.project_image(rows), model.get_image_features(pixels).pooler_output)
    torch.testing.assert_close(model.project_patches(rows), model.get_patch_features(pixels))
    tokens = model.text_encoder.tokenizer(LABELS, padding=True, return_tensors="pt")
    expected = model.get_text_features(**tokens).pooler_output
    torch.testing.assert_close(model.project_text(model.text_encoder.encode(LABELS, 4)), expected, rtol=1e-4, atol=1e-5)


def test_an_encoder_without_cls_gets_a_token_head_without_tp_cls(encoders, tmp_path):
    model = token_model((save(tmp_path / "siglip", "siglip_vision_model"), encoders[1]))
    assert model.vision_head.cls is None and not any(name.startswith("vision_head.cls") for name in model.state_dict())
    pixels = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    _, patches = model.vision_encoder.encode(pixels)
    expected = model.vision_head.local(patches).mean(1)
    expected = expected / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(model.get_image_features(pixels).pooler_output, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"), [("width", "abc"), ("width", 10**12), ("head", 7), ("vision", []), ("expansion", "x"), ("bias", {})]
)
def test_a_config_that_no_model_has_is_refused_in_one_line(saved, tmp_path, field, value):
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(KitError) as refused:
        _ = SailModel.from_pretrained(folder).vision_encoder
    assert "\n" not in str(refused.value)


def test_a_flipped_bit_in_any_file_of_the_folder_never_loads(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "m")
    refuses_every_flipped_bit(tmp_path / "m", SailModel.from_pretrained)
