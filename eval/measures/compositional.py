"""Compositional matching: two similar images and two similar captions, which the model must match.

s(i, c) is the cosine of image i and caption c. Caption 0 belongs to image 0, caption 1 to image 1.

    winoground  text score:  s(0,0) > s(0,1) and s(1,1) > s(1,0): each image prefers its own caption
                image score: s(0,0) > s(1,0) and s(1,1) > s(0,1): each caption prefers its own image
                group score: both        (Thrush et al., "Winoground", CVPR 2022, equations 1 to 3)
    mmvp        pair accuracy: Winoground's image score        (Tong et al., "Eyes Wide Shut?", CVPR 2024)

A tie is wrong. Shapes: `G` groups, `N` = 2 G images and N captions in group order, `E` aligned width. Embeddings are L2-normalized
float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from align.common.errors import UsageError
from align.common.intervals import wilson_interval
from eval.results.examples import drawn_numbers
from eval.results.records import Entry

METRICS = {
    "winoground": {"text_score": "text", "image_score": "image", "group_score": "group"},
    "mmvp": {"pair_accuracy": "image"},
}  # protocol -> metric -> the property of CompositionalAnswers that it averages
CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}  # two comparisons: (1/2)^2; group: 2! 2! of the 4! orders


@dataclass(frozen=True)
class CompositionalAnswers:
    """A model's `scores`: (G, 2, 2) float32 cosines [group, image, caption]. The diagonal holds the right pairs."""

    scores: np.ndarray

    @property
    def text(self) -> np.ndarray:
        """(G,) bool: each image scores higher with its own caption than with the other one."""
        return self._own_above(self.scores[:, [0, 1], [1, 0]])  # (G, 2), by image

    @property
    def image(self) -> np.ndarray:
        """(G,) bool: each caption scores higher with its own image than with the other one."""
        return self._own_above(self.scores[:, [1, 0], [0, 1]])  # (G, 2), by caption

    @property
    def group(self) -> np.ndarray:
        """(G,) bool: text and image are both right."""
        return self.text & self.image

    def _own_above(self, other: np.ndarray) -> np.ndarray:
        return np.asarray((self.scores[:, [0, 1], [0, 1]] > other).all(axis=1))


@torch.no_grad()
def compositional(images: Tensor, captions: Tensor) -> CompositionalAnswers:
    """Return the answers for `images` (N, E) and `captions` (N, E), two rows per group; UsageError if the shapes differ or N is odd."""
    if images.shape != captions.shape or len(images) % 2:
        shapes = f"{tuple(images.shape)} images and {tuple(captions.shape)} captions"
        raise UsageError(f"{shapes}: a compositional task needs two images and two captions a group")
    groups = (len(images) // 2, 2, images.shape[1])
    # float64, so that captions with the same embedding tie
    scores = torch.einsum("gie,gce->gic", images.double().reshape(groups), captions.double().reshape(groups))
    return CompositionalAnswers(scores.float().numpy())


def compositional_entries(answers: CompositionalAnswers, protocol: str, task: str, model: str, confidence: float) -> list[Entry]:
    """Return the share of right groups for each metric of `protocol`, with Wilson intervals."""
    n = len(answers.scores)
    rights = {metric: int(getattr(answers, answer).sum()) for metric, answer in _metrics(protocol).items()}
    return [Entry(task, metric, right / n, *wilson_interval(right, n, confidence), n, model) for metric, right in rights.items()]


def compositional_chance(groups: int, protocol: str, task: str, model: str) -> list[Entry]:
    """Return the expected scores of four cosines in random order. They are exact, so each interval is a point."""
    chances = {metric: CHANCE[answer] for metric, answer in _metrics(protocol).items()}
    return [Entry(task, metric, value, value, value, groups, model) for metric, value in chances.items()]


def compositional_table(answers: CompositionalAnswers, groups: Sequence[str], categories: Sequence[str]) -> pa.Table:
    """Return one row per group: key, category, cosines s00 to s11 (image, caption), and what is right. Inputs (N,) are per image."""
    keys, kinds = _of_groups(groups), _of_groups(categories)
    cosines = {f"s{i}{c}": pa.array(answers.scores[:, i, c], pa.float32()) for i in (0, 1) for c in (0, 1)}
    right = {name: pa.array(getattr(answers, name)) for name in CHANCE}
    return pa.table({"key": pa.array(keys, pa.string()), "category": pa.array(kinds, pa.string()), **cosines, **right})


def compositional_examples(
    answers: Mapping[str, CompositionalAnswers],
    groups: Sequence[str],
    categories: Sequence[str],
    captions: Sequence[str],
    count: int,
    generator: np.random.Generator,
) -> dict[str, Any]:
    """Return `count` random groups with each model's answers, by model name. `groups`, `categories`, `captions` (N,) are per image."""
    keys, kinds = _of_groups(groups), _of_groups(categories)
    items = []
    for group in drawn_numbers(len(keys), count, generator):
        first = 2 * group
        said = {}
        for name, given in answers.items():
            right = {answer: bool(getattr(given, answer)[group]) for answer in CHANCE}
            said[name] = {"scores": given.scores[group].astype(np.float64).round(4).tolist(), **right}
        shown = {"images": [first, first + 1], "captions": list(captions[first : first + 2])}
        items.append({"key": keys[group], "category": kinds[group], **shown, "answers": said})
    return {"items": items}


def _metrics(protocol: str) -> dict[str, str]:
    if protocol not in METRICS:
        raise UsageError(f"unknown compositional protocol {protocol!r}; known: {', '.join(METRICS)}")
    return METRICS[protocol]


def _of_groups(by_image: Sequence[str]) -> list[str]:
    """Return one value per group; UsageError unless both images of each group have the same value."""
    if list(by_image[::2]) != list(by_image[1::2]):
        raise UsageError("the two images of a group should follow one another, with the same group and category")
    return list(by_image[::2])
