"""Frozen features of a task, computed once for each content and encoder.

    <cache>/images/<images digest>/<encoder digest>/images/    a feature store
    <cache>/texts/<encoder digest>/<texts digest>-<hash>.safetensors  "features" (T, D) float16

Models that share an encoder share its features. A second run encodes nothing and does not load SailModel encoders. It does load
reference models, to hash their weights.

Shapes: `N` samples, `T` texts, `F` image feature width, `D` text feature width, `E` aligned width.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load as tensors_from_bytes
from safetensors.numpy import save as tensors_to_bytes
from torch import Tensor

from align.common.errors import DataError, NonFiniteError
from align.common.files import hash_bytes, load_hashed, save_hashed
from align.common.fingerprints import compare_encoders, fingerprint_digest
from align.features.extract import Extraction, Stopping
from align.features.store import FeatureStore
from align.runtime.console import Progress
from eval.models.dual_encoder import DualEncoder
from eval.tasks.data import TaskData


@dataclass(frozen=True)
class FeatureCache:
    """A cache of frozen features. Missing features are computed."""

    folder: Path
    batch_size: int = 64
    text_batch_size: int = 256
    workers: int = 2
    max_reject_fraction: float = 0.05

    def images(self, data: TaskData, model: DualEncoder, progress: Progress | None = None) -> tuple[TaskData, np.ndarray]:
        """Return the samples whose image could be encoded, and their features (N, F) float16 in the same order."""
        folder = self.folder / "images" / data.images_digest / fingerprint_digest(model.vision_fingerprint)
        if not all((folder / "images" / name).exists() for name in ("store.json", "rejects.parquet")):  # missing or incomplete
            vision, stopping = model.vision_encoder, Stopping(self.max_reject_fraction)
            job = Extraction(
                data.source, data.plan, folder, vision=vision, batch_size=self.batch_size, workers=self.workers, stopping=stopping
            )
            job.fill(progress)
        store = FeatureStore(folder / "images")
        compare_encoders(model.vision_fingerprint, store.fingerprint, str(store.folder))
        return self._with_feature(data, store)

    def _with_feature(self, data: TaskData, store: FeatureStore) -> tuple[TaskData, np.ndarray]:
        """Return the samples that have a feature, and their features; DataError if too many samples are rejected."""
        keys = store.keys.to_pylist()
        row_of = dict(zip(reversed(keys), range(len(keys) - 1, -1, -1), strict=True))  # a key's first row
        rows = np.array([row_of.get(key, -1) for key in data.keys], dtype=np.int64)
        lost = {key for key, row in zip(data.keys, rows, strict=True) if row < 0}
        rejects = pq.read_table(store.folder / "rejects.parquet").to_pylist()
        codes = Counter(reject["code"] for reject in rejects if reject["key"] in lost)
        kept = data.keep(rows >= 0, dict(codes))
        total = len(kept.keys) + sum(kept.rejected.values())
        if len(kept.keys) < (1 - self.max_reject_fraction) * total or not kept.keys:
            shown = ", ".join(f"{code} {count}" for code, count in kept.rejected.items())
            rejected = f"{total - len(kept.keys)} of {total} samples were rejected ({shown})"
            raise DataError(f"task {data.task.id!r}: {rejected}; mend the data, or raise --max-reject-fraction")
        return kept, store.features(rows[rows >= 0])

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


@torch.inference_mode()
def projected(head: Callable[[Tensor], Tensor], features: np.ndarray | Tensor, device: torch.device, chunk: int = 8192) -> Tensor:
    """Return (N, E) float32 embeddings on the CPU: `head` (project_image or project_text) of rows of features, in chunks."""
    rows = torch.as_tensor(features)
    return torch.cat([head(part.to(device).float()).cpu() for part in rows.split(chunk)])
