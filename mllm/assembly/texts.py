"""Texts without images: read from files, embedded in the aligned space, and told in the LLM's own word embeddings.

Shapes: `n` texts, `E` head width, `H` LLM width, `V` vocabulary.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

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
    """What a text is in the LLM's word space: the mean input embedding of its tokens, each weighted by its rarity.

    `table` (V, H) are the embeddings. Rarity is log(texts / texts with the token), over all texts that `count` was given; a text whose
    tokens are all in every text gets the plain mean.
    """

    def __init__(self, tokenizer: Any, table: Tensor) -> None:
        self.tokenizer, self.table = tokenizer, table.detach()
        self.special = torch.tensor(sorted(tokenizer.all_special_ids))
        self.texts = 0
        self.counts = torch.zeros(len(table), dtype=torch.int64)

    def ids(self, texts: Sequence[str]) -> list[Tensor]:
        """Return the token ids of each text as it stands within a sentence, without special tokens."""
        encoded = self.tokenizer([f" {text}" for text in texts], add_special_tokens=False)["input_ids"]
        found = [torch.tensor(ids, dtype=torch.int64) for ids in encoded]
        return [ids[~torch.isin(ids, self.special)] for ids in found]

    def count(self, ids: Sequence[Tensor]) -> None:
        """Count in how many texts each token is."""
        self.texts += len(ids)
        for one in ids:
            self.counts[one.unique()] += 1

    def rarity(self) -> Tensor:
        """Return (V,) float32 weights; 0 for tokens of every text and of none."""
        counts = self.counts.float()
        return torch.where(counts > 0, (self.texts / counts.clamp(min=1)).log(), torch.zeros(()))

    def targets(self, ids: Sequence[Tensor], rarity: Tensor) -> Tensor:
        """Return (n, H) float32; no text may be without tokens."""
        if not ids:
            return self.table.new_zeros(0, self.table.shape[1], dtype=torch.float32)
        shares = [rarity[one] for one in ids]
        shares = [share / share.sum() if float(share.sum()) > 0 else torch.full_like(share, 1 / len(share)) for share in shares]
        starts = torch.tensor([0, *(len(one) for one in ids[:-1])]).cumsum(0)
        flat, starts, weights = (each.to(self.table.device) for each in (torch.cat(list(ids)), starts, torch.cat(shares)))
        return functional.embedding_bag(flat, self.table.float(), starts, mode="sum", per_sample_weights=weights)


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
