"""The console of every entry, and progress lines with rate, time left and where the time goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

LOG_WIDTH = 150
TERMINAL_SECONDS, LOG_SECONDS = 0.5, 10.0  # between two lines of progress


def plain_console(quiet: bool = False) -> Console:
    """Return a console that prints text unchanged: no markup, no wrapping. In logs it is 150 columns wide."""
    width = None if Console().is_terminal else LOG_WIDTH
    return Console(quiet=quiet, soft_wrap=True, highlight=False, markup=False, emoji=False, width=width)


class Progress:
    """Progress lines (count, rate, time left, time by part), every 0.5 s on a terminal, 10 s in a log. Without a console: a timer only."""

    def __init__(self, console: Console | None = None, what: str = "", total: int = 0, first: int | None = 0, workers: int = 1) -> None:
        """`first` items were done before (None: all but one of the first call's count). Each of `workers` advances like this process."""
        self.console, self.what, self.total, self.first, self.workers = console, what, total, first, workers
        self.spent: dict[str, float] = {}  # seconds by part of the work
        self._begin = self._shown = self._lap = time.monotonic()
        self._lap_spent: dict[str, float] = {}

    def __call__(self, done: int, total: int | None = None, note: str = "", now: bool = False) -> None:
        """Print a line if one is due, if `now`, or if all is done and lines were printed before."""
        self.total = self.total if total is None else total
        self.first = done - 1 if self.first is None else self.first
        if self.console is None:
            return
        clock, live, done = time.monotonic(), self.console.is_terminal, min(self.total, done * self.workers)
        now = now or (done == self.total and self._shown > self._begin)
        if not now and clock - self._shown < (TERMINAL_SECONDS if live else LOG_SECONDS):
            return
        self._shown = clock
        seconds = max(clock - self._begin, 1e-9)
        rate = max(done - self.first, 0) / seconds
        left = f"{(self.total - done) / rate:.0f} s left" if rate else "time left unknown"
        split = ", ".join(f"{part} {spent / seconds:.0%}" for part, spent in self.spent.items())
        line = f"{self.what} {done}/{self.total}{note and f': {note}'} | {rate:.{0 if rate >= 10 else 2}f}/s, {left}"
        self.console.print(line + (split and f" | {split}"), end="\r" if live and not now else "\n")

    def add(self, part: str, seconds: float) -> None:
        """Add `seconds` to the time spent on a part of the work."""
        self.spent[part] = self.spent.get(part, 0.0) + seconds

    @contextmanager
    def spend(self, part: str) -> Iterator[None]:
        """Add the time of the block to a part of the work."""
        before = time.monotonic()
        try:
            yield
        finally:
            self.add(part, time.monotonic() - before)

    def lap(self) -> tuple[float, dict[str, float]]:
        """Return the seconds since the last lap, and each part's share of them."""
        now = time.monotonic()
        seconds = max(now - self._lap, 1e-9)
        shares = {part: (spent - self._lap_spent.get(part, 0.0)) / seconds for part, spent in self.spent.items()}
        self._lap, self._lap_spent = now, dict(self.spent)
        return seconds, shares
