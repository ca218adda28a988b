"""Image folders: what is listed, what is passed over, and what is wrong with an entry."""

import os
from pathlib import Path

from align.sources.plan import Source, open_shard, plan
from tests.support.captioned_pictures import all_rows, codes, picture


def test_image_folder(tmp_path):
    for name in ("cat/b.png", "cat/a.v2.JPG", "dog/été/ключ 🐕.png", "top.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(1))
    (tmp_path / "cat/b.txt").write_text("a cat\n")
    (tmp_path / "top.txt").write_text("one\r\ntwo\n")
    for ignored in ("notes.md", ".hidden.png", ".cache/x.png"):
        (tmp_path / ignored).parent.mkdir(exist_ok=True)
        (tmp_path / ignored).write_bytes(b"")
    source = Source(str(tmp_path))
    assert plan(source, 2, columns=["image"]).layout == "folder"
    rows = all_rows(source, 2)
    assert [row.key for row in rows] == ["cat/a.v2", "cat/b", "dog/été/ключ 🐕", "top"]
    assert [row.fields for row in rows] == [{"label": "cat"}, {"label": "cat", "txt": "a cat\n"}, {"label": "été"}, {"txt": ["one", "two"]}]
    assert {row.image for row in rows} == {picture(1)}
    assert [row.image for row in all_rows(source, images=False)] == [None] * 4


def test_bad_entries_of_an_image_folder_are_rejected(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.png").write_bytes(b"X")
    (root / "a.jpg").write_bytes(b"X")
    os.mkfifo(root / "b.png")
    (root / "c.png").symlink_to("c.png")
    (root / "d.png").symlink_to(tmp_path / "secret.png")
    (root / "e.png").mkdir()
    (root / "f.png").write_bytes(b"X")
    (root / "f.txt").write_bytes(b"\xff")
    Path(os.fsdecode(os.fsencode(root) + b"/g\xff.png")).write_bytes(b"X")
    rows = all_rows(Source(str(root)))
    assert codes(rows) == [None, "duplicate_key", "file_kind", "file_kind", "unsafe_path", "row_utf8", "key_invalid"]


def test_links_to_folders_are_not_walked(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"X")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert [row.key for row in all_rows(Source(str(tmp_path)))] == ["a/x"]


def test_a_folder_is_listed_once_and_sorted(tmp_path):
    for number in range(300):
        (tmp_path / f"{number * 7919 % 300}.png").touch()
    source = Source(str(tmp_path))
    made = plan(source, 100)
    assert made.rows == 300 and made.listing.to_pylist() == sorted(f"{number}.png".encode() for number in range(300))
    (tmp_path / "0.png").unlink()  # a reader goes by the listing and does not walk again
    assert len(open_shard(source, made, 0)) == 100
