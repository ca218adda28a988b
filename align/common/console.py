"""The console of every entry, and lines that say how far work is, how fast, and where the time goes."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from align.features.extract import Progress

LOG_WIDTH = 150


def plain_console(quiet: bool = False) -> Console:
    """Return a console that prints text as it is: brackets in names are no markup, lines are not wrapped, tables in logs are wide."""
    width = None if Console().is_terminal else LOG_WIDTH
    return Console(quiet=quiet, soft_wrap=True, highlight=False, markup=False, emoji=False, width=width)


class Meter:
    """Shows rate, time left and the split of time: twice a second on a terminal, every 10 s in a log, and once at the end.

    `rows` is what all `workers` processes have to do; this one's progress is taken for theirs.
    """

    def __init__(self, console: Console, what: str, rows: int, workers: int = 1) -> None:
        self.console, self.what, self.rows, self.workers = console, what, rows, workers
        self.begin = self.last = time.monotonic()

    def __call__(self, progress: "Progress", last: bool = False) -> None:
        """Print a line if it is time to, or if it is the last one."""
        now = time.monotonic()
        if not last and now - self.last < (0.5 if self.console.is_terminal else 10):
            return
        self.last = now
        done = min(self.rows, progress.rows * self.workers)
        rate = done / max(1e-9, now - self.begin)
        busy = max(1e-9, progress.wait + progress.forward + progress.write)
        line = (
            f"{self.what} {done}/{self.rows}, {rate:.0f}/s, {(self.rows - done) / max(rate, 1e-9):.0f} s left | waiting for decode "
            f"{progress.wait / busy:.0%}, forward {progress.forward / busy:.0%}, write {progress.write / busy:.0%} | "
            f"rejected {progress.rejected}"
        )
        self.console.print(line, end="\r" if self.console.is_terminal and not last else "\n")


def counter(console: Console, what: str) -> Callable[[int, int], None]:
    """Return a function of (done, total) that shows rate and time left as often as `Meter` does, and at the end if that took a while."""
    begin = last = time.monotonic()
    first: int | None = None

    def show(done: int, total: int) -> None:
        nonlocal first, last
        now = time.monotonic()
        first = done - 1 if first is None else first
        if now - last < (0.5 if console.is_terminal else 10) and not (done == total and last > begin):
            return
        last = now
        rate = (done - first) / max(1e-9, now - begin)
        line = f"{what} {done}/{total}, {rate:.1f}/s, {(total - done) / max(rate, 1e-9):.0f} s left"
        console.print(line, end="\r" if console.is_terminal and done < total else "\n")

    return show
