"""Recipes: plain YAML files with one section per entry (`encode:`, `train:`, `eval:`). Each key is a flag of that entry."""

import difflib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from align.common.errors import UsageError
from align.common.files import atomic_bytes

SECTIONS = ("prepare", "encode", "assess", "curate", "train", "convert", "eval", "upgrade", "check", "pretrain", "instruct", "lmms", "chat")


class _PlainLoader(yaml.SafeLoader):
    """YAML loader that refuses object tags, aliases (YAML bombs) and repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise UsageError(f"aliases are not allowed in YAML ({self.peek_event().start_mark}); write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise UsageError(f"key {key!r} appears twice ({key_node.start_mark}); keep one")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def load_yaml(path: Path) -> Any:
    """Return the content of a plain YAML file. UsageError gives the place of a syntax error, tag, alias or repeated key."""
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_PlainLoader)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise UsageError(f"no such file: {path}") from error
    except RecursionError as error:
        raise UsageError(f"{path} is not plain YAML: it is nested too deep; write it flat") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); give a YAML file") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{path} is not plain YAML: {error}") from error


def nearest(word: str, known: Sequence[str]) -> str:
    """Return a sentence that names the known word nearest to `word`, or all known words."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def recipe_flags(recipe: Path, section: str, known: Sequence[str]) -> dict[str, list[str]]:
    """Return the flags in `section` of a recipe by key, each with its values. Raise UsageError for an unknown section or key."""
    content = load_yaml(recipe)
    if not isinstance(content, dict):
        raise UsageError(f"{recipe}: expected sections {', '.join(SECTIONS)}, each with flags below it")
    for name in content:
        if name not in SECTIONS:
            raise UsageError(f"{recipe}: unknown section {name!r}; {nearest(str(name), SECTIONS)}")
    if section not in content:
        raise UsageError(f"{recipe} has no section {section!r} (it has: {', '.join(content)}); nothing to run here")
    flags: dict[str, list[str]] = {}
    for key, value in (content[section] or {}).items():
        if key not in known:
            raise UsageError(f"{recipe}: unknown key {key!r} in section {section!r}; {nearest(str(key), known)}")
        name = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            flags[key] = [name if value else f"--no-{name[2:]}"]
        else:
            flags[key] = [name, *map(str, value if isinstance(value, list) else [value])]
    return flags


def to_recipe(config: Any, section: str) -> str:
    """Return `config` as a YAML recipe that reproduces it."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}
    return yaml.safe_dump({section: values}, sort_keys=False, allow_unicode=True)


def write_recipe(config: Any, folder: Path, section: str) -> dict[str, Any]:
    """Write `config` to config.yaml in a run folder; return it as plain values."""
    recipe = to_recipe(config, section)
    atomic_bytes(folder / "config.yaml", recipe.encode())
    return yaml.safe_load(recipe)[section]


def refuse_other_config(config: Any, folder: Path, section: str, free: set[str]) -> None:
    """Raise UsageError, naming the fields, if the run in `folder` has another config. Fields in `free` may differ."""
    path = folder / "config.yaml"
    if not path.exists():
        return
    content = load_yaml(path)
    if not isinstance(content, dict) or section not in content:
        raise UsageError(f"{folder} holds another kind of run ({', '.join(content or ())}); give another --output")
    before, now = content[section], yaml.safe_load(to_recipe(config, section))[section]
    fixed = [key for key in now if key not in free and before.get(key) != now[key]]
    differing = [f"{key}: {before.get(key)!r} there, {now[key]!r} given" for key in fixed]
    if differing:
        raise UsageError(f"{folder} holds a run with other settings ({'; '.join(differing)}). Give another --output or the same settings.")
