"""A folder is its old content or its new one, and every changed byte of a committed one is seen."""

import pytest

from align.common.errors import DamagedError
from align.common.files import arm_failpoint, load_hashed, save_hashed
from align.common.folders import (
    COMMIT,
    check_folder,
    commit_folder,
    damage,
    folder_digest,
    read_sealed,
    replaced_folder,
    write_sealed,
)


def write(folder, text):
    with replaced_folder(folder, "test") as place:
        (place / "inner").mkdir()
        (place / "inner" / "a").write_text(text)
        (place / "inner" / "a").chmod(0o600)


def contents(folder):
    return {path.name: (path / "inner" / "a").read_text() for path in folder.iterdir()}


def test_a_folder_is_replaced_whole_and_can_be_read_by_others(tmp_path):
    write(tmp_path / "x", "old")
    write(tmp_path / "x", "new")
    assert contents(tmp_path) == {"x": "new"} and (tmp_path / "x/inner/a").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(("failpoint", "left"), [("test-saved", {"x": "old", "x.partial": "new"}),
                                                 ("test-retired", {"x.retired": "old", "x.partial": "new"})])  # fmt: skip
def test_a_kill_leaves_the_old_folder_and_the_next_run_cleans_up(tmp_path, forked, failpoint, left):
    write(tmp_path / "x", "old")

    def killed():
        arm_failpoint(failpoint)
        write(tmp_path / "x", "new")

    assert forked(killed) == -9
    assert contents(tmp_path) == left
    write(tmp_path / "x", "newer")
    assert contents(tmp_path) == {"x": "newer"}


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path):
    write(tmp_path / "x", "old")
    with pytest.raises(ValueError), replaced_folder(tmp_path / "x", "test") as place:
        (place / "half").write_text("")
        raise ValueError
    assert contents(tmp_path) == {"x": "old"}


def test_a_committed_folder_names_what_is_missing_cut_or_changed(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"12345")
    commit_folder(tmp_path, {"made": "here"})
    check_folder(tmp_path, True, "run again")
    (tmp_path / "b").write_bytes(b"12346")
    check_folder(tmp_path, False, "run again")
    with pytest.raises(DamagedError, match="b does not have the content that was committed; run again"):
        check_folder(tmp_path, True, "run again")
    (tmp_path / "a").write_bytes(b"1234")
    with pytest.raises(DamagedError, match="a has 4 bytes, 5 were committed"):
        check_folder(tmp_path, False, "run again")
    (tmp_path / "a").unlink()
    assert damage(tmp_path / "a") == f"{tmp_path / 'a'} is missing" and damage(tmp_path / COMMIT) is None


def test_a_hashed_cache_gives_back_what_was_written_or_nothing(tmp_path):
    stem = tmp_path / "deep" / "000003"
    assert load_hashed(stem, ".bin") is None
    save_hashed(stem, ".bin", b"first")
    save_hashed(stem, ".bin", b"second")
    save_hashed(tmp_path / "deep" / "0000031", ".bin", b"another")
    assert load_hashed(stem, ".bin") == b"second" and len(list(stem.parent.glob("000003-*"))) == 1
    place = next(stem.parent.glob("000003-*"))
    place.write_bytes(b"secont")
    assert load_hashed(stem, ".bin") is None
    save_hashed(stem, ".bin", b"second")
    assert load_hashed(stem, ".bin") == b"second"


def test_a_flipped_bit_anywhere_in_a_sealed_file_is_seen(tmp_path):
    path = tmp_path / "sealed.json"
    write_sealed(path, {"content": "0" * 32, "rows": 3, "files": {"a": "1"}})
    good = path.read_bytes()
    for bit in range(8 * (len(good) - 1)):  # all but the closing line end
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with pytest.raises(DamagedError):
            read_sealed(path)
    path.write_bytes(good)
    assert read_sealed(path) == {"content": "0" * 32, "rows": 3, "files": {"a": "1"}}
    path.write_text('{"content": "0"}')
    assert read_sealed(path) == {"content": "0"}, "older versions had no seals"


def test_the_digest_of_a_model_does_not_depend_on_when_it_was_made(tmp_path):
    for name, when in (("a", "1"), ("b", "2"), ("c", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(when)
        (tmp_path / name / "model").write_text("c" if name == "c" else "same")
        commit_folder(tmp_path / name, {})
    first, second, other = (folder_digest(tmp_path / name) for name in "abc")
    assert first == second != other
