"""FLOPs of a training step, from the model's shapes, and counts of what each micro-batch holds.

FLOPs are the model's own (a multiplication and an addition are two). Recomputation for gradient checkpointing and padding do not
count. Legend: `L` tokens of a row, `H` width, `V` vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mllm.conversations.tokens import IGNORED
from mllm.loop.parameter_groups import size, unwrapped
from mllm.model.modeling import SailLlavaConfig, SailLlavaModel

PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "L40S": 362.0, "RTX 4090": 165.0, "V100": 125.0}  # dense, 16 bit
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # names of config fields
ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k_experts")


@dataclass(frozen=True)
class StepCost:
    """FLOPs of a forward and backward pass per token (text or visual), per pair of a row's L^2, per supervised token, and per image."""

    token: float
    pair: float
    label: float
    image: float

    def flops(self, lengths: Sequence[int], labels: int, images: int) -> float:
        """Return the FLOPs of a step over rows of the given lengths. The rows of a pack count one by one."""
        return self.token * sum(lengths) + self.pair * sum(length**2 for length in lengths) + self.label * labels + self.image * images


class Collate:
    """Makes a batch and adds `counts`: its tokens, slots (tokens and padding), supervised tokens, images and FLOPs."""

    def __init__(self, collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]], cost: StepCost) -> None:
        self.collate, self.cost = collate, cost

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(items)
        lengths: list[int] = []  # of rows, those of a pack one by one
        for item in items:
            starts = (item["position_ids"] == 0).nonzero().flatten()
            lengths += starts.diff(append=torch.tensor([len(item["position_ids"])])).tolist()
        images = sum(len(item["pixel_values"]) for item in items)
        supervised = int((batch["labels"][:, 1:] != IGNORED).sum())  # the first token of a sequence is never predicted
        batch["counts"] = {
            "tokens": float(sum(lengths)), "slots": float(batch["labels"].numel()), "supervised": float(supervised),
            "images": float(images), "flops": self.cost.flops(lengths, supervised, images),
        }  # fmt: skip
        return batch


def step_cost(model: nn.Module, image: float) -> StepCost:
    """Return the cost of training `model`. `image` is from `image_flops`. Attention counts all L^2 pairs, though half are masked."""
    inner = unwrapped(model)
    text = inner.config.text_config
    token = sum(2.0 * count * (2 + trained) for count, trained in _products(inner.model.language_model, text))
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    pair = 3 * 4.0 * heads * width * text.num_hidden_layers  # QK^T and AV, forward and twice backward
    rows = hasattr(inner.lm_head, "token_adapter")  # peft trains some rows: the gradient of all is computed
    output = inner.lm_head.token_adapter.base_layer.weight if rows else inner.lm_head.weight
    label = 2.0 * size(output) * (2 + (rows or output.requires_grad))
    return StepCost(token, pair, label, image)


def _products(language: nn.Module, config: Any) -> Iterator[tuple[float, bool]]:
    """Yield, for each matrix that a token is multiplied with, its size and whether it is trained. Of experts only the active ones count."""
    sizes = config.to_dict()
    experts = next((sizes[name] for name in EXPERTS if sizes.get(name)), 0)
    active = next((sizes[name] for name in ACTIVE if sizes.get(name)), experts) / max(1, experts)
    for module in language.modules():
        if isinstance(module, nn.Embedding | nn.ParameterDict | nn.Conv1d):
            continue
        for parameter in module.parameters(recurse=False):
            shape = tuple(parameter.ds_shape) if hasattr(parameter, "ds_shape") else tuple(parameter.shape)
            if len(shape) == 2 or (len(shape) == 3 and shape[0] == experts):
                yield size(parameter) * (active if len(shape) == 3 else 1), parameter.requires_grad


def image_flops(config: SailLlavaConfig, rates: Mapping[str, float]) -> float:
    """Return the exact FLOPs of one image through encoder, head and projector, counted on the meta device.

    Call it before DeepSpeed's ZeRO-3 is set up, which would try to partition this copy of the model.
    """
    slim = SailLlavaConfig.from_dict(config.to_dict())
    slim.text_config.num_hidden_layers = 1
    with torch.device("meta"):
        shadow = SailLlavaModel(slim)
        pixels = torch.zeros(1, *config.pixel_shape())
    for place in shadow.places:
        place.vision_tower.requires_grad_(rates["vision"] > 0)
        place.sail_head.requires_grad_(rates["head"] > 0)
    for projector in shadow.projectors:
        for name, parameter in projector.named_parameters():
            parameter.requires_grad_(rates["raw" if name.startswith("linear_raw.") else "projector"] > 0)
    shadow.train()
    with FlopCounterMode(display=False) as counter:
        [tokens] = shadow.get_image_features(pixels, return_dict=True).pooler_output
        if tokens.requires_grad:
            tokens.sum().backward()
    return float(counter.get_total_flops())


def peak_tflops(device: torch.device) -> float | None:
    """Return the dense 16-bit peak of a known GPU in TFLOP/s, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_TFLOPS.items() if known in name), None)
