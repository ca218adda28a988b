"""Local YAML tasks: the kit's own in `tasks/`, and those in a user's folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from align.common.errors import UsageError
from align.common.files import atomic_bytes, remove_temporaries

FOLDER = Path(__file__).resolve().parent / "tasks"


class _TaskLoader(yaml.SafeLoader):
    """Reads a task without importing the functions that its !function tags name."""


_TaskLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


@dataclass(frozen=True)
class LocalTask:
    """A local task: its name, its YAML, and its local data files by split (none if lmms-eval downloads the data)."""

    name: str
    path: Path
    splits: tuple[tuple[str, Path], ...]
    moved: bool  # `splits` differ from the paths in the YAML

    @property
    def data(self) -> tuple[Path, ...]:
        """The data files."""
        return tuple(path for _, path in self.splits)


def local_tasks(include: str | None = None, data: str | None = None) -> dict[str, LocalTask]:
    """Return the local tasks by name; `data`: folder of the kit's data files. UsageError for no folder, bad YAML or equal names."""
    found: dict[str, LocalTask] = {}
    for folder in [FOLDER, *([Path(include).resolve()] if include else [])]:
        if not folder.is_dir():
            raise UsageError(f"--include {folder} is no folder")
        for path in sorted(folder.rglob("*.yaml")):
            content = _read(path)
            if not isinstance(content, dict) or not isinstance(content.get("task"), str):
                continue  # a group, or a part that others include
            name = content["task"]
            if name in found:
                raise UsageError(f"two tasks are called {name!r}: {found[name].path} and {path}; rename one")
            splits = data_files(content)
            moved = data is not None and folder == FOLDER and path.name.startswith("sprites_")
            base = Path(str(data)).resolve() if moved else path.parent
            places = tuple((split, (base / (Path(file).name if moved else file)).resolve()) for split, file in splits)
            found[name] = LocalTask(name, path, places, moved)
    return found


def write_wrappers(folder: Path, tasks: Sequence[LocalTask]) -> Path:
    """Write one small YAML per task that includes the original with absolute data files; return the folder (for --include_path)."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporaries(folder)
    for old in folder.glob("*.yaml"):
        old.unlink()
    for task in tasks:
        content: dict[str, Any] = {"include": str(task.path), "task": task.name}
        if task.moved:
            content["dataset_kwargs"] = {"data_files": {split: str(path) for split, path in task.splits}}
        atomic_bytes(folder / f"{task.name}.yaml", yaml.safe_dump(content, sort_keys=False).encode())
    return folder


def _read(path: Path) -> Any:
    try:
        return _TaskLoader(path.read_text(encoding="utf-8")).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a YAML task: {error}") from error


def data_files(content: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (split, file) of the local data files in a task's config, as written there."""
    given = (content.get("dataset_kwargs") or {}).get("data_files") or {}
    if isinstance(given, str | list):
        given = {str(content.get("test_split") or "train"): given}
    return [(split, file) for split, files in given.items() for file in ([files] if isinstance(files, str) else files) if "://" not in file]
