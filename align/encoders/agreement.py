"""Whether a timm model is read as it is: what its adapter gives is compared with the model's own output, once, when it is loaded.

Legend: `B` images, `P` patches (row by row over the grid), `D` width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from align.common.errors import UsageError
from align.encoders.families import Backbone, PyramidBackbone
from align.encoders.loading import FORWARD_ERRORS

_PROBES = ((0.2, 0.6), (0.7, 0.3), (0.4, 0.9), (0.9, 0.5))  # places in an image, as shares of its height and width
_RANDOM = 7  # seed of the probe images


def require_agreement(name: str, backbone: Backbone, size: tuple[int, int]) -> None:
    """Raise UsageError, naming the family, if a timm model with pixels of `size` (H, W) is not read as it is.

    Compared with `forward_features`: number, order and values of the tokens, and the width (`num_features`). Of models that give tokens
    and no map, every layer must have the same tokens, and a changed patch of an image must change its own token more than the next ones.
    """
    model: Any = backbone.model
    timm_model = model.timm_model
    family = type(timm_model).__module__.rpartition(".")[2]
    try:
        why = _disagreement(timm_model, backbone, size)
    except FORWARD_ERRORS as error:
        why = f"its forward pass fails ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    if why:
        raise UsageError(
            f"{name}: timm's family {family!r} (architecture {model.config.architecture!r}) cannot be read: {why}. "
            "Choose another architecture, or one that transformers has itself"
        )


@torch.no_grad()
def _disagreement(timm_model: Any, backbone: Backbone, size: tuple[int, int]) -> str:
    """Return what is not as expected, or ""."""
    timm_model.eval()
    noise = torch.Generator().manual_seed(_RANDOM)
    image, other = (torch.randn(1, 3, *size, generator=noise) for _ in range(2))
    own = timm_model.forward_features(image)
    if not isinstance(own, Tensor) or own.ndim not in (3, 4):
        return "it does not give one map or one list of tokens"
    tokens, width = backbone(image, [backbone.count])[0], timm_model.num_features
    expected = own
    if own.ndim == 4:
        expected = own.flatten(2).transpose(1, 2) if own.shape[1] == width != own.shape[3] else own.flatten(1, 2)
    if expected.shape[2] != width:
        return f"it gives features of the shape {tuple(own.shape[1:])}, none of which is its width {width}"
    if tokens.shape != expected.shape or not torch.allclose(tokens, expected, rtol=1e-3, atol=1e-3 * float(expected.std())):
        return f"its own output has the shape {tuple(own.shape[1:])}, what would be read {tuple(tokens.shape[1:])}, or other values"
    if own.ndim == 4:
        return ""
    if isinstance(backbone, PyramidBackbone):
        backbone.fixed = True  # nothing says how its tokens would lie at another size
    else:
        counts = {one.shape[1] for one in backbone(image, range(backbone.first, backbone.count + 1))}
        if len(counts) > 1:
            return f"its layers have {sorted(counts)} tokens, so that the class token is not in all of them"
    return _misplaced(backbone, image, other, tokens[0, backbone.prefix :])


def _misplaced(backbone: Backbone, image: Tensor, other: Tensor, patches: Tensor) -> str:
    """Return "" if each patch (P, D) of an image belongs to its place in the grid, else why not."""
    (height, width), count = image.shape[2:], len(patches)
    rows = round((count * height / width) ** 0.5)
    columns = count // max(rows, 1)
    if count < 4 or rows * columns != count or abs(height / rows - width / columns) > 1:
        return f"its {count} tokens are no grid of patches of {height} x {width} pixels"
    cells, probes = [(int(y * rows), int(x * columns)) for y, x in _PROBES], []
    for row, column in cells:
        top, left = row * height // rows, column * width // columns
        part = (..., slice(top, top + height // rows), slice(left, left + width // columns))
        probes.append(image.clone())
        probes[-1][part] = other[part]
    changed = torch.cat([backbone(probe, [backbone.count])[0][:, backbone.prefix :] for probe in probes])  # (B, P, D)
    moves = 1 - functional.cosine_similarity(changed, patches[None], dim=2)  # (B, P)
    places = {"in its place": [row * columns + column for row, column in cells]}
    places["in columns"] = [column * rows + row for row, column in cells]
    for step in (-2, -1, 1, 2):
        places[f"shifted by {step}"] = [min(max(place + step, 0), count - 1) for place in places["in its place"]]
    scores = {said: float(sum(moves[number, place] for number, place in enumerate(at))) for said, at in places.items()}
    best = max(scores, key=lambda said: scores[said])
    return "" if best == "in its place" else f"a changed patch of the image changes a token that is {best}"
