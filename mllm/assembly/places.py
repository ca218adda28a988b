"""How an LLM is told where in the image a visual token is: by a vector of its own, or in words after it.

Small LLMs do not learn to use the vectors within a few hundred steps; words they copy (docs/LOG.md). SmolVLM (arXiv 2504.05299) and
Idefics3 (arXiv 2408.12637) name the places of an image's tiles in such a way, before them. Here the place follows, since a language
model that has found a word again continues with what came after it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from align.common.errors import UsageError
from align.model.words import Words
from mllm.model.towers import SailProjector

PLACES = (("top", "middle", "bottom"), ("left", "center", "right"))  # words for rows and columns, at their beginning, half way and end
PLACE_SHARE = 0.5  # length of the vectors that tell the place, relative to the visual tokens'
MOST = 64  # visual tokens with places in words
_IN_WORDS = (
    ("in the top left", "at the top", "in the top right"),
    ("on the left", "in the center", "on the right"),
    ("in the bottom left", "at the bottom", "in the bottom right"),
)


def places_in_words(grids: Sequence[tuple[int, int]]) -> list[str]:
    """Return what is written after each visual token of grids of (rows, columns): the third of the image that it is in, row by row.

    UsageError if there are more than MOST.
    """
    places = []
    for rows, columns in grids:
        across, down = ([min(2, (6 * at + 3) // (2 * count)) for at in range(count)] for count in (columns, rows))
        places += [f" {_IN_WORDS[row][column]}," for row in down for column in across]
    if len(places) > MOST:
        raise UsageError(f"--place-words with {len(places)} visual tokens; at most {MOST} are allowed, for example by --grid 3 3")
    return places


def write_places(projector: SailProjector, grid: Sequence[int], words: Words, table: Tensor, tokens: Tensor) -> None:
    """Set the vectors that tell where a visual token is: the embeddings of PLACES, mixed by how near its row and column are to each.

    They have mean 0 over the grid (rows, columns), and PLACE_SHARE of the length that the projector gives `tokens` (t, D).
    """
    axes = []
    for names, count in zip(PLACES, grid, strict=True):
        said = torch.stack([table[ids.to(table.device)].float().mean(0) for ids in words.ids(names)])  # (3, H)
        at = (2 * torch.arange(count, device=said.device) + 1) / count - 1  # -1: the beginning, 1: the end
        axes.append(torch.stack([(-at).clamp(min=0), 1 - at.abs(), at.clamp(min=0)], 1) @ said)  # (count, H)
    places = (axes[0][:, None] + axes[1][None]).flatten(0, 1)
    places = places - places.mean(0)
    length = projector.linear_2(projector.act(projector.scores(tokens.to(said)))).norm(dim=1).mean()
    projector.positions.copy_(PLACE_SHARE * length / places.norm(dim=1).mean().clamp(min=1e-6) * places)  # type: ignore[union-attr]
