"""Fingerprints are compared field by field; the name of an encoder is no part of what it is."""

import pytest

from align.common.errors import FingerprintError
from align.common.fingerprints import compare_encoders, compare_fingerprints, fingerprint_digest, without_name

OURS = {"encoder": "facebook/dinov2", "weights": "ab", "layer": -1}


def test_every_field_that_differs_is_named_on_either_side():
    compare_fingerprints(OURS, dict(OURS), "store")
    with pytest.raises(FingerprintError, match=r"store was made differently \(layer: -2 there, -1 asked for; pooling: 'cls' there, None"):
        compare_fingerprints(OURS, {**OURS, "layer": -2, "pooling": "cls"}, "store")


def test_a_renamed_encoder_is_the_same_one_and_other_weights_are_not():
    moved = {**OURS, "encoder": "/data/copy"}
    compare_encoders(OURS, moved, "store")
    assert fingerprint_digest(OURS) == fingerprint_digest(moved) and without_name(OURS)["weights"] == "ab"
    with pytest.raises(FingerprintError, match="encoder"):
        compare_fingerprints(OURS, moved, "store")
    with pytest.raises(FingerprintError, match="weights"):
        compare_encoders(OURS, {**moved, "weights": "cd"}, "store")
    assert fingerprint_digest(OURS) != fingerprint_digest({**OURS, "weights": "cd"})


def test_the_digest_that_names_cache_folders_stays_what_it_was():
    assert fingerprint_digest({"encoder": "x", "weights": "ab"}) == "a2f217a471f90dba"
