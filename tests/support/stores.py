"""Small feature stores with known content."""

import numpy as np

from align.features.store import FeatureStore, StoreHeader
from align.features.writer import StoreWriter


def build_store(folder, shards, kind="image", width=8, fingerprint=None, data="plan-1", rejects=None):
    """Write a store; `shards` is a list of lists of (key, item, vector) and return it opened."""
    header = StoreHeader(kind, fingerprint or {"encoder": "tiny", "layer": -1}, {}, width, data, len(shards), sum(map(len, shards)))
    writer = StoreWriter(folder, header)
    for number, rows in enumerate(shards):
        vectors = np.array([row[2] for row in rows], dtype=np.float32).reshape(len(rows), width)
        writer.write(number, vectors, [row[0] for row in rows], [row[1] for row in rows], (rejects or {}).get(number, []))
    writer.finish()
    return FeatureStore(folder)


def build_paired_stores(folder, seed=0):
    """Write image and caption stores of 96 samples in 3 shards whose captions are a linear map of the images, plus noise."""
    random = np.random.default_rng(seed)
    images = random.normal(size=(96, 12)).astype(np.float32)
    mix = random.normal(size=(12, 8)).astype(np.float32)
    captions = images @ mix + 0.1 * random.normal(size=(96, 8)).astype(np.float32)
    keys = [f"k{n:03d}" for n in range(96)]
    build_store(folder / "images", [[(keys[n], 0, images[n]) for n in range(a, a + 32)] for a in (0, 32, 64)], width=12)
    for name in ("short", "long"):
        shards = [[(keys[n], 0, captions[n] * (1 if name == "short" else 2)) for n in range(a, a + 32)] for a in (0, 32, 64)]
        build_store(folder / f"captions-{name}", shards, kind="caption", fingerprint={"encoder": "text"})


def all_features(store):
    """Return the features (N, W) float16 of every row."""
    return store.features(np.arange(len(store)))
