"""The one form of a config check: a condition, what was given, what is allowed."""

from align.common.errors import UsageError


def check(condition: bool, given: str, allowed: str) -> None:
    if not condition:
        raise UsageError(f"{given}: {allowed}")
