"""Shared builders: small feature stores with known content, and one CPU thread so that runs can be compared bit by bit."""

import pytest
import torch

from tests.support.forking import exit_codes, fork
from tests.support.stores import build_paired_stores, build_store

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
    """The stores of `build_paired_stores`."""
    build_paired_stores(tmp_path)
    return tmp_path
