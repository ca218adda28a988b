"""Vision encoders against plain transformers on tiny random models: same tokens, same order, honest fingerprints."""

import json
import pickle
import shutil
import socket
import time

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, BitImageProcessor, ViTImageProcessor

from align.common.errors import DamagedError, OfflineError, UsageError
from align.encoders.families import VISION_ADAPTERS
from align.encoders.loading import resolve_encoder
from align.encoders.spec import VisionSpec
from align.encoders.text import load_text_encoder
from align.encoders.vision import feature_width, load_vision_encoder
from tests.support.tiny_encoders import (
    CASES,
    GRID,
    PATCH,
    SIZE,
    TIMM_CASES,
    VITS,
    change_weight,
    close,
    pixels_of,
    save,
    save_timm,
    tokens_of,
    without_weight,
)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    return save(tmp_path_factory.mktemp("dinov2") / "tiny", "dinov2")


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (75, 100, 3), dtype=np.uint8)).resize((500, 375))


def test_every_adapter_is_tested():
    assert set(VISION_ADAPTERS) == {*CASES, "timm_wrapper"}


@torch.no_grad()
@pytest.mark.parametrize("model_type", CASES)
def test_tokens_are_those_of_the_stock_model(tmp_path, model_type):
    folder = save(tmp_path / "m", model_type)
    encoder = load_vision_encoder(folder)
    pixels = pixels_of(encoder)
    stock = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    cls, patches = CASES[model_type][2](stock, pixels)
    own_cls, own_patches = encoder.encode(pixels)
    close(own_cls, cls)
    close(own_patches, patches)
    assert encoder.patch_grid[0] * encoder.patch_grid[1] == own_patches.shape[1]
    assert (encoder.width, encoder.has_cls) == (patches.shape[-1], cls is not None)
    if model_type in VITS:
        assert encoder.patch_grid == (GRID, GRID)
    pooled = patches.mean(1) if cls is None else torch.cat([cls, patches.mean(1)], -1)
    close(encoder(pixels), pooled)
    assert encoder.feature_width == pooled.shape[-1]
    dense = encoder.dense(pixels)
    close(dense[:, -1], patches[:, -1] if cls is None else torch.cat([cls, patches[:, -1]], -1))


@torch.no_grad()
@pytest.mark.parametrize("case", TIMM_CASES)
def test_tokens_are_those_of_timm(tmp_path, case):
    architecture, arguments, expected = TIMM_CASES[case]
    folder = save_timm(tmp_path / "m", architecture, arguments)
    encoder = load_vision_encoder(folder)
    pixels = pixels_of(encoder)
    stock = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    cls, patches = expected(stock, pixels)
    own_cls, own_patches = encoder.encode(pixels)
    close(own_cls, cls)
    close(own_patches, patches)
    assert encoder.patch_grid[0] * encoder.patch_grid[1] == own_patches.shape[1]
    assert encoder.width == patches.shape[-1]


@torch.no_grad()
@pytest.mark.parametrize("model_type", VITS)
def test_patches_are_in_row_major_order(tmp_path, model_type):
    encoder = load_vision_encoder(VisionSpec(save(tmp_path / "m", model_type), layer=0))
    blank = torch.zeros(1, 3, SIZE, SIZE)
    for row, column in ((0, 0), (0, 2), (1, 0), (2, 1)):
        bright = blank.clone()
        bright[..., row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = 5.0
        change = (encoder.encode(bright)[1] - encoder.encode(blank)[1]).norm(dim=-1)[0]
        assert change.argmax() == row * GRID + column
        assert (change > 1e-4).sum() == 1  # the embeddings of other patches do not see it


@torch.no_grad()
@pytest.mark.parametrize("model_type", VITS)
def test_inner_layers_pass_the_final_norm_and_drop_later_blocks(tmp_path, model_type):
    folder = save(tmp_path / "m", model_type)
    whole = load_vision_encoder(folder)
    assert (whole.layers, whole.layer) == (3, 3)
    pixels = pixels_of(whole)
    every = whole.encode_layers(pixels, range(4))
    for layer, (cls, patches) in enumerate(every):
        part = load_vision_encoder(VisionSpec(folder, layer=layer))
        assert sum(p.numel() for p in part.parameters()) <= sum(p.numel() for p in whole.parameters()) - (layer in (0, 1, 2))
        close(part.encode(pixels)[0], cls, 1e-6)
        close(part.encode(pixels)[1], patches, 1e-6)
    close(every[3][1], whole.encode(pixels)[1], 0)
    assert load_vision_encoder(VisionSpec(folder, layer=-2)).layer == 2


@torch.no_grad()
def test_inner_layers_are_the_stock_hidden_states(dinov2):
    encoder = load_vision_encoder(dinov2)
    pixels = pixels_of(encoder)
    stock = AutoModel.from_pretrained(dinov2).eval()
    hidden = stock(pixels, output_hidden_states=True).hidden_states
    for layer, (cls, patches) in enumerate(encoder.encode_layers(pixels, [0, 1, 2, 3])):
        close(cls, stock.layernorm(hidden[layer])[:, 0])
        close(patches, stock.layernorm(hidden[layer])[:, 1:])


@torch.no_grad()
def test_inner_layers_of_cnns_are_stage_maps(tmp_path):
    folder = save(tmp_path / "c", "dinov3_convnext")
    encoder = load_vision_encoder(folder)
    pixels = pixels_of(encoder)
    hidden = AutoModel.from_pretrained(folder).eval()(pixels, output_hidden_states=True).hidden_states
    second = load_vision_encoder(VisionSpec(folder, layer=2))
    assert (second.width, encoder.width, encoder.layers) == (12, 20, 4)
    close(second.encode(pixels)[1], tokens_of(hidden[2]))
    with pytest.raises(UsageError, match="allowed: 1 to 4, or -4 to -1"):
        load_vision_encoder(VisionSpec(folder, layer=0))


@torch.no_grad()
def test_inner_layers_of_timm_cnns_are_stage_maps(tmp_path):
    folder = save_timm(tmp_path / "t", "test_efficientnet", {})
    encoder = load_vision_encoder(folder)
    pixels = pixels_of(encoder)
    stock = AutoModel.from_pretrained(folder).eval().timm_model
    maps = stock.forward_intermediates(pixels, intermediates_only=True)
    assert encoder.layers == len(maps) + 1
    together = encoder.encode_layers(pixels, [*range(1, len(maps) + 1), -1])
    for (_, patches), expected in zip(together, [*maps, stock.forward_features(pixels)], strict=True):
        close(patches, tokens_of(expected))
    third = load_vision_encoder(VisionSpec(folder, layer=3))
    assert third.width == maps[2].shape[1]
    assert third.patch_grid == tuple(maps[2].shape[2:])
    close(third.encode(pixels)[1], tokens_of(maps[2]))


def test_layers_out_of_range_are_refused(dinov2):
    for layer in (4, -5):
        with pytest.raises(UsageError, match=r"allowed: 0 to 3, or -4 to -1"):
            load_vision_encoder(VisionSpec(dinov2, layer=layer))
    inner = load_vision_encoder(VisionSpec(dinov2, layer=1))
    with pytest.raises(UsageError, match="load it with layer=-1"):
        inner.encode_layers(torch.zeros(1, 3, SIZE, SIZE), [2])


@pytest.mark.parametrize("feature", ["cls", "cls_mean"])
def test_cls_features_need_a_cls(tmp_path, feature):
    with pytest.raises(UsageError, match="feature='mean'"):
        load_vision_encoder(VisionSpec(save(tmp_path / "m", "siglip_vision_model"), feature=feature))
    assert (feature_width(8, "auto", True), feature_width(8, "auto", False), feature_width(8, "cls", True)) == (16, 8, 8)


@torch.no_grad()
def test_bf16_is_close_and_returns_float32(dinov2, tmp_path):
    for folder in (dinov2, save_timm(tmp_path / "t", "test_resnet", {})):
        exact, fast = load_vision_encoder(folder), load_vision_encoder(VisionSpec(folder, precision="bf16"))
        pixels = pixels_of(exact, 4)
        expected, actual = exact(pixels), fast(pixels)
        assert actual.dtype == torch.float32
        assert 0 < (actual - expected).norm() / expected.norm() < 0.02


@torch.no_grad()
def test_an_outer_autocast_does_not_touch_an_fp32_encoder(dinov2):
    encoder = load_vision_encoder(dinov2)
    pixels = pixels_of(encoder)
    expected = encoder(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(pixels), expected)


def test_encoders_stay_frozen(dinov2):
    encoder = load_vision_encoder(dinov2)
    torch.nn.Sequential(encoder).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_transform_is_the_image_processor(dinov2, tmp_path, photo):
    encoder = load_vision_encoder(dinov2)
    expected = AutoImageProcessor.from_pretrained(dinov2)(photo, return_tensors="pt")["pixel_values"][0]
    assert expected.shape == (3, SIZE, SIZE)
    assert expected.dtype == torch.float32
    assert torch.equal(encoder.transform(photo), expected)
    assert torch.equal(pickle.loads(pickle.dumps(encoder.transform))(photo), expected)
    timm = load_vision_encoder(save_timm(tmp_path / "t", "test_resnet", {}))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "t")
    assert torch.equal(timm.transform(photo), processor(photo)["pixel_values"][0])


def test_the_backend_of_the_processor_is_recorded(dinov2, tmp_path):
    def backend(encoder):
        return json.loads(encoder.fingerprint["preprocessing"])["backend"]

    assert backend(load_vision_encoder(dinov2)) == "torchvision"
    assert backend(load_vision_encoder(save_timm(tmp_path / "t", "test_resnet", {}))) == "pil"


def test_image_size_scales_resize_and_crop(dinov2, tmp_path, photo):
    larger = load_vision_encoder(VisionSpec(dinov2, image_size=70))
    assert larger.transform(photo).shape == (3, 70, 70)
    assert larger.patch_grid == (5, 5)
    values = json.loads(larger.fingerprint["preprocessing"])
    assert (values["size"], values["crop_size"]) == ({"shortest_edge": 80}, {"height": 70, "width": 70})
    timm = load_vision_encoder(VisionSpec(save_timm(tmp_path / "t", *TIMM_CASES["vit with cls and registers"][:2]), image_size=70))
    assert timm.patch_grid == (5, 5)
    assert timm(timm.transform(photo)[None]).shape == (1, 64)


@pytest.mark.parametrize("model_type", ["vit", "clip", "siglip", "vit_mae", "ijepa", "dinov3_vit"])
def test_position_embeddings_are_interpolated(tmp_path, model_type):
    assert load_vision_encoder(VisionSpec(save(tmp_path / "m", model_type), image_size=56)).patch_grid == (4, 4)


def test_sizes_that_a_model_cannot_take_are_refused(tmp_path):
    with pytest.raises(UsageError, match="does not take images of 56 x 56"):
        load_vision_encoder(VisionSpec(save(tmp_path / "m", "aimv2_vision_model"), image_size=56))


def test_processors_with_varying_output_are_refused(dinov2, tmp_path):
    shutil.copytree(dinov2, tmp_path / "m")
    BitImageProcessor(size={"shortest_edge": 48}, do_center_crop=False).save_pretrained(tmp_path / "m")
    with pytest.raises(UsageError, match="different shapes"):
        load_vision_encoder(str(tmp_path / "m"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_std": [0.0, 0.0, 0.0]}, "infinite pixels"),
        ({"image_mean": [0.5, 0.5]}, "fails on a plain image"),
        ({"image_mean": "x"}, "fails on a plain image"),
        ({"rescale_factor": 0}, "fails on a plain image|infinite pixels"),
        ({"resample": 99}, "fails on a plain image"),
        ({"do_center_crop": False, "size": {"height": -1, "width": 3}}, "fails on a plain image"),
    ],
)
def test_processors_that_give_no_pixels_are_refused(dinov2, tmp_path, values, message):
    shutil.copytree(dinov2, tmp_path / "m")
    change_processor(tmp_path / "m", **values)
    with pytest.raises(UsageError, match=message):
        load_vision_encoder(str(tmp_path / "m"))


def test_non_square_images_keep_their_grid(dinov2, tmp_path):
    shutil.copytree(dinov2, tmp_path / "m")
    ViTImageProcessor(size={"height": 28, "width": 70}).save_pretrained(tmp_path / "m")
    assert load_vision_encoder(str(tmp_path / "m")).patch_grid == (2, 5)


def change_processor(folder, **values):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


CHANGES = {
    "weights": lambda folder: change_weight(folder, "encoder.layer.2.mlp.fc1.weight"),
    "mean": lambda folder: change_processor(folder, image_mean=[0.5, 0.5, 0.5]),
    "std": lambda folder: change_processor(folder, image_std=[0.5, 0.5, 0.5]),
    "resize": lambda folder: change_processor(folder, size={"shortest_edge": 50}),
    "crop": lambda folder: change_processor(folder, crop_size={"height": 56, "width": 56}),
    "interpolation": lambda folder: change_processor(folder, resample=2),
    "processor": lambda folder: change_processor(folder, image_processor_type="ViTImageProcessor"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprint_follows_the_folder(dinov2, tmp_path, change):
    folder = tmp_path / "tiny"
    shutil.copytree(dinov2, folder)
    before = load_vision_encoder(dinov2).fingerprint
    assert load_vision_encoder(str(folder)).fingerprint == before  # moved, same name
    CHANGES[change](folder)
    after = load_vision_encoder(str(folder)).fingerprint
    assert {key for key in before if before[key] != after[key]} == {"weights" if change == "weights" else "preprocessing"}
    assert all(isinstance(value, str | int) for value in before.values())


def test_fingerprint_follows_the_settings(dinov2):
    before = load_vision_encoder(dinov2).fingerprint
    for setting, value in {"feature": "cls", "layer": 2, "precision": "bf16"}.items():
        after = load_vision_encoder(VisionSpec(dinov2, **{setting: value})).fingerprint
        assert {key for key in before if before[key] != after[key]} == {setting}
    larger = load_vision_encoder(VisionSpec(dinov2, image_size=70)).fingerprint
    assert {key for key in before if before[key] != larger[key]} == {"preprocessing"}
    assert load_vision_encoder(VisionSpec(dinov2, layer=3, feature="cls_mean")).fingerprint == before  # the same, said otherwise


def test_weights_hash_ignores_storage_and_unused_parameters(tmp_path):
    folder = tmp_path / "vit"
    before = load_vision_encoder(save(folder, "vit")).fingerprint
    weights = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in weights.items() if not key.startswith("pooler.")}
    assert len(kept) < len(weights)
    half = len(kept) // 2
    parts = {"model-00001-of-00002.safetensors": list(kept)[half:], "model-00002-of-00002.safetensors": list(kept)[:half]}
    for name, keys in parts.items():
        save_file({key: kept[key] for key in keys}, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_vision_encoder(str(folder)).fingerprint == before


def test_tower_of_a_dual_encoder_has_the_same_weights_alone(tmp_path):
    folder = save(tmp_path / "full", "clip")
    transformers.CLIPModel.from_pretrained(folder).vision_model.save_pretrained(tmp_path / "alone")
    shutil.copy(tmp_path / "full" / "preprocessor_config.json", tmp_path / "alone")
    full, alone = load_vision_encoder(folder), load_vision_encoder(str(tmp_path / "alone"))
    assert full.fingerprint["weights"] == alone.fingerprint["weights"]


def test_half_precision_checkpoints_are_read_as_float32(dinov2, tmp_path):
    shutil.copytree(dinov2, tmp_path / "half")
    AutoModel.from_pretrained(dinov2).half().save_pretrained(tmp_path / "half")
    encoder = load_vision_encoder(str(tmp_path / "half"))
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def as_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def of_type(folder, model_type):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (without_weight, UsageError, "lacks 1 weights of its architecture, such as encoder.layer.1.mlp.fc1.weight"),
        (as_pickle, UsageError, "model.safetensors"),
        (cut, DamagedError, "cannot be read"),
        (lambda folder: of_type(folder, "bert"), UsageError, "'bert' has no vision adapter; known model types: aimv2"),
        (lambda folder: of_type(folder, "nonesuch"), UsageError, "known model types: aimv2"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), UsageError, "preprocessor_config.json"),
        (lambda folder: (folder / "config.json").unlink(), UsageError, "has no config.json"),
    ],
)
def test_bad_folders_are_refused_in_one_line(dinov2, tmp_path, damage, error, message):
    shutil.copytree(dinov2, tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(error, match=message) as caught:
        load_vision_encoder(str(tmp_path / "m"))
    assert "\n" not in str(caught.value)


def test_names_that_lead_nowhere_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (str(tmp_path / "nothing"), "./nothing", "a/b/c"):
        with pytest.raises(UsageError, match="is not a folder"):
            load_vision_encoder(name)
    with pytest.raises(OfflineError, match="give a downloaded folder") as caught:
        load_vision_encoder("nobody/has-this-model")
    assert "\n" not in str(caught.value)
    with pytest.raises(OfflineError):
        load_text_encoder("nobody/has-this-model")


def test_a_hub_that_does_not_answer_is_told_within_five_seconds_and_what_is_cached_is_opened(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(OfflineError, match="hf download nobody/has-this-model --local-dir FOLDER"):
                resolve_encoder("nobody/has-this-model")
            assert time.monotonic() - began < 5
        (tmp_path / "models--nobody--has-this-model/snapshots/0").mkdir(parents=True)
        (tmp_path / "models--nobody--has-this-model/snapshots/0/config.json").touch()
        assert resolve_encoder("nobody/has-this-model") and huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.assets
def test_the_embedded_encoders_know_pictures_and_words():
    """Real weights: the shapes of ASSETS, and paraphrases nearer than other sentences."""
    for name, grid, width, cls in (("efficientnet-lite0", (7, 7), 1280, False), ("vit-s14-focus", (16, 16), 384, True)):
        encoder = load_vision_encoder(f"embedded:{name}")
        assert (encoder.patch_grid, encoder.width, encoder.has_cls) == (grid, width, cls)
        assert torch.isfinite(encoder(encoder.transform(Image.new("RGB", (300, 200), "red"))[None])).all()
    text = load_text_encoder("embedded:minilm")
    dog, puppy, tax = torch.nn.functional.normalize(text.encode(["a dog runs", "a running puppy", "the tax form is due"], 4), dim=-1)
    assert dog @ puppy > dog @ tax + 0.3
