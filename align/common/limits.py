"""Limits of time and memory for foreign code, such as a model's chat template: it may loop or allocate without end."""

import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def bounded(seconds: float, size: int) -> Iterator[None]:
    """Raise TimeoutError if the block computes for more than `seconds`, MemoryError if it takes more than `size` bytes.

    Seconds are of the processor, not of the clock. They are counted in the main thread only; memory is limited on Linux only.
    """
    with _memory(size), _time(seconds):
        yield


@contextmanager
def _time(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it computes for more than {seconds:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def _memory(size: int) -> Iterator[None]:
    statistics = Path("/proc/self/statm")
    if not sys.platform.startswith("linux") or not statistics.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(statistics.read_text().split()[0]) * resource.getpagesize() + size
    tighter = all(limit == resource.RLIM_INFINITY or wanted < limit for limit in (soft, hard))
    if tighter:
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        if tighter:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
