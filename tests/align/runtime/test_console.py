"""What an entry prints: text as it is, and lines of progress that are true and few."""

import io

from rich.console import Console
from rich.table import Table

from align.runtime.console import Progress, plain_console


def test_what_is_printed_stands_as_it_is_whatever_brackets_and_colons_it_holds(monkeypatch):
    monkeypatch.setattr("sys.stdout", written := io.StringIO())
    console = plain_console()
    console.print("runs/a[red]b[/red] :smile: [/] " + "x" * 300)
    table = Table("name")
    table.add_row("a[bold]b")
    console.print(table)
    lines = written.getvalue().splitlines()
    assert lines[0] == "runs/a[red]b[/red] :smile: [/] " + "x" * 300
    assert any("a[bold]b" in line for line in lines)


def test_a_quiet_console_says_nothing(capsys):
    plain_console(quiet=True).print("a")
    assert capsys.readouterr().out == ""


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


def shown(monkeypatch, terminal=False):
    console = Console(file=(written := io.StringIO()), force_terminal=terminal, width=200, highlight=False)
    return Clock(monkeypatch), console, lambda: written.getvalue()


def test_progress_says_how_far_how_fast_how_long_and_where_the_time_went(monkeypatch):
    clock, console, text = shown(monkeypatch)
    progress = Progress(console, "encoded samples", 1000, workers=2)
    with progress.spend("forward"):
        clock.now += 8
    progress(20)
    assert text() == "", "a log gets a line every 10 s"
    progress.add("write", 1)
    clock.now += 2
    progress(50, note="3 rejected")
    assert text() == "encoded samples 100/1000: 3 rejected | 10/s, 90 s left | forward 80%, write 10%\n"
    clock.now += 1
    progress(500)
    assert text().splitlines()[1].startswith("encoded samples 1000/1000 | 91/s, 0 s left"), "the last line is shown if others were"


def test_short_work_is_not_reported_unless_asked_for(monkeypatch):
    clock, console, text = shown(monkeypatch)
    progress = Progress(console, "rows")
    clock.now += 5
    progress(10, 10)
    assert text() == ""
    progress(10, now=True)
    assert text() == "rows 10/10 | 2.00/s, 0 s left\n"


def test_a_terminal_gets_one_line_that_is_written_over(monkeypatch):
    clock, console, text = shown(monkeypatch, terminal=True)
    progress = Progress(console, "rows", 10)
    for done in (1, 2, 3):
        clock.now += 0.3
        progress(done)
    assert text().count("rows") == 1 and text().endswith("\r")


def test_what_was_done_before_does_not_count_as_fast(monkeypatch):
    clock, console, text = shown(monkeypatch)
    progress = Progress(console, "step", 110, first=100)
    progress(100, now=True)
    clock.now += 20
    progress(105, now=True)
    assert text() == "step 100/110 | 0.00/s, time left unknown\nstep 105/110 | 0.25/s, 20 s left\n"


def test_laps_have_their_own_split_of_time(monkeypatch):
    clock = Clock(monkeypatch)
    progress = Progress()
    progress.add("wait", 2)
    clock.now += 4
    progress(7, 9)  # without a console nothing is printed
    assert progress.lap() == (4, {"wait": 0.5})
    clock.now += 10
    progress.add("wait", 1)
    assert progress.lap() == (10, {"wait": 0.1}) and progress.spent == {"wait": 3}


def test_what_was_done_before_may_become_known_with_the_first_call(monkeypatch):
    clock, console, text = shown(monkeypatch)
    progress = Progress(console, "maps", first=None)
    clock.now += 10
    progress(51, 60)
    assert text() == "maps 51/60 | 0.10/s, 90 s left\n"
