"""Published SAIL weights, read strictly into a SailModel and written back.

    published, of `vision_` and `text_`     here, of `vision_head.` and `text_head.`
    <side>_layer_norm.{weight,bias}         norm
    <side>_mapping_network.f1               gate      W1 of W3(ReLU6(W1 x + b1) * clamp(W2 x + b2)) + b3
    <side>_mapping_network.f2               value     W2
    <side>_mapping_network.g                out       W3
    logit_scale, logit_bias (1,)            logit_scale (the logarithm of t), logit_bias

A checkpoint may be wrapped by training (`module.` before each name, `state_dict` or `model` around all). A file of a tuned LLaVA
(vlhead.bin) has the `vision_` half only. Legend: `F` feature width, `H` hidden width = expansion x F, `E` aligned width.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from align.common.errors import DamagedError, UsageError
from align.common.hardware import Arithmetic
from align.common.tensor_files import read_tensor_file
from align.encoders.text import TextEncoder
from align.encoders.vision import VisionEncoder
from align.model.dual_encoder import SailConfig, SailModel

SIDES = ("vision", "text")
LAYERS = {"layer_norm": "norm", "mapping_network.f1": "gate", "mapping_network.f2": "value", "mapping_network.g": "out"}
LOGITS = ("logit_scale", "logit_bias")
PROJECTOR = {"0": "linear_1", "2": "linear_2"}  # LLaVA's mlp2x_gelu: Linear, GELU, Linear
_WRAPPERS = ("state_dict", "model")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, as float32, without the wrapping of training; DamagedError if some are not finite."""
    content = read_tensor_file(path)
    while isinstance(content, dict) and len(inner := [name for name in _WRAPPERS if isinstance(content.get(name), dict)]) == 1:
        content = content[inner[0]]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise DamagedError(f"{path} does not hold tensors by name, neither at its top nor in {' or '.join(_WRAPPERS)}; is it a checkpoint?")
    prefix = "module." if all(name.startswith("module.") for name in content) else ""
    weights = {name.removeprefix(prefix): value.float() for name, value in content.items()}
    wrong = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if wrong:
        raise DamagedError(f"{path}: {wrong[0]} has values that are not finite; fetch it again")
    return weights


def heads_from(
    weights: Mapping[str, Tensor],
    place: str,
    vision: VisionEncoder | None = None,
    text: TextEncoder | None = None,
    precision: Arithmetic = "fp32",
) -> SailModel:
    """Return the SailModel of both published heads, with the encoders that they were trained on if given.

    DamagedError for a missing or unknown name, shapes that do not fit together, or sides of different expansion; UsageError for an
    encoder whose features have another width.
    """
    _refuse_names(weights, [*_names("vision_"), *_names("text_"), *LOGITS], place)
    sides = [_widths(weights, side, place) for side in SIDES]
    if sides[0][1:] != sides[1][1:]:
        found = ", ".join(f"{side} {hidden} x {feature} -> {width}" for side, (feature, hidden, width) in zip(SIDES, sides, strict=True))
        raise DamagedError(f"{place}: both heads need one expansion and one aligned width, found {found}")
    expansion, width = sides[0][1:]
    config = SailConfig(vision_width=sides[0][0], text_width=sides[1][0], width=width, head="glu", expansion=expansion, precision=precision)
    if vision is not None:
        _require_width("vision", vision.id, vision.feature_width, config.vision_width)
        config.vision, config.vision_fingerprint = vision.spec.stored(), vision.fingerprint
    if text is not None:
        _require_width("text", text.id, text.width, config.text_width)
        config.text, config.text_fingerprint = text.spec.stored(), text.fingerprint
    model = SailModel(config)
    own = {f"{side}_head.{name}": value for side in SIDES for name, value in _renamed(weights, side).items()}
    for name in LOGITS:
        if weights[name].numel() != 1:
            raise DamagedError(f"{place}: {name} has the shape {tuple(weights[name].shape)}, expected one value")
        own[name] = weights[name].reshape(())
    model.load_state_dict(own)
    return model.eval()


def with_vision_head(base: SailModel, weights: Mapping[str, Tensor], place: str) -> SailModel:
    """Put the image head of a file with the `vision_` half only (vlhead.bin) into `base` and return it; its own logit_* are not used.

    UsageError if `base` has another kind of head, DamagedError as `heads_from`.
    """
    _refuse_names({name: value for name, value in weights.items() if name not in LOGITS}, _names("vision_"), place)
    feature, expansion, width = _widths(weights, "vision", place)
    own = (base.config.head, base.config.vision_width, base.config.expansion or 8, base.config.width)
    if own != ("glu", feature, expansion, width):
        given = f"glu {feature} -> {width}, expansion {expansion}"
        raise UsageError(f"{place} holds an image head {given}; the model has {own[0]} {own[1]} -> {own[3]}, expansion {own[2]}")
    base.vision_head.load_state_dict(_renamed(weights, "vision"))
    return base


def to_published(model: SailModel) -> dict[str, Tensor]:
    """Return the weights of a model with glu heads under their published names; UsageError for other heads or a model without bias."""
    if model.config.head != "glu" or model.logit_bias is None:
        raise UsageError(f"the published layout is of glu heads with scale and bias; this model has {model.config.head} heads")
    own = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    weights = {name: own[name].reshape(1) for name in LOGITS}
    for side in SIDES:
        weights |= {theirs: own[f"{side}_head.{ours}"] for theirs, ours in _names(f"{side}_").items()}
    return weights


def projector_from(weights: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """Return LLaVA's two-layer projector under the names of transformers (linear_1, linear_2); DamagedError for other names or shapes."""
    prefix = "model.mm_projector." if any(name.startswith("model.") for name in weights) else "mm_projector."
    names = _names(prefix, PROJECTOR)
    _refuse_names(weights, names, place)
    renamed = {ours: weights[theirs] for theirs, ours in names.items()}
    shapes = {name: tuple(value.shape) for name, value in renamed.items()}
    first = shapes["linear_1.weight"]
    if len(first) != 2 or [*shapes.values()][1:] != [first[:1], (first[0], first[0]), first[:1]]:
        raise DamagedError(f"{place} is no two-layer projector: shapes {shapes}")
    return renamed


def _require_width(side: str, name: str, found: int, wanted: int) -> None:
    if found != wanted:
        given = f"--{side} {name} gives features of {found}, but the published head takes {wanted}"
        raise UsageError(f"{given}; name the encoder that it was trained on, or another --feature")


def _names(prefix: str, layers: Mapping[str, str] = LAYERS) -> dict[str, str]:
    """Return our name of each weight and bias of `layers`, by its published name."""
    return {f"{prefix}{theirs}.{part}": f"{ours}.{part}" for theirs, ours in layers.items() for part in ("weight", "bias")}


def _renamed(weights: Mapping[str, Tensor], side: str) -> dict[str, Tensor]:
    return {ours: weights[theirs] for theirs, ours in _names(f"{side}_").items()}


def _refuse_names(weights: Mapping[str, Tensor], expected: Iterable[str], place: str) -> None:
    missing, unknown = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if missing or unknown:
        lists = {"missing": missing, "unknown": unknown}
        shown = [f"{what}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" for what, names in lists.items() if names]
        half = "" if any(name.startswith("text_") for name in weights) else "; a file with an image head only needs --base"
        raise DamagedError(f"{place} does not have the published layout ({'; '.join(shown)}){half}")


def _widths(weights: Mapping[str, Tensor], side: str, place: str) -> tuple[int, int, int]:
    """Return (F, expansion, E) of one head; DamagedError if its shapes do not fit together."""
    shapes = {name: tuple(value.shape) for name, value in _renamed(weights, side).items()}
    feature, hidden, width = (shapes[name][0] if shapes[name] else 0 for name in ("norm.weight", "gate.bias", "out.bias"))
    expected = {
        **dict.fromkeys(("norm.weight", "norm.bias"), (feature,)),
        **dict.fromkeys(("gate.weight", "value.weight"), (hidden, feature)),
        **dict.fromkeys(("gate.bias", "value.bias"), (hidden,)),
        "out.weight": (width, hidden),
        "out.bias": (width,),
    }
    wrong = [name for name in expected if shapes[name] != expected[name]]
    if wrong or min(feature, hidden, width) < 1 or hidden % feature:
        name = wrong[0] if wrong else "gate.weight"
        raise DamagedError(
            f"{place}: {side} head: {name} is {shapes[name]}; with features of {feature}, a hidden width that is a multiple of it and "
            f"{width} outputs it should be {expected[name]}"
        )
    return feature, hidden // feature, width
