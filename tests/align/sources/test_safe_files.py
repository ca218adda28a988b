"""Reading files that others name: never outside the image root, never anything but a regular file."""

import errno
import json
import os

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
    (tmp_path / "a.jsonl").write_text(json.dumps({"key": "k", "image": path, "text": "t"}) + "\n")
    (row,) = all_rows(Source(str(tmp_path / "a.jsonl"), image_root=str(root)))
    assert codes([row]) == [PATHS[path]]
    assert row.reject is None and row.fields["text"] == "t", "a row whose image is bad still has its caption"
    if PATHS[path] is None:
        assert row.image == b"X"


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
