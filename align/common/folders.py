"""Folders that are complete or absent: written aside, committed with all hashes, renamed into place, checked against the commit."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from align.common.errors import DamagedError
from align.common.files import (
    TEMPORARY,
    atomic_json,
    disk_full_named,
    failpoint,
    hash_bytes,
    hash_file,
    read_json,
    require_free,
    sync_file,
    sync_folder,
)

COMMIT = "COMMIT.json"
RETIRED = ".retired"  # suffix of the old folder between the two renames
_intact: dict[Path, tuple[Any, ...] | None] = {}  # files that had their hash: hash, size, time and inode then
_SETTLED_SECONDS = 1.0  # a file changed so recently may change again without another time
WORK = ".work"  # leases and claims of those who write to a folder
RECORDS = ("config.yaml", "manifest.json")  # how and when a model was made: its digest does not depend on it


@contextmanager
def replaced_folder(folder: Path, name: str, needed: int | None = None) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, then flush it and move it into place. An error keeps the old folder.

    A crash leaves the old folder (perhaps as NAME.retired) or the new one. The next call deletes half-written folders. Failpoints:
    `<name>-saved` and `<name>-retired`. Raises DiskFullError, before anything is written if `needed` bytes are known and not free.
    """
    temporary = folder.with_name(f"{folder.name}{TEMPORARY}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk_full_named(folder, needed):
            require_free(folder, needed or 0)
            temporary.mkdir(parents=True)
            yield temporary
            sync_tree(temporary)
        move_into_place(temporary, folder, name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_into_place(complete: Path, folder: Path, name: str) -> None:
    """Rename `complete` to `folder`, whose old content is deleted only then. Failpoints as in `replaced_folder`."""
    retired = folder.with_name(f"{folder.name}{RETIRED}")
    shutil.rmtree(retired, ignore_errors=True)
    failpoint(f"{name}-saved")
    if folder.exists():
        folder.rename(retired)
    failpoint(f"{name}-retired")
    complete.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(retired, ignore_errors=True)


@contextmanager
def dry_view(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that looks like `folder`: for dry runs, which read what is there and write nothing.

    Its files are links. Whoever replaces or deletes one changes only the view.
    """
    with TemporaryDirectory() as scratch:
        view = Path(scratch) / folder.name
        view.mkdir(exist_ok=True)
        for place, _, files in os.walk(folder):
            here = view / Path(place).relative_to(folder)
            here.mkdir(exist_ok=True)
            for name in files:
                (here / name).symlink_to((Path(place) / name).resolve())
        yield view


def clean_tree(folder: Path) -> None:
    """Delete what a dead writer left half-written below `folder`, and put back a folder that it was about to replace.

    The caller holds the folder's lease, so that no other process writes there. Folders below it with leases of their own are left alone.
    """
    for place, names, files in os.walk(folder):
        here = Path(place)
        for name in [name for name in names if name.endswith((TEMPORARY, RETIRED))]:
            whole = here / name.removesuffix(RETIRED)
            if name.endswith(RETIRED) and not whole.exists():
                (here / name).rename(whole)
            else:
                shutil.rmtree(here / name, ignore_errors=True)
        for name in files:
            if name.endswith(TEMPORARY):
                (here / name).unlink(missing_ok=True)
        names[:] = [name for name in names if (here / name).is_dir() and not (here / name / WORK).is_dir()]


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


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """Write `values` as JSON, atomically, with a hash of themselves as `seal`."""
    atomic_json(path, {**values, "seal": _seal(values)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Return what `write_sealed` or an older version without seals wrote. DamagedError if it is not that any more."""
    values = read_json(path)
    named = [name for name, value in values.items() if value == _seal(values, name)] if isinstance(values, dict) else None
    if named is None or named != (["seal"] if "seal" in values else []):  # a seal by another name: its own name is damaged
        raise DamagedError(f"{path} does not have the content that was written")
    return {name: value for name, value in values.items() if name != "seal"}


def _seal(values: dict[str, Any], own: str = "seal") -> str:
    """Return the hash of what `values` hold beside their `own` seal."""
    rest = {name: value for name, value in values.items() if name != own}
    return hash_bytes(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode())


def commit_folder(folder: Path, facts: dict[str, Any]) -> None:
    """Write COMMIT.json: `facts`, size and xxh3-128 of every file. Call it inside `replaced_folder`, which flushes it."""
    hashes = hashes_below(folder, COMMIT)
    files = {name: {"bytes": (folder / name).stat().st_size, "xxh3": digest} for name, digest in hashes.items()}
    write_sealed(folder / COMMIT, {**facts, "files": files})


def check_folder(folder: Path, contents: bool, advice: str) -> None:
    """Raise DamagedError, ending in `advice`, unless every committed file has its size and, if `contents`, its hash."""
    try:
        files = read_sealed(folder / COMMIT)["files"].items()
        for name, entry in files:
            if problem := damage(folder / name, None, entry["bytes"]):
                raise DamagedError(problem)
            if contents:
                require_intact(folder / name, entry["xxh3"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{folder / COMMIT} is not a list of files and hashes; {advice}") from error
    except DamagedError as error:
        raise DamagedError(f"{error}; {advice}") from error


def check_model_folder(folder: Path) -> None:
    """Raise DamagedError if a saved model has COMMIT.json and a file is not as it was saved. Folders of other programs have none."""
    if (folder / COMMIT).is_file():
        check_folder(folder, True, f"restore it, or make the model again; if it was changed on purpose, delete {folder / COMMIT}")


def folder_digest(folder: Path) -> str:
    """Return the xxh3-128 of the names and hashes of a folder's files without RECORDS: those in its COMMIT.json, compared on opening."""
    if (folder / COMMIT).is_file():
        hashes = {name: entry["xxh3"] for name, entry in read_sealed(folder / COMMIT)["files"].items()}
    else:
        hashes = hashes_below(folder, COMMIT)
    hashes = {name: digest for name, digest in hashes.items() if name not in RECORDS}
    return hash_bytes(json.dumps(hashes, sort_keys=True).encode())


def require_intact(path: Path, digest: str, advice: str = "") -> None:
    """Raise DamagedError unless a file has the hash `digest`. This process reads a file for it only once, while it does not change."""
    state = path.stat() if path.is_file() else None
    found = (digest, state.st_size, state.st_mtime_ns, state.st_ino) if state else None
    if found is None or _intact.get(path) != found:
        if problem := damage(path, digest):
            raise DamagedError(f"{problem}; {advice}" if advice else problem)
        if state and time.time() - state.st_mtime > _SETTLED_SECONDS:
            _intact[path] = found


def damage(path: Path, digest: str | None = None, size: int | None = None) -> str | None:
    """Return one sentence on what is wrong with a file, or None if it has its committed size and hash."""
    if not path.is_file():
        return f"{path} is missing"
    if size is not None and path.stat().st_size != size:
        return f"{path} has {path.stat().st_size} bytes, {size} were committed"
    if digest is not None and hash_file(path) != digest:
        return f"{path} does not have the content that was committed"
    return None
