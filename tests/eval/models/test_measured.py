"""How models are named on the command line, and SailModel seen through the protocol of dual encoders."""

import pytest
import torch
from torch import nn

from align.common.errors import UsageError
from align.model.dual_encoder import SailConfig, SailModel
from eval.models.dual_encoder import SailDualEncoder
from eval.models.measured import REFERENCES, load_models, split_name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("runs/mine", ("", "runs/mine")),
        ("mine=runs/mine", ("mine", "runs/mine")),
        ("mine=/runs/lr=1e-3/best", ("mine", "/runs/lr=1e-3/best")),
        ("/runs/lr=1e-3/best", ("", "/runs/lr=1e-3/best")),
        ("./lr=1", ("", "./lr=1")),
        ("openclip:ViT-L-14/openai", ("", "openclip:ViT-L-14/openai")),
        ("CLIP-L=openclip:ViT-L-14/openai", ("CLIP-L", "openclip:ViT-L-14/openai")),
        ("openclip:ViT-B-32/a=b/model.safetensors", ("", "openclip:ViT-B-32/a=b/model.safetensors")),
        ("hf:folders/x=y", ("", "hf:folders/x=y")),
        ("S=hf:google/siglip", ("S", "hf:google/siglip")),
        ("=x", ("", "=x")),
        ("name=", ("", "name=")),
    ],
)
def test_a_name_is_what_stands_before_the_first_equals_sign_of_no_path(given, expected):
    assert split_name(given) == expected


def test_what_exists_is_a_path_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    assert split_name("lr=1") == ("", "lr=1")
    assert split_name("lr=2") == ("lr", "2")


def save(folder, **changes):
    settings = {"vision_width": 4, "text_width": 6, "width": 8, "vision_fingerprint": {"weights": "1"}, "head": "glu", "expansion": 2}
    SailModel(SailConfig(**{**settings, **changes})).initialize(3).save_pretrained(folder)
    return str(folder)


class Loaded(nn.Module):
    """Stands for a reference model that was loaded."""

    description, width = "a CLIP", 5
    vision_fingerprint, text_fingerprint = {"weights": "v"}, {"weights": "t"}


@pytest.fixture
def loaded(monkeypatch):
    seen = []
    for library in list(REFERENCES):
        monkeypatch.setitem(REFERENCES, library, lambda source, library=library: seen.append((library, source)) or Loaded())
    return seen


def test_reference_models_stand_beside_others_and_have_no_untrained_twin(tmp_path, loaded):
    folder = save(tmp_path / "run" / "best")
    models = (str(tmp_path / "run"), "openclip:ViT-L-14/openai", "S=hf:some/siglip")
    found = load_models(models, "cpu", seed=4)
    assert [(one.record.name, one.record.kind) for one in found] == [
        ("trained", "trained"),
        ("ViT-L-14/openai", "clip"),
        ("S", "clip"),
        ("untrained", "untrained"),
    ]
    assert loaded == [("openclip", "ViT-L-14/openai"), ("hf", "some/siglip")]
    assert found[0].record.folder == folder and found[1].record.folder == ""
    assert found[1].record.fingerprint == {"vision weights": "v", "text weights": "t"}
    assert "5 dimensions" in found[1].record.description
    assert found[0].record.fingerprint["heads"] != found[3].record.fingerprint["heads"]


def test_only_models_of_two_kinds_need_names(tmp_path, loaded):
    a, b = save(tmp_path / "a"), save(tmp_path / "b")
    assert [one.record.name for one in load_models([a, f"b={b}"], "cpu", untrained=False)] == [a, "b"]
    with pytest.raises(UsageError, match="same name"):
        load_models(["x=hf:one", "x=hf:two"], "cpu")
    assert not loaded
    with pytest.raises(UsageError, match="openclip:ARCH/TAG"):
        load_models([str(tmp_path)], "cpu")


def test_folders_are_checked_before_any_model_is_loaded(tmp_path, loaded):
    with pytest.raises(UsageError, match="neither an aligned model"):
        load_models(["hf:one", str(tmp_path / "typo")], "cpu")
    assert not loaded


def test_a_sail_model_is_a_dual_encoder(tmp_path):
    sail = SailModel.from_pretrained(save(tmp_path / "m", log_scale=2.5))
    dual = SailDualEncoder(sail)
    images, texts = torch.randn(3, 5, 4), torch.randn(7, 6)
    assert dual.vision_fingerprint == {"weights": "1"} and dual.text_fingerprint == {}
    assert torch.equal(dual.project_image(images), sail.project_image(images).detach()) and not dual.project_image(images).requires_grad
    assert torch.equal(dual.project_text(texts), sail.project_text(texts).detach())
    assert dual.scale == pytest.approx(2.718281828**2.5) and dual.device == torch.device("cpu")
    with pytest.raises(UsageError, match="already encoded"):
        _ = dual.vision_encoder
