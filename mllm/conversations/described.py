"""Described images: visual tokens that are composed of texts, for conversations about pictures that nobody has.

An image cell may hold {"text": "a dog on a beach"}, or {"regions": [{"text": "a dog", "box": [left, top, right, bottom]}, ...]} with
boxes in shares (0 to 1) of width and height. A trained alignment head puts texts where images are; mllm/upgrade.py --described writes
their vectors and what real images look like, in the projector's own coordinates, into the model's folder:

    described.safetensors    keys (n) int64, sorted; vectors (n, E) and tokens (m, N, D) float16; mean (D) float32; grid (2) int64

Composed are the tokens of a random real picture, weaker, and on them the vectors of the texts, stronger where a box covers more of a
token's cell. So an LLM that learns from them reads any word that the texts have, not only those of the captioned images. Legend: `N`
visual tokens, `D` width given to the projector, whose first `E` columns are the head's.
"""

import json
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from align.common.errors import UsageError
from align.common.files import hash64
from align.common.reject_codes import Reject
from align.sources.gate import text_problem

FILE = "described.safetensors"
MOST_REGIONS = 100
BACKGROUND = 0.4  # of the real picture's deviation from the mean token
STRENGTH = (1.1, 2.4)  # of the texts' vectors, drawn for each picture: single tokens lie further from the mean than means of pictures


def is_description(value: Any) -> bool:
    """Return whether an image cell describes an image instead of holding one."""
    return isinstance(value, dict) and any(value.get(name) is not None for name in ("text", "regions"))


def description(value: dict[str, Any]) -> str:
    """Return the regions of an image cell as JSON: [[text, [left, top, right, bottom]], ...]. Raise Reject if they are not as above."""
    given = [name for name in value if value[name] is not None]
    regions = [{"text": value["text"], "box": [0, 0, 1, 1]}] if given == ["text"] else value.get("regions")
    if len(given) != 1:
        raise Reject("image_description", f"it has {', '.join(map(str, given))}; give text or regions")
    if not isinstance(regions, list) or not 0 < len(regions) <= MOST_REGIONS:
        raise Reject("image_description", f"regions is no list of 1 to {MOST_REGIONS} regions")
    return json.dumps([_region(region) for region in regions], ensure_ascii=False)


def _region(region: Any) -> tuple[str, list[float]]:
    text: Any = region["text"] if isinstance(region, dict) and region.keys() == {"text", "box"} else ""
    if not isinstance(text, str) or not text.strip() or text_problem(text):
        raise Reject("image_description", f"{str(region)[:100]}; expected text and box")
    box: Any = region["box"]
    four = isinstance(box, list) and len(box) == 4 and all(isinstance(edge, int | float) and math.isfinite(edge) for edge in box)
    if not four or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise Reject("image_description", f"box {str(box)[:80]}; expected [left, top, right, bottom] from 0 to 1")
    return text.strip(), [float(edge) for edge in box]


def texts_in(described: str) -> Iterator[str]:
    """Yield the texts of a description."""
    yield from (text for text, _ in json.loads(described))


class _Opened(NamedTuple):
    """The parts of described.safetensors; a row of `vectors` and `pictures` is read when it is asked for."""

    keys: np.ndarray
    vectors: Any
    pictures: Any
    mean: Tensor
    grid: list[int]


class DescribedImages:
    """The vectors and real tokens in a model's folder, memory-mapped. Can be pickled: nothing is kept open."""

    def __init__(self, folder: Path) -> None:
        """UsageError if the folder has no described.safetensors."""
        self.path = folder / FILE
        if not self.path.is_file():
            raise UsageError(
                f"the data has described images, and there is no {self.path}; make the model with mllm/upgrade.py --described FILES, "
                "or give finetune the folder of such a model as --described"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def tokens(self, described: str, seed: int) -> Tensor:
        """Return the tokens (N, D) float32 of a description; another seed gives another background. Raise Reject for an unknown text."""
        opened = self._opened
        random = np.random.Generator(np.random.Philox(key=[seed, xxhash.xxh3_64_intdigest(described.encode())]))
        tokens = BACKGROUND * (opened.pictures[int(random.integers(opened.pictures.get_shape()[0]))].float() - opened.mean)
        strength = random.uniform(*STRENGTH)
        for text, box in json.loads(described):
            vector = opened.vectors[self._row(text)].float()
            tokens[:, : len(vector)] += strength * torch.outer(coverage(box, *opened.grid).sqrt(), vector)
        return opened.mean + tokens

    def _row(self, text: str) -> int:
        keys, [key] = self._opened.keys, hash64([text])
        row = int(np.searchsorted(keys, key))
        if row == len(keys) or keys[row] != key:
            raise Reject("image_description", f"{text[:80]!r} has no vector in {self.path}; give the file to mllm/upgrade.py --described")
        return row

    @cached_property
    def _opened(self) -> "_Opened":
        file = safe_open(self.path, "pt")
        vectors, pictures = file.get_slice("vectors"), file.get_slice("tokens")
        return _Opened(file.get_tensor("keys").numpy(), vectors, pictures, file.get_tensor("mean"), file.get_tensor("grid").tolist())


def coverage(box: Sequence[float], rows: int, columns: int) -> Tensor:
    """Return which share of each cell of a grid a box [left, top, right, bottom] covers: (rows * columns) float32, row by row."""
    shares = []
    for begin, end, cells in ((box[1], box[3], rows), (box[0], box[2], columns)):
        edges = torch.arange(cells + 1) / cells
        shares.append((edges[1:].clamp(max=end) - edges[:-1].clamp(min=begin)).clamp(min=0) * cells)
    return torch.outer(*shares).flatten()
