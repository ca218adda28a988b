"""Whatever a library raises leaves an entry as one line with a code, the cause and the next step; --debug shows the traceback."""

import errno
import json
import sys
from pathlib import Path

import pytest
import yaml

from align.common.errors import DamagedError, DataError, DiskFullError, KitError, MemoryFullError, OfflineError, UsageError
from align.common.failures import explained
from align.features.config import EncodeConfig
from align.runtime import commandline as cli

FLAGS = ["encode.py", "--data", "d", "--output", "o", "--vision", "v"]


def raised(error, cause=None):
    with pytest.raises(type(error)) as caught:
        raise error from cause
    return caught.value


def ended(monkeypatch, capsys, error, *flags):
    """Return exit code and stderr of an entry whose main raises `error`."""

    def main(config):
        raise error

    monkeypatch.setattr(sys, "argv", [*FLAGS, *flags])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as leaving:
        cli.run(main, EncodeConfig, "encode")
    return leaving.value.code, capsys.readouterr().err


def unreadable(read):
    with pytest.raises(Exception) as caught:
        read()
    return caught.value


class PanicException(BaseException):
    """Stands for what Rust libraries raise, which is no Exception."""


class HfHubHTTPError(OSError):
    pass


FORESEEN = {
    "memory": (MemoryError(), MemoryFullError),
    "memory of torch": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), MemoryFullError),
    "memory of the system": (OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryFullError),
    "a worker killed": (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), MemoryFullError),
    "disk": (OSError(errno.ENOSPC, "No space left on device"), DiskFullError),
    "disk in a library": (RuntimeError("PytorchStreamWriter failed writing file data/0: No space left on device"), DiskFullError),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), DiskFullError),
    "nested": (RecursionError("maximum recursion depth exceeded"), DataError),
    "json": (unreadable(lambda: json.loads("{")), DataError),
    "yaml": (unreadable(lambda: yaml.safe_load("a: {")), DataError),
    "utf-8": (unreadable(lambda: b"\xff".decode()), DataError),
    "no file": (unreadable(Path("/no/such/file").read_bytes), UsageError),
    "a folder": (unreadable(Path("/").read_bytes), UsageError),
    "files open": (OSError(errno.EMFILE, "Too many open files"), UsageError),
    "library absent": (ModuleNotFoundError("No module named 'deepspeed'"), UsageError),
    "panic": (PanicException("index out of bounds"), DamagedError),
    "hub": (HfHubHTTPError("503 Server Error"), OfflineError),
    "input and output": (OSError(errno.EIO, "Input/output error"), DataError),
}  # fmt: skip


@pytest.mark.parametrize("name", FORESEEN)
def test_a_librarys_error_has_code_cause_and_next_step(monkeypatch, capsys, name):
    error, kind = FORESEEN[name]
    code, err = ended(monkeypatch, capsys, error)
    lines = err.splitlines()
    assert code == kind.exit_code and len(lines) == 2, err
    assert lines[1].startswith("error: ") and "Traceback" not in err
    assert ";" in lines[1], "after the cause comes what to do"


@pytest.mark.parametrize("error", [KeyError("k"), AssertionError(), TypeError("x\n\nmany   lines\n" * 200), ZeroDivisionError("division")])
def test_what_nobody_foresaw_names_its_place_and_keeps_the_traceback(monkeypatch, capsys, error):
    code, err = ended(monkeypatch, capsys, error)
    [line] = err.splitlines()[1:]
    assert code == 1 and type(error).__name__ in line and "--debug" in line and len(line) < 1500
    file = line.partition("traceback in ")[2].partition(" ")[0]
    assert type(error).__name__ in Path(file).read_text()
    Path(file).unlink()


@pytest.mark.parametrize("error", [KeyError("k"), DataError("no rows"), MemoryError()])
def test_debug_shows_the_traceback_and_the_same_code(monkeypatch, capsys, error):
    code, err = ended(monkeypatch, capsys, error, "--debug")
    quiet, _ = ended(monkeypatch, capsys, error)
    assert code == quiet and "Traceback (most recent call last)" in err and "in main" in err
    assert err.splitlines()[-1].startswith("error: ")


def test_an_error_behind_another_one_counts():
    wrapped = raised(RuntimeError("generating the dataset failed"), raised(DataError("row 3 is empty")))
    assert isinstance(explained(wrapped), DataError) and "row 3 is empty" in str(explained(wrapped))
    wrapped = raised(RuntimeError("generating the dataset failed"), raised(OSError(errno.ENOSPC, "No space left on device")))
    assert isinstance(explained(wrapped), DiskFullError)


def test_a_workers_error_is_told_without_its_traceback():
    text = (
        "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\n    raise it\nalign.common.errors.DataError: row 3 is empty\n'
    )
    for error, kind in ((DataError(text), DataError), (RuntimeError(text), KitError)):
        found = explained(raised(error))
        assert isinstance(found, kind) and "row 3 is empty" in str(found) and "Original Traceback" not in str(found)


def test_an_error_while_the_flags_are_read_is_told_alike(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["encode.py", "--config", str(tmp_path)])
    with pytest.raises(SystemExit) as leaving:
        cli.run(lambda config: None, EncodeConfig, "encode")
    err = capsys.readouterr().err
    assert leaving.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_help_names_the_flags_of_every_entry(capsys):
    with pytest.raises(SystemExit):
        cli.parse(EncodeConfig, "encode", ["--help"])
    out = capsys.readouterr().out
    assert all(flag in out for flag in ("--config", "--print-config", "--debug"))
