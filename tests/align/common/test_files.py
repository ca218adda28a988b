"""A file is its old content or its new one, never a part; a full disk says what is needed and free."""

import errno
import os

import pytest

from align.common.errors import DamagedError, DiskFullError, UsageError
from align.common.files import (
    arm_failpoint,
    atomic_bytes,
    atomic_json,
    atomic_path,
    disk_full_named,
    hash_bytes,
    hash_file,
    human_bytes,
    read_json,
    read_object,
    remove_temporaries,
    require_free,
)


@pytest.mark.parametrize("failpoint", ["write", "rename", "renamed"])
def test_a_kill_leaves_the_old_content_or_the_new(tmp_path, forked, failpoint):
    path = tmp_path / "file"
    atomic_bytes(path, b"old")

    def write():
        arm_failpoint(failpoint)
        atomic_bytes(path, b"new")

    assert forked(write) == -9
    assert path.read_bytes() == (b"new" if failpoint == "renamed" else b"old")
    remove_temporaries(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_the_old_content_and_names_the_space(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_bytes(path, b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match=r"disk full while writing .*file: .* free"):
        atomic_bytes(path, b"new")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_really_full_device_is_named(tmp_path):
    with pytest.raises(DiskFullError, match="1.0 KiB needed"), disk_full_named(tmp_path / "file", 1024):
        with open("/dev/full", "wb") as device:
            device.write(b"x" * 100_000)


def test_a_full_disk_is_seen_whichever_library_met_it(tmp_path):
    for error in (
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.EDQUOT, "x"),
    ):
        with pytest.raises(DiskFullError, match="disk full while writing .*file: .* free"), disk_full_named(tmp_path / "file"):
            try:
                raise error
            except type(error) as cause:
                raise RuntimeError("the writer failed") from cause
    with pytest.raises(DamagedError), disk_full_named(tmp_path / "file"):
        raise DamagedError("not a full disk")


def test_space_is_asked_for_beforehand(tmp_path):
    require_free(tmp_path, 1)
    with pytest.raises(DiskFullError, match="TiB needed"):
        require_free(tmp_path, 1 << 62)


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(PermissionError), disk_full_named(tmp_path):
        raise PermissionError("no")
    with pytest.raises(ValueError), atomic_path(tmp_path / "x") as temporary:
        temporary.write_bytes(b"half")
        raise ValueError
    assert not list(tmp_path.iterdir())


def test_json_round_trip_and_damage(tmp_path):
    path = tmp_path / "a.json"
    atomic_json(path, {"ä": [1, None]})
    assert read_json(path) == {"ä": [1, None]}
    with pytest.raises(ValueError):
        atomic_json(path, float("nan"))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DamagedError, match="not valid JSON"):
        read_json(path)


def test_hashes_agree_and_see_one_bit(tmp_path):
    data = bytes(range(256)) * 70_000  # more than one block of 16 MiB
    (tmp_path / "a").write_bytes(data)
    assert hash_file(tmp_path / "a") == hash_bytes(data) != hash_bytes(data[:-1] + b"\xfe")


def test_failpoints_are_checked():
    with pytest.raises(UsageError, match="name:n"):
        arm_failpoint("write:x")


def test_bytes_are_readable():
    assert [human_bytes(n) for n in (0, 1023, 1536, 3 << 40)] == ["0 B", "1023 B", "1.5 KiB", "3.0 TiB"]


@pytest.mark.parametrize("content", ["[" * 100_000, "{", "[]", "7", "null", '"a"', "\xff", ""])
def test_what_is_no_json_object_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DamagedError, match=r"a\.json"):
        read_object(tmp_path / "a.json")


def test_an_entry_that_a_record_lacks_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"b": 1}')
    record = read_object(tmp_path / "a.json")
    assert record["b"] == 1 and record.get("c") is None
    with pytest.raises(DamagedError, match=r"a\.json has no entry 'c'"):
        record["c"]
