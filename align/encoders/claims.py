"""What a model folder claims to be, looked at before anything is built: its layout, and its size beside that of its weight files.

A config may claim anything. Building what it says takes memory and time before a missing weight is noticed.
"""

import importlib
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

from torch.nn.modules import module as torch_modules
from transformers.utils import cached_file

from align.common.errors import MemoryFullError, UsageError
from align.common.files import read_object

_COUNTS = re.compile(r"layers$|n_layer$|depth|num_experts|local_experts|num_heads|attention_heads|key_value_heads|^n_head")
_FEW = 1000  # layers, heads or experts that no model exceeds which is larger than its weight file has tensors
_SLACK = 1 << 24  # parameters that a class may have beside those of the file, such as an unused pooler
_BUFFERS = 1 << 28  # elements of buffers, such as masks and rotation tables
ORIGINAL_LLAVA = ("mm_vision_tower", "mm_projector_type", "mm_hidden_size")
_NAMES = ("model.safetensors", "model.safetensors.index.json")


def read_config(name: str, source: str, revision: str | None = None) -> dict[str, Any]:
    """Return the config.json of a folder or hub id as it stands, {} if there is none. UsageError if it is of no layout known here."""
    path = cached_file(source, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    config = dict(read_object(Path(path))) if path else {}
    original = [key for key in ORIGINAL_LLAVA if key in config]
    if original and config.get("model_type") != "sail_llava":
        raise UsageError(
            f"{name} has the layout of the original LLaVA repository ({', '.join(original)} in its config.json), which transformers does "
            "not read; give the checkpoint converted for transformers (on the hub its name ends with -hf), or its LLM as --llm"
        )
    if "architecture" in config or "pretrained_cfg" in config:
        _require_timm(name, config)
    return config


def _require_timm(name: str, config: dict[str, Any]) -> None:
    """Refuse a config.json of timm's layout that does not say what was built and how its images are scaled."""
    if config.get("model_type", "timm_wrapper") != "timm_wrapper":
        return
    architecture, arguments, given = (config.get(key) for key in ("architecture", "model_args", "pretrained_cfg"))
    if not isinstance(architecture, str) or not isinstance(arguments, dict | None):
        raise UsageError(
            f"{name}: its config.json has architecture {architecture!r} and model_args {arguments!r}; needed are timm's name of the "
            'architecture ("architecture": "vit_small_patch16_224") and, if timm.create_model was given more, "model_args" as an object'
        )
    if not isinstance(given, dict) or not given:
        raise UsageError(
            f"{name}: its config.json has no pretrained_cfg, so that nothing says how timm's {architecture} wants its images; save it "
            "again with timm.models.save_for_hf(model, folder, safe_serialization=True), or add what it was trained with"
            + _usual_images(architecture, arguments or {})
        )


def _usual_images(architecture: str, arguments: dict[str, Any]) -> str:
    """Return what timm itself gives to an architecture's images, as the end of a sentence."""
    timm = importlib.import_module("timm")  # seconds, for what few models ask
    known = timm.get_pretrained_cfg(architecture) if timm.is_model(architecture) else None
    if known is None:
        return f"; timm {timm.__version__} does not know this architecture"
    usual = timm.data.resolve_data_config({}, pretrained_cfg=known.to_dict())
    if side := arguments.get("img_size"):
        usual["input_size"] = (3, *(side if isinstance(side, list) else [side, side]))
    return f'. timm\'s values of this architecture: "pretrained_cfg": {json.dumps(usual)}'


@contextmanager
def within_weights(name: str, source: str, revision: str | None = None, more_files: tuple[str, ...] = ()) -> Iterator[None]:
    """Stop the block as soon as it builds more than the weights of `source` can fill; `more_files` are packed ones, such as GGUF.

    Raises MemoryFullError, and UsageError for a config that is none or of an unknown layout. Without weight files nothing is limited:
    opening fails by itself.
    """
    config = read_config(name, source, revision)
    tensors, parameters = _held(source, revision, more_files)
    if not tensors:
        yield
        return
    _few_enough(name, config, tensors)
    limit = 3 * parameters + _SLACK
    built = {"parameters": 0, "buffers": 0}

    def count(kind: str, most: int, value: Any) -> None:
        built[kind] += value.numel() if value is not None else 0
        if built[kind] > most:
            raise MemoryFullError(
                f"{name}: its config.json describes more than {built[kind]:,} {kind}, its weight files hold {parameters:,} numbers; "
                "the config belongs to another model: fetch both again"
            )

    with ExitStack() as stack:
        hooks = (
            torch_modules.register_module_parameter_registration_hook(lambda module, key, value: count("parameters", 2 * limit, value)),
            torch_modules.register_module_buffer_registration_hook(lambda module, key, value: count("buffers", limit + _BUFFERS, value)),
        )
        for hook in hooks:
            stack.callback(hook.remove)
        yield


def require_counts(name: str, config: dict[str, Any], source: str) -> None:
    """Raise MemoryFullError if a config claims more layers, heads or experts than the weight files of `source` can fill."""
    if tensors := _held(source, None, ())[0]:
        _few_enough(name, config, tensors)


def _held(source: str, revision: str | None, more_files: tuple[str, ...]) -> tuple[int, int]:
    """Return how many tensors, and at most how many numbers, the weight files hold."""
    folder = Path(source)
    if folder.is_dir():
        files = [*folder.rglob("*.safetensors"), *(folder / file for file in more_files if (folder / file).is_file())]
    else:
        found = [cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False) for name in _NAMES]
        files = [Path(found[0])] if found[0] else []
        if not files and found[1]:
            shards = sorted(set(read_object(Path(found[1]))["weight_map"].values()))
            files = [Path(str(cached_file(source, shard, revision=revision))) for shard in shards]
    tensors = parameters = 0
    for file in files:
        if file.suffix != ".safetensors":
            tensors, parameters = tensors + 10 * _FEW, parameters + 8 * file.stat().st_size  # at least a bit a number
            continue
        for entry in _header(file).values():
            shape = entry.get("shape") if isinstance(entry, dict) else None
            if isinstance(shape, list) and all(isinstance(side, int) for side in shape):
                packed = 1 if str(entry.get("dtype", "")).startswith(("F", "BF")) else 8
                tensors, parameters = tensors + 1, parameters + packed * prod(shape)
    return tensors, parameters


def _header(file: Path) -> dict[str, Any]:
    """Return the header of a safetensors file, {} if it is none: opening it says so."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= min(file.stat().st_size, 100_000_000):
            return {}
        try:
            header = json.loads(opened.read(length))
        except (ValueError, RecursionError):
            return {}
    return header if isinstance(header, dict) else {}


def _few_enough(name: str, value: Any, tensors: int) -> None:
    """Raise MemoryFullError for a number of layers, heads or experts that the weight file cannot fill, at any depth of a config."""
    parts = value.items() if isinstance(value, dict) else ()
    for key, part in parts:
        numbers = part if isinstance(part, list) else [part]
        largest = max((n for n in numbers if isinstance(n, int | float) and not isinstance(n, bool)), default=0)
        if _COUNTS.search(str(key)) and largest > max(_FEW, tensors):
            raise MemoryFullError(
                f"{name}: its config.json says {key} {largest:g}, its weight files hold {tensors} tensors; the config belongs to another "
                "model: fetch both again"
            )
        _few_enough(name, part, tensors)
