"""A projector that starts near the words: its output layer is solved in closed form from captioned images, without the LLM.

The mean of an image's projected tokens is regressed onto the mean LLM input embedding of its caption's words, each weighted by
how rare it is (log of captions over captions with the word). The first layer is random, on standardized features, and only the
second is solved (ridge regression on its hidden units); the mean passes through a linear layer, so a solution for the mean is one
for the tokens. One pass over the images through encoder and head, memory O(H^2). A choice of this kit, not of the papers: on few
captions it replaces most of what the pretrain stage learns slowly (docs/decisions.md). Shapes: `N` visual tokens, `E` head width,
`H` LLM width, `V` vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from align.common.errors import DataError, UsageError
from align.common.reject_codes import Reject
from align.sources.gate import Limits, gate_image
from mllm.conversations.messages import texts_of
from mllm.conversations.table import Conversations
from mllm.model.modeling import SailLlavaForConditionalGeneration
from mllm.model.processing import SailLlavaProcessor

BATCH = 32  # images a forward pass
STANDARDIZE_IMAGES = 256  # first images, whose features give mean and spread
HELD_OUT = 0.1  # share of the rows that only judge the fit
MOST_HELD_OUT = 500
RIDGE = 0.3  # relative to the mean variance of the hidden units
LEAST_SPREAD = 0.3  # of the typical spread, to which a feature is standardized
MIN_IMAGES = 50


@dataclass(frozen=True)
class Fit:
    """How well it went: images used and left out, and how often a held-out image is nearest to its own caption of `held_out`."""

    images: int
    rejected: int
    held_out: int
    found: float

    def summary(self) -> str:
        """Return the fit as a sentence."""
        return (
            f"projector solved from {self.images} captioned images ({self.rejected} unusable); of {self.held_out} held-out images "
            f"{self.found:.0%} are nearest to their own caption's words"
        )


def fit_projector(
    model: SailLlavaForConditionalGeneration,
    processor: SailLlavaProcessor,
    conversations: Conversations,
    rows: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Fit:
    """Set the projector's weights from the first `rows` rows with one image; their answers are the captions. Return the fit.

    Raises DataError if fewer than MIN_IMAGES images can be used, UsageError if the projector is not two linear layers with biases.
    """
    projector: Any = model.model.multi_modal_projector
    if projector.linear_1.bias is None or projector.linear_2.bias is None:
        raise UsageError("a warm start needs a projector with biases (multimodal_projector_bias in the config)")
    used, words = captions(conversations, processor, rows)
    if len(used) < MIN_IMAGES:
        raise DataError(f"{len(used)} rows with one image and a caption, at least {MIN_IMAGES} are needed for a warm start")
    table: Any = model.get_input_embeddings()
    embedding = table.weight.detach()
    weights = rarity(words, len(embedding)).to(embedding.device)
    order = np.random.Generator(np.random.Philox(key=[seed, 7])).permutation(len(used))
    judged = set(order[: min(MOST_HELD_OUT, int(HELD_OUT * len(used)))].tolist())
    solver: _Solver | None = None
    held: list[tuple[Tensor, Tensor]] = []
    images = 0
    with torch.no_grad():
        for places, features in _features(model, processor, conversations, used, lambda done: progress(done, len(used))):
            if solver is None:
                _first_layer(projector, features[:STANDARDIZE_IMAGES], seed)
                solver = _Solver(projector.linear_2.weight.shape[1], embedding.shape[1])
            hidden = projector.act(projector.linear_1(features.to(projector.linear_1.weight.dtype))).mean(1).double().cpu()
            for place, unit in zip(places, hidden, strict=True):
                target = _target(embedding, words[place], weights).double().cpu()
                images += 1
                if place in judged:
                    held.append((unit, target))
                else:
                    solver.add(unit, target)
        if solver is None or solver.count < MIN_IMAGES:
            raise DataError(f"only {images} of {len(used)} images can be read; check the data with mllm/check.py, and --image-root")
        matrix, offset = solver.solve(RIDGE)
        projector.linear_2.weight.copy_(matrix.T)
        projector.linear_2.bias.copy_(offset)
        found = _found(held, matrix, offset, solver.target_mean)
    return Fit(images, len(used) - images, len(held), found)


def captions(conversations: Conversations, processor: SailLlavaProcessor, rows: int) -> tuple[list[int], list[Tensor]]:
    """Return the numbers of the first `rows` rows with exactly one image, and the token ids of what is answered there."""
    special = torch.tensor(sorted(processor.tokenizer.all_special_ids))
    used, words = [], []
    for number in range(len(conversations)):
        row = conversations[number]
        said = " ".join(texts_of([message for message in row.messages if message["role"] == "assistant"]))
        ids = torch.tensor(processor.tokenizer.encode(f" {said}", add_special_tokens=False), dtype=torch.long)
        ids = ids[~torch.isin(ids, special)]
        if len(row.images) == 1 and len(ids):
            used.append(number)
            words.append(ids)
        if len(used) == rows:
            break
    return used, words


def rarity(words: list[Tensor], vocabulary: int) -> Tensor:
    """Return (V,) float32: log(captions / captions with the token), 0 for tokens of every caption and of none."""
    counts = torch.zeros(vocabulary)
    for ids in words:
        counts[ids.unique()] += 1
    return torch.where(counts > 0, (len(words) / counts.clamp(min=1)).log(), torch.zeros(()))


class _Solver:
    """Sums for a ridge regression of targets (H) on hidden units (K), one row at a time."""

    def __init__(self, hidden: int, width: int) -> None:
        self.count = 0
        self.hidden_sum, self.target_sum = torch.zeros(hidden, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        self.gram = torch.zeros(hidden, hidden, dtype=torch.float64)
        self.cross = torch.zeros(hidden, width, dtype=torch.float64)

    def add(self, hidden: Tensor, target: Tensor) -> None:
        self.count += 1
        self.hidden_sum += hidden
        self.target_sum += target
        self.gram.addr_(hidden, hidden)
        self.cross.addr_(hidden, target)

    @property
    def target_mean(self) -> Tensor:
        return self.target_sum / self.count

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Return the matrix (K, H) and offset (H) of the regression."""
        mean = self.hidden_sum / self.count
        gram = self.gram - self.count * torch.outer(mean, mean)
        cross = self.cross - self.count * torch.outer(mean, self.target_mean)
        gram += ridge * gram.diagonal().mean() * torch.eye(len(mean), dtype=torch.float64)
        matrix = torch.linalg.solve(gram, cross)
        return matrix, self.target_mean - mean @ matrix


def _features(
    model: SailLlavaForConditionalGeneration, processor: SailLlavaProcessor, conversations: Conversations, used: list[int],
    progress: Callable[[int], None],
) -> Iterator[tuple[list[int], Tensor]]:  # fmt: skip
    """Yield places in `used` and their head outputs (B, N, E), BATCH rows at a time (the first: STANDARDIZE_IMAGES)."""
    device = next(model.parameters()).device
    start = 0
    while start < len(used):
        stop = min(start + (BATCH if start else STANDARDIZE_IMAGES), len(used))
        pixels: dict[int, Tensor] = {}
        for place in range(start, stop):
            with suppress(Reject):
                encoded = conversations.read_image(conversations[used[place]].images[0])
                pixels[place] = processor.image_processor.to_pixels(gate_image(encoded, Limits()))
        if pixels:
            batches = torch.stack(list(pixels.values())).split(BATCH)
            yield list(pixels), torch.cat([model.model.get_patch_features(batch.to(device)) for batch in batches])
        start = stop
        progress(start)


def _first_layer(projector: Any, features: Tensor, seed: int) -> None:
    """Set the first layer to random units of standardized features (B, N, E), in the nearly straight part of GELU.

    A straighter first layer fits better (docs/LOG.md); training bends it where that helps.
    """
    flat = features.double().flatten(0, 1).cpu()
    mean, spread = flat.mean(0), flat.std(0)
    # channels that hardly vary in the first images (CNNs have many) would drown all others once they do
    spread = torch.maximum(spread, LEAST_SPREAD * spread.square().mean().sqrt()) + 1e-6
    hidden, width = projector.linear_1.weight.shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(hidden, width, generator=generator, dtype=torch.float64) / width**0.5 / spread
    bias = 2.0 - weight @ mean
    projector.linear_1.weight.copy_(weight)
    projector.linear_1.bias.copy_(bias)


def _target(embedding: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Return (H): the mean embedding of the tokens `ids`, weighted by their rarity; plain if all of them are in every caption."""
    share = weights[ids.to(weights.device)]
    share = share if float(share.sum()) > 0 else torch.ones_like(share)
    return (embedding[ids.to(embedding.device)].float() * share[:, None]).sum(0) / share.sum()


def _found(held: list[tuple[Tensor, Tensor]], matrix: Tensor, offset: Tensor, mean: Tensor) -> float:
    if not held:
        return float("nan")
    hidden, targets = (torch.stack(column) for column in zip(*held, strict=True))
    predicted = functional.normalize(hidden @ matrix + offset - mean, dim=1)
    scores = predicted @ functional.normalize(targets - mean, dim=1).T
    return float((scores.argmax(1) == torch.arange(len(scores))).double().mean())
