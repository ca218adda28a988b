"""Whether a prompt is the beginning of its training row, token by token. If not, a model is asked other tokens than it learned.

A tokenizer may merge the end of the prompt with the beginning of the answer, as white space with a word or with more white space.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from align.common.reject_codes import Reject

Tokens = tuple[np.ndarray, np.ndarray]  # ids (T,) and character offsets (T, 2)
_SHOWN = 20  # characters on both sides of a seam in a message


@dataclass(frozen=True)
class Seam:
    """A prompt, the text of the row that should begin with it, and the row's tokens."""

    row: int
    prompt: str
    text: str
    tokens: Tokens


def broken_seams(seams: Sequence[Seam], control: re.Pattern[str], tokenize: Callable[[list[str]], list[Tokens]]) -> dict[int, Reject]:
    """Return a Reject for each row with a prompt that does not begin it.

    The text before the last control token of a prompt is tokenized alone in both, so only what follows is compared; where that
    differs, the whole prompt is.
    """
    broken = {seam.row: _reject(seam) for seam in seams if not seam.text.startswith(seam.prompt)}
    open_seams = [seam for seam in seams if seam.row not in broken]
    starts = [max((match.start() for match in control.finditer(seam.prompt)), default=0) for seam in open_seams]
    ends = tokenize([seam.prompt[start:] for seam, start in zip(open_seams, starts, strict=True)])
    doubtful = []
    for seam, start, (ids, _) in zip(open_seams, starts, ends, strict=True):
        row_ids, offsets = seam.tokens
        inside = (offsets[:, 0] >= start) & (offsets[:, 0] < len(seam.prompt))
        if not np.array_equal(row_ids[inside], ids):
            doubtful.append(seam)
    for seam, (ids, _) in zip(doubtful, tokenize([seam.prompt for seam in doubtful]), strict=True):
        if not np.array_equal(seam.tokens[0][: len(ids)], ids):
            broken[seam.row] = _reject(seam)
    return broken


def _reject(seam: Seam) -> Reject:
    at = len(seam.prompt)
    return Reject(
        "prompt_seam", f"the prompt ends with {seam.prompt[-_SHOWN:]!r}, the row has {seam.text[max(0, at - _SHOWN) : at + _SHOWN]!r}"
    )
