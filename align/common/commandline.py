"""One command line for every entry: a recipe is a saved command line, the user's own flags come after it and win.

Entries keep their heavy imports inside `main`, so that `--help` and a typo are answered before torch is loaded.
"""

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import tyro
from rich.console import Console

from align.common.console import plain_console
from align.common.errors import KitError, UsageError
from align.common.files import arm_failpoint
from align.common.hardware import reuse_freed_memory, use_cores
from align.common.recipes_yaml import recipe_flags, to_recipe

Config = TypeVar("Config")


def parse(kind: type[Config], section: str, argv: Sequence[str] | None = None) -> Config:
    """Return the config of an entry from `--config recipe.yaml` and flags; later flags win.

    `--print-config` prints the resolved recipe and exits 0. The `--local_rank` that launchers add is dropped.
    Wrong flags and values end with exit code 2 and the nearest known flag.
    """
    arguments = [a for a in (sys.argv[1:] if argv is None else argv) if not a.startswith(("--local_rank=", "--local-rank="))]
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    recipe = _take_value(arguments, "--config")
    flags = recipe_flags(Path(recipe), section, known) if recipe else []
    flags += [a for a in arguments if a != "--print-config"]
    config = tyro.cli(kind, args=flags, description=inspect.getdoc(kind))
    if "--print-config" in arguments:
        sys.stdout.write(to_recipe(config, section))
        raise SystemExit(0)
    return config


def _take_value(arguments: list[str], flag: str) -> str | None:
    """Remove `flag value` or `flag=value` from `arguments` and return the value, or None if it is not there."""
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
    """Run an entry: parse, call `main(config)`, turn a KitError into one line on stderr and its exit code (130: interrupted).

    `section` may be a function of the arguments, for an entry with several sections.
    """
    if "SAIL_FAILPOINT" in os.environ:
        arm_failpoint(os.environ["SAIL_FAILPOINT"])
    try:
        name = section if isinstance(section, str) else section(sys.argv[1:])
        config = parse(kind, name)
        if os.environ.get("RANK", "0") == "0":  # the first sign of life; libraries take seconds to load
            sys.stderr.write(f"{name}: loading libraries\n")
        main(config)
    except KitError as error:
        _leave(f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        _leave("interrupted; run the same command again to go on", 130)


def set_up(quiet: bool = False) -> Console:
    """Return the console of an entry that computes; first give torch this process's share of the cores and silence transformers' bars.

    Call it after whatever sets the number of threads itself, such as `PartialState`.
    """
    from transformers.utils.logging import disable_progress_bar

    reuse_freed_memory()
    use_cores(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    disable_progress_bar()  # of transformers, for every file it reads and writes
    return plain_console(quiet)


def _leave(message: str, code: int) -> None:
    sys.stderr.write(f"{message}\n")  # stderr flushes each line
    # After an error other ranks may sit in a collective and DataLoader workers in a queue: a plain exit would hang on them.
    if "RANK" in os.environ:
        os._exit(code)
    raise SystemExit(code)
