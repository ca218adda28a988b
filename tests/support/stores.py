"""Small feature stores with known content."""

import numpy as np

from align.features.store import FeatureStore, StoreHeader, StoreWriter


def build_store(folder, shards, kind="image", width=8, fingerprint=None, data="plan-1", rejects=None):
    """Write a store; `shards` is a list of lists of (key, item, vector) and return it opened."""
    header = StoreHeader(kind, fingerprint or {"encoder": "tiny", "layer": -1}, {}, width, data, len(shards), sum(map(len, shards)))
    writer = StoreWriter(folder, header)
    for number, rows in enumerate(shards):
        vectors = np.array([row[2] for row in rows], dtype=np.float32).reshape(len(rows), width)
        writer.write(number, vectors, [row[0] for row in rows], [row[1] for row in rows], (rejects or {}).get(number, []))
    writer.finish()
    return FeatureStore(folder)
