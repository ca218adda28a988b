"""Frozen features of a task, computed once: images in a feature store by content and encoder, texts by content and encoder.

    <cache>/images/<images digest>/<encoder digest>/images/    a feature store
    <cache>/texts/<encoder digest>/<texts digest>-<hash>.safetensors  "features" (T, D) float16

Models that share an encoder share its features, so before and after cost one forward pass, and a second run none: the encoders of
a SailModel are not even loaded (reference models are, to hash their weights, but not run).

Shapes: `N` samples, `T` texts, `F` image feature width, `D` text feature width, `E` aligned width.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load as tensors_from_bytes
from safetensors.numpy import save as tensors_to_bytes
from torch import Tensor

from align.common.console import Progress
from align.common.errors import DataError, NonFiniteError
from align.common.files import hash_bytes, load_hashed, save_hashed
from align.common.fingerprints import compare_encoders, fingerprint_digest
from align.features.extract import Extraction, Stopping
from align.features.store import FeatureStore
from eval.models.dual_encoder import DualEncoder
from eval.tasks.data import TaskData


@dataclass(frozen=True)
class FeatureCache:
    """Where features are kept and how they are computed if they are not there yet."""

    folder: Path
    batch_size: int = 64
    text_batch_size: int = 256
    workers: int = 2
    max_reject_fraction: float = 0.05

    def images(self, data: TaskData, model: DualEncoder, progress: Progress | None = None) -> tuple[TaskData, np.ndarray]:
        """Return the samples whose image could be encoded and their features (N, F) float16, in the same order."""
        folder = self.folder / "images" / data.images_digest / fingerprint_digest(model.vision_fingerprint)
        store = _open_complete(folder / "images")
        if store is None:
            job = Extraction(
                data.source,
                data.plan,
                folder,
                vision=model.vision_encoder,
                batch_size=self.batch_size,
                workers=self.workers,
                stopping=Stopping(self.max_reject_fraction),
            )
            job.fill(progress)
            store = FeatureStore(folder / "images")
        compare_encoders(model.vision_fingerprint, store.fingerprint, str(store.folder))
        rejects = pq.read_table(store.folder / "rejects.parquet")
        return select_rows(data, store, rejects, self.max_reject_fraction)

    def texts(self, texts: Sequence[str], model: DualEncoder) -> Tensor:
        """Return features (T, D) float16 of `texts`, in order; equal texts are encoded once."""
        unique = sorted(set(texts))
        fingerprint = model.text_fingerprint
        stem = self.folder / "texts" / fingerprint_digest(fingerprint) / hash_bytes(json.dumps(unique).encode())
        cached = load_hashed(stem, ".safetensors")
        if cached is None:
            encoded = model.text_encoder.encode(unique, self.text_batch_size).numpy(force=True)
            with np.errstate(over="ignore"):
                features = encoded.astype(np.float16)
            finite = np.isfinite(features).all(axis=1)
            if not finite.all():
                raise NonFiniteError(f"the text encoder gave features beyond fp16 for {unique[int(np.argmin(finite))]!r}")
            cached = tensors_to_bytes({"features": features}, {"fingerprint": json.dumps(fingerprint, sort_keys=True)})
            save_hashed(stem, ".safetensors", cached)
        features = tensors_from_bytes(cached)["features"]
        rows = np.searchsorted(np.array(unique, dtype=object), np.array(texts, dtype=object))
        return torch.from_numpy(features[rows.astype(np.int64)])


def select_rows(data: TaskData, store: FeatureStore, rejects: pa.Table, max_reject_fraction: float) -> tuple[TaskData, np.ndarray]:
    """Return the samples that have a feature, and the features by key; DataError if too many are left out."""
    row_of: dict[str, int] = {}
    for row, key in enumerate(store.keys.to_pylist()):
        row_of.setdefault(key, row)
    rows = np.array([row_of.get(key, -1) for key in data.keys], dtype=np.int64)
    lost = {key for key, row in zip(data.keys, rows, strict=True) if row < 0}
    codes = Counter(reject["code"] for reject in rejects.to_pylist() if reject["key"] in lost)
    kept = data.keep(rows >= 0, dict(codes))
    total = len(kept.keys) + sum(kept.rejected.values())
    if len(kept.keys) < (1 - max_reject_fraction) * total or not kept.keys:
        shown = ", ".join(f"{code} {count}" for code, count in kept.rejected.items())
        raise DataError(
            f"task {data.task.id!r}: {total - len(kept.keys)} of {total} samples were rejected ({shown}); "
            "mend the data, or raise --max-reject-fraction"
        )
    return kept, store.features(rows[rows >= 0])


@torch.inference_mode()
def projected(head: Callable[[Tensor], Tensor], features: np.ndarray | Tensor, device: torch.device, chunk: int = 8192) -> Tensor:
    """Return (N, E) float32 embeddings on the CPU: `head` (a model's project_image or project_text) over rows of features."""
    rows = torch.as_tensor(features)
    parts = [head(rows[start : start + chunk].to(device).float()).cpu() for start in range(0, len(rows), chunk)]
    return torch.cat(parts)


def _open_complete(folder: Path) -> FeatureStore | None:
    """Return the store in `folder` if all its shards are committed and its rejects are known, else None."""
    if not (folder / "store.json").exists() or not (folder / "rejects.parquet").exists():
        return None
    return FeatureStore(folder)
