"""Write locks: one process at a time (`locked`), or one job whose workers share the shards (`Lease` and its claims).

The kernel frees a lock when its holder dies. Workers on several machines can share a lease: each keeps a file with its name and touches
it. A dead worker loses its place, and so does one on another machine after `STALE_SECONDS` of silence. Claims only save work: two
workers that encode the same shard write the same bytes.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from align.common.errors import LeaseError

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 120.0
PATIENCE_SECONDS = 4.0  # wait for a lock before LeaseError


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


def _myself(job: str) -> str:
    """Return the JSON that identifies this process in a lease or claim."""
    return json.dumps({"job": job, "host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()})


def _is_stale(path: Path) -> bool:
    """Return whether the holder in `path` is dead (same host) or silent for too long (another host)."""
    try:
        holder = json.loads(path.read_bytes())
        silent = time.time() - path.stat().st_mtime
        if holder["host"] != socket.gethostname():
            return silent > STALE_SECONDS
        return psutil.Process(holder["pid"]).create_time() != holder["started"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, psutil.NoSuchProcess):  # released, cut short by a crash, or dead
        return True


def new_job() -> str:
    """Return a unique job name."""
    return f"run-{uuid.uuid4().hex[:8]}"


class Lease:
    """Lock on `folder` while a job writes to it, as a context manager. Processes with the same `job` share it; None: a job of its own."""

    def __init__(self, folder: Path, job: str | None = None) -> None:
        self.folder, self.job = folder, job or new_job()
        self._leases, self._claims = folder / ".work" / "leases", folder / ".work" / "claims"
        self._mine = self._leases / f"{socket.gethostname()}-{os.getpid()}.json"
        self._claimed: set[Path] = set()
        self._stop = threading.Event()

    def __enter__(self) -> "Lease":
        """Take the lease. Raise LeaseError within seconds, naming the holder, if a living process of another job has it."""
        self._leases.mkdir(parents=True, exist_ok=True)
        self._claims.mkdir(parents=True, exist_ok=True)
        with locked(self._leases / "lock"):
            for path in self._leases.glob("*.json"):
                if _is_stale(path):
                    path.unlink(missing_ok=True)
                    continue
                holder = json.loads(path.read_bytes())
                if holder["job"] != self.job:
                    raise LeaseError(
                        f"{self.folder} is being written by process {holder['pid']} on {holder['host']} (job {holder['job']}). "
                        "Wait for it to end, or give both the same --job to share the work."
                    )
            self._mine.write_text(_myself(self.job))
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._heart.join()
        for path in (self._mine, *self._claimed):
            path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            for path in (self._mine, *tuple(self._claimed)):
                try:
                    os.utime(path)
                except FileNotFoundError:
                    continue  # taken over or just released: no longer ours

    def claim(self, unit: int) -> bool:
        """Return True if this process may work on `unit`, False if a living worker of the job already does."""
        path = self._claims / f"{unit:06d}.json"
        if path.exists() and not _is_stale(path):
            return False
        path.unlink(missing_ok=True)
        try:
            with open(path, "x") as file:
                file.write(_myself(self.job))
        except FileExistsError:
            return False
        self._claimed.add(path)
        return True

    def release(self, unit: int) -> None:
        """Give up the claim on `unit` after its shard is committed."""
        path = self._claims / f"{unit:06d}.json"
        self._claimed.discard(path)
        path.unlink(missing_ok=True)
