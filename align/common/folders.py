"""Folders that are complete or absent: written aside, committed with all hashes, renamed into place, checked against the commit."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.common.errors import DamagedError
from align.common.files import TEMPORARY, atomic_json, disk_full_named, failpoint, hash_file, read_json, sync_file, sync_folder

COMMIT = "COMMIT.json"
RETIRED = ".retired"  # suffix of the old folder between the two renames


@contextmanager
def replaced_folder(folder: Path, name: str, needed: int | None = None) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, then flush it and move it into place. An error keeps the old folder.

    A crash leaves the old folder (perhaps as NAME.retired) or the new one. The next call deletes half-written folders. Failpoints:
    `<name>-saved` and `<name>-retired`. Raises DiskFullError, with the `needed` bytes if they are known.
    """
    temporary, retired = folder.with_name(f"{folder.name}{TEMPORARY}"), folder.with_name(f"{folder.name}{RETIRED}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk_full_named(folder, needed):
            temporary.mkdir(parents=True)
            yield temporary
            sync_tree(temporary)
        shutil.rmtree(retired, ignore_errors=True)
        failpoint(f"{name}-saved")
        if folder.exists():
            folder.rename(retired)
        failpoint(f"{name}-retired")
        temporary.rename(folder)
        sync_folder(folder.parent)
        shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Flush everything below a folder to disk and make it readable: safetensors writes files for their owner only."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            path.chmod(0o644)
            sync_file(path)
    sync_folder(folder)


def hashes_below(folder: Path, record: str) -> dict[str, str]:
    """Return the xxh3-128 of every file below a folder, by relative path, without the file `record`."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: hash_file(path) for name, path in files.items() if name != record}


def commit_folder(folder: Path, facts: dict[str, Any]) -> None:
    """Write COMMIT.json: `facts`, size and xxh3-128 of every file. Call it inside `replaced_folder`, which flushes it."""
    hashes = hashes_below(folder, COMMIT)
    files = {name: {"bytes": (folder / name).stat().st_size, "xxh3": digest} for name, digest in hashes.items()}
    atomic_json(folder / COMMIT, {**facts, "files": files})


def check_folder(folder: Path, contents: bool, advice: str) -> None:
    """Raise DamagedError, ending in `advice`, unless every committed file has its size and, if `contents`, its hash."""
    for name, entry in read_json(folder / COMMIT)["files"].items():
        if problem := damage(folder / name, entry["xxh3"] if contents else None, entry["bytes"]):
            raise DamagedError(f"{problem}; {advice}")


def damage(path: Path, digest: str | None = None, size: int | None = None) -> str | None:
    """Return one sentence on what is wrong with a file, or None if it has its committed size and hash."""
    if not path.is_file():
        return f"{path} is missing"
    if size is not None and path.stat().st_size != size:
        return f"{path} has {path.stat().st_size} bytes, {size} were committed"
    if digest is not None and hash_file(path) != digest:
        return f"{path} does not have the content that was committed"
    return None
