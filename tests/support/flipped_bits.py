"""Damage of one bit in a folder whose files have committed hashes."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from align.common.errors import DamagedError


def refuses_a_flipped_bit(path: Path, draw: random.Random, folder: Path, load: Callable[[Path], object]) -> None:
    """Assert that `folder` does not load while a random bit of its file `path` is flipped; the file is then as before."""
    good = path.read_bytes()
    bad = bytearray(good)
    bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
    path.write_bytes(bad)
    with pytest.raises(DamagedError):
        load(folder)
    path.write_bytes(good)


def refuses_every_flipped_bit(folder: Path, load: Callable[[Path], object]) -> None:
    """Assert that no file of a committed folder loads with a flipped bit, and that the folder does without, and without hashes."""
    draw = random.Random(0)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert "COMMIT.json" in [path.name for path in files]
    for path in [*files, *draw.choices(files, k=20)]:
        refuses_a_flipped_bit(path, draw, folder, load)
    load(folder)
    (folder / "COMMIT.json").unlink()  # changed on purpose, or of an older version
    load(folder)
