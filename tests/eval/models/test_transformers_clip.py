"""CLIP and SigLIP of transformers against the stock models they wrap, on tiny random weights."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.nn.functional import gelu, layer_norm, normalize

from align.common.errors import UsageError
from eval.models.transformers_clip import FAMILIES, load_transformers_clip
from tests.support.tiny_clip import TEXTS, save_hugging_face


@pytest.fixture(scope="module", params=FAMILIES)
def hugging_face(request, tmp_path_factory):
    """(family, folder, stock model, stock tokenizer, what this kit opens)"""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, *save_hugging_face(folder, request.param), load_transformers_clip(str(folder))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_images_are_those_of_the_stock_model(hugging_face):
    _, folder, model, _, baseline = hugging_face
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(baseline.vision_encoder.transform(picture), pixels[0])
    expected = model.get_image_features(pixel_values=pixels).pooler_output
    features = baseline.vision_encoder(pixels)
    close(features, expected)
    assert features.shape == (1, baseline.vision_encoder.feature_width) and features.norm() != pytest.approx(1, abs=1e-3)
    close(baseline.project_image(features), normalize(expected, dim=-1))


@torch.no_grad()
def test_texts_are_those_of_the_stock_model_one_by_one(hugging_face):
    family, _, model, tokenizer, baseline = hugging_face
    features = baseline.text_encoder.encode(TEXTS, 2)
    for text, feature in zip(TEXTS, features, strict=True):
        if family == "siglip":  # trained on padded texts, without a mask
            ids = tokenizer(text, padding="max_length", max_length=12, truncation=True, return_tensors="pt")["input_ids"]
            assert ids.shape == (1, 12)
            expected = model.get_text_features(input_ids=ids).pooler_output
        else:
            tokens = tokenizer(text, truncation=True, max_length=12, return_tensors="pt")
            expected = model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        close(feature[None], expected)
    close(features[0], features[4])
    assert baseline.text_encoder.encode([], 2).shape == (0, baseline.width)


@torch.no_grad()
def test_cosines_are_the_logits_of_the_stock_model(hugging_face):
    family, _, model, tokenizer, baseline = hugging_face
    pixels, texts = torch.randn(3, 3, 32, 32), TEXTS[:3]
    tokens = tokenizer(texts, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    mask = {} if family == "siglip" else {"attention_mask": tokens["attention_mask"]}
    logits = model(input_ids=tokens["input_ids"], pixel_values=pixels, **mask).logits_per_image
    images = baseline.project_image(baseline.vision_encoder(pixels))
    found = baseline.scale * images @ baseline.project_text(baseline.text_encoder.encode(texts, 8)).T
    close(found + (model.logit_bias if family == "siglip" else 0), logits, 1e-4)


@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
@torch.no_grad()
def test_dense_embeddings_are_each_patch_through_the_projection(hugging_face, size):
    family, _, model, _, baseline = hugging_face
    pixels = torch.randn(2, 3, *size)
    tokens = model.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
    if family == "siglip":  # attention to a single token is its value: v = Wv x, then Wo v, then the MLP
        head = model.vision_model.head
        width = tokens.shape[-1]
        value = tokens @ head.attention.in_proj_weight[2 * width :].T + head.attention.in_proj_bias[2 * width :]
        out = value @ head.attention.out_proj.weight.T + head.attention.out_proj.bias
        normed = layer_norm(out, (width,), head.layernorm.weight, head.layernorm.bias, head.layernorm.eps)
        hidden = gelu(normed @ head.mlp.fc1.weight.T + head.mlp.fc1.bias, approximate="tanh")
        expected = out + hidden @ head.mlp.fc2.weight.T + head.mlp.fc2.bias
    else:
        norm = model.vision_model.post_layernorm
        tokens = layer_norm(tokens[:, 1:], (tokens.shape[-1],), norm.weight, norm.bias, norm.eps)
        expected = tokens @ model.visual_projection.weight.T
    dense = baseline.project_patches(baseline.encode_patches(pixels))
    assert dense.shape == (2, size[0] // 8 * size[1] // 8, baseline.width) and baseline.patch_size == 8
    close(dense, normalize(expected, dim=-1))


def test_fingerprints_follow_weights_and_architecture_of_their_own_side(hugging_face, tmp_path):
    family, folder, model, _, baseline = hugging_face
    again = load_transformers_clip(str(folder))
    assert again.vision_fingerprint == baseline.vision_fingerprint and again.text_fingerprint == baseline.text_fingerprint
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with torch.no_grad():
        changed = type(model).from_pretrained(folder)
        changed.text_model.final_layer_norm.bias.add_(1)
        changed.save_pretrained(tmp_path)
    other = load_transformers_clip(str(tmp_path))
    assert other.vision_fingerprint == {**baseline.vision_fingerprint, "encoder": tmp_path.name}
    assert other.text_fingerprint["weights"] != baseline.text_fingerprint["weights"]
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "relu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = load_transformers_clip(str(tmp_path))
    assert other.vision_fingerprint["weights"] == baseline.vision_fingerprint["weights"]
    assert other.vision_fingerprint["architecture"] != baseline.vision_fingerprint["architecture"]


def test_folders_of_other_models_are_refused(tmp_path):
    save_hugging_face(tmp_path, "clip")
    config = json.loads((tmp_path / "config.json").read_text())
    for model_type, message in (("siglip2", "fixed-size"), ("bert", "known: clip, metaclip_2, siglip")):
        (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
        with pytest.raises(UsageError, match=message):
            load_transformers_clip(str(tmp_path))
    with pytest.raises(UsageError, match="not a folder"):
        load_transformers_clip(str(tmp_path / "nothing"))


def test_code_in_a_model_folder_does_not_run_though_the_terminal_says_yes(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(
        f"import pathlib\nfrom transformers import PretrainedConfig\npathlib.Path({str(ran)!r}).write_text('')\n"
        "class OwnConfig(PretrainedConfig):\n    model_type = 'own'\n"
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}))
    with pytest.raises(UsageError, match="comes with code of its own"):
        load_transformers_clip(str(tmp_path))
    assert not asked and not ran.exists()
