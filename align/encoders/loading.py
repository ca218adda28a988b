"""Opening encoder folders safely, and what identifies their weights: shared by vision and text encoders.

No code of an encoder runs unless asked for, then from a local folder or a pinned commit, and only its own; weights from safetensors
only; a checkpoint that lacks weights is refused.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import xxhash
from huggingface_hub import constants, snapshot_download
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import get_session
from safetensors import SafetensorError
from torch import nn
from transformers import dynamic_module_utils
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from align.common.errors import DamagedError, KitError, OfflineError, UsageError
from align.common.hardware import Arithmetic
from align.common.tensor_files import read_tensor_file, write_tensor_file
from align.encoders.claims import within_weights
from align.encoders.spec import EncoderSpec

CODE_NAMED_IN = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json", "modules.json")
HUB_SECONDS = 4  # in which the hub has to answer
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Where it is told nothing, transformers asks on the terminal whether to run the code of a folder. Without time for an answer it refuses.
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
# What a forward pass of a model of any code may raise.
FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError, ArithmeticError)
MODULE_BIN = "pytorch_model.bin"
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".pkl", ".npz", ".tflite")
VISION_FILES = "needed are config.json, preprocessor_config.json (timm: only config.json) and model.safetensors"
TEXT_FILES = "needed are config.json, the tokenizer's files, model.safetensors and, for its own pooling, modules.json"


def resolve_encoder(name: str) -> str:
    """Return the local folder or hub id to open."""
    if name.startswith("embedded:"):
        from align.embedded.assets import fetch

        return str(fetch(name))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
            raise UsageError(f"{name} has no config.json; vision encoders: {VISION_FILES}; text encoders: {TEXT_FILES}")
        return str(folder)
    if name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        raise UsageError(f"{name!r} is not a folder; give an existing folder, a hub id (owner/name) or an embedded: id")
    require_hub(name)
    return name


def require_hub(name: str) -> None:
    """Raise OfflineError within HUB_SECONDS if the hub cannot be reached and nothing of `name` is cached.

    If something is, the cache alone is read from now on: each file would else be asked for again and again.
    """
    if constants.HF_HUB_OFFLINE or _hub_answers(constants.ENDPOINT):
        return
    snapshots = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "snapshots")
    if not any(snapshots.glob("*/*")):
        raise OfflineError(_out_of_reach(name, constants.ENDPOINT))
    constants.HF_HUB_OFFLINE = True


@lru_cache
def _hub_answers(endpoint: str) -> bool:
    answers: list[Any] = []

    def ask() -> None:
        with suppress(Exception):  # whatever it was, there is no answer
            answers.append(get_session().head(endpoint, timeout=HUB_SECONDS))

    asking = Thread(target=ask, daemon=True)  # the lookup of a name knows no timeout
    asking.start()
    asking.join(HUB_SECONDS)
    return bool(answers)


def _out_of_reach(name: str, why: str) -> str:
    return (
        f"{name} is not a local folder, and the hub is out of reach ({why}); give a downloaded folder (where there is a connection: "
        f"hf download {name} --local-dir FOLDER), or set HF_ENDPOINT to a mirror"
    )


@contextmanager
def opened(spec: EncoderSpec, needed: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the folder or hub id that `spec` means and what `from_pretrained` is told besides; errors as `load_errors_named`."""
    source, remote = resolve_encoder(spec.name), spec.from_pretrained
    with load_errors_named(spec.name, needed), within_weights(spec.name, source, spec.revision):
        if remote["trust_remote_code"]:
            require_own_code(spec.name, source, spec.revision)
        yield source, remote


@contextmanager
def load_errors_named(name: str, needed: str) -> Iterator[None]:
    """Turn what the libraries raise while opening `name` into one line, and silence their load reports and bars meanwhile."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except (KitError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except SafetensorError as error:
        raise DamagedError(f"{name}: the weights cannot be read ({first_line(error)}); fetch or copy them again") from error
    except BaseException as error:
        if any(sign in str(error) for sign in ("couldn't connect", "offline mode", "Cannot reach", "ConnectError")):
            raise OfflineError(_out_of_reach(name, first_line(error))) from error
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"{name} comes with code of its own, which runs only if you ask for it: read that code, then give --trust-remote-code "
                "(in Python trust_remote_code=True) and, of a hub id, the 40 hex digits of its commit (--text-revision; assess: id@COMMIT)"
            ) from error
        if "file named model.safetensors" in str(error) and (file := Path(name).expanduser() / MODULE_BIN).is_file():
            raise UsageError(_only_pickled(name, file)) from error
        why = "its weights have other shapes than its config.json" if "mismatched_sizes" in str(error) else first_line(error)
        raise UsageError(f"{name} cannot be opened ({why}); {needed}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _only_pickled(name: str, file: Path) -> str:
    return (
        f"{name} has no model.safetensors; its {MODULE_BIN} is a pickle, which can run code and is not read. Save the model again: timm "
        "with timm.models.save_for_hf(model, folder, safe_serialization=True), transformers with model.save_pretrained(folder). Or "
        'convert it: python -c "import torch, safetensors.torch as s; '
        f"s.save_file({{k: v.clone() for k, v in torch.load('{file}', weights_only=True).items()}}, "
        f"'{file.with_name('model.safetensors')}', {{'format': 'pt'}})\""
    )


def require_own_code(name: str, source: str, revision: str | None) -> None:
    """Refuse an encoder whose code lies in another repository: the commit that is pinned, or the folder that was read, does not hold it."""
    for file in CODE_NAMED_IN:
        path = cached_file(source, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        elsewhere = sorted(_elsewhere(json.loads(Path(path).read_text(encoding="utf-8")))) if path else []
        if elsewhere:
            repository, _, module = elsewhere[0].partition("--")
            raise UsageError(
                f"{name}: its {file} runs code of another repository ({', '.join(elsewhere)}), which no commit of this one pins; download "
                f"both to one folder, read the code ({module.split('.')[0]}.py), take '{repository}--' out of {file}, and give that folder"
            )


def _elsewhere(value: Any, names_code: bool = False) -> set[str]:
    """Return what a JSON value names as OWNER/REPOSITORY--FILE.CLASS."""
    if isinstance(value, str):
        return {value} if names_code and "--" in value else set()
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return set().union(*(_elsewhere(part, names_code or key in ("auto_map", "type")) for key, part in parts))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, with its kind where that says more, or its kind alone."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: {line}"


def recorded_id(name: str) -> str:
    """Return what a fingerprint calls an encoder: its hub or `embedded:` id, or the base name of its folder, which may be moved."""
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.is_dir() else name


def require_complete(name: str, missing: Iterable[str], unused: tuple[str, ...]) -> None:
    """Refuse a checkpoint that lacks weights a feature depends on: they would be random."""
    lacking = sorted(key for key in missing if _is_used(key, unused))
    if lacking:
        raise UsageError(f"{name} lacks {len(lacking)} weights of its architecture, such as {lacking[0]}; use a complete checkpoint")


def _is_used(key: str, unused: tuple[str, ...]) -> bool:
    return not key.startswith(unused) and not key.endswith("num_batches_tracked")


def hash_weights(model: nn.Module, unused: tuple[str, ...]) -> str:
    """Return the xxh3-128 over names, types, shapes and bytes of the tensors that features depend on, sorted by name."""
    digest = xxhash.xxh3_128()
    for key, value in sorted(model.state_dict().items()):
        if _is_used(key, unused):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def autocast(device: torch.device, precision: Arithmetic) -> torch.autocast:
    """Return the context of an encoder's forward; it also shields an fp32 encoder from an outer autocast."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def snapshot(name: str, revision: str | None = None) -> Path:
    """Return the folder of an encoder: the named one, or what was downloaded of a hub id."""
    source = Path(resolve_encoder(name))
    if not source.is_dir():
        with load_errors_named(name, "a downloaded snapshot"):
            source = Path(snapshot_download(name, revision=revision, local_files_only=True))
    return source


def require_copyable(name: str, revision: str | None = None) -> int:
    """Return the bytes of a copy of an encoder. UsageError or DamagedError if one could not be opened without the original.

    That is an adapter, whose base model lies elsewhere, and a module whose weights are a .bin file of more than tensors.
    """
    source = snapshot(name, revision)
    if adapters := sorted(source.rglob("adapter_config.json")):
        raise UsageError(
            f"{name} is an adapter (LoRA, {adapters[0].name}) on the weights of another model, which a copy would lack. Merge it first: "
            'python -c "from peft import AutoPeftModelForFeatureExtraction as M; '
            f"M.from_pretrained('{adapters[0].parent}').merge_and_unload().save_pretrained('merged')\", add the tokenizer's and the other "
            "files, and encode and train with that folder"
        )
    for file in _unsafe_weights(source):
        read_tensor_file(file)
    return sum(file.stat().st_size for file in _files(source))


def copy_encoder(name: str, folder: Path, revision: str | None = None) -> None:
    """Copy the files that load the encoder `name` to `folder`; a module's weights that are only a .bin file become safetensors.

    The copy's code runs as the encoder's: only with `trust_remote_code`. Raises as `require_copyable`.
    """
    require_copyable(name, revision)
    source = snapshot(name, revision)
    for file in _files(source):
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.name == MODULE_BIN:
            write_tensor_file(target.with_name("model.safetensors"), {key: value.clone() for key, value in read_tensor_file(file).items()})
        else:
            shutil.copyfile(file, target)


def _files(source: Path) -> Iterator[Path]:
    """Yield the files of a copy: no hidden ones, and of the weights only safetensors and what becomes it."""
    converted = set(_unsafe_weights(source))
    for file in sorted(source.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(source).parts)
        if file.is_file() and not hidden and (file in converted or file.suffix not in OTHER_WEIGHTS):
            yield file


def _unsafe_weights(source: Path) -> list[Path]:
    """Return the .bin files of modules that have no safetensors."""
    return [file for file in sorted(source.rglob(MODULE_BIN)) if not any(file.parent.glob("*.safetensors"))]
