"""Checks of config values: each error says what was given and what is allowed."""

from align.common.errors import UsageError


def check(condition: bool, given: str, allowed: str) -> None:
    """Raise UsageError with the given value and what is allowed, unless `condition` holds."""
    if not condition:
        raise UsageError(f"{given}: {allowed}")


def check_least(config: object, **least: float) -> None:
    """Raise UsageError, naming the flag, if a field of `config` is below its minimum in `least`. None passes."""
    for name, value in least.items():
        given = getattr(config, name)
        check(given is None or given >= value, f"--{name.replace('_', '-')} {given}", f"must be at least {value}")


def check_share(name: str, value: float) -> None:
    """Raise UsageError, naming the flag, unless `value` lies in 0..1."""
    check(0 <= value <= 1, f"--{name} {value}", "must lie in 0..1")
