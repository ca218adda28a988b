"""Texts without images: read from files, embedded in the aligned space, and cut into the LLM's own words.

Shapes: `n` texts, `E` head width, `V` words.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.common.errors import DataError, UsageError
from align.common.reject_codes import Reject
from align.model.dual_encoder import SailModel
from align.model.saving import model_folder
from align.sources.gate import Limits, gate_captions, split_captions
from align.sources.plan import Source, open_shard, plan
from align.sources.safe_files import bounded_lines, text_start

BATCH = 512  # texts read and embedded at a time
ENCODER_BATCH = 64


@dataclass(frozen=True)
class Texts:
    """Text files (one text a line) and tables or tars with text columns; at most `most` texts are read, in order."""

    files: tuple[str, ...]
    columns: tuple[str, ...] = ("caption",)
    most: int = 1_000_000

    def batches(self) -> Iterator[list[str]]:
        """Yield up to BATCH texts at a time; what is no usable text is left out. DataError if a file has none of `columns`."""
        batch: list[str] = []
        left = self.most
        for file in self.files:
            for text in _lines(file) if file.endswith(".txt") else _cells(file, self.columns):
                batch.append(text)
                left -= 1
                if len(batch) == BATCH or not left:
                    yield batch
                    batch = []
                if not left:
                    return
        if batch:
            yield batch


def _lines(file: str) -> Iterator[str]:
    """Yield the lines of a text file, or of all that a pattern matches, that are usable as captions."""
    found = [file] if os.path.isfile(file) else sorted(glob.glob(file))
    if not found:
        raise UsageError(f"no such file: {file}; --texts takes .txt (a text a line), .jsonl, .csv, .tsv, .parquet and .tar")
    for path in found:
        with open(path, "rb") as opened:
            opened.seek(text_start(path))
            for line, _ in bounded_lines(opened):
                try:
                    yield gate_captions(line.decode("utf-8").strip(), Limits())[0]
                except (UnicodeDecodeError, Reject):
                    continue


def _cells(data: str, columns: Sequence[str]) -> Iterator[str]:
    """Yield the texts in the columns of a table, tar, or pattern of such files; no image is read."""
    source = Source(data, group="none", key_prefix="file")  # every row counts, and keys pair nothing here
    found = plan(source, rows_per_shard=10_000, columns=columns)
    for shard in range(len(found.shards)):
        for row in open_shard(source, found, shard).rows(images=False):
            for column in columns if row.reject is None else ():
                try:
                    yield from split_captions(row.fields.get(column), Limits())[0]
                except Reject:
                    continue


class Words:
    """The words of a projector: the tokens that texts use, as the LLM's tokenizer cuts them.

    First `count` all texts, then `choose`; `presence` tells which of the chosen words are in a text. Tokens that are in every text
    tell nothing and are left out.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        """`size`: rows of the LLM's embedding matrix."""
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


class TextSide:
    """The text encoder and text head of a stage-one run: aligned embeddings before normalization, as the image head's are."""

    def __init__(self, sail: str, device: torch.device) -> None:
        self.model: SailModel = SailModel.from_pretrained(model_folder(Path(sail).expanduser())).to(device).eval()

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Tensor:
        """Return (n, E) float32."""
        features = self.model.text_encoder.encode(texts, ENCODER_BATCH)
        return self.model.text_head(features.to(self.model.logit_scale)).float()


def require_texts(count: int, files: Sequence[str], least: int) -> None:
    """Raise DataError if fewer than `least` texts could be used."""
    if count < least:
        raise DataError(f"--texts {' '.join(files)}: {count} usable texts, at least {least} are needed; check --text-columns")
