"""Writes what described images are composed of (mllm/conversations/described.py): texts' vectors where images lie, and real tokens.

Aligned texts are moved into the coordinates of images by mean and covariance: CORAL (Sun et al., arXiv 1511.05547), the other way than
`align.model.word_map` moves images. Training on texts that stand for images is CapDec's idea (arXiv 2211.00575). Legend as there.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from align.common.errors import DataError
from align.common.files import hash64
from align.common.hardware import choose_device
from align.model.word_map import Moments, power
from align.runtime.console import Progress
from mllm.assembly.config import UpgradeConfig
from mllm.assembly.texts import BATCH, Batch, TextSide
from mllm.conversations.described import FILE, texts_in
from mllm.conversations.table import Conversations, open_conversations
from mllm.model.towers import SailProjector


@dataclass(frozen=True)
class Crossing:
    """The way from aligned texts to images: the texts' mean (E), the matrix (E, E), and real tokens (m, N, D) with their mean (D)."""

    text_mean: Tensor
    change: Tensor
    tokens: Tensor
    mean: Tensor
    grid: Sequence[int]

    @classmethod
    def between(cls, texts: Moments, means: Tensor, tokens: Tensor, grid: Sequence[int]) -> "Crossing":
        """Return the way from `texts` to images with the given mean tokens (n, D), of which `tokens` (m * N, D) are some."""
        own = means[:, : len(texts.mean)].double()
        own = own - own.mean(0)
        change = power(texts.centered()[0] / texts.count, -0.5) @ power(own.T @ own / len(own), 0.5)
        whole = tokens[: len(tokens) // prod(grid) * prod(grid)].unflatten(0, (-1, prod(grid)))
        return cls(texts.mean, change, whole, means.mean(0), grid)

    def vectors(self, aligned: Tensor) -> Tensor:
        """Return how far images of some texts (n, E) would lie from the mean image: (n, E) float16."""
        return ((aligned.double().cpu() - self.text_mean) @ self.change).half()


def write_described(folder: Path, config: UpgradeConfig, crossing: Crossing | None, projector: SailProjector, console: Console) -> None:
    """Write described.safetensors for all texts of the config's `described` files to `folder`. DataError if they describe no image.

    Nothing is written if there are no such files. `projector` is the one that sees the first run's head.
    """
    if not config.described or crossing is None:
        return
    side = TextSide(config.sail[0], choose_device())
    keys, vectors = list[int](), [torch.zeros(0, len(crossing.text_mean)).half()]
    with tempfile.TemporaryDirectory() as cache:
        conversations = open_conversations(config.described, None, Path(cache), config.seed)
        texts = _new_texts(conversations, Progress(console, "descriptions"))
        while batch := dict(islice(texts, BATCH)):
            keys += batch
            said = Batch(list(batch.values()), None, 1.0)
            vectors.append(crossing.vectors(projector.normed(side.embed(said, range(len(batch))))))
    if not keys:
        raise DataError(f'--described {" ".join(config.described)}: no image is described; give {{"text": ...}} or regions as image')
    ordered = torch.tensor(keys, dtype=torch.int64).sort()
    tensors = {
        "keys": ordered.values, "vectors": torch.cat(vectors)[ordered.indices], "tokens": crossing.tokens.half(),
        "mean": crossing.mean.float(), "grid": torch.tensor(list(crossing.grid)),
    }  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE)
    console.print(f"{len(keys):,} texts of described images; train on them with mllm/finetune.py --data {' '.join(config.described)}")


def _new_texts(conversations: Conversations, progress: Callable[[int, int], None]) -> Iterator[tuple[int, str]]:
    """Yield each text of the described images once, after its hash."""
    seen: set[int] = set()
    for number in range(len(conversations)):
        for image in conversations[number].images:
            texts = list(texts_in(image.described)) if image.described is not None else []
            for key, text in zip(hash64(texts).tolist(), texts, strict=True):
                if key not in seen:
                    seen.add(key)
                    yield key, text
        progress(number + 1, len(conversations))
