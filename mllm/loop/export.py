"""The result of a training run as a model folder: the start model, with what was trained put into it."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from align.common.folders import replaced_folder
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
        with replaced_folder(folder / "adapter", "adapter") as temporary:
            prepared.save_pretrained(str(temporary))  # type: ignore[operator]
    plain = merged(prepared)
    plain.config.text_config.use_cache = True
    save_mllm(plain, processor, folder / "model")
    return folder / "model"
