"""On PYTHONPATH this makes a flag do nothing: every config field named by SAIL_IGNORED_FLAG (`TrainConfig.lr`) reads as its default.

Only code of align, mllm and eval is deceived: checks of the config itself, recipes that are written and tests see what was given.
With SAIL_RECORDED_FLAGS, a file, it writes down instead which test made that code read which field with another value than its default.
"""

import dataclasses
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
CODE = tuple(os.path.join(ROOT, package, "") for package in ("align", "mllm", "eval"))
PACKAGES = ("align.", "mllm.", "eval.")
seen = set()


def reading(frame):
    """Return whether the caller is code that should heed a flag: no check of the config, and not what writes recipes."""
    code = frame.f_code
    name = getattr(code, "co_qualname", code.co_name)
    checks = "__post_init__" in name or "._check" in name or code.co_filename.endswith(("checks.py", "recipes_yaml.py"))
    return code.co_filename.startswith(CODE) and not checks


def deceive(kind):
    """Make fields of the config class `kind` read as the environment says."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}

    def read(self, name):
        value = object.__getattribute__(self, name)
        if name not in defaults or not reading(sys._getframe(1)):
            return value
        field = f"{kind.__name__}.{name}"
        if os.environ.get("SAIL_IGNORED_FLAG") == field:
            return None if defaults[name] is dataclasses.MISSING else defaults[name]
        if "SAIL_RECORDED_FLAGS" in os.environ and value != defaults[name]:
            line = f"{field} {os.environ.get('PYTEST_CURRENT_TEST', 'collection').rsplit(' ', 1)[0]}\n"
            if line not in seen:
                seen.add(line)
                with open(os.environ["SAIL_RECORDED_FLAGS"], "a") as file:
                    file.write(line)
        return value

    kind.__getattribute__ = read


original = dataclasses.dataclass


def dataclass(cls=None, **options):
    """Make a data class; of a config, one that deceives."""

    def made(cls):
        kind = original(cls, **options)
        if kind.__name__.endswith("Config") and kind.__module__.endswith(".config") and kind.__module__.startswith(PACKAGES):
            deceive(kind)
        return kind

    return made if cls is None else made(cls)


dataclasses.dataclass = dataclass
