"""Saves and loads a SailLlava as one folder. It opens on machines without this kit; with the kit, loading is strict.

AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)     # anywhere
model, processor = load_mllm("runs/mine/mllm")                                  # here: our classes, no code from the folder
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from align.common import errors
from align.common.errors import UsageError
from align.common.files import read_json
from align.common.folders import check_model_folder, commit_folder, replaced_folder
from align.encoders import families
from align.encoders.claims import read_config, require_counts, within_weights
from align.encoders.loading import load_errors_named
from align.model import heads, strict_loading
from mllm.model import modeling, processing, towers
from mllm.model.modeling import SailLlavaConfig, SailLlavaForConditionalGeneration
from mllm.model.processing import SailLlavaProcessor

SHARD_SIZE = "5GB"
NEEDED = "needed are config.json, model.safetensors, processor_config.json and the tokenizer's files"
CODE: dict[str, ModuleType] = {
    "modeling_sail_llava.py": modeling, "processing_sail_llava.py": processing, "towers.py": towers, "heads.py": heads,
    "strict_loading.py": strict_loading, "families.py": families, "errors.py": errors,
}  # fmt: skip
MODEL_MAP = {
    "AutoConfig": "modeling_sail_llava.SailLlavaConfig",
    "AutoModel": "modeling_sail_llava.SailLlavaModel",
    "AutoModelForImageTextToText": "modeling_sail_llava.SailLlavaForConditionalGeneration",
}
PROCESSOR_MAP = {"AutoProcessor": "processing_sail_llava.SailLlavaProcessor"}
IMAGE_MAP = {"AutoImageProcessor": "processing_sail_llava.SailLlavaImageProcessor"}


def save_mllm(
    model: SailLlavaForConditionalGeneration, processor: SailLlavaProcessor, folder: Path, add: Callable[[Path], None] = lambda folder: None
) -> None:
    """Write model, processor and the Python files of their classes to `folder`. A crash leaves the old folder or the new one.

    `add` may write further files into the folder that it is given. Weights keep their dtypes; shards hold at most 5 GB. UsageError if
    `folder` holds something else; DiskFullError.
    """
    require_free_place(folder)
    size = sum(parameter.nbytes for parameter in model.parameters())
    with replaced_folder(folder, "mllm", size) as temporary:
        model.save_pretrained(temporary, max_shard_size=SHARD_SIZE)
        processor.save_pretrained(temporary)
        _describe(temporary, model.model.language_model.embed_tokens.weight.dtype)
        for name, module in CODE.items():
            (temporary / name).write_text(portable_source(module), encoding="utf-8")
        add(temporary)
        commit_folder(temporary, {})


def load_mllm(
    folder: str | Path, dtype: torch.dtype | str = torch.float32, device: str | torch.device = "cpu", **from_pretrained: Any
) -> tuple[SailLlavaForConditionalGeneration, SailLlavaProcessor]:
    """Return (model in eval mode, processor) of a folder that `save_mllm` wrote, with the kit's own classes.

    `dtype` "auto" keeps the saved one; other arguments go to `from_pretrained`. UsageError if it is not such a folder, DamagedError
    if a file is not as it was saved, or a weight is missing, unexpected or of another shape.
    """
    folder = require_mllm(Path(folder))
    check_model_folder(folder)
    processor = load_processor(folder)
    with load_errors_named(str(folder), NEEDED), within_weights(str(folder), str(folder)):
        model = SailLlavaForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, **from_pretrained
        )
    return model.to(device), processor


def load_processor(folder: Path) -> SailLlavaProcessor:
    """Return the processor of a folder that `save_mllm` wrote, with the kit's own class; UsageError if it is not such a folder."""
    folder = require_mllm(folder)
    with load_errors_named(str(folder), NEEDED):
        return SailLlavaProcessor.from_pretrained(folder, trust_remote_code=False)


def mllm_folder(path: Path) -> Path:
    """Return the folder of the MLLM at `path`: itself, or the model/ of a run. UsageError, with what is there instead, if it has none."""
    path = path.expanduser()
    for place in (path, path / "model"):
        if (place / "config.json").is_file():
            return place
    said = f"{path} is neither an MLLM folder (with config.json) nor a run with model/"
    if not path.is_dir():
        raise UsageError(f"{said}: there is no such folder; mllm/upgrade.py and mllm/finetune.py make them")
    if any(path.glob("checkpoint-*")):
        raise UsageError(f"{said}: the run is not finished; give its command again, and it goes on from its newest checkpoint")
    if any((path / name / "config.json").is_file() for name in ("best", "last")):
        raise UsageError(f"{said}: it is a run of stage one; make an MLLM with it: mllm/upgrade.py --sail {path} --llm LLM")
    inside = [str(place) for place in (*sorted(path.glob("*/model")), *sorted(path.glob("*"))) if (place / "config.json").is_file()]
    raise UsageError(f"{said}; " + (f"there is {', '.join(inside[:5])}" if inside else "make one with mllm/upgrade.py or mllm/finetune.py"))


def require_mllm(folder: Path) -> Path:
    """Return the folder of the SailLlava at `folder`, see `mllm_folder`.

    UsageError if it holds none, MemoryFullError if its config claims more layers than its weights can fill.
    """
    folder = mllm_folder(folder)
    config = read_config(str(folder), str(folder))
    model_type = config.get("model_type")
    if model_type != "sail_llava":
        hint = "upgrade it: mllm/upgrade.py --llava" if model_type == "llava" else "make one with mllm/upgrade.py"
        raise UsageError(f"{folder} holds a model of type {model_type!r}, expected 'sail_llava'; {hint}")
    require_counts(str(folder), config, str(folder))
    return folder


def fitting_length(folder: Path, asked: int, notice: Callable[[str], object]) -> int:
    """Return the tokens that a row may have: `asked`, or what the LLM in `folder` was made for if that is less, with a notice."""
    config = SailLlavaConfig.from_pretrained(folder, trust_remote_code=False)
    most = context_length(config.text_config)
    if most is None or asked <= most:
        return asked
    notice(f"--max-length {asked}: the LLM was made for {most} tokens, an image takes {config.image_tokens()} of them; {most} is used")
    return most


def context_length(text: Any) -> int | None:
    """Return the tokens that an LLM with the config `text` was made for, stretched positions included; None if it says nothing."""
    most = getattr(text, "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    stretched = [most]
    for one in (rope, *(part for part in rope.values() if isinstance(part, dict))):  # of some LLMs by the kind of layer
        kind, factor = one.get("rope_type") or one.get("type"), one.get("factor")
        if kind in ("linear", "dynamic", "yarn") and factor:
            stretched.append(int(factor * (one.get("original_max_position_embeddings") or most)))
    return max(stretched)


def require_free_place(folder: Path) -> None:
    """Raise UsageError if `folder` holds something other than a model, which saving would replace."""
    if folder.exists() and not (folder / "config.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not a model folder: it would be replaced; give another --output")


def portable_source(module: ModuleType) -> str:
    """Return the module's source for the saved folder: relative imports, and no registration nor what only it imports."""
    assert module.__file__ is not None
    text = Path(module.__file__).read_text(encoding="utf-8")
    text = re.sub(r"^(from mllm\.model\.modeling |Auto\w+\.register\().*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^from (?:align|mllm)\.(?:\w+\.)*(\w+) import", r"from .\1 import", text, flags=re.MULTILINE)
    return f"# Copied from sail-upgrade-kit ({module.__name__}). Apache License 2.0.\n{text}"


def _describe(folder: Path, dtype: torch.dtype) -> None:
    """Add to the saved configs the LLM's dtype and where the Auto classes find the code."""
    config, processor = (read_json(folder / name) for name in ("config.json", "processor_config.json"))
    config |= {"dtype": str(dtype).removeprefix("torch."), "auto_map": MODEL_MAP | PROCESSOR_MAP | IMAGE_MAP}
    processor |= {"auto_map": PROCESSOR_MAP}
    processor["image_processor"]["auto_map"] = IMAGE_MAP
    for name, values in (("config.json", config), ("processor_config.json", processor)):
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
