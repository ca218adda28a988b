"""Folders that are whole or not there: written aside, committed with the hash of every file, flushed, renamed into place.

Whoever reads one compares what it holds with what was committed: a file that exists is never taken for done.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.common.errors import DamagedError
from align.common.files import TEMPORARY, atomic_json, disk_full_named, failpoint, hash_file, read_json, sync_file, sync_folder

COMMIT = "COMMIT.json"
RETIRED = ".retired"  # suffix of what a new folder replaces, for the moment between two renames


@contextmanager
def replaced_folder(folder: Path, name: str, needed: int | None = None) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; then flush it and put it in its place. An error leaves the old one.

    A crash leaves the old folder (perhaps as NAME.retired) or the new one; what it left half-written is removed here. The failpoints
    are `<name>-saved` and `<name>-retired`. DiskFullError, naming the `needed` bytes if they are known.
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
    """Flush everything below a folder to disk, and let others read it: safetensors writes files for their owner alone."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            path.chmod(0o644)
            sync_file(path)
    sync_folder(folder)


def hashes_below(folder: Path, record: str) -> dict[str, str]:
    """Return the xxh3-128 of every file below a folder, by its path there; the file `record` is left out."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: hash_file(path) for name, path in files.items() if name != record}


def commit_folder(folder: Path, facts: dict[str, Any]) -> None:
    """Write the COMMIT of a finished folder, inside `replaced_folder`, which flushes it: `facts`, size and xxh3-128 of every file."""
    hashes = hashes_below(folder, COMMIT)
    files = {name: {"bytes": (folder / name).stat().st_size, "xxh3": digest} for name, digest in hashes.items()}
    atomic_json(folder / COMMIT, {**facts, "files": files})


def check_folder(folder: Path, contents: bool, advice: str) -> None:
    """Raise DamagedError, ending in `advice`, unless every committed file has its size and, if `contents`, its hash."""
    for name, entry in read_json(folder / COMMIT)["files"].items():
        if problem := damage(folder / name, entry["xxh3"] if contents else None, entry["bytes"]):
            raise DamagedError(f"{problem}; {advice}")


def damage(path: Path, digest: str | None = None, size: int | None = None) -> str | None:
    """Return what is wrong with a file in one sentence, or None if it is there with its committed size and hash."""
    if not path.is_file():
        return f"{path} is missing"
    if size is not None and path.stat().st_size != size:
        return f"{path} has {path.stat().st_size} bytes, {size} were committed"
    if digest is not None and hash_file(path) != digest:
        return f"{path} does not have the content that was committed"
    return None
