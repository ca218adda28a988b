"""Tensor files, read without running code: .safetensors, and .pt, .pth and .bin that hold only tensors."""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.common.errors import DamagedError, UsageError
from align.common.files import atomic_path

_PICKLES = (".pt", ".pth", ".bin")
_KINDS = ", ".join((*_PICKLES, ".safetensors"))


def read_tensor_file(path: Path) -> Any:
    """Return the content of a .safetensors, .pt, .pth or .bin file, on the CPU. Only tensors and plain containers are read.

    Raise UsageError for a missing file or unknown suffix, DamagedError if it is unreadable or holds more than tensors.
    """
    if not path.is_file():
        raise UsageError(f"{path} is not a file; give a checkpoint ({_KINDS})")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise DamagedError(f"{path} is not a safetensors file ({error}); fetch it again") from error
    if path.suffix not in _PICKLES:
        raise UsageError(f"{path}: unknown kind of file {path.suffix!r}; known: {_KINDS}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DamagedError(f"{path} is damaged, or holds more than tensors, which is refused as it could run code") from error
    except (OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise DamagedError(f"{path} cannot be read ({str(error).splitlines()[0] if str(error) else 'empty'}); fetch it again") from error


def write_tensor_file(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors by name, atomically: .safetensors, or .pt as published checkpoints are. UsageError for another suffix."""
    if path.suffix not in (".safetensors", ".pt"):
        raise UsageError(f"{path}: write .pt (the published layout) or .safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(contiguous, temporary, {"format": "pt"})
        else:
            torch.save(contiguous, temporary)
