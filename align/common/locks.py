"""Write locks: one process at a time (`locked`), or one job whose workers share the shards (`Lease` and its claims).

Each worker keeps a lease file, which it locks and touches. The kernel frees the lock when its holder dies, whoever can see its process:
on one machine, in containers too, that decides. A lease of another machine, where locks may not be shared, is watched: its holder lives
if the file's time changes, and is dead after `STALE_SECONDS` without a change. No clock is compared with another. Claims only save
work: two workers that encode the same shard write the same bytes.
"""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from align.common.errors import LeaseError
from align.common.files import disk_full_named, remove_temporaries, writer_name
from align.common.folders import WORK
from align.common.preemption import stop_without_saving

HEARTBEAT_SECONDS = 2.0
STALE_SECONDS = 60.0
PATIENCE_SECONDS = 4.0  # wait for a lock before LeaseError
_held: set[int] = set()  # descriptors of this process's lease files


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None, keep: bool = True) -> Iterator[None]:
    """Hold the lock file `path`; delete it unless `keep`. If it is taken, call `waiting` and wait; without `waiting` raise LeaseError."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=PATIENCE_SECONDS if waiting is None else 0)
    except Timeout:
        if waiting is None:
            raise LeaseError(f"another process holds {path}; wait for it to end, then run the same command again") from None
        waiting()
        lock.acquire()
    try:
        yield
    finally:
        if not keep:
            path.unlink()  # while held: a waiting process then looks at the name again
        lock.release()


@cache
def _boot() -> str:
    """Return what no two running kernels share, and containers on one do."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _space() -> str:
    """Return the namespace in which process numbers count."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(process: int) -> str | None:
    """Return when a process of this namespace started, in the kernel's ticks since boot; None if there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _close_in_child() -> None:
    """A forked worker must not keep the lock of its parent: it would outlive it."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _lock(descriptor: int, kind: int) -> bool | None:
    """Return whether the lock of a file was free and is taken now; None if the file system has no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def new_job() -> str:
    """Return a unique job name."""
    return f"run-{uuid.uuid4().hex[:8]}"


class Lease:
    """Lock on `folder` while a job writes to it, as a context manager. Processes with the same `job` share it; None: a job of its own.

    `waiting` is told why the lease is waited for. If another job takes the folder over, because this process was silent for too long,
    the main thread gets a LeaseError.
    """

    def __init__(self, folder: Path, job: str | None = None, waiting: Callable[[str], object] = lambda line: None) -> None:
        self.folder, self.job, self._waiting = folder, job or new_job(), waiting
        self._leases, self._claims = folder / WORK / "leases", folder / WORK / "claims"
        self._mine = self._leases / f"{writer_name()}-{uuid.uuid4().hex[:4]}.json"
        self._descriptor = -1
        self._seen: dict[Path, tuple[int, float]] = {}  # lease file: its time, and when this process first saw that time
        self._claimed: set[Path] = set()
        self._stop = threading.Event()

    def __enter__(self) -> "Lease":
        """Take the lease. Raise LeaseError, naming the holder, once another job is known to live: on one machine at once."""
        self._leases.mkdir(parents=True, exist_ok=True)
        self._claims.mkdir(parents=True, exist_ok=True)
        told = False
        while rival := self._take():
            if not told:
                self._waiting(f"{self._written_by(rival)}: waiting up to {STALE_SECONDS:.0f} s for a sign of life")
            told = True
            time.sleep(HEARTBEAT_SECONDS / 4)
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor not in _held:
            return  # a forked child
        self._stop.set()
        self._heart.join()
        for path in (self._mine, *self._claimed):
            path.unlink(missing_ok=True)
        _held.discard(self._descriptor)
        os.close(self._descriptor)

    def _take(self) -> dict[str, Any] | None:
        """Write this process's lease and return None; or return the holder of one whose life is not known yet."""
        with ExitStack() as stack:
            with suppress(OSError, NotImplementedError):  # a file system without locks
                stack.enter_context(locked(self._leases / "lock"))
            for path in sorted(self._leases.glob("*.json")):
                lives, holder = self._lives(path), _read(path)
                if lives is False or holder is None:
                    path.unlink(missing_ok=True)
                elif holder["job"] != self.job:
                    if lives is None:
                        return holder
                    raise LeaseError(
                        f"{self._written_by(holder)}. Wait for it to end, or stop it, then run the same command again; workers that "
                        "share the work of align/encode.py have the same --job."
                    )
            with disk_full_named(self._mine):
                self._descriptor = os.open(self._mine, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                _held.add(self._descriptor)
                _lock(self._descriptor, fcntl.LOCK_EX)
                os.write(self._descriptor, self._record().encode())
        return None

    def _written_by(self, holder: dict[str, Any]) -> str:
        return f"{self.folder} is being written by process {holder['pid']} on {holder['host']} (job {holder['job']})"

    def _record(self) -> str:
        me = {"job": self.job, "host": socket.gethostname(), "pid": os.getpid(), "lease": self._mine.name, "writer": writer_name()}
        return json.dumps({**me, "boot": _boot(), "space": _space(), "started": _started(os.getpid())})

    def _lives(self, path: Path) -> bool | None:
        """Return whether the holder of a lease lives. None: not known yet, look again later."""
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            return False
        except OSError:  # somebody else's file: watch it
            descriptor = -1
        try:
            free = _lock(descriptor, fcntl.LOCK_SH) if descriptor >= 0 else None
            changed = os.stat(path).st_mtime_ns
        except FileNotFoundError:
            return False
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        holder = _read(path)
        if free is False:
            return True
        if holder is None:
            return False  # cut short by a crash
        if holder.get("boot") == _boot():
            if holder.get("space") == _space():
                return _started(holder["pid"]) == holder.get("started")
            if free:
                return False
        before, since = self._seen.setdefault(path, (changed, time.monotonic()))
        if before != changed:
            self._seen[path] = (changed, time.monotonic())  # silence counts from here
            return True
        return False if time.monotonic() - since > STALE_SECONDS else None

    def _beat(self) -> None:
        mine = os.fstat(self._descriptor).st_ino
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self._mine)
                taken = os.stat(self._mine).st_ino != mine
            except FileNotFoundError:
                taken = True
            except OSError:
                continue  # a file system that is away for a moment
            if taken:
                text = f"{self.folder} was taken over by another job while this process was silent; it stops without writing"
                stop_without_saving(LeaseError(text))
                return

    def living_writers(self) -> set[str]:
        """Return the names of the writers in this folder that are not known to be dead; see `align.common.files.writer_name`."""
        found = {path: _read(path) for path in self._leases.glob("*.json")}
        return {holder["writer"] for path, holder in found.items() if holder and "writer" in holder and self._lives(path) is not False}

    def remove_temporaries(self, folder: Path) -> None:
        """Delete the half-written files of dead writers in `folder`, not in its subfolders."""
        remove_temporaries(folder, self.living_writers)

    def claim(self, unit: int) -> bool:
        """Return True if this process may work on `unit`, False if a worker of the job that is not known to be dead already does."""
        path = self._claims / f"{unit:06d}.json"
        if path.exists():
            holder = _read(path)
            lease = holder and self._leases / str(holder.get("lease"))
            if lease and self._lives(lease) is not False:
                return False
            path.unlink(missing_ok=True)
        try:
            with open(path, "x") as file:
                file.write(self._record())
        except FileExistsError:
            return False
        self._claimed.add(path)
        return True

    def release(self, unit: int) -> None:
        """Give up the claim on `unit` after its shard is committed."""
        path = self._claims / f"{unit:06d}.json"
        self._claimed.discard(path)
        path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    """Return the holder in a lease or claim; None if a crash cut it short."""
    try:
        holder = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return holder if isinstance(holder, dict) and {"job", "host", "pid"} <= holder.keys() else None
