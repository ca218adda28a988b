"""Dense features of images larger than a model was trained on: the stock models' own interpolation, patch by patch."""

from functools import partial

import numpy as np
import pytest
import timm
import torch
from transformers import AutoModel

from align.common.errors import UsageError
from align.encoders.families import VISION_ADAPTERS
from align.encoders.spec import VisionSpec
from align.encoders.vision import load_vision_encoder
from tests.support.tiny_encoders import CASES, PATCH, SIZE, TIMM_CASES, VITS, close, save, save_timm

ASKED = ("vit", "vit_mae", "ijepa", "clip", "clip_vision_model", "siglip", "siglip_vision_model")  # interpolate only if told to
FIXED = ("aimv2_vision_model",)  # learned positions that transformers does not interpolate


def random_pixels(height, width, count=2):
    return torch.randn((count, 3, height, width), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("size", [(2 * SIZE, 2 * SIZE), (SIZE, 3 * SIZE)])
@pytest.mark.parametrize("model_type", [name for name in VITS if name not in FIXED])
def test_larger_images_have_more_patches_as_in_the_stock_model(tmp_path, model_type, size):
    folder = save(tmp_path / "m", model_type)
    encoder = load_vision_encoder(folder)
    stock = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    if model_type in ASKED:
        asked = stock.vision_model if model_type in ("clip", "siglip") else stock
        asked.forward = partial(asked.forward, interpolate_pos_encoding=True)
    pixels = random_pixels(*size)
    cls, patches = CASES[model_type][2](stock, pixels)
    own_cls, own_patches = encoder.encode(pixels)
    assert encoder.patch_size == PATCH
    assert own_patches.shape[1] == size[0] // PATCH * (size[1] // PATCH) == patches.shape[1]
    close(own_cls, cls)
    close(own_patches, patches)


@torch.no_grad()
@pytest.mark.parametrize("model_type", [name for name in VITS if name not in FIXED])
def test_patches_of_a_wide_image_are_in_row_major_order(tmp_path, model_type):
    encoder = load_vision_encoder(VisionSpec(save(tmp_path / "m", model_type), layer=0))
    blank = torch.zeros(1, 3, 2 * PATCH, 5 * PATCH)
    bright = blank.clone()
    bright[..., PATCH:, 3 * PATCH : 4 * PATCH] = 5.0
    change = (encoder.encode(bright)[1] - encoder.encode(blank)[1]).norm(dim=-1)[0]
    assert len(change) == 10 and change.argmax() == 5 + 3


@torch.no_grad()
@pytest.mark.parametrize("model_type", sorted(set(CASES) - set(VITS)))
def test_cnns_take_any_size(tmp_path, model_type):
    encoder = load_vision_encoder(save(tmp_path / "m", model_type))
    stock = AutoModel.from_pretrained(encoder.id, dtype=torch.float32).eval()
    pixels = random_pixels(64, 160)
    assert encoder.patch_size == 32
    assert encoder.encode(pixels)[1].shape[1] == 2 * 5
    close(encoder.encode(pixels)[1], CASES[model_type][2](stock, pixels)[1])


def test_every_family_is_tested_or_refuses():
    assert set(VISION_ADAPTERS) == {*CASES, "timm_wrapper"} and set(FIXED) < set(VITS)


@torch.no_grad()
@pytest.mark.parametrize("case", ["vit with cls and registers", "vit with registers, no cls", "distilled deit"])
def test_timm_vits_are_as_if_created_with_dynamic_img_size(tmp_path, case):
    architecture, arguments, expected = TIMM_CASES[case]
    encoder = load_vision_encoder(save_timm(tmp_path / "m", architecture, arguments))
    stock = AutoModel.from_pretrained(encoder.id, dtype=torch.float32).eval()
    dynamic = timm.create_model(architecture, pretrained=False, num_classes=0, dynamic_img_size=True, **arguments).eval()
    dynamic.load_state_dict({name: value for name, value in stock.timm_model.state_dict().items() if not name.startswith("head")})
    stock.timm_model = dynamic
    for pixels in (random_pixels(2 * SIZE, 2 * SIZE), random_pixels(SIZE, 3 * SIZE)):
        cls, patches = expected(stock, pixels)
        close(encoder.encode(pixels)[0], cls)
        close(encoder.encode(pixels)[1], patches)
        assert patches.shape[1] == pixels.shape[2] // PATCH * (pixels.shape[3] // PATCH)


@torch.no_grad()
@pytest.mark.parametrize("case", ["efficientnet", "resnet"])
def test_timm_cnns_take_any_size(tmp_path, case):
    architecture, arguments, expected = TIMM_CASES[case]
    encoder = load_vision_encoder(save_timm(tmp_path / "m", architecture, arguments))
    stock = AutoModel.from_pretrained(encoder.id, dtype=torch.float32).eval()
    side = encoder.patch_size
    pixels = random_pixels(2 * side, 3 * side)
    close(encoder.encode(pixels)[1], expected(stock, pixels)[1])
    assert encoder.encode(pixels)[1].shape[1] == 6


@torch.no_grad()
@pytest.mark.parametrize("case", [*FIXED, "channels-last swin"])
def test_models_of_one_size_refuse_others(tmp_path, case):
    folder = save(tmp_path / "m", case) if case in CASES else save_timm(tmp_path / "m", *TIMM_CASES[case][:2])
    encoder = load_vision_encoder(folder)
    assert encoder.dense(random_pixels(*encoder.image_size)).shape[1] == np.prod(encoder.patch_grid)
    with pytest.raises(UsageError, match=r"takes \d+ x \d+ only.*image_size"):
        encoder.dense(random_pixels(2 * SIZE, 2 * SIZE))


@torch.no_grad()
def test_dense_features_are_what_a_head_takes(tmp_path):
    folder = save(tmp_path / "m", "dinov2")
    pixels = random_pixels(SIZE, SIZE)
    cls, patches = load_vision_encoder(folder).encode(pixels)
    both = torch.cat([cls[:, None].expand_as(patches), patches], -1)
    for feature, expected in (("cls_mean", both), ("mean", patches), ("cls", patches)):
        encoder = load_vision_encoder(VisionSpec(folder, feature=feature))
        close(encoder.dense(pixels), expected, 0)
        assert expected.shape[-1] == encoder.feature_width
