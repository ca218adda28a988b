"""The command line of every entry. A recipe is a saved command line; later flags win. Entries import heavy libraries inside `main`."""

import inspect
import io
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import TextIO, TypeVar

import tyro
from rich.console import Console

from align.common.errors import KitError, Preempted
from align.common.failures import explained, is_foreseen, keep_traceback
from align.common.files import arm_failpoint, disk_full_named
from align.common.hardware import reuse_freed_memory, use_cores
from align.common.preemption import asked_to_stop, ended_by_sigterm, launchers, reason, say_after, stop_with
from align.runtime.arguments import Arguments
from align.runtime.console import plain_console
from align.runtime.recipes_yaml import to_recipe

Config = TypeVar("Config")
OF_ALL = (
    "Besides: --config RECIPE.yaml (flags win over it), --print-config (print the recipe that the flags make), --debug (show the "
    "traceback of an error)."
)


def parse(kind: type[Config], section: str, argv: Sequence[str] | None = None) -> Config:
    """Return the config of an entry from `--config recipe.yaml` and flags; later flags win.

    `--print-config` prints the resolved recipe and exits with code 0. `--local_rank`, which launchers add, is dropped. A wrong flag or
    value exits with code 2 and names the nearest known flag.
    """
    return _config(kind, section, Arguments.of(kind, section, sys.argv[1:] if argv is None else argv))


def _config(kind: type[Config], section: str, arguments: Arguments) -> Config:
    for sentence in arguments.replaced if _is_first() else ():
        sys.stderr.write(f"{sentence}\n")
    flags = [word for word in arguments.flags() if word != "--print-config"]
    heard = _Heard(sys.stderr)
    try:
        with redirect_stderr(heard):
            config = tyro.cli(kind, args=flags, description=f"{inspect.getdoc(kind)} {OF_ALL}")
    except SystemExit as leaving:
        origin = arguments.origin(heard.text).strip(" ()")
        sys.stderr.write(f"{origin}\n" if origin else "")
        if leaving.code:
            _tell_again(f"{heard.text}{origin}")
        raise
    if "--print-config" in arguments.typed:
        sys.stdout.write(to_recipe(config, section))
        raise SystemExit(0)
    return config


class _Heard(io.TextIOBase):
    """A stream that passes on what is written to another one, and keeps it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.text = stream, ""
        self.isatty, self.fileno = stream.isatty, stream.fileno  # type: ignore[method-assign]

    def write(self, text: str) -> int:
        self.text += text
        return self.stream.write(text)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def run(main: Callable[[Config], None], kind: type[Config], section: str | Callable[[list[str]], str]) -> None:
    """Run an entry: parse the flags, call `main`. Every error becomes one line on stderr and an exit code; Ctrl-C exits with 130.

    SIGTERM, and the end of the launcher that started the process, exit with 75. `--debug` shows the traceback of an error. Without it,
    that of an error that no check foresaw is kept in a temporary file.
    """
    if "SAIL_FAILPOINT" in os.environ:
        arm_failpoint(os.environ["SAIL_FAILPOINT"])
    flags = [flag for flag in sys.argv[1:] if flag != "--debug"]
    debug = len(flags) < len(sys.argv) - 1
    if not debug:
        threading.excepthook = _tell_of_thread
        quiet_libraries()
    arguments = Arguments(flags)
    try:
        with ended_by_sigterm():
            name = section if isinstance(section, str) else section(flags)  # some entries have several sections
            arguments = Arguments.of(kind, name, flags)
            config = _config(kind, name, arguments)
            if _is_first():  # loading takes seconds: show that the process is alive
                sys.stderr.write(f"{name}: loading libraries\n")
            stop_with(launchers())
            with disk_full_named(Path(vars(config).get("output") or ".")):  # whichever library writes
                main(config)
    except SystemExit:
        raise
    except KeyboardInterrupt:
        _leave("interrupted; run the same command again to go on", 130)
    except BaseException as error:  # noqa: BLE001 - the outermost guard; panics of Rust libraries are no Exception
        _leave(*_told(error, debug, arguments))


def quiet_libraries() -> None:
    """Silence what libraries say to their own developers: deprecations, backends, DeepSpeed's choice of accelerator. Before their import.

    A user cannot act on them, and they hide the lines that matter. TRANSFORMERS_VERBOSITY in the environment wins.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for kind in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.simplefilter("ignore", kind)
    logging.getLogger("DeepSpeed").addFilter(lambda record: "accelerator" not in record.getMessage())


def _tell_of_thread(failed: threading.ExceptHookArgs) -> None:
    """Write one line: such an error is raised again where the thread is used, TensorBoard's for example."""
    sys.stderr.write(f"in a thread: {explained(failed.exc_value or failed.exc_type())}\n")


def _told(error: BaseException, debug: bool, arguments: Arguments) -> tuple[str, int]:
    """Return the last line that an entry writes because of `error`, and its exit code; with `debug` print the traceback before."""
    if debug:
        traceback.print_exception(error)
    if asked_to_stop() and not isinstance(error, KitError):  # another process of the run, or a worker, was stopped first
        return f"error: stopped by {reason()} ({type(error).__name__}); run the same command to go on", Preempted.exit_code
    found = explained(error)
    if debug or is_foreseen(found):
        return f"error: {found}{arguments.origin(str(found))}", found.exit_code
    advice = f"see the traceback in {keep_traceback(error)} and check the files that you gave, or run the same command with --debug"
    return f"error: {found}; no check foresaw this: {advice}", found.exit_code


def set_up(quiet: bool = False) -> Console:
    """Set torch's threads and memory, silence transformers, return the console. Call it after `PartialState`, which sets threads too."""
    from transformers.utils.logging import disable_progress_bar

    reuse_freed_memory()
    use_cores(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    disable_progress_bar()
    return plain_console(quiet)


def _tell_again(message: str) -> None:
    """Under a launcher, write an error again below the launcher's own traceback."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        say_after(launchers(), f"\n{message}\n")


def _leave(message: str, code: int) -> None:
    sys.stderr.write(f"{message}\n")  # stderr flushes each line
    if code not in (Preempted.exit_code, 130):
        _tell_again(message)
    # Other ranks may wait in a collective, and DataLoader workers in a queue: a plain exit would hang.
    if "RANK" in os.environ:
        os._exit(code)
    raise SystemExit(code)
