"""Webdataset tars: names from every kind of header, and hostile archives."""

import io
import os
import subprocess
import tarfile
import tracemalloc

import numpy as np
import pytest

from align.common.errors import DataError
from align.sources.plan import Source, plan
from tests.support.captioned_pictures import ROWS, add, all_rows, codes, write_tar


def test_clip_benchmark_and_img2dataset_tars(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "./folder/s0.webp", b"W")
        add(tar, "./folder/s0.cls", b"12\n")
        add(tar, "./folder/s1.jpg", b"J")
        add(tar, "./folder/s1.txt", b"a dog\na cat\n")
        add(tar, "000000002.jpg", b"J2")
        add(tar, "000000002.txt", b"two\nlines")
        add(tar, "000000002.json", b'{"caption": "c", "width": 3}')
        add(tar, "folder", kind=tarfile.DIRTYPE)
        add(tar, "._3.jpg", b"not an image")
        add(tar, "folder/._4.jpg", b"not an image")
        add(tar, "n.01.left.png", b"L")
        add(tar, "n.cls", "weiß".encode())
    rows = all_rows(Source(str(tmp_path / "*.tar")))
    assert [row.key for row in rows] == ["folder/s0", "folder/s1", "000000002", "n"]
    assert [row.fields for row in rows] == [
        {"cls": 12},
        {"txt": ["a dog", "a cat"]},
        {"txt": "two\nlines", "caption": "c", "width": 3},
        {"cls": "weiß"},
    ]
    assert [row.image for row in rows[:3]] == [b"W", b"J", b"J2"]
    assert all_rows(Source(str(tmp_path), image="01.left.png"))[3].image == b"L"


@pytest.mark.parametrize(("tar_format", "depth"), [(tarfile.PAX_FORMAT, 60), (tarfile.GNU_FORMAT, 60), (tarfile.USTAR_FORMAT, 25)])
def test_long_names_are_read_from_every_kind_of_header(tmp_path, tar_format, depth):
    name = "deep/" * depth + "key"
    with tarfile.open(tmp_path / "a.tar", "w", format=tar_format) as tar:
        add(tar, "first.jpg", b"1")
        add(tar, f"{name}.jpg", b"2")
    assert [(row.key, row.image) for row in all_rows(Source(str(tmp_path)), 1)] == [("first", b"1"), (name, b"2")]


def test_pax_sizes_and_unicode_names_are_read(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("ключ 🐕.jpg")
        info.size, info.pax_headers = 3, {"size": "3", "comment": "x"}
        tar.addfile(info, io.BytesIO(b"abc"))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    header = data.index(b"abc") - 512
    data[header + 124 : header + 136] = b"0" * 11 + b"\0"  # the plain header says 0 bytes, as for sizes it cannot hold
    data[header + 148 : header + 156] = b"%06o\0 " % (sum(data[header : header + 512]) - sum(data[header + 148 : header + 156]) + 8 * 32)
    (tmp_path / "a.tar").write_bytes(data)
    assert [(row.key, row.image) for row in all_rows(Source(str(tmp_path)))] == [("ключ 🐕", b"abc")]


def test_other_fields_of_old_tars_are_not_taken_for_a_name(tmp_path):
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[345:356] = b"14371573000"  # GNU tar keeps a time where ustar has the first part of the name
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * 32)
    (tmp_path / "a.tar").write_bytes(header + bytes(1024))
    assert [row.key for row in all_rows(Source(str(tmp_path)))] == ["a"]


def members(*entries):
    """Return the bytes of a tar; an entry is (name, data) or (name, kind, link target)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        add(tar, "first.jpg", b"1")
        for entry in entries:
            if isinstance(entry[1], str):
                add(tar, entry[0], entry[1].encode())
            else:
                add(tar, entry[0], kind=entry[1], link=entry[2])
        add(tar, "last.jpg", b"2")
    return buffer.getvalue()


BAD_MEMBERS = {
    "..": ([("../../etc/passwd.jpg", "x")], "unsafe_path"),
    ".. inside": ([("a/../../b.jpg", "x")], "unsafe_path"),
    "absolute name": ([("/etc/passwd.jpg", "x")], "unsafe_path"),
    "symbolic link": ([("b.jpg", tarfile.SYMTYPE, "/etc/passwd")], "archive_link"),
    "hard link": ([("b.jpg", tarfile.LNKTYPE, "first.jpg")], "archive_link"),
    "character device": ([("b.jpg", tarfile.CHRTYPE, "")], "archive_link"),
    "block device": ([("b.jpg", tarfile.BLKTYPE, "")], "archive_link"),
    "pipe": ([("b.jpg", tarfile.FIFOTYPE, "")], "archive_link"),
    "link for a caption": ([("b.jpg", "x"), ("b.txt", tarfile.SYMTYPE, "/etc/passwd")], "archive_link"),
    "no image": ([("b.txt", "a dog")], "image_missing"),
    "two images": ([("b.jpg", "x"), ("b.png", "x")], "image_ambiguous"),
    "bad JSON": ([("b.jpg", "x"), ("b.json", "{")], "row_syntax"),
    "NaN in JSON": ([("b.jpg", "x"), ("b.json", '{"similarity": NaN}')], None),
    "duplicate key": ([("first.jpg", "z"), ("b.jpg", "x"), ("first.jpg", "y")], "duplicate_key"),
    "long key": ([("b" * 600 + ".jpg", "x")], "key_large"),
    "name that is not UTF-8": ([("b\udcff.jpg", "x")], "key_invalid"),
}


@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_bad_archive_members_are_rejected_and_never_followed(tmp_path, case):
    entries, code = BAD_MEMBERS[case]
    (tmp_path / "a.tar").write_bytes(members(*entries))
    rows = all_rows(Source(str(tmp_path)))
    assert rows[0].image == b"1" or code == "image_ambiguous" or case == "duplicate key"
    assert codes(rows)[-2:] == [code, None] and rows[-1].image == b"2"
    assert b"root:" not in b"".join(row.image for row in rows if isinstance(row.image, bytes))


def test_caption_file_in_an_archive_must_be_utf8(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a.jpg", b"1")
        add(tar, "a.txt", b"\xff\xfe")
        add(tar, "b.jpg", b"2")
        add(tar, "b.txt", b"\xef\xbb\xbfa dog")
    rows = all_rows(Source(str(tmp_path)))
    assert codes(rows) == ["row_utf8", None] and rows[1].fields == {"txt": "a dog"}


@pytest.mark.parametrize("step", [1, 2, 100])
def test_archive_cut_anywhere_keeps_the_rows_before(tmp_path, step):
    write_tar(tmp_path)
    whole = (tmp_path / "a.tar").read_bytes()
    intact = all_rows(Source(str(tmp_path)), step)
    assert codes(intact) == [None] * ROWS
    for size in (0, 300, 512, 600, 1024, 5000, 5120, 5121, 6144, 20_000, 23 * 2048, 23 * 2048 + 100, len(whole) // 2 + 7):
        (tmp_path / "a.tar").write_bytes(whole[:size])
        rows = all_rows(Source(str(tmp_path)), step)
        *before, last = rows
        assert last.reject is not None and last.reject.code == "archive_truncated", size
        assert [(row.key, row.image, row.fields) for row in before] == [(row.key, row.image, row.fields) for row in intact[: len(before)]]
        assert len(before) >= size // 2048 - 1


def test_damaged_header_ends_the_archive_with_one_reject(tmp_path):
    write_tar(tmp_path)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[5 * 2048 + 3] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    (tmp_path / "b.tar").write_bytes(members())
    rows = all_rows(Source(str(tmp_path)))
    # a damaged header does not say whether the sample before it was complete
    assert codes(rows) == [None] * 4 + ["archive_truncated"] + [None] * 2


def test_members_of_giant_size_are_not_read(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("b.jpg")
    for info.size in (8 << 40, 1 << 80):  # announced, but not there
        path.write_bytes(members()[:1024] + info.tobuf(tarfile.GNU_FORMAT) + bytes(5000))
        assert codes(all_rows(Source(str(tmp_path), group="none"))) == [None, "archive_truncated"]
    info.size = 300 << 20
    with open(path, "wb") as file:  # the bytes are there, as a hole in the file
        file.write(members()[:1024] + info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(file.tell() + info.size)
        file.seek(0, os.SEEK_END)
        file.write(members())
    tracemalloc.start()
    rows = all_rows(Source(str(path), group="none"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert codes(rows) == [None, "file_large", "duplicate_key", None] and peak < 20 << 20


def test_extension_headers_of_giant_size_are_not_read(tmp_path):
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 2 << 20
        (tmp_path / "a.tar").write_bytes(members()[:1024] + info.tobuf(tarfile.GNU_FORMAT) + bytes(3 << 20))
        assert codes(all_rows(Source(str(tmp_path)))) == ["archive_truncated"]


def test_arbitrary_bytes_as_an_archive_give_rows_or_one_reject(tmp_path):
    whole = members(("b.jpg", "x"), ("b.json", "{}"), ("c" * 200 + ".jpg", "x"))
    draw = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        for position in draw.integers(0, len(data), 3):
            data[position] = draw.integers(256)
        (tmp_path / "a.tar").write_bytes(data[: draw.integers(1, len(data))])
        for row in all_rows(Source(str(tmp_path))):
            assert row.key


def pack(folder, *names, data=b"x", name="a.tar"):
    with tarfile.open(folder / name, "w") as tar:
        for member in names:
            add(tar, member, data)
    return Source(str(folder / "*.tar"), group="none")  # the images have the same bytes


@pytest.mark.parametrize("count", [3, 150])
@pytest.mark.parametrize("suffixes", [("jpg", "txt"), ("txt", "jpg"), ("input.png", "cls")])
def test_members_that_are_not_neighbors_are_told_with_the_line_that_sorts_them(tmp_path, count, suffixes):
    source = pack(tmp_path, *[f"k-{number:03d}.{suffix}" for suffix in suffixes for number in range(count)], data=b"7")
    with pytest.raises(DataError) as refused:
        plan(source, 10, ["txt"])
    said = f"the members of {count} samples are not neighbors, for example k-000.{suffixes[0]} at place 1 and k-000.{suffixes[1]} at place"
    assert said in str(refused.value)
    subprocess.run(str(refused.value).partition("with GNU tar): ")[2], shell=True, check=True)
    rows = all_rows(Source(str(tmp_path / "a-sorted.tar"), group="none"))
    assert codes(rows) == [None] * count and all(row.image == b"7" and list(row.fields.values()) in ([7], ["7"]) for row in rows)


def test_a_few_scattered_members_are_told_too_and_doubled_samples_are_not_mistaken_for_them(tmp_path):
    names = [f"{number}.{suffix}" for number in range(20) for suffix in ("jpg", "json")]
    with pytest.raises(DataError, match="the members of 1 samples are not neighbors, for example 3.jpg at place 4 and 3.txt at place 21"):
        plan(pack(tmp_path, *names, "3.txt", data=b"{}"), 10)
    assert codes(all_rows(pack(tmp_path, *names, "3.jpg", "4.cls", "4.jpg", "x.txt", data=b"{}"))) == [
        *[None] * 20, *["duplicate_key"] * 2, "image_missing",
    ]  # fmt: skip


def test_samples_in_two_folders_or_in_two_tars_are_told_apart_from_equal_keys(tmp_path):
    for first in (1, 60):  # the folder of the captions begins within the rows that decide on columns, or after them
        names = [f"{folder}/{number}.{suffix}" for folder, suffix in (("im", "jpg"), ("cap", "txt")) for number in range(2 * first)]
        with pytest.raises(DataError, match="lie in different folders, for example im/0.jpg and cap/0.txt"):
            plan(pack(tmp_path, *names), 10, ["txt"])
    pack(tmp_path, *[f"{number}.jpg" for number in range(3)])
    with pytest.raises(DataError, match=r"3 samples lie in two files, for example '0': jpg in .*a.tar; txt in .*b.tar"):
        plan(pack(tmp_path, *[f"{number}.txt" for number in range(3)], name="b.tar"), 10)


def test_texts_are_columns_by_their_suffix_and_images_may_have_compound_ones(tmp_path):
    source = pack(tmp_path, "0.input.jpg", "0.outputs.txt", "0.caption", "1.input.jpg", "1.outputs.txt", "1.caption", data=b"a dog")
    rows = all_rows(source)
    assert codes(rows) == [None, None] and [row.image for row in rows] == [b"a dog"] * 2
    assert rows[0].fields == {"outputs.txt": "a dog", "caption": "a dog"}
    with pytest.raises(DataError, match=r"no column 'txt'; it has 'image', 'outputs.txt'.*\.input\.jpg \(2\), \.outputs\.txt \(2\)"):
        plan(source, 10, ["txt"])
    assert codes(all_rows(pack(tmp_path, "0.a.jpg", "0.b.jpg"))) == ["image_ambiguous"]
    assert all_rows(pack(tmp_path, "0.seg.png", "0.jpg"))[0].image == b"x"


def test_dots_in_names_are_told_with_the_line_that_takes_them_out(tmp_path):
    with pytest.raises(DataError) as refused:
        plan(pack(tmp_path, *[f"img_v1.{number:02d}.{suffix}" for number in range(20) for suffix in ("jpg", "txt")]), 10, ["txt"])
    assert "no column 'txt'" in str(refused.value) and ".00.jpg (1), .00.txt (1)" in str(refused.value) and len(str(refused.value)) < 1500
    (tmp_path / "files").mkdir()
    for name in ("img_v1.00.jpg", "img_v1.2.00.txt", "a.jpg"):
        (tmp_path / "files" / name).touch()
    subprocess.run(["bash", "-c", str(refused.value).partition("after: ")[2]], cwd=tmp_path / "files", check=True)
    assert sorted(os.listdir(tmp_path / "files")) == ["a.jpg", "img_v1_00.jpg", "img_v1_2_00.txt"]
    with pytest.raises(DataError, match="Texts are members that end in .txt, .text, .caption, .captions, or names in a .json"):
        plan(pack(tmp_path, "0.jpg", "0.json", data=b'{"a": 1}'), 10, ["txt"])
