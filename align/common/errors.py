"""Errors shown to users, with exit codes. A message says what was given, what is allowed and what to do. `assert` is for our bugs."""


class KitError(Exception):
    """Base of errors that are reported in one line. `exit_code` is what the process returns; 1 stands for what no check foresaw."""

    exit_code = 1

    def __init_subclass__(cls, exit_code: int | None = None) -> None:
        cls.exit_code = cls.exit_code if exit_code is None else exit_code


class UsageError(KitError, ValueError, exit_code=2):
    """A flag, recipe or argument is wrong."""


class DataError(KitError, exit_code=3):
    """The data cannot be used: no samples, a missing column, too many rejects."""


class OfflineError(KitError, exit_code=4):
    """An embedded asset is not cached and cannot be downloaded."""


class FingerprintError(KitError, exit_code=5):
    """Features come from another encoder or setting than requested, or a run's inputs changed under the same path."""


class LeaseError(KitError, exit_code=6):
    """Another job is writing to the same folder."""


class DiskFullError(KitError, exit_code=7):
    """A write needs more space than the file system has."""


class NonFiniteError(KitError, exit_code=8):
    """Training produced a non-finite loss or gradient several times in a row."""


class DamagedError(KitError, exit_code=9):
    """A file does not have the content that was committed."""


class MemoryFullError(KitError, exit_code=10):
    """More memory is needed than there is, or than a file may ask for."""


class Preempted(KitError, exit_code=75):
    """SIGTERM, or the end of the launcher, stopped the process; what it had to save is saved. Run the same command to resume."""
