"""What an image processor does besides resizing is read from it: mean, deviation and filter, as Pillow computes them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from transformers import BitImageProcessor

from align.common.errors import UsageError
from align.encoders.transforms import Transform, pixel_normalizer
from align.encoders.vision import load_vision_encoder
from tests.support.tiny_encoders import close, save_timm

SOLID = Image.new("RGB", (90, 70), (200, 30, 7))  # a single color stays what it is through any resize and crop
HALF = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


@pytest.mark.parametrize(
    "settings",
    [HALF, {**HALF, "do_normalize": False}, {**HALF, "do_rescale": False}, {**HALF, "rescale_factor": 1 / 127.5}],
    ids=["usual", "no normalize", "no rescale", "other factor"],
)
def test_pixels_are_scaled_as_by_the_processor(settings):
    transform = Transform(BitImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 42, "width": 42}, resample=3, **settings))
    normalizer = pixel_normalizer(transform)
    close(normalizer(SOLID, (42, 42)), transform(SOLID))
    assert normalizer.resample is Image.Resampling.BICUBIC


def test_pixels_are_scaled_as_by_timm_and_torchvision(tmp_path):
    wrapped = load_vision_encoder(save_timm(tmp_path / "t", "test_resnet", {})).transform
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    bilinear = transforms.Resize(50, interpolation=transforms.InterpolationMode.BILINEAR)
    compose = transforms.Compose([bilinear, transforms.CenterCrop(42), transforms.ToTensor(), transforms.Normalize(mean, std)])
    for transform, resample in ((wrapped, Image.Resampling.BICUBIC), (compose, Image.Resampling.BILINEAR)):
        normalizer = pixel_normalizer(transform)
        close(normalizer(SOLID, (42, 42)), transform(SOLID))
        assert normalizer.resample is resample


def test_resizing_is_pillows(tmp_path):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (31, 57, 3), dtype=np.uint8))
    pixels = pixel_normalizer(transforms.Compose([transforms.Resize(8, interpolation=transforms.InterpolationMode.BICUBIC)]))(
        photo, (28, 42)
    )
    expected = np.asarray(photo.resize((42, 28), Image.Resampling.BICUBIC)) / np.float32(255)
    assert pixels.shape == (3, 28, 42) and pixels.dtype == torch.float32
    close(pixels, torch.from_numpy(expected).permute(2, 0, 1))


@pytest.mark.parametrize("transform", [lambda image: image, transforms.ToTensor()])
def test_a_transform_that_says_nothing_is_refused(transform):
    with pytest.raises(UsageError, match="cannot read mean"):
        pixel_normalizer(transform)


def test_a_filter_pillow_does_not_have_is_refused():
    exact = transforms.Compose([transforms.Resize(8, interpolation=transforms.InterpolationMode.NEAREST_EXACT)])
    with pytest.raises(UsageError, match="NEAREST_EXACT"):
        pixel_normalizer(exact)
