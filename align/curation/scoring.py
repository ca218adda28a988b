"""Scores of candidates against concepts: their common space, and each concept's best candidates over all shards.

Shapes: `r` rows and `n` samples of a chunk, `W` feature width, `E` width of the space, `C` concepts, `S` rows of all candidates.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import normalize

from align.common.errors import Preempted, UsageError
from align.common.files import human_bytes
from align.common.fingerprints import compare_encoders, compare_fingerprints
from align.common.locks import Lease
from align.common.preemption import noted, reason
from align.curation.pool import CandidatePool
from align.curation.toplists import TopLists
from align.encoders.spec import TextSpec
from align.encoders.text import load_text_encoder
from align.model.dual_encoder import SailModel
from align.runtime.checkpoints import clean_checkpoints, newest_checkpoint, save_checkpoint
from align.runtime.console import Progress

CHUNK_SCORES = 1 << 22  # scores held at once (16 MiB)

Projection = Callable[[Tensor], Tensor]  # features (r, W) float32 -> L2-normalized (r, E)


def chunk_rows(concepts: int) -> int:
    """Return how many rows are scored at once. It depends only on C, so a rerun rounds as the first run did."""
    return max(256, min(8192, CHUNK_SCORES // concepts))


@torch.no_grad()
def scored_chunks(
    candidates: CandidatePool, shard: int, prototypes: Tensor, project: Projection, only: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (cosines (n, C) float32, sample numbers (n,)) of a shard. `prototypes` (C, E) are normalized, on the device to use."""
    for features, firsts, samples in candidates.chunks(shard, chunk_rows(len(prototypes)), only):
        rows = project(torch.from_numpy(features).to(prototypes.device).float())
        scores = (rows @ prototypes.T).cpu().numpy()  # (r, C)
        if len(firsts) < len(scores):
            scores = np.maximum.reduceat(scores, firsts, axis=0)  # a sample's best caption
        yield scores, samples


def score_shard(candidates: CandidatePool, shard: int, prototypes: Tensor, project: Projection, lists: TopLists) -> np.ndarray:
    """Add a shard's samples to the lists. Return (C,) int64: how many samples have each concept as their best."""
    counts = np.zeros(len(lists), dtype=np.int64)
    for scores, samples in scored_chunks(candidates, shard, prototypes, project):
        lists.add(scores, samples)
        counts += np.bincount(scores.argmax(axis=1), minlength=len(lists))
    return counts


def best_counts(space: "ConceptSpace", prototypes: Tensor, samples: np.ndarray) -> np.ndarray:
    """Return (C,) int64: how many of the samples with these numbers have each concept as their best."""
    only, counts = np.zeros(len(space.candidates), dtype=bool), np.zeros(len(prototypes), dtype=np.int64)
    only[samples] = True
    for shard in range(len(space.candidates.shards)):
        for scores, _ in scored_chunks(space.candidates, shard, prototypes, space.project, only):
            counts += np.bincount(scores.argmax(axis=1), minlength=len(counts))
    return counts


class ConceptSpace:
    """The space of candidates and concepts: the candidates' own features, or the shared space of an aligned model."""

    def __init__(self, candidates: CandidatePool, model: SailModel | None, device: torch.device, texts: bool) -> None:
        """`texts`: concepts are texts. Raise UsageError if they should score images without a model."""
        if model is None and texts and candidates.kind == "image":
            raise UsageError(
                "text concepts can score images only in the space of an aligned model; give --model, or captions to choose from"
            )
        self.candidates, self.model, self.device = candidates, model, device
        self.project = self.projection(candidates)
        self.width = candidates.width if model is None else model.config.width

    def projection(self, features: CandidatePool) -> Projection:
        """Return the projection of a store's features into the space. Raise FingerprintError if another encoder made them."""
        if self.model is None:
            compare_fingerprints(features.fingerprint, self.candidates.fingerprint, str(self.candidates.stores[0].folder))
            return normalize
        config, image = self.model.config, features.kind == "image"
        own = config.vision_fingerprint if image else config.text_fingerprint
        compare_encoders(own, features.fingerprint, str(features.stores[0].folder))
        return self.model.project_image if image else self.model.project_text

    def work(self, concepts: int, top: int, lists: int) -> str:
        """Return the work and memory in words. Raise UsageError if `lists` lists per concept do not fit into memory."""
        rows, size = len(self.candidates), TopLists.nbytes(concepts, top, chunk_rows(concepts))
        needed, free = size * lists + rows, psutil.virtual_memory().available
        if needed > free:
            raise UsageError(
                f"the lists need {human_bytes(needed)} of memory, {human_bytes(free)} are free; give a smaller --top or fewer concepts"
            )
        return (
            f"{rows} {self.candidates.kind} rows x {concepts} concepts: {2 * self.width * rows * concepts / 1e12:.3g} TFLOP; "
            f"lists of {top}: {human_bytes(size)} of memory and twice that on disk"
        )

    @torch.no_grad()
    def encode_texts(self, texts: list[str], batch_size: int, trust_remote_code: bool) -> Tensor:
        """Return (T, E) normalized embeddings of texts, by the text encoder of the model or else of the candidates."""
        if self.model is not None:
            return self.model.project_text(self.model.text_encoder.encode(texts, batch_size).to(self.device))
        store = self.candidates.stores[0]
        if not store.header.loader:
            raise UsageError(f"{store.folder} names no encoder (it was imported); give --model, or concepts as a --concept-store")
        precision = store.fingerprint.get("precision", "fp32")
        encoder = load_text_encoder(TextSpec(**store.header.loader, precision=precision, trust_remote_code=trust_remote_code), self.device)
        compare_encoders(encoder.fingerprint, store.fingerprint, str(store.folder))
        return normalize(encoder.encode(texts, batch_size).to(self.device))


def score_shards(
    folder: Path, shards: Sequence[int], space: ConceptSpace, prototypes: Tensor, top: int, inputs: dict[str, Any], every: int,
    console: Console,
) -> tuple[TopLists, np.ndarray]:  # fmt: skip
    """Return lists of the shards and (C,) best counts; commit to `folder` every `every` shards and resume there. Preempted on SIGTERM."""
    candidates, lists = space.candidates, TopLists(len(prototypes), top, chunk_rows(len(prototypes)))
    best = np.zeros(len(lists), dtype=np.int64)
    with noted() as stopping, Lease(folder):
        clean_checkpoints(folder)
        path, tensors, state, problems = newest_checkpoint(folder)
        for problem in problems:
            console.print(f"passed over lists: {problem}")
        if path is not None:
            compare_fingerprints(inputs, state["inputs"], str(path))
            best += tensors.pop("best").numpy()
            lists.load_state({name: tensor.numpy() for name, tensor in tensors.items()})
        done, rows = state.get("step", 0), 0
        progress = Progress(console, f"{folder.name}: scored rows", sum(len(candidates.rows_of(shard)) for shard in shards[done:]))
        for number, shard in enumerate(shards[done:], done + 1):
            best += score_shard(candidates, shard, prototypes, space.project, lists)
            rows += len(candidates.rows_of(shard))
            stop = stopping()
            if number % every == 0 or number == len(shards) or stop:
                tensors = {name: torch.from_numpy(array) for name, array in {**lists.state(), "best": best}.items()}
                save_checkpoint(folder, number, tensors, {"inputs": inputs}, keep=2)
            if stop and number < len(shards):
                raise Preempted(f"stopped by {reason()} after shard {number} of {len(shards)}, lists saved; run the same command to go on")
            progress(rows, now=number == len(shards))
    return lists, best
