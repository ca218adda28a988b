"""Which words are in which texts: cut by a tokenizer, counted, chosen by frequency; the targets of `align.model.word_map`.

Shapes: `n` texts, `V` words.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from align.common.errors import DataError


class Words:
    """The words of a projector: the tokens that texts use, as a tokenizer cuts them.

    First `count` all texts, then `choose`; `presence` tells which of the chosen words are in a text. Tokens that are in every text
    tell nothing and are left out.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        """`size`: how many tokens there are, such as the rows of an LLM's embedding matrix."""
        self.tokenizer = tokenizer
        self.special = torch.tensor(sorted(tokenizer.all_special_ids))
        self.texts = 0
        self.counts = torch.zeros(size, dtype=torch.int64)
        self.chosen = torch.zeros(0, dtype=torch.int64)  # token ids (V)

    def ids(self, texts: Sequence[str]) -> list[Tensor]:
        """Return the token ids of each text as it stands within a sentence, each once, without special tokens."""
        encoded = self.tokenizer([f" {text}" for text in texts], add_special_tokens=False)["input_ids"]
        found = [torch.tensor(ids, dtype=torch.int64).unique() for ids in encoded]
        return [ids[~torch.isin(ids, self.special)] for ids in found]

    def count(self, ids: Sequence[Tensor]) -> None:
        """Count in how many texts each token is."""
        self.texts += len(ids)
        for one in ids:
            self.counts[one] += 1

    def choose(self, most: int) -> None:
        """Choose the `most` most frequent tokens as words. DataError if all texts are of the same words."""
        usable = (self.counts > 0) & (self.counts < self.texts)
        if not usable.any():
            raise DataError(f"{self.texts} texts that all use the same words; a projector cannot be solved from them")
        order = self.counts.masked_fill(~usable, 0).sort(descending=True, stable=True).indices
        self.chosen = order[: min(most, int(usable.sum()))].sort().values

    @property
    def shares(self) -> Tensor:
        """Shares of the texts that have each word (V), float64."""
        return self.counts[self.chosen].double() / self.texts

    def presence(self, ids: Sequence[Tensor]) -> Tensor:
        """Return which words are in each text: (n, V) bool."""
        places = torch.full_like(self.counts, -1)
        places[self.chosen] = torch.arange(len(self.chosen))
        said = torch.zeros(len(ids), len(self.chosen), dtype=torch.bool)
        for row, one in zip(said, ids, strict=True):
            found = places[one]
            row[found[found >= 0]] = True
        return said
