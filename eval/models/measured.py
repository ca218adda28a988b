"""The models of a measurement: the named ones, each SailModel's untrained twin, and their records for results.json."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from align.common.errors import UsageError
from align.common.files import hash_bytes
from align.model.dual_encoder import SailModel
from align.model.saving import model_folder
from eval.models.dual_encoder import DualEncoder, SailDualEncoder
from eval.models.openclip import load_openclip
from eval.models.reference import ReferenceModel
from eval.models.transformers_clip import load_transformers_clip
from eval.results.records import ModelRecord

REFERENCES: dict[str, Callable[[str], ReferenceModel]] = {"openclip": load_openclip, "hf": load_transformers_clip}


@dataclass(frozen=True)
class MeasuredModel:
    """A model to measure and its record for results.json."""

    record: ModelRecord
    model: DualEncoder


def split_name(given: str) -> tuple[str, str]:
    """Return (name, model) of MODEL or NAME=MODEL; no name is "". An existing path is never split. A NAME has no `/` or `:`."""
    name, equals, rest = given.partition("=")
    if not (name and equals and rest) or "/" in name or ":" in name or Path(given).exists():
        return "", given
    return name, rest


def load_models(
    models: Sequence[str], device: str, *, untrained: bool = True, seed: int = 0, trust_remote_code: bool = False
) -> list[MeasuredModel]:
    """Return the models as given; if `untrained`, add each SailModel with fresh heads from `seed`. All folders are checked first."""
    pairs = [split_name(given) for given in models]
    reference = [model.startswith(tuple(f"{library}:" for library in REFERENCES)) for _, model in pairs]
    alone = reference.count(False) == 1
    names = [
        name or (model.partition(":")[2] if trained_as_one else "trained" if alone else model)
        for (name, model), trained_as_one in zip(pairs, reference, strict=True)
    ]
    if len(set(names)) < len(names):
        raise UsageError(f"two models have the same name ({', '.join(names)}); name them: --model NAME=PATH NAME=PATH")
    folders = [None if trained_as_one else _folder(model) for (_, model), trained_as_one in zip(pairs, reference, strict=True)]
    given, twins = [], []
    for name, (_, model), folder in zip(names, pairs, folders, strict=True):
        if folder is None:
            given.append(_reference(name, model, device))
            continue
        sail = SailModel.from_pretrained(folder, trust_remote_code=trust_remote_code)
        given.append(_aligned(name, "trained", sail, str(folder), device))
        if untrained:
            twins.append(_aligned("untrained" if alone else f"{name} untrained", "untrained", sail.untrained(seed), "", device))
    return given + twins


def _folder(model: str) -> Path:
    try:
        return model_folder(Path(model))
    except UsageError as error:
        raise UsageError(f"{error}, or name a model to compare with: openclip:ARCH/TAG or hf:FOLDER") from error


def _aligned(name: str, kind: str, model: SailModel, folder: str, device: str) -> MeasuredModel:
    settings = model.config
    encoders = [Path(str(side.get("name", "encoded features"))).name for side in (settings.vision, settings.text)]
    heads = hash_bytes(b"".join(value.numpy(force=True).tobytes() for _, value in sorted(model.state_dict().items())))
    fingerprint = _both_sides(settings) | {"heads": heads}
    state = "" if kind == "trained" else "freshly initialized "
    description = f"{encoders[0]} + {encoders[1]}, {state}{settings.head} heads to {settings.width} dimensions"
    nn.Module.to(model, torch.device(device))
    return MeasuredModel(ModelRecord(name, kind, description, folder, fingerprint), SailDualEncoder(model))


def _reference(name: str, model: str, device: str) -> MeasuredModel:
    library, _, source = model.partition(":")
    loaded = REFERENCES[library](source).to(device)
    description = f"{loaded.description}, trained as one on images and texts, {loaded.width} dimensions"
    return MeasuredModel(ModelRecord(name, "clip", description, "", _both_sides(loaded)), loaded)


def _both_sides(model: Any) -> dict[str, Any]:
    sides = {"vision": model.vision_fingerprint, "text": model.text_fingerprint}
    return {f"{side} {name}": value for side, fingerprint in sides.items() for name, value in fingerprint.items()}
