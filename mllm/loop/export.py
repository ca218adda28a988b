"""The result of a training run as a model folder: the start model, with what was trained put into it."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from align.common.files import TEMPORARY, disk_full_named, put_in_place, sync_file
from mllm.loop.config import Lora
from mllm.loop.parameter_groups import load_trained, merged, set_trainable
from mllm.model.saving import load_mllm, save_mllm


def export(start: Path, tensors: Mapping[str, Tensor], rates: Mapping[str, float], lora: Lora | None, folder: Path) -> Path:
    """Write `folder/model` (and, with LoRA, `folder/adapter` for peft) and return the former; float32 on the CPU.

    `start` is the model folder that the run began with, `tensors` what `trained_tensors` gave, `rates` and `lora` the run's own.
    """
    model, processor = load_mllm(start)
    prepared = set_trainable(model, rates, lora, seed=0)
    load_trained(prepared, tensors, f"the run in {folder}")
    if hasattr(prepared, "merge_and_unload"):
        temporary, final = folder / f"adapter{TEMPORARY}", folder / "adapter"
        shutil.rmtree(temporary, ignore_errors=True)
        with disk_full_named(final):
            prepared.save_pretrained(str(temporary))  # type: ignore[operator]
            for file in temporary.rglob("*"):
                if file.is_file():
                    sync_file(file)
        put_in_place(temporary, final, "adapter")
    plain = merged(prepared)
    plain.config.text_config.use_cache = True
    save_mllm(plain, processor, folder / "model")
    return folder / "model"
