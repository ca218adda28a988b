"""open_clip's models against the stock ones, on tiny random weights: tags, local files, and what is refused."""

import json

import numpy as np
import open_clip
import pytest
import torch
from open_clip import pretrained
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import normalize

from align.common.errors import DamagedError, OfflineError, UsageError
from align.encoders.transforms import pixel_normalizer
from eval.models.openclip import load_openclip
from tests.support.tiny_clip import TEXTS, shake


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


ARCHITECTURES = {
    "kit-tiny": {"image_size": 32, "quick_gelu": False},
    "kit-tiny-quickgelu": {"image_size": 32, "quick_gelu": True},
    "kit-tiny-48": {"image_size": 48, "quick_gelu": False},
}


@pytest.fixture(scope="module")
def clip_files(tmp_path_factory):
    """A folder with weights of kit-tiny; the architectures are registered for this module only."""
    folder = tmp_path_factory.mktemp("openclip")
    before = dict(open_clip.factory._MODEL_CONFIGS), list(open_clip.factory._MODEL_CONFIG_PATHS)
    for name, values in ARCHITECTURES.items():
        config = {
            "embed_dim": 20,
            "quick_gelu": values["quick_gelu"],
            "vision_cfg": {"image_size": values["image_size"], "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
            "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
        }
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    model = shake(open_clip.create_model("kit-tiny"))
    save_file(model.state_dict(), folder / "model.safetensors")
    yield folder
    open_clip.factory._MODEL_CONFIGS, open_clip.factory._MODEL_CONFIG_PATHS = before


def stock(folder, architecture="kit-tiny"):
    model = open_clip.create_model(architecture, pretrained=str(folder / "model.safetensors"))
    return model.eval()


@torch.no_grad()
def test_an_open_clip_model_is_the_stock_one(clip_files):
    model, baseline = stock(clip_files), load_openclip(f"kit-tiny/{clip_files}/model.safetensors")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    transform = open_clip.image_transform(32, is_train=False, mean=model.visual.image_mean, std=model.visual.image_std)
    pixels = transform(picture)[None]
    assert torch.equal(baseline.vision_encoder.transform(picture), pixels[0])
    close(baseline.vision_encoder(pixels), model.encode_image(pixels))
    expected = model.encode_text(open_clip.get_tokenizer("kit-tiny")(TEXTS))  # the fourth is longer than the context
    close(baseline.text_encoder.encode(TEXTS, 2), expected)
    assert baseline.width == 20 and baseline.scale == pytest.approx(float(model.logit_scale.exp()))
    assert not any(parameter.requires_grad for parameter in baseline.parameters()) and not baseline.train().training
    assert pixel_normalizer(baseline.transform).mean == pytest.approx(model.visual.image_mean)


@torch.no_grad()
def test_dense_open_clip_embeddings_at_its_own_and_at_another_size(clip_files):
    baseline = load_openclip(f"kit-tiny{clip_files}/model.safetensors")  # a path from the root after the architecture
    for size, architecture in ((32, "kit-tiny"), (48, "kit-tiny-48")):
        model = stock(clip_files, architecture)  # open_clip's own loader interpolates the position embeddings
        pixels = torch.randn(2, 3, size, size)
        given = model.visual.forward_intermediates(pixels, indices=1, normalize_intermediates=True, output_fmt="NLC")
        expected = normalize(given["image_intermediates"][-1] @ model.visual.proj, dim=-1)
        close(baseline.project_patches(baseline.encode_patches(pixels)), expected)
    assert baseline.encode_patches(torch.randn(1, 3, 16, 40)).shape == (1, 10, 20) and baseline.patch_size == 8
    pixels = torch.randn(2, 3, 32, 32)
    close(baseline.vision_encoder(pixels), stock(clip_files).encode_image(pixels))  # its own positions are as they were


def test_files_that_are_not_safe_or_do_not_fit_are_refused(clip_files, tmp_path):
    where = f"{clip_files}/model.safetensors"
    torch.save({}, tmp_path / "model.pt")
    weights = stock(clip_files).state_dict()
    save_file({name: value for name, value in weights.items() if "ln_post" not in name}, tmp_path / "less.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((clip_files / "model.safetensors").read_bytes()[:999])
    for source, message in (
        (f"kit-tiny/{tmp_path}/model.pt", "safetensors"),
        (f"kit-tiny/{tmp_path}/none.safetensors", "neither a file nor a pretrained tag"),
        (f"kit-tiny-48/{where}", "another image size"),
        (f"kit-tinny/{where}", "did you mean 'kit-tiny'"),
        ("kit-tiny", "ARCH/TAG"),
        (f"kit-tiny/{tmp_path}/less.safetensors", "needed are weights of this architecture"),
        (f"ViT-L-14/{where}", "open_clip_config.json"),
    ):
        with pytest.raises(UsageError, match=message):
            load_openclip(source)
    with pytest.raises(DamagedError, match="cannot be read"):
        load_openclip(f"kit-tiny/{tmp_path}/cut.safetensors")


def test_a_config_beside_the_weights_is_followed(clip_files, tmp_path):
    config = json.loads((clip_files / "kit-tiny-quickgelu.json").read_text())
    described = {"model_cfg": config, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    (tmp_path / "w.safetensors").write_bytes((clip_files / "model.safetensors").read_bytes())
    beside = load_openclip(f"kit-tiny/{tmp_path}/w.safetensors")
    plain = load_openclip(f"kit-tiny/{clip_files}/model.safetensors")
    assert json.loads(beside.vision_fingerprint["preprocessing"])["mean"] == [0.1, 0.2, 0.3]
    assert beside.vision_fingerprint["architecture"] != plain.vision_fingerprint["architecture"]
    assert beside.vision_fingerprint["weights"] == plain.vision_fingerprint["weights"]
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        close(beside.vision_encoder(pixels), stock(clip_files, "kit-tiny-quickgelu").encode_image(pixels))


def test_a_tag_says_itself_how_it_was_trained(clip_files, monkeypatch):
    tag = {
        "file": str(clip_files / "model.safetensors"),
        "quick_gelu": True,
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "interpolation": "bicubic",
    }
    monkeypatch.setitem(pretrained._PRETRAINED, "kit-tiny", {"mine": tag})
    baseline = load_openclip("kit-tiny/mine")
    assert json.loads(baseline.vision_fingerprint["preprocessing"])["std"] == [0.25] * 3
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        close(baseline.vision_encoder(pixels), stock(clip_files, "kit-tiny-quickgelu").encode_image(pixels))
    own = load_openclip(f"kit-tiny/{clip_files}/model.safetensors")  # a file is prepared as the tags are
    assert json.loads(own.vision_fingerprint["preprocessing"])["std"] == [0.25] * 3


def test_a_tag_that_cannot_be_fetched_says_what_to_do(clip_files, monkeypatch):
    monkeypatch.setitem(pretrained._PRETRAINED, "kit-tiny", {"far": {"hf_hub": "nobody/nothing/"}})

    def unreachable(*_, **__):
        raise FileNotFoundError("no network here")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", unreachable)
    with pytest.raises(OfflineError, match=r"openclip:kit-tiny/PATH/open_clip_model.safetensors"):
        load_openclip("kit-tiny/far")


# side by side
