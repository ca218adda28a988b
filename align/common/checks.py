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


def check_divides(batch_size: int, processes: int) -> None:
    """Raise UsageError unless each process has the same share of a batch."""
    check(batch_size % processes == 0, f"--batch-size {batch_size}", f"does not divide by {processes} processes")


def batch_for(asked: int, rows: int, steps: int) -> int:
    """Return `asked`, or with fewer rows than that a smaller batch, with which an epoch has at least `steps` steps.

    It is a multiple of 8, below 8 a power of two, and at least 2: what divides by most numbers of processes. It depends on
    nothing else, so that a run that is resumed with other processes has the same batches.
    """
    if asked <= rows:
        return asked
    most = max(rows // steps, 1)
    return max(1, min(rows, max(2, most // 8 * 8 or 1 << most.bit_length() - 1)))


def check_share(name: str, value: float) -> None:
    """Raise UsageError, naming the flag, unless `value` lies in 0..1."""
    check(0 <= value <= 1, f"--{name} {value}", "must lie in 0..1")
