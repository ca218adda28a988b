"""What the machine is good at: which arithmetic is fast on a device."""

from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]
Arithmetic = Literal["fp32", "bf16"]


def resolve_precision(precision: Precision, device: torch.device) -> Arithmetic:
    """Return `precision`, with `auto` resolved to bf16 where the device computes it in hardware, else fp32.

    A CPU without AMX or AVX512-BF16 emulates bf16: 78 times slower than fp32 in matrix products on AVX2 (docs/decisions.md).
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    else:
        fast = False
    return "bf16" if fast else "fp32"
