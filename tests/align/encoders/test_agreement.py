"""Every architecture family of timm is read as it is, or refused by name."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from timm.models._registry import _module_to_models

from align.common.errors import UsageError
from align.encoders.agreement import require_agreement
from align.encoders.families import VISION_ADAPTERS
from align.encoders.vision import load_vision_encoder


class Wrapped(torch.nn.Module):
    """What transformers makes of a timm model, as far as adapters use it."""

    def __init__(self, architecture):
        super().__init__()
        self.timm_model = timm.create_model(architecture, num_classes=0).eval()
        self.config = type("Config", (), {"architecture": architecture})
        self.size = self.timm_model.default_cfg["input_size"][1:]

    def forward(self, pixels, do_pooling=False):
        return self.timm_model.forward_features(pixels)


def read(model):
    """Return the backbone of a model if it is read, else raise UsageError."""
    backbone = VISION_ADAPTERS["timm_wrapper"](model)
    require_agreement("some/model", backbone, model.size)
    return backbone


def right(model, backbone):
    """Assert that the patches are those of the model's own output and a grid, by the shapes that timm documents."""
    pixels = torch.randn(2, 3, *model.size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own, tokens = model.timm_model.forward_features(pixels), backbone(pixels, [backbone.count])[0]
    if own.ndim == 4:
        own = own.flatten(1, 2) if own.shape[3] == model.timm_model.num_features else own.flatten(2).transpose(1, 2)
    assert tokens.shape[2] == model.timm_model.num_features
    torch.testing.assert_close(tokens, own, rtol=1e-3, atol=1e-3)
    if model.size[0] == model.size[1] and model.size[0] % 32 == 0:
        assert round((tokens.shape[1] - backbone.prefix) ** 0.5) ** 2 == tokens.shape[1] - backbone.prefix


def test_models_of_tokens_without_a_class_token_are_read_as_they_are():
    model = Wrapped("mixer_s32_224")
    backbone = read(model)
    right(model, backbone)
    assert backbone.fixed and not backbone.has_cls


def test_a_class_token_that_comes_late_is_refused_by_family():
    with pytest.raises(UsageError, match=r"some/model: timm's family 'cait' \(architecture 'cait_xxs24_224'\) cannot be read"):
        read(Wrapped("cait_xxs24_224"))


def test_tokens_in_another_order_are_refused():
    model = Wrapped("mixer_s32_224")
    whole = model.timm_model.forward_features
    for said, order in (
        ("shifted", lambda x: x.roll(1, dims=1)),
        ("columns", lambda x: x.unflatten(1, (7, 7)).transpose(1, 2).flatten(1, 2)),
    ):
        model.timm_model.forward_features = lambda pixels, order=order: order(whole(pixels))
        with pytest.raises(UsageError, match=said):
            read(model)


def smallest(module):
    """Return the architecture of a file of timm with the fewest parameters; None if none can be made."""
    sizes = {}
    for name in _module_to_models[module]:
        try:
            with torch.device("meta"):
                sizes[name] = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        except (RuntimeError, NotImplementedError, TypeError):  # some compute numbers while they are made
            continue
    return min(sizes, key=lambda name: sizes[name]) if sizes else min(_module_to_models[module], key=len)


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted(_module_to_models))
def test_every_family_of_timm_is_read_as_it_is_or_refused(module):
    model = Wrapped(smallest(module))
    try:
        backbone = read(model)
    except UsageError as error:
        assert model.config.architecture in str(error)
        return
    right(model, backbone)


TINY = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2}


def saved_by_timm(folder, edit=lambda config: None, safe=True, **arguments):
    model = timm.create_model("vit_tiny_patch16_224", **TINY, **arguments)
    timm.models.save_for_hf(model, str(folder), model_args={**TINY, **arguments}, safe_serialization=safe)
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    return model.eval()


@pytest.mark.parametrize("arguments", [{}, {"num_classes": 5}, {"class_token": False, "global_pool": "avg"}], ids=str)
def test_folders_saved_by_timm_give_the_tokens_of_timm(tmp_path, arguments):
    model, pixels = saved_by_timm(tmp_path / "m", **arguments), torch.randn(2, 3, 32, 32)
    encoder = load_vision_encoder(str(tmp_path / "m"))
    expected = model.forward_features(pixels)[:, model.num_prefix_tokens :]
    assert encoder.layers == 3 and torch.allclose(encoder.encode(pixels)[1], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda config: config.pop("pretrained_cfg"), r'no pretrained_cfg.*"input_size": \[3, 32, 32\].*"mean"'),
        (lambda config: config.update(pretrained_cfg=None, architecture="nothing"), "timm .* does not know this architecture"),
        (lambda config: config.pop("architecture"), "architecture None"),
        (lambda config: config.update(model_args=[1]), r"model_args \[1\].*as an object"),
        (lambda config: config["model_args"].update(foo=1), "unexpected keyword argument 'foo'.*save_for_hf"),
        (lambda config: config.pop("model_args"), "other shapes.*model_args=.*safe_serialization=True"),
    ],
)
def test_what_a_folder_of_timm_lacks_is_said_with_the_way_out(tmp_path, edit, said):
    saved_by_timm(tmp_path / "m", edit)
    with pytest.raises(UsageError, match=said):
        load_vision_encoder(str(tmp_path / "m"))


def test_a_pickle_of_timm_is_refused_with_a_command_that_converts_it(tmp_path):
    saved_by_timm(tmp_path / "m", safe=False)
    with pytest.raises(UsageError, match="safe_serialization=True") as caught:
        load_vision_encoder(str(tmp_path / "m"))
    code = str(caught.value).partition('python -c "')[2].removesuffix('"')
    subprocess.run([sys.executable, "-c", code], check=True)
    assert load_vision_encoder(str(tmp_path / "m")).width == 32
