"""Inputs of a SailLlava: whole images as pixels, and prompts in which each image placeholder becomes N visual tokens.

Legend: `B` images, `N` visual tokens an image. This file is copied into every saved model, so it imports only what the copy has.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor, BaseImageProcessor, BatchFeature, LlavaProcessor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData

from align.common.errors import UsageError
from mllm.model.modeling import SailLlavaConfig

ASPECT_RATIOS = ("pad", "resize")
_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


class SailLlavaImageProcessor(BaseImageProcessor):
    """Resizes whole images with Pillow to `size`, with or without padding to its shape before. Nothing is cropped.

    `size` is {"height", "width"} in pixels, `resample` a PIL filter number. `image_mean` and `image_std` are for values between 0
    and 1. `image_aspect_ratio`: `pad` centers the image on the mean color (as LLaVA-1.5 does), `resize` changes its shape. `beside` has
    size, mean, std, filter and scale for each further encoder of a model.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self, size: dict[str, int] | None = None, image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5), resample: int = 3, rescale_factor: float = 1 / 255,
        image_aspect_ratio: str = "pad", beside: Sequence[dict[str, Any]] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)
        if image_aspect_ratio not in ASPECT_RATIOS:
            raise UsageError(f"image_aspect_ratio is {image_aspect_ratio!r}; allowed: {', '.join(ASPECT_RATIOS)}")
        self.size = dict(size) if size else {"height": 224, "width": 224}
        self.image_mean, self.image_std = [float(x) for x in image_mean], [float(x) for x in image_std]
        self.resample, self.rescale_factor, self.image_aspect_ratio = int(resample), rescale_factor, image_aspect_ratio
        self.beside = [dict(values) for values in beside] if beside else None

    @property
    def pad_color(self) -> tuple[int, ...]:
        """The mean as an 8-bit color, rounded down as in LLaVA: such pixels are about 0 after normalization."""
        return tuple(min(255, max(0, int(mean / self.rescale_factor + 1e-6))) for mean in self.image_mean)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **_: Any) -> BatchFeature:
        """Return pixel_values (B, 3, H, W) float32 of an image or a (nested) list of images, PIL or arrays with channels first or last.

        For several encoders they are (B, 3, pixels): those for one encoder after those for the other.
        """
        flat: Any = make_flat_list_of_images(self.fetch_images(images))
        return BatchFeature({"pixel_values": torch.stack([self.to_pixels(image) for image in flat])}, tensor_type=return_tensors)

    def to_pixels(self, image: Any) -> Tensor:
        """Return one image as (3, H, W) float32, for several encoders as (3, pixels)."""
        image = upright_rgb(image if isinstance(image, Image.Image) else to_pil_image(image))
        own = self._pixels(image)
        others = [type(self)(**values, image_aspect_ratio=self.image_aspect_ratio) for values in self.beside or ()]
        return torch.cat([own.flatten(1), *(other._pixels(image).flatten(1) for other in others)], dim=1) if others else own

    def _pixels(self, image: Image.Image) -> Tensor:
        """Return an upright RGB image as (3, H, W) float32 of this size."""
        if self.image_aspect_ratio == "pad":
            image = self._padded(image)
        image = image.resize((self.size["width"], self.size["height"]), Image.Resampling(self.resample))
        values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() * self.rescale_factor  # (3, H, W)
        mean, std = (torch.tensor(channel).view(3, 1, 1) for channel in (self.image_mean, self.image_std))
        return (values - mean) / std

    def _padded(self, image: Image.Image) -> Image.Image:
        """Return the image centered on the smallest canvas that has the target's shape and holds it."""
        height, width = self.size["height"], self.size["width"]
        across = max(image.width, round(image.height * width / height))
        down = max(image.height, round(image.width * height / width))
        if (across, down) == image.size:
            return image
        canvas = Image.new("RGB", (across, down), self.pad_color)
        canvas.paste(image, ((across - image.width) // 2, (down - image.height) // 2))
        return canvas


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return the image as 8-bit RGB: EXIF orientation applied, transparency composited on white, as `align.sources.gate` does."""
    image = ImageOps.exif_transpose(image)
    if image.mode in _ALPHA or "transparency" in image.info:
        if image.mode in ("RGBa", "La"):  # premultiplied: converts only to its own plain mode
            image = image.convert(image.mode.upper())
        layered = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered)
    return image.convert("RGB")


class SailLlavaProcessor(LlavaProcessor):
    """Image processor and tokenizer in one. Each `<image>` in a text becomes `image_seq_length` visual tokens.

    `image_places` are texts, one for each visual token, that are written after it: where it is. None: visual tokens alone.
    """

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, patch_size: int | None = None,
        vision_feature_select_strategy: str = "full", chat_template: str | None = None, image_token: str = "<image>",
        num_additional_image_tokens: int = 0, image_seq_length: int = 1, image_places: Sequence[str] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.image_seq_length, self.image_places = image_seq_length, list(image_places) if image_places else None
        super().__init__(
            image_processor, tokenizer, patch_size, vision_feature_select_strategy, chat_template, image_token,
            num_additional_image_tokens, **kwargs,
        )  # fmt: skip

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Return the placeholder of one image for each of its visual tokens, with `image_places` after them."""
        return "".join(f"{self.image_token}{place}" for place in self.image_places or [""] * self.image_seq_length)

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        count = len(image_sizes) if image_sizes is not None else 0
        return MultiModalData(num_image_tokens=[self.image_seq_length] * count, num_image_patches=[1] * count)


_BACKENDS: dict[str, type] = dict.fromkeys(("pil", "torchvision"), SailLlavaImageProcessor)  # transformers asks for the latter
AutoImageProcessor.register(SailLlavaConfig, image_processor_classes=_BACKENDS, exist_ok=True)
AutoProcessor.register(SailLlavaConfig, SailLlavaProcessor, exist_ok=True)
