"""Shared builders: small feature stores with known content, and one CPU thread so that runs can be compared bit by bit."""

import numpy as np
import pytest
import torch

from tests.support.forking import exit_codes, fork
from tests.support.stores import build_store

torch.set_num_threads(1)


@pytest.fixture
def make_store():
    return build_store


@pytest.fixture
def forked():
    """Run a function in a forked child to its end and return its exit code."""
    return lambda function, *arguments: exit_codes([fork(function, *arguments)])[0]


@pytest.fixture(autouse=True)
def one_thread():
    """Entries run inside a test set their own number of threads; the next test starts with one again."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def paired_folders(tmp_path):
    """Image and caption stores of 96 samples in 3 shards whose captions are a linear map of the images, plus noise."""
    random = np.random.default_rng(0)
    images = random.normal(size=(96, 12)).astype(np.float32)
    mix = random.normal(size=(12, 8)).astype(np.float32)
    captions = images @ mix + 0.1 * random.normal(size=(96, 8)).astype(np.float32)
    keys = [f"k{n:03d}" for n in range(96)]
    build_store(tmp_path / "images", [[(keys[n], 0, images[n]) for n in range(a, a + 32)] for a in (0, 32, 64)], width=12)
    for name in ("short", "long"):
        shards = [[(keys[n], 0, captions[n] * (1 if name == "short" else 2)) for n in range(a, a + 32)] for a in (0, 32, 64)]
        build_store(tmp_path / f"captions-{name}", shards, kind="caption", fingerprint={"encoder": "text"})
    return tmp_path
