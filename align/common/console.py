"""The console of every entry, and the line that says how far work is, how fast it goes, and where the time is spent."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

LOG_WIDTH = 150
TERMINAL_SECONDS, LOG_SECONDS = 0.5, 10.0  # between two lines of progress


def plain_console(quiet: bool = False) -> Console:
    """Return a console that prints text as it is: brackets in names are no markup, lines are not wrapped, tables in logs are wide."""
    width = None if Console().is_terminal else LOG_WIDTH
    return Console(quiet=quiet, soft_wrap=True, highlight=False, markup=False, emoji=False, width=width)


class Progress:
    """Shows what is done, the rate, the time left and the split of time: twice a second on a terminal, every 10 s in a log.

    Call it with what is done; libraries take it as a function of (done, total). Without a console it only keeps the time.
    """

    def __init__(self, console: Console | None = None, what: str = "", total: int = 0, first: int | None = 0, workers: int = 1) -> None:
        """`first` of `total` were done before (None: all but one of what the first call says). Each of `workers` counts as this process."""
        self.console, self.what, self.total, self.first, self.workers = console, what, total, first, workers
        self.spent: dict[str, float] = {}  # seconds by part of the work
        self._begin = self._shown = self._lap = time.monotonic()
        self._lap_spent: dict[str, float] = {}

    def __call__(self, done: int, total: int | None = None, note: str = "", now: bool = False) -> None:
        """Print a line if it is time to, if `now`, or if all is done and lines were printed before."""
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
        """Count `seconds` as spent on a part of the work."""
        self.spent[part] = self.spent.get(part, 0.0) + seconds

    @contextmanager
    def spend(self, part: str) -> Iterator[None]:
        """Count the time of the block as spent on a part of the work."""
        before = time.monotonic()
        try:
            yield
        finally:
            self.add(part, time.monotonic() - before)

    def lap(self) -> tuple[float, dict[str, float]]:
        """Return the seconds since the last lap and the share of them that each part of the work took."""
        now = time.monotonic()
        seconds = max(now - self._lap, 1e-9)
        shares = {part: (spent - self._lap_spent.get(part, 0.0)) / seconds for part, spent in self.spent.items()}
        self._lap, self._lap_spent = now, dict(self.spent)
        return seconds, shares
