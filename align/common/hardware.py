"""Device and precision: where a run computes, in fp32 or bf16; and the CPU cores and memory it uses."""

import ctypes
import os
import sys
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "fp32", "bf16"]
Arithmetic = Literal["fp32", "bf16"]


def choose_device(name: str = "auto") -> "torch.device":
    """Return the device called `name`; `auto` is the current GPU if there is one, else the CPU."""
    import torch

    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: Precision, device: "torch.device") -> Arithmetic:
    """Return `precision`; `auto` becomes bf16 where the device computes it in hardware, else fp32."""
    import torch  # imported here: configs import this file and must load fast

    if precision != "auto":
        return precision
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":  # a CPU without these emulates bf16, on AVX2 78 times slower than fp32 (docs/decisions.md)
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "fp32"


def use_cores(local_processes: int) -> int:
    """Set torch's threads to this process's share of the CPU cores; return it. Launchers would set one thread per process."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // max(1, local_processes))
    torch.set_num_threads(share)
    return share


def reuse_freed_memory() -> bool:
    """Make glibc keep freed memory for this process; return whether it took effect. Results do not change.

    `mallopt` turns off trimming and memory maps of large blocks. Without it a CPU forward pass spends its time on page faults:
    EfficientNet-Lite0 at 224 px went from 27 to 70 images/s on two cores (docs/decisions.md).
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl and others have no such settings
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # names of the settings in malloc.h
    settings = ((mmap_max, 0), (trim_threshold, (1 << 31) - 1), (top_pad, 1 << 26))
    results = [library.mallopt(name, value) for name, value in settings]
    return all(results)
