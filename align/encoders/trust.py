"""Which encoders may run code of their own; imports nothing, so that configs are read fast."""

import re
from pathlib import Path

from align.common.checks import check

COMMIT_ID = re.compile(r"[0-9a-f]{40}")


def may_run_code(name: str, revision: str | None, trust_remote_code: bool) -> bool:
    """Return whether code that ships with the encoder `name` may run: only if asked for, from a local folder or a pinned commit."""
    return trust_remote_code and (bool(COMMIT_ID.fullmatch(revision or "")) or Path(name).expanduser().is_dir())


def split_revision(name: str) -> tuple[str, str | None]:
    """Return (id, commit) of `owner/name@COMMIT`, and (name, None) of anything else."""
    bare, _, revision = name.rpartition("@")
    return (bare, revision) if COMMIT_ID.fullmatch(revision) and not Path(name).expanduser().exists() else (name, None)


def check_trust(trusted: bool, *encoders: tuple[str | None, str | None]) -> None:
    may = any(name and may_run_code(name, revision, trusted) for name, revision in encoders)
    check(may or not trusted, "--trust-remote-code", "needs an encoder pinned to a commit (40 hex digits), or one in a local folder")
