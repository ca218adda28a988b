"""Files of conversations with pictures, opened."""

import json

import pytest
from PIL import Image

from mllm.conversations.table import open_conversations


@pytest.fixture
def make(tmp_path):
    """Write rows and pictures 0.png to 4.png; return the opened conversations."""
    for number in range(5):
        Image.new("RGB", (8, 8), (50 * number, 9, 200)).save(tmp_path / f"{number}.png")

    def build(rows, spec="", seed=0):
        (tmp_path / "rows.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return open_conversations([f"{tmp_path}/rows.jsonl{spec}"], cache=tmp_path / "cache", seed=seed)

    return build
