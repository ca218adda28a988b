"""The errors a user can meet, each with the exit code that entry scripts return for it.

Every message says what was given, what is allowed and what to do next. Plain `assert` is kept for our own bugs.
"""


class KitError(Exception):
    """Base of all errors that are reported without a traceback; `exit_code` is what the process returns."""

    exit_code = 1


class UsageError(KitError, ValueError):
    """A flag, recipe or argument is wrong."""

    exit_code = 2


class DataError(KitError):
    """The data cannot be used: no samples, a missing column, too many rejects."""

    exit_code = 3


class OfflineError(KitError):
    """An embedded asset is neither in the cache nor reachable."""

    exit_code = 4


class FingerprintError(KitError):
    """Features were made by another encoder or setting than the one asked for."""

    exit_code = 5


class LeaseError(KitError):
    """Another job is writing to the same folder."""

    exit_code = 6


class DiskFullError(KitError):
    """A write needs more space than the file system has."""

    exit_code = 7


class NonFiniteError(KitError):
    """Training produced a non-finite loss or gradient several times in a row."""

    exit_code = 8


class DamagedError(KitError):
    """A file does not have the content that was committed."""

    exit_code = 9


class Preempted(KitError):
    """The process was asked to stop (SIGTERM) and has saved its state; run the same command to go on."""

    exit_code = 75
