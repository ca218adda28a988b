"""The registry of reject codes: no code without its use and its test, and rejects that survive the way between processes."""

import pickle
import re
from pathlib import Path

import pytest

from align.common.errors import DataError
from align.common.reject_codes import CONVERSATION_CODES, FEATURE_CODES, MAX_DETAIL, REJECT_CODES, SAMPLE_CODES, Reject, RejectedRow

ROOT = Path(__file__).resolve().parents[3]


def text_of(*folders):
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*.py") if path.name not in ("reject_codes.py", Path(__file__).name)
    ]
    return "".join(path.read_text() for path in files)


def test_every_code_is_used_in_the_code_and_tested():
    """A code in the table that nobody raises, or that no test asks for, is a promise without proof."""
    library = text_of("align/sources", "align/features", "mllm/conversations")
    tests = text_of("tests/align/sources", "tests/align/features", "tests/mllm/conversations")
    assert [code for code in REJECT_CODES if f'"{code}"' not in library] == []
    assert [code for code in REJECT_CODES if f'"{code}' not in tests] == []


def test_no_code_is_raised_that_is_not_in_the_registry():
    raised = re.findall(r'Reject\(\s*"([a-z0-9_]+)"', text_of("align", "mllm", "eval"))
    assert len(raised) > 50 and set(raised) <= set(REJECT_CODES)
    with pytest.raises(AssertionError):
        Reject("missing_key")


def test_a_code_stands_in_one_table_only():
    assert len(REJECT_CODES) == len(SAMPLE_CODES) + len(FEATURE_CODES) + len(CONVERSATION_CODES)


def test_a_reject_says_its_code_and_ends_a_command_like_bad_data():
    assert str(Reject("image_empty")) == f"image_empty: {REJECT_CODES['image_empty']}"
    found = pickle.loads(pickle.dumps(Reject("too_long", "70 tokens")))  # from a worker process
    assert (str(found), found.code, found.detail) == ("too_long: 70 tokens", "too_long", "70 tokens")
    assert isinstance(found, DataError) and found.exit_code == 3


def test_the_record_of_a_reject_keeps_a_bounded_detail():
    row = RejectedRow.of(Reject("row_syntax", "x" * 10_000), 3, "key", "row")
    assert (row.row, row.key, row.column, row.code) == (3, "key", "row", "row_syntax") and len(row.detail) == MAX_DETAIL
