"""A config names the flag that is wrong, what was given and what is allowed."""

from dataclasses import dataclass

import pytest

from align.common.checks import batch_for, check, check_least, check_share
from align.common.errors import UsageError


@dataclass
class Sizes:
    batch_size: int = 4
    limit: int | None = None


def test_a_field_below_its_least_value_is_named_as_its_flag():
    check_least(Sizes(), batch_size=4, limit=1)
    with pytest.raises(UsageError, match="^--batch-size 4: must be at least 5$"):
        check_least(Sizes(), limit=1, batch_size=5)
    with pytest.raises(UsageError, match="^--limit 0: must be at least 1$"):
        check_least(Sizes(limit=0), limit=1)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_lies_between_0_and_1(share):
    check_share("max-reject-fraction", 0)
    check_share("max-reject-fraction", 1)
    with pytest.raises(UsageError, match="--max-reject-fraction .*: must lie in 0..1"):
        check_share("max-reject-fraction", share)


@pytest.mark.parametrize(
    ("rows", "whole", "quarter"),
    [(512, 512, 512), (511, 504, 120), (128, 128, 32), (60, 56, 8), (31, 24, 4), (9, 8, 2), (3, 2, 2), (1, 1, 1)],
)
def test_a_batch_that_the_data_cannot_fill_is_smaller(rows, whole, quarter):
    assert (batch_for(512, rows, steps=1), batch_for(512, rows, steps=4)) == (whole, quarter)


def test_a_rule_says_what_was_given_and_what_is_allowed():
    check(True, "a", "b")
    with pytest.raises(UsageError, match="^--steps and --epochs: give exactly one$"):
        check(False, "--steps and --epochs", "give exactly one")
