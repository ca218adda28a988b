"""Flags of an entry: what was typed, and what a recipe says where nothing was typed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from align.common.errors import UsageError
from align.common.files import expand_home
from align.runtime.recipes_yaml import recipe_flags

TEXTS = ("--prompt", "--title")  # flags whose values are words, which may begin with `~`


@dataclass(frozen=True)
class Arguments:
    """The flags of an entry: what was typed, and what a recipe says where nothing was typed."""

    typed: list[str]
    recipe: str | None = None
    kept: dict[str, list[str]] = field(default_factory=dict)  # of the recipe: by key, the flag with its values
    replaced: list[str] = field(default_factory=list)  # a sentence for each key of the recipe that a typed flag takes the place of

    @classmethod
    def of(cls, kind: type[Any], section: str, argv: Sequence[str]) -> "Arguments":
        """Return the arguments in `argv`, of a config class and a section of recipes.

        Where `kind` has REPLACES, a typed flag takes the place of the recipe's keys listed there: those that exclude it, or that
        belong to the value it replaces. A flag that turns something off (None, 0, no value) replaces nothing else.
        """
        typed = _homes_expanded([a for a in argv if not a.startswith(("--local_rank=", "--local-rank="))])
        known = [one.name for one in fields(kind)]
        recipe = _take_value(typed, "--config")
        kept = recipe_flags(Path(recipe), section, known) if recipe else {}
        kept = {name: _homes_expanded(words) for name, words in kept.items()}
        given, replaced = _values(typed, known), list[str]()
        for name in given:
            kept.pop(name, None)
        for name, values in given.items():
            off = values in ([], ["None"], ["0"], ["False"])
            for key in () if off else getattr(kind, "REPLACES", {}).get(name, ()):
                if key in kept:
                    flag = name.replace("_", "-")
                    replaced.append(f"--{flag} {' '.join(values)} takes the place of {key}: {_short(kept.pop(key)[1:])} in {recipe}")
        return cls(typed, recipe, kept, replaced)

    def flags(self) -> list[str]:
        """Return all flags, those of the recipe first: later ones win."""
        return [word for words in self.kept.values() for word in words] + self.typed

    def origin(self, message: str) -> str:
        """Return which of the flags that `message` names were not typed but come from the recipe, as text to put behind it."""
        named = {name.replace("-", "_") for name in re.findall(r"--([a-z][a-z-]*)", message)}
        said = ", ".join(_short(words) for key, words in self.kept.items() if key in named)
        return f" ({said} is what {self.recipe} says; type the flag to say otherwise)" if said else ""


def _homes_expanded(words: Sequence[str]) -> list[str]:
    """Return flags and values with `~` written out in all values but words (TEXTS)."""
    flag, expanded = "", list[str]()
    for word in words:
        flag = word.partition("=")[0].replace("_", "-") if word.startswith("--") else flag
        expanded.append(word if flag in TEXTS else expand_home(word))
    return expanded


def _values(typed: Sequence[str], known: Sequence[str]) -> dict[str, list[str]]:
    """Return the values of each typed flag, by the field that it sets."""
    values: dict[str, list[str]] = {}
    name = ""
    for word in typed:
        if word.startswith("--"):
            flag, _, value = word[2:].partition("=")
            name = flag.replace("-", "_")
            off = name.startswith("no_") and name not in known
            name = name[3:] if off else name
            values[name] = ["False"] if off else [value] if value else []
        elif name:
            values[name].append(word)
    return {name: given for name, given in values.items() if name in known}


def _short(words: Sequence[str]) -> str:
    return " ".join(words if len(words) <= 4 else [*words[:3], "..."])


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
