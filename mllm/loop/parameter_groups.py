"""The parts of a SailLlava that are trained at their own rates, LoRA on its LLM, and what a run has changed of a model.

Parts: `projector`, `head`, `llm` (language model and output layer, or its LoRA adapters), `vision`. A rate of 0 freezes a part.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from align.common.errors import DamagedError, UsageError
from mllm.model.modeling import SailLlavaForConditionalGeneration

PARTS = ("projector", "head", "llm", "vision")


@dataclass(frozen=True)
class Lora:
    """Adapters on every linear layer of the LLM."""

    rank: int
    alpha: int
    dropout: float = 0.0


def bare(model: nn.Module) -> SailLlavaForConditionalGeneration:
    """Return the SailLlava inside a model that may be wrapped for LoRA."""
    found: Any = model
    if hasattr(found, "get_base_model"):
        found = found.get_base_model()
    assert isinstance(found, SailLlavaForConditionalGeneration), type(found)
    return found


def parameters_of(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Return the named parameters of each part; names are those of `model` itself, each parameter once."""
    inner = bare(model)
    modules = {
        "projector": [inner.model.multi_modal_projector],
        "head": [inner.model.sail_head],
        "llm": [inner.model.language_model, inner.lm_head],
        "vision": [inner.model.vision_tower],
    }
    owner = {id(parameter): part for part, listed in modules.items() for module in listed for parameter in module.parameters()}
    found: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        found[owner[id(parameter)]].append((name, parameter))
    return found


def prepare_parts(model: SailLlavaForConditionalGeneration, rates: Mapping[str, float], lora: Lora | None, seed: int) -> nn.Module:
    """Return the model (wrapped by peft if `lora`) with gradients on exactly the parts whose rate is above 0.

    Vision parameters that no feature depends on stay frozen. With LoRA the head and projector are part of the adapter.
    """
    for part, named in parameters_of(model).items():
        for _, parameter in named:
            parameter.requires_grad_(rates[part] > 0)
    model.model.freeze_unread()
    if lora is None or rates["llm"] == 0:
        return model
    from peft import LoraConfig, get_peft_model

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith("model.language_model.")]
    whole = {"projector": ("multi_modal_projector", model.model.multi_modal_projector), "head": ("sail_head", model.model.sail_head)}
    saved = [name for part, (name, module) in whole.items() if rates[part] > 0 and any(True for _ in module.parameters())]
    settings = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=linear, modules_to_save=saved or None
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # peft draws the adapters' weights from the global generator
        return get_peft_model(model, settings)


def optimizer_groups(model: nn.Module, rates: Mapping[str, float], weight_decay: float) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups, one or two a part: weight decay on matrices only. Each has the part's `name`."""
    groups = []
    for part, named in parameters_of(model).items():
        trained = [parameter for _, parameter in named if parameter.requires_grad]
        matrices = [parameter for parameter in trained if _dimensions(parameter) > 1]
        vectors = [parameter for parameter in trained if _dimensions(parameter) <= 1]
        for parameters, decay in ((matrices, weight_decay), (vectors, 0.0)):
            if parameters:
                groups.append({"name": part, "params": parameters, "lr": rates[part], "weight_decay": decay})
    if not groups:
        raise UsageError("nothing is trained: this model has no parameters in the parts with a rate above 0 (it may have no head)")
    return groups


def part_table(model: nn.Module, rates: Mapping[str, float]) -> list[tuple[str, int, int, float]]:
    """Return, per part, (name, parameters, trained parameters, learning rate)."""
    rows = []
    for part, named in parameters_of(model).items():
        trained = sum(_size(parameter) for _, parameter in named if parameter.requires_grad)
        rows.append((part, sum(_size(parameter) for _, parameter in named), trained, rates[part] if trained else 0.0))
    return rows


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return float32 copies on the CPU of all trained parameters by name; under DeepSpeed call it on every process.

    Where DeepSpeed keeps float32 masters of bf16 weights, the masters are returned.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[name] = _whole(parameter)
    return tensors


def load_trained(model: nn.Module, tensors: Mapping[str, Tensor], place: str) -> None:
    """Put `tensors` (as `trained_tensors` gave them) into `model`; DamagedError unless they are exactly its trained parameters."""
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    differing = sorted(wanted.keys() ^ tensors.keys())
    differing += sorted(name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape)
    if differing:
        raise DamagedError(
            f"{place} does not hold what this run trains (differing: {', '.join(differing[:3])}); use the run's own settings"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])


def merged(model: nn.Module) -> SailLlavaForConditionalGeneration:
    """Return the plain SailLlava, with LoRA adapters (if any) merged into its weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else bare(model)  # type: ignore[operator]


def _whole(parameter: nn.Parameter) -> Tensor:
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        import deepspeed

        master = deepspeed.utils.safe_get_full_fp32_param(parameter)
        if master is not None:
            return master.detach().to("cpu", torch.float32, copy=True)
        with deepspeed.zero.GatheredParameters([parameter]) if hasattr(parameter, "ds_id") else nullcontext():
            return parameter.detach().to("cpu", torch.float32, copy=True)
    return parameter.detach().to("cpu", torch.float32, copy=True)


def _size(parameter: nn.Parameter) -> int:
    return int(parameter.ds_numel) if hasattr(parameter, "ds_numel") else parameter.numel()  # ZeRO-3 keeps a part here


def _dimensions(parameter: nn.Parameter) -> int:
    return len(parameter.ds_shape) if hasattr(parameter, "ds_shape") else parameter.ndim
