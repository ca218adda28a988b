"""Stopping on request: SIGTERM of a scheduler or launcher, a launcher that is gone, a folder that was lost to another job.

A process that has nothing to save ends at once (`ended_by_sigterm`). A training loop is told instead (`noted`), saves, and then
ends. Worker processes stay (`stay`): a scheduler signals every process, but the main one may still need its next batch.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

from align.common.errors import KitError, Preempted

GRACE_SECONDS = 45.0  # an orphan that has not stopped by then is ended
CLEANUP_SECONDS = 15.0  # the same for a process that has nothing to save
_reason = "SIGTERM"
_error: KitError | None = None  # why the process must stop without saving
_asked = threading.Event()


def asked_to_stop() -> bool:
    """Return whether this process was asked to stop."""
    return _asked.is_set()


def reason() -> str:
    """Return who asked for the stop, for messages."""
    return _reason


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within the block SIGTERM raises Preempted. A process that does not end within seconds of it is ended with the same code."""

    def end(number: int, frame: FrameType | None) -> None:
        if not _asked.is_set():
            _asked.set()
            _end_later(CLEANUP_SECONDS)
        raise _error or Preempted(f"stopped by {_reason}; everything committed is kept; run the same command to go on")

    with _handler(end):
        yield


@contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM only takes a note. Yield a function that returns whether it came: then save and raise Preempted."""
    came = []

    def note(number: int, frame: FrameType | None) -> None:
        _asked.set()
        if _error is not None:
            raise _error
        came.append(number)

    with _handler(note):
        yield lambda: bool(came)


@contextmanager
def _handler(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may listen
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    _asked.clear()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def stop_without_saving(error: KitError) -> None:
    """Make the main thread raise `error` soon, also inside `noted`. For threads that find that the process must not go on."""
    global _error
    _error = error
    _signal_main_thread()


def stay(worker: int = 0) -> None:
    """Ignore SIGTERM: for worker processes, which end with their parent. DataLoader's `worker_init_fn`."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def launchers() -> list[psutil.Process]:
    """Return the Python processes above this one that were given its script: accelerate, torchrun and deepspeed."""
    script, found = Path(sys.argv[0]).name, []
    for parent in psutil.Process().parents():
        try:
            program, *words = parent.cmdline() or [""]
        except psutil.Error:
            continue
        if "python" in Path(program).name and script in {Path(word).name for word in words}:
            found.append(parent)
    return found


def stop_with(parents: list[psutil.Process], seconds: float = 1.0) -> None:
    """From now on look at the `parents` every so many `seconds`; if one of them is gone, stop this process as SIGTERM does."""

    def look() -> None:
        global _reason
        while not (gone := [parent for parent in parents if _is_gone(parent)]):
            time.sleep(seconds)
        _reason = f"the end of its launcher (process {gone[0].pid})"
        _end_later(GRACE_SECONDS)
        _signal_main_thread()

    if parents:
        threading.Thread(target=look, daemon=True).start()


def say_after(parents: list[psutil.Process], text: str, seconds: float = 10.0) -> None:
    """Write `text` to stderr once the `parents` are gone, at most so many `seconds` from now, from a process of its own.

    A launcher writes a traceback of its own below the error of the process that it started: without this, that is what is read.
    """
    if not parents or not hasattr(os, "fork") or os.fork():
        return
    try:
        stay()
        deadline = time.monotonic() + seconds
        while not all(map(_is_gone, parents)) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.write(2, text.encode("utf-8", "replace"))
    finally:
        os._exit(0)


def _signal_main_thread() -> None:
    """Wake the main thread, which alone runs handlers, also out of a blocking call."""
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGTERM)


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _end_later(seconds: float) -> None:
    timer = threading.Timer(seconds, os._exit, (Preempted.exit_code,))
    timer.daemon = True
    timer.start()
