"""Errors of libraries and of the system as a KitError: a code, the cause in one line, and what to do next."""

import errno
import os
import re
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from align.common.errors import DamagedError, DataError, DiskFullError, KitError, MemoryFullError, OfflineError, UsageError

_MAX_TEXT = 600  # characters of a library's message
_ROOT = Path(__file__).resolve().parents[2]
_SMALLER = "give smaller batches, fewer --workers or a smaller model, or use a machine with more memory"
_SPACE = "free some space and run the same command again"
_MEND = "mend the file, or fetch or copy it again"
_NUMBERS = {
    errno.ENOSPC: (DiskFullError, _SPACE),
    errno.EDQUOT: (DiskFullError, _SPACE),
    errno.ENOMEM: (MemoryFullError, _SMALLER),
    errno.EMFILE: (UsageError, "allow more open files (ulimit -n), or give fewer --workers"),
    errno.EROFS: (UsageError, "give a path on a file system that can be written to"),
}
# By the name of the class or of one it is derived from: this file loads no library to know its errors.
_KINDS: dict[str, tuple[type[KitError], str]] = {
    "MemoryError": (MemoryFullError, _SMALLER),
    "OutOfMemoryError": (MemoryFullError, _SMALLER),
    "RecursionError": (DataError, "a file is nested too deep for its reader: make it flat, or remove it"),
    "JSONDecodeError": (DataError, _MEND),
    "YAMLError": (DataError, _MEND),
    "UnicodeError": (DataError, "write the file in UTF-8"),
    "ArrowException": (DataError, _MEND),
    "TemplateError": (DataError, "mend the chat template, or choose another one"),
    "UnidentifiedImageError": (DataError, _MEND),
    "SafetensorError": (DamagedError, _MEND),
    "BadZipFile": (DamagedError, _MEND),
    "Reject": (DataError, "mend or remove it"),
    "PanicException": (DamagedError, f"a file that it read is damaged: {_MEND}"),
    "HfHubHTTPError": (OfflineError, "give a downloaded folder, or try again with a connection"),
    "ConnectionError": (OfflineError, "give a downloaded folder, or try again with a connection"),
    "ConnectError": (OfflineError, "give a downloaded folder, or try again with a connection"),
    "ImportError": (UsageError, "install what this entry needs: pip install -e '.[mllm,lmms,clip,demo]'"),
    "FileNotFoundError": (UsageError, "give a path that exists"),
    "NotADirectoryError": (UsageError, "give a path that exists"),
    "IsADirectoryError": (UsageError, "give the path of a file"),
    "PermissionError": (UsageError, "give a path that you may read and write"),
    "OSError": (DataError, "look at the file system, then run the same command again"),
}
# What a message says where the class says nothing: most are a plain RuntimeError.
_SIGNS: tuple[tuple[str, type[KitError], str], ...] = (
    (r"No space left|Disk quota", DiskFullError, _SPACE),
    (r"can't allocate memory|Cannot allocate memory|out of memory|not enough memory", MemoryFullError, _SMALLER),
    (r"worker.* (killed by signal|exited unexpectedly)", MemoryFullError, f"the system may have run out of memory: {_SMALLER}"),
)


def explained(error: BaseException) -> KitError:
    """Return the KitError that tells of `error` in one line.

    That is the error itself, a KitError that caused it, or what its class, number or text stand for. Anything else is unforeseen: a
    plain KitError (exit code 1) with the place in this project where it came from.
    """
    for one in _causes(error):
        if isinstance(one, KitError):
            own = next(kind for kind in type(one).__mro__ if kind.__module__ == KitError.__module__)  # takes a message and no more
            return one if "\n" not in str(one) else own(_text(one))
    full = next((one for one in _causes(error, contexts=True) if isinstance(one, OSError) and one.errno in _NUMBERS), None)
    for one in _causes(error) if full is None else (full,):
        kind, advice = _recognized(one)
        if kind is not None:
            return kind(f"{_told(one)}; {advice}")
    return KitError(f"{_told(error)}{_place(error)}")


def is_foreseen(error: KitError) -> bool:
    """Return whether an error has a code of its own."""
    return type(error) is not KitError


def keep_traceback(error: BaseException) -> str:
    """Write the traceback of `error` to a new temporary file and return its path, or that there is none."""
    try:
        descriptor, path = tempfile.mkstemp(prefix="sail-traceback-", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError as full:
        return f"(no file: {full})"
    return path


def _causes(error: BaseException | None, contexts: bool = False) -> Iterator[BaseException]:
    """Yield an error and what it was raised from, the last one first; with `contexts` also what was being handled."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (error.__context__ if contexts else None)


def _recognized(error: BaseException) -> tuple[type[KitError] | None, str]:
    if isinstance(error, OSError) and error.errno in _NUMBERS:
        return _NUMBERS[error.errno]
    text = _text(error)
    for sign, kind, advice in _SIGNS:
        if re.search(sign, text):
            return kind, advice
    names = [base.__name__ for base in type(error).__mro__]
    if worker := re.match(r"Caught (\w+) in DataLoader worker", str(error)):
        names = [worker[1], *names]
    return next((_KINDS[name] for name in names if name in _KINDS), (None, ""))


def _told(error: BaseException) -> str:
    text, name = _text(error), type(error).__name__
    return f"{name}: {text}" if text else name


def _text(error: BaseException) -> str:
    """Return the text of an error in one line, without the traceback that a DataLoader worker puts into it."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - some libraries' errors cannot even be printed
        text = ""
    if "Original Traceback (most recent call last):" in text:
        lines = [line for line in text.splitlines() if line.strip()]
        last = next((number for number in range(len(lines) - 1, 0, -1) if lines[number].startswith(" ")), 0)
        text = " ".join(lines[last + 1 :]).partition(": ")[2] or lines[-1]
    text = " ".join(text.split())
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} ..."


def _place(error: BaseException) -> str:
    """Return where in this project an error came from, as text to put behind it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(_ROOT)]
    own = [frame for frame in frames if "site-packages" not in frame.filename]
    return f" ({os.path.relpath(own[-1].filename, _ROOT)}:{own[-1].lineno})" if own else ""
