"""The parameter groups of a SailLlava, each with its own learning rate; LoRA on its LLM; what a run has changed of a model.

Groups: `projector`, `raw` (the projector's weights for what lies beside its first input: raw patches, a second encoder), `head`, `llm`
(language model and output layer, or its LoRA adapters), `vision`. Each has the parts of all encoders. A rate of 0 freezes a group.
"""

import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from align.common.errors import DamagedError, UsageError
from mllm.loop.config import Lora
from mllm.model.modeling import SailLlavaForConditionalGeneration
from mllm.model.processing import SailLlavaProcessor
from mllm.model.saving import load_mllm

GROUPS = ("projector", "raw", "head", "llm", "vision")


def unwrapped(model: nn.Module) -> SailLlavaForConditionalGeneration:
    """Return the SailLlava inside a model that may be wrapped for LoRA."""
    found: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    assert isinstance(found, SailLlavaForConditionalGeneration), type(found)
    return found


def named_groups(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Return the named parameters of each group; names are those of `model` itself, each parameter once."""
    inner = unwrapped(model)
    places = inner.model.places
    parts = {
        "projector": inner.model.projectors, "head": [place.sail_head for place in places],
        "llm": [inner.model.language_model, inner.lm_head], "vision": [place.vision_tower for place in places],
    }  # fmt: skip
    owner = {id(parameter): group for group, modules in parts.items() for module in modules for parameter in module.parameters()}
    owner |= {id(parameter): "raw" for name, parameter in inner.named_parameters() if "linear_raw." in name}
    found: dict[str, list[tuple[str, nn.Parameter]]] = {group: [] for group in GROUPS}
    for name, parameter in model.named_parameters():
        found[owner[id(parameter)]].append((name, parameter))
    return found


def set_trainable(model: SailLlavaForConditionalGeneration, rates: Mapping[str, float], lora: Lora | None, seed: int) -> nn.Module:
    """Return the model (wrapped by peft if `lora`) with gradients on exactly the groups whose rate is above 0.

    Vision parameters that no feature depends on stay frozen. With LoRA the head and projector are part of the adapter.
    """
    for group, named in named_groups(model).items():
        for _, parameter in named:
            parameter.requires_grad_(rates[group] > 0)
    model.model.freeze_unread()
    if lora is None or rates["llm"] == 0:
        return model
    from peft import LoraConfig, get_peft_model

    linear = _adapted(model, lora)
    rates_of = {"multi_modal_projector": max(rates["projector"], rates["raw"]), "sail_head": rates["head"]}
    whole = {"multi_modal_projector": model.model.projectors, "sail_head": [place.sail_head for place in model.model.places]}
    saved = [name for name, modules in whole.items() if rates_of[name] > 0 and any(True for _ in nn.ModuleList(modules).parameters())]
    settings = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=linear, modules_to_save=saved or None,
        trainable_token_indices=_new_rows(model),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # peft draws the adapters' weights from the global generator
        wrapped: nn.Module = get_peft_model(model, settings)
    for group in ("projector", "raw"):  # peft trains all of a module that it keeps a copy of
        for name, parameter in named_groups(wrapped)[group]:
            parameter.requires_grad_(rates[group] > 0 and ".original_module." not in name)
    return wrapped


def _adapted(model: SailLlavaForConditionalGeneration, lora: Lora) -> list[str]:
    """Return the names of the linear layers that get adapters. UsageError for a target that none has."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith("model.language_model.")]
    ends = {name.rpartition(".")[2] for name in linear}
    if unknown := set(lora.targets) - ends:
        raise UsageError(f"--lora-targets {' '.join(sorted(unknown))}: no such linear layer in the LLM; it has {', '.join(sorted(ends))}")
    return [name for name in linear if not lora.targets or name.rpartition(".")[2] in lora.targets]


def _new_rows(model: SailLlavaForConditionalGeneration) -> dict[str, list[int]] | None:
    """Return which rows of which embeddings are trained beside the adapters: tokens of the template that the LLM never saw."""
    tokens = list(model.config.sail_untrained_tokens or ())
    tied = model.config.tie_word_embeddings  # then peft shares them with the output layer
    return dict.fromkeys(("embed_tokens", *(() if tied else ("lm_head",))), tokens) if tokens else None


def trained_rows(model: nn.Module) -> list[int] | None:
    """Return the ids of the tokens whose output rows are trained; None: all."""
    inner = unwrapped(model)
    if hasattr(model, "get_base_model"):
        return list(inner.config.sail_untrained_tokens or ())
    return None if inner.lm_head.weight.requires_grad else []


def untouched(model: nn.Module) -> dict[str, int]:
    """Return the matrices of the LLM's blocks that no adapter changes, by name without layer numbers, with their parameters."""
    found: dict[str, int] = {}
    if hasattr(model, "get_base_model"):
        for name, parameter in unwrapped(model).model.language_model.named_parameters():
            if _dimensions(parameter) > 1 and not any(part in name for part in ("lora_", "base_layer.", "embed_tokens.")):
                short = re.sub(r"^layers\.\d+\.", "", name)
                found[short] = found.get(short, 0) + size(parameter)
    return found


def load_trainable(
    folder: Path, rates: Mapping[str, float], lora: Lora | None, seed: int, *, bf16: bool, deepspeed: bool
) -> tuple[nn.Module, SailLlavaProcessor]:
    """Return (the model in `folder` as `set_trainable` makes it, its processor).

    With `bf16`, frozen weights are bfloat16 and trained ones float32; under `deepspeed`, which keeps float32 masters, all are bfloat16.
    """
    model, processor = load_mllm(folder, dtype=torch.bfloat16 if bf16 and deepspeed else torch.float32)
    model.config.text_config.use_cache = False  # a cache would hide the restarts of position ids from packed rows
    trainable = set_trainable(model, rates, lora, seed)
    if bf16 and not deepspeed:
        for parameter in trainable.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    return trainable, processor


def optimizer_groups(model: nn.Module, rates: Mapping[str, float], weight_decay: float) -> list[dict[str, Any]]:
    """Return the optimizer's groups, one or two for each of ours, which names it: weight decay on matrices only."""
    groups = []
    for name, named in named_groups(model).items():
        trained = [parameter for _, parameter in named if parameter.requires_grad]
        for matrices, decay in ((True, weight_decay), (False, 0.0)):
            if chosen := [parameter for parameter in trained if (_dimensions(parameter) > 1) == matrices]:
                groups.append({"name": name, "params": chosen, "lr": rates[name], "weight_decay": decay})
    if not groups:
        raise UsageError("nothing is trained: the groups with a rate above 0 have no parameters (this model may have no head)")
    return groups


def group_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return, per group, (parameters, trained parameters). What peft keeps of a module that it trains a copy of does not count."""
    return {
        group: (
            sum(size(each) for name, each in named if ".original_module." not in name),
            sum(size(each) for _, each in named if each.requires_grad),
        )
        for group, named in named_groups(model).items()
    }


def group_table(model: nn.Module, rates: Mapping[str, float]) -> Table:
    """Return what is trained, at which rate, and what is frozen, as a table for the terminal."""
    table = Table("parameters", "in all", "trained", "learning rate")
    for group, (total, trained) in group_sizes(model).items():
        table.add_row(group, f"{total:,}", f"{trained:,}" if trained else "frozen", f"{rates[group]:g}" if trained else "-")
    for name, count in untouched(model).items():
        table.add_row(f"of llm, without adapters: {name}", f"{count:,}", "frozen", "-")
    return table


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return float32 copies on the CPU of all trained parameters by name; under DeepSpeed call it on every process.

    Where DeepSpeed keeps float32 masters of bf16 weights, the masters are returned.
    """
    return {name: _whole(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_trained(model: nn.Module, tensors: Mapping[str, Tensor], place: str) -> None:
    """Put `tensors` (as `trained_tensors` gave them) into `model`; DamagedError unless they are exactly its trained parameters."""
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    differing = sorted(wanted.keys() ^ tensors.keys())
    differing += sorted(name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape)
    if differing:
        names = ", ".join(differing[:3])
        raise DamagedError(f"{place} does not hold what this run trains (differing: {names}); use the run's own settings")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])


def merged(model: nn.Module) -> SailLlavaForConditionalGeneration:
    """Return the plain SailLlava, with LoRA adapters (if any) merged into its weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else unwrapped(model)  # type: ignore[operator]


def _whole(parameter: nn.Parameter) -> Tensor:
    whole: Any = nullcontext()
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        import deepspeed

        master = deepspeed.utils.safe_get_full_fp32_param(parameter)
        if master is not None:
            return master.detach().to("cpu", torch.float32, copy=True)
        if hasattr(parameter, "ds_id"):
            whole = deepspeed.zero.GatheredParameters([parameter])
    with whole:
        return parameter.detach().to("cpu", torch.float32, copy=True)


def size(parameter: Tensor) -> int:
    """Return how many numbers a parameter has, over all processes: under ZeRO-3 each keeps a share."""
    return int(parameter.ds_numel) if hasattr(parameter, "ds_numel") else parameter.numel()


def _dimensions(parameter: nn.Parameter) -> int:
    return len(parameter.ds_shape) if hasattr(parameter, "ds_shape") else parameter.ndim
