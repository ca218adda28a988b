"""Aligned models on disk: where the folder of one lies."""

from pathlib import Path

from align.common.errors import UsageError
from align.common.files import read_json


def model_folder(path: Path) -> Path:
    """Return the aligned model's folder at `path`: itself, or the `best` or `last` model of a run; UsageError if there is none."""
    for place in (path, path / "best", path / "last"):
        if (place / "config.json").is_file() and read_json(place / "config.json").get("model_type") == "sail":
            return place
    raise UsageError(f"{path} is neither an aligned model (config.json) nor a run with best/ or last/; make one with align/train.py")
