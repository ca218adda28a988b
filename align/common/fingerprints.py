"""Fingerprints: flat dictionaries that say how features were made. Features with different fingerprints are never mixed."""

import json
from typing import Any

from align.common.errors import FingerprintError
from align.common.files import hash_bytes


def compare_fingerprints(given: dict[str, Any], stored: dict[str, Any], place: str) -> None:
    """Raise FingerprintError, naming each field that differs, unless the fingerprints are equal."""
    if differing := _differing(given, stored):
        lines = "; ".join(f"{name}: {stored.get(name)!r} there, {given.get(name)!r} asked for" for name in differing)
        raise FingerprintError(f"{place} was made differently ({lines}). Use the same settings or another folder.")


def compare_inputs(given: dict[str, Any], stored: dict[str, Any] | None, checkpoint: str) -> None:
    """Raise FingerprintError, naming each field, unless a run's inputs are those of its checkpoint. None: of an older version.

    Inputs are hashes of what files and folders hold, by field of the config: a path says nothing about them.
    """
    stored = given if stored is None else stored
    if differing := _differing(given, stored):
        lines = "; ".join(f"{name}: {stored.get(name)} there, {given.get(name)} now" for name in differing)
        raise FingerprintError(
            f"{checkpoint} was trained on other inputs ({lines}). The files changed under the same path: restore them, "
            "or give another --output to train anew."
        )


def _differing(given: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    return [name for name in sorted(given.keys() | stored.keys()) if given.get(name) != stored.get(name)]


def without_name(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Return an encoder's fingerprint without its name: the weights hash identifies a copied or renamed folder."""
    return {**fingerprint, "encoder": ""}


def compare_encoders(given: dict[str, Any], stored: dict[str, Any], place: str) -> None:
    """Raise FingerprintError, naming each field that differs, unless encoder and settings are equal. The encoder's name is ignored."""
    compare_fingerprints(without_name(given), without_name(stored), place)


def fingerprint_digest(fingerprint: dict[str, Any]) -> str:
    """Return 16 hex digits that identify an encoder's fingerprint without its name."""
    return hash_bytes(json.dumps(without_name(fingerprint), sort_keys=True).encode())[:16]
