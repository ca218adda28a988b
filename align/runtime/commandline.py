"""The command line of every entry. A recipe is a saved command line; later flags win. Entries import heavy libraries inside `main`."""

import inspect
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import tyro
from rich.console import Console

from align.common.errors import KitError, Preempted, UsageError
from align.common.failures import explained, is_foreseen, keep_traceback
from align.common.files import arm_failpoint, disk_full_named
from align.common.hardware import reuse_freed_memory, use_cores
from align.common.preemption import asked_to_stop, ended_by_sigterm, launchers, reason, stop_with
from align.runtime.console import plain_console
from align.runtime.recipes_yaml import recipe_flags, to_recipe

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
    arguments = [a for a in (sys.argv[1:] if argv is None else argv) if not a.startswith(("--local_rank=", "--local-rank="))]
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    recipe = _take_value(arguments, "--config")
    flags = recipe_flags(Path(recipe), section, known) if recipe else []
    flags += [a for a in arguments if a != "--print-config"]
    config = tyro.cli(kind, args=flags, description=f"{inspect.getdoc(kind)} {OF_ALL}")
    if "--print-config" in arguments:
        sys.stdout.write(to_recipe(config, section))
        raise SystemExit(0)
    return config


def _take_value(arguments: list[str], flag: str) -> str | None:
    """Remove `flag value` or `flag=value` from `arguments` and return the value, or None if the flag is absent."""
    for at, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            return arguments.pop(at).partition("=")[2]
        if argument == flag:
            if at + 1 == len(arguments):
                raise UsageError(f"{flag} needs the path of a recipe, for example align/recipes/quickstart.yaml")
            del arguments[at]
            return arguments.pop(at)
    return None


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
    try:
        with ended_by_sigterm():
            name = section if isinstance(section, str) else section(flags)  # some entries have several sections
            config = parse(kind, name, flags)
            if os.environ.get("RANK", "0") == "0":  # loading takes seconds: show that the process is alive
                sys.stderr.write(f"{name}: loading libraries\n")
            stop_with(launchers())
            with disk_full_named(Path(vars(config).get("output") or ".")):  # whichever library writes
                main(config)
    except SystemExit:
        raise
    except KeyboardInterrupt:
        _leave("interrupted; run the same command again to go on", 130)
    except BaseException as error:  # noqa: BLE001 - the outermost guard; panics of Rust libraries are no Exception
        _leave(*_told(error, debug))


def _tell_of_thread(failed: threading.ExceptHookArgs) -> None:
    """Write one line: such an error is raised again where the thread is used, TensorBoard's for example."""
    sys.stderr.write(f"in a thread: {explained(failed.exc_value or failed.exc_type())}\n")


def _told(error: BaseException, debug: bool) -> tuple[str, int]:
    """Return the last line that an entry writes because of `error`, and its exit code; with `debug` print the traceback before."""
    if debug:
        traceback.print_exception(error)
    if asked_to_stop() and not isinstance(error, KitError):  # another process of the run, or a worker, was stopped first
        return f"error: stopped by {reason()} ({type(error).__name__}); run the same command to go on", Preempted.exit_code
    found = explained(error)
    if debug or is_foreseen(found):
        return f"error: {found}", found.exit_code
    advice = f"see the traceback in {keep_traceback(error)} and check the files that you gave, or run the same command with --debug"
    return f"error: {found}; no check foresaw this: {advice}", found.exit_code


def set_up(quiet: bool = False) -> Console:
    """Set torch's threads and memory, silence transformers, return the console. Call it after `PartialState`, which sets threads too."""
    from transformers.utils.logging import disable_progress_bar

    reuse_freed_memory()
    use_cores(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    disable_progress_bar()
    return plain_console(quiet)


def _leave(message: str, code: int) -> None:
    sys.stderr.write(f"{message}\n")  # stderr flushes each line
    # Other ranks may wait in a collective, and DataLoader workers in a queue: a plain exit would hang.
    if "RANK" in os.environ:
        os._exit(code)
    raise SystemExit(code)
