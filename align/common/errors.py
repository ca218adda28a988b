"""The errors a user can meet, each with the exit code that entry scripts return for it.

Every message says what was given, what is allowed and what to do next. Plain `assert` is kept for our own bugs.
"""


class KitError(Exception):
    """Base of all errors that are reported without a traceback; `exit_code` is what the process returns."""

    exit_code = 1

    def __init_subclass__(cls, exit_code: int | None = None) -> None:
        cls.exit_code = cls.exit_code if exit_code is None else exit_code


class UsageError(KitError, ValueError, exit_code=2):
    """A flag, recipe or argument is wrong."""


class DataError(KitError, exit_code=3):
    """The data cannot be used: no samples, a missing column, too many rejects."""


class OfflineError(KitError, exit_code=4):
    """An embedded asset is neither in the cache nor reachable."""


class FingerprintError(KitError, exit_code=5):
    """Features were made by another encoder or setting than the one asked for."""


class LeaseError(KitError, exit_code=6):
    """Another job is writing to the same folder."""


class DiskFullError(KitError, exit_code=7):
    """A write needs more space than the file system has."""


class NonFiniteError(KitError, exit_code=8):
    """Training produced a non-finite loss or gradient several times in a row."""


class DamagedError(KitError, exit_code=9):
    """A file does not have the content that was committed."""


class Preempted(KitError, exit_code=75):
    """The process was asked to stop (SIGTERM) and has saved its state; run the same command to go on."""
