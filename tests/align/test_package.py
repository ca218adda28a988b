"""A packaged model opens where its encoders are not, and what could not be copied whole is refused before anything is written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from align.common.errors import DamagedError, FingerprintError, UsageError
from align.encoders.loading import copy_encoder, require_copyable
from align.encoders.spec import TextSpec, VisionSpec
from align.encoders.text import load_text_encoder
from align.encoders.vision import load_vision_encoder
from align.model.config import PackageConfig
from align.model.dual_encoder import SailConfig, SailModel
from align.model.saving import save_model
from align.package import main
from tests.support.tiny_encoders import change_weight, save, save_bert


@pytest.fixture
def run(tmp_path):
    """A run whose text encoder has a Dense module with weights as .bin only; best/ and last/ differ in their scale."""
    vision, text = save(tmp_path / "vision", "dinov2"), save_bert(tmp_path / "text", dense=True)[0]
    dense = next((tmp_path / "text/st").glob("*Dense*"))
    torch.save(load_file(dense / "model.safetensors"), dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    seen, read = load_vision_encoder(VisionSpec(vision)), load_text_encoder(TextSpec(text))
    for name, scale in (("best", 1.0), ("last", 2.0)):
        config = SailConfig(
            vision={"name": vision}, text={"name": text}, vision_fingerprint=seen.fingerprint, text_fingerprint=read.fingerprint,
            vision_width=seen.feature_width, text_width=read.width, width=16, head="linear", log_scale=scale,
        )  # fmt: skip
        read.tokenizer.save_pretrained(tmp_path / "tokenizer")
        save_model(SailModel(config).initialize(0), tmp_path / "run" / name, tmp_path / "tokenizer")
    return tmp_path / "run"


def packaged(run, output="packed", **flags):
    main(PackageConfig(run=str(run), output=str(run.parent / output), **flags))
    return run.parent / output


def test_a_packaged_run_opens_where_its_encoders_are_not(run, tmp_path):
    before = SailModel.from_pretrained(run / "last").text_encoder.encode(["a dog"], 1)
    folder = packaged(run, which="last")
    assert not list(folder.rglob("*.bin")), "what was .bin is safetensors"
    shutil.rmtree(tmp_path / "vision")
    shutil.rmtree(tmp_path / "text")
    model = SailModel.from_pretrained(folder.rename(tmp_path / "moved"))
    assert model.logit_scale.item() == 2.0 and torch.equal(model.text_encoder.encode(["a dog"], 1), before)
    assert model.vision_encoder.id.endswith("vision_encoder")
    with pytest.raises(UsageError, match="is there already"):
        packaged(run, "moved")


def test_encoders_that_were_moved_are_named(run, tmp_path):
    vision, text = (tmp_path / "vision").rename(tmp_path / "v"), (tmp_path / "text/st").rename(tmp_path / "t")
    with pytest.raises(UsageError, match="not a folder"):
        packaged(run)
    assert SailModel.from_pretrained(packaged(run, vision=str(vision), text=str(text))).logit_scale.item() == 1.0
    change_weight(vision, "encoder.layer.1.mlp.fc1.weight")
    with pytest.raises(FingerprintError, match="weights"):
        packaged(run, "other", vision=str(vision), text=str(text))
    assert not (tmp_path / "other").exists()


def test_a_copy_that_does_not_open_alone_is_not_put_into_place(run, tmp_path):
    config = json.loads((tmp_path / "vision/config.json").read_text())
    (tmp_path / "vision/config.json").write_text(json.dumps({**config, "layer_norm_eps": 0.5}))
    text = tmp_path / "text/st"
    change_weight(text, "encoder.layer.1.output.dense.weight")
    with pytest.raises(DamagedError, match="does not open in a process of its own.*weights"):
        packaged(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "text", "tokenizer", "vision"]


def test_what_cannot_be_copied_whole_is_refused(run, tmp_path):
    text = tmp_path / "text/st"
    assert require_copyable(str(text)) > 10_000
    (text / "model.onnx").write_bytes(b"x" * 100)
    (text / ".cache").mkdir()
    (text / ".cache/x.json").write_text("{}")
    copy_encoder(str(text), tmp_path / "copy")
    assert not (tmp_path / "copy/model.onnx").exists() and not (tmp_path / "copy/.cache").exists()
    dense = next(text.glob("*Dense*"))
    torch.save({"a": object()}, dense / "pytorch_model.bin")
    with pytest.raises(DamagedError, match="more than tensors"):
        require_copyable(str(text))
    (dense / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"adapter \(LoRA.*Merge it first"):
        require_copyable(str(text))
