"""Reading files that others name: never outside the image root, never anything but a regular file."""

import errno
import json
import os
import shutil

import pytest

from align.common.reject_codes import Reject
from align.sources.plan import Source
from align.sources.safe_files import read_below
from tests.support.captioned_pictures import all_rows, codes, readers_of, write_images

PATHS = {
    "../../etc/passwd": "unsafe_path",
    "images/../../x.png": "unsafe_path",
    "..\\x.png": "unsafe_path",
    "/etc/passwd": "unsafe_path",
    "\\\\host\\x.png": "unsafe_path",
    "file:///etc/passwd": "unsafe_path",
    "http://example.com/x.png": "unsafe_path",
    "https://example.com/x.png": "unsafe_path",
    "x\x00.png": "unsafe_path",
    "\ud800.png": "unsafe_path",
    "link-out.png": "unsafe_path",
    "folder-out/x.png": "unsafe_path",
    "link-in.png": None,
    "missing.png": "file_missing",
    "x.png/y.png": "file_missing",
    "link-dead.png": "file_missing",
    "folder": "file_kind",
    "pipe": "file_kind",
    "socket": "file_kind",
    "loop": "file_kind",
    "large.png": "file_large",
    "ROOT/x.png": None,
    "ROOT/link-in.png": None,
    "ROOT/link-out.png": "unsafe_path",
    "ROOT/../outside/x.png": "unsafe_path",
    "ROOT-other/x.png": "unsafe_path",
    "ROOT/missing.png": "file_missing",
    "n" * 300: "file_unreadable",
}


@pytest.mark.parametrize("path", PATHS)
def test_paths_reach_only_regular_files_below_the_image_root(tmp_path, path, monkeypatch):
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    root.mkdir()
    (outside / "x.png").write_bytes(b"secret")
    (root / "x.png").write_bytes(b"X")
    (root / "folder").mkdir()
    (root / "large.png").write_bytes(bytes(101))
    monkeypatch.setattr("align.sources.row.MAX_FILE_BYTES", 100)
    os.mkfifo(root / "pipe")
    os.mknod(root / "socket", 0o140600)
    for name, target in {
        "link-out.png": outside / "x.png",
        "link-in.png": "x.png",
        "link-dead.png": "gone",
        "folder-out": outside,
        "loop": "loop",
    }.items():
        (root / name).symlink_to(target)
    shutil.copytree(outside, tmp_path / "root-other")
    row = {"key": "k", "image": path.replace("ROOT", str(root)), "text": "t"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (row,) = all_rows(Source(str(tmp_path / "a.jsonl"), image_root=str(root)))
    assert codes([row]) == [PATHS[path]]
    assert row.reject is None and row.fields["text"] == "t", "a row whose image is bad still has its caption"
    if PATHS[path] is None:
        assert row.image == b"X"


def test_what_is_wrong_with_a_path_names_the_place_that_was_tried_and_the_flag(tmp_path):
    root = os.path.realpath(tmp_path)
    with pytest.raises(Reject, match=f"{root}/images/x.png': No such file"):
        read_below(root, "images/x.png", 100)
    with pytest.raises(Reject, match=f"'/etc/passwd' is outside {root}; if it is meant, give a folder above it as --image-root"):
        read_below(root, "/etc/passwd", 100)


def test_an_absolute_path_and_a_relative_one_name_the_same_image(tmp_path):
    (tmp_path / "x.png").write_bytes(b"X")
    rows = [{"image": path, "text": text} for path, text in (("x.png", "t"), (str(tmp_path / "x.png"), "u"))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.cell("text") for row in all_rows(Source(str(tmp_path / "a.jsonl")))] == [["t", "u"]]


@pytest.mark.parametrize(("number", "code"), [(errno.EACCES, "file_denied"), (errno.EPERM, "file_denied"), (errno.EIO, "file_unreadable")])
def test_a_file_that_the_system_refuses_is_rejected(tmp_path, monkeypatch, number, code):
    (tmp_path / "x.png").write_bytes(b"X")

    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(Reject) as caught:
        read_below(os.path.realpath(tmp_path), "x.png", 100)
    assert caught.value.code == code


def test_a_file_that_vanishes_after_planning_is_rejected(tmp_path):
    write_images(tmp_path)
    source = Source(str(tmp_path / "images"))
    (reader,) = readers_of(source, 100)
    (tmp_path / "images" / "00004.png").unlink()
    assert codes(reader.rows()) == [None] * 4 + ["file_missing"] + [None] * 18
