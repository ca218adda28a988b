"""Files that survive a crash: atomic writes, content hashes, disk space and failpoints."""

import errno
import json
import os
import re
import shutil
import signal
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from align.common.errors import DamagedError, DiskFullError, KitError, UsageError

if TYPE_CHECKING:
    import numpy as np

TEMPORARY = ".partial"  # suffix of files being written
# libraries that write files themselves report a full disk in their own errors: safetensors, arrow, torch
_FULL = ("No space left on device", "Disk quota exceeded", "(os error 28)", "(os error 122)", "PytorchStreamWriter failed writing")
_HOME = re.compile(r"(^|[=:+])(~[\w.-]*)(?=/|$)")
_armed: dict[str, int] = {}
_writer = (0, "")  # process id, and the name of this process as a writer


def arm_failpoint(spec: str) -> None:
    """Kill this process (SIGKILL) at the n-th passage of a write boundary, for tests. `spec`: `name` or `name:n`."""
    name, _, count = spec.partition(":")
    if count and not count.isdigit():
        raise UsageError(f"failpoint {spec!r}: expected name or name:n with n a whole number from 1")
    _armed[name] = int(count or 1)


def failpoint(name: str) -> None:
    """Mark the write boundary `name`. If it is armed, the process dies at its n-th passage."""
    if name in _armed:
        _armed[name] -= 1
        if _armed[name] == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def writer_name() -> str:
    """Return a name for this process that no other has, on any host. It is part of the names of its temporary files."""
    global _writer
    if _writer[0] != os.getpid():
        _writer = os.getpid(), f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return _writer[1]


def hash_bytes(data: bytes) -> str:
    """Return the xxh3-128 of `data` as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def hash64(texts: Iterable[str]) -> "np.ndarray":
    """Return (n,) int64 hashes of strings: xxh3-64 of their UTF-8 bytes. Among a billion strings a collision has a chance of 3%."""
    hashes = (xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) for text in texts)
    import numpy as np  # here, as assets are fetched without it

    return np.fromiter(hashes, dtype=np.uint64).view(np.int64)


def hash_file(path: Path) -> str:
    """Return the xxh3-128 of a file's content as 32 hex digits, reading 16 MiB at a time."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Flush a file's content to disk. `sync_folder` flushes its name."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path. Success flushes and renames it to `path`; failure removes it. DiskFullError names the free space."""
    temporary = path.with_name(f"{path.name}.{writer_name()}{TEMPORARY}")
    try:
        with disk_full_named(path):
            yield temporary
            failpoint("write")
            sync_file(temporary)
        failpoint("rename")
        os.replace(temporary, path)
        sync_folder(path.parent)
        failpoint("renamed")
    finally:
        temporary.unlink(missing_ok=True)


def atomic_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`. A reader sees the old content or the new one, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raise ValueError for NaN and infinities."""
    atomic_bytes(path, (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Return the JSON content of `path`. Raise DamagedError if it does not parse."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is not valid JSON ({error}); restore it or delete the folder and run again") from error


class Record(dict[str, Any]):
    """A JSON object read from `path`. Asking for an entry that it lacks is a DamagedError."""

    path: Path

    def __missing__(self, key: str) -> Any:
        raise DamagedError(f"{self.path} has no entry {key!r}; restore it or delete the folder and run again")


def read_object(path: Path) -> Record:
    """Return the JSON object in `path`. Raise DamagedError if there is none."""
    content = read_json(path)
    if not isinstance(content, dict):
        found = f"{path} holds a JSON {type(content).__name__}, expected an object"
        raise DamagedError(f"{found}; restore it or delete the folder and run again")
    record = Record(content)
    record.path = path
    return record


def remove_temporaries(folder: Path, living: Callable[[], Collection[str]] = tuple) -> None:
    """Delete the half-written files in `folder`, not in its subfolders, except those of `living` writers (see `writer_name`).

    The files are listed before `living` is called: a writer that begins meanwhile loses nothing.
    """
    leftovers = [path for path in folder.glob(f"*{TEMPORARY}") if not path.is_dir()]
    kept = living() if leftovers else ()
    for path in leftovers:
        if path.name.removesuffix(TEMPORARY).rpartition(".")[2] not in kept:
            path.unlink(missing_ok=True)


def save_hashed(stem: Path, suffix: str, data: bytes) -> None:
    """Write `data` atomically to STEM-HASH.SUFFIX and delete other versions. The hash in the name reveals damage."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    for other in stem.parent.glob(f"{stem.name}-*{suffix}"):
        other.unlink(missing_ok=True)
    atomic_bytes(stem.with_name(f"{stem.name}-{hash_bytes(data)}{suffix}"), data)


def load_hashed(stem: Path, suffix: str) -> bytes | None:
    """Return what `save_hashed` wrote, or None if it is missing or does not have the hash in its name."""
    for path in stem.parent.glob(f"{stem.name}-*{suffix}"):
        data = path.read_bytes()
        if path.name == f"{stem.name}-{hash_bytes(data)}{suffix}":
            return data
    return None


@contextmanager
def disk_full_named(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn a "no space left" error of the block into a DiskFullError that names the file and the space (`needed` in bytes).

    Such an error may be of any library, or be the cause of another error.
    """
    try:
        yield
    except KitError:
        raise
    except Exception as error:
        cause = _disk_full_cause(error)
        if cause is None:
            raise
        named = getattr(cause, "filename", None)
        raise DiskFullError(_space_message(Path(named) if isinstance(named, str) else path, needed)) from error


def _disk_full_cause(error: BaseException | None) -> BaseException | None:
    """Return the error that says that the disk is full: `error` or one that led to it; None if there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        if any(text in str(error) for text in _FULL):
            return error
        error = error.__cause__ or error.__context__
    return None


def require_free(folder: Path, needed: int) -> None:
    """Raise DiskFullError unless the file system of `folder`, which need not exist, has `needed` bytes free."""
    if free_bytes(folder) < needed:
        raise DiskFullError(_space_message(folder, needed))


def free_bytes(path: Path) -> int:
    """Return the free bytes of the file system of `path`, which need not exist yet."""
    return shutil.disk_usage(next(place for place in (path, *path.absolute().parents) if place.exists())).free


def _space_message(path: Path, needed: int | None) -> str:
    wanted = f"{human_bytes(needed)} needed, " if needed is not None else ""
    left = human_bytes(free_bytes(path))
    return f"disk full while writing {path}: {wanted}{left} free; free some space and run the same command again"


def expand_home(text: str) -> str:
    """Return a flag's value or a path with `~` and `~user` written out, at its begin and after `name=`, `prefix:` and `+`.

    A shell leaves them as they are in quotes, in `--flag=~/x` and in recipes. UsageError for the home of an unknown user: no folder is
    ever named `~` by mistake. One that is really named so is `./~`.
    """
    return _HOME.sub(_home, text)


def _home(found: re.Match[str]) -> str:
    home = os.path.expanduser(found[2])
    if home.startswith("~"):
        raise UsageError(f"{found.string!r}: {found[2]} is the home of no user here; write the path out (a folder named so: ./{found[2]})")
    return f"{found[1]}{home}"


def human_bytes(count: float) -> str:
    """Return a byte count as text with a binary unit, for example `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
