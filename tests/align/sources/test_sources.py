"""Sources: layouts agree, plans are pure functions of the files, random access equals a full read, and bad rows have codes."""

import csv
import errno
import io
import json
import os
import pickle
import tarfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from align.common.errors import DamagedError, DataError, UsageError
from align.common.reject_codes import Reject
from align.sources import row as units
from align.sources import tables as tabular
from align.sources.gate import Limits, gate_image
from align.sources.plan import Plan, Source, open_unit, plan
from align.sources.row import read_below


def picture(number):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 7 % 256, number * 31 % 256, 99)).save(buffer, "PNG")
    return buffer.getvalue()


ROWS = 23
KEYS = [f"{number:05d}" for number in range(ROWS)]
CAPTIONS = [f'a "quoted" picture, number {number}\nof many 🐕' for number in range(ROWS)]


def add(tar, name, data=b"", kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    tar.addfile(info, io.BytesIO(data))


def write_images(folder):
    (folder / "images").mkdir(parents=True)
    for number, key in enumerate(KEYS):
        (folder / "images" / f"{key}.png").write_bytes(picture(number))


def write_tar(folder, tar_format=tarfile.PAX_FORMAT):
    with tarfile.open(folder / "a.tar", "w", format=tar_format) as tar:
        for number, key in enumerate(KEYS):
            add(tar, f"{key}.png", picture(number))
            add(tar, f"{key}.json", json.dumps({"text": CAPTIONS[number]}).encode())


def write_parquet(folder, image):
    cells = {
        "bytes": [picture(number) for number in range(ROWS)],
        "struct": [{"bytes": picture(number), "path": None} for number in range(ROWS)],
        "path": [f"images/{key}.png" for key in KEYS],
        "struct of path": [{"bytes": None, "path": f"images/{key}.png"} for key in KEYS],
    }[image]
    pq.write_table(pa.table({"key": KEYS, "image": cells, "text": CAPTIONS}), folder / "a.parquet", row_group_size=5)


def write_jsonl(folder, mark=b"", end="\n", last="\n"):
    lines = [json.dumps({"key": key, "image": f"images/{key}.png", "text": text}) for key, text in zip(KEYS, CAPTIONS, strict=True)]
    (folder / "a.jsonl").write_bytes(mark + (end.join(lines) + last).encode())


def write_csv(folder, name="a.csv", mark=b"", end="\r\n"):
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t" if name.endswith("tsv") else ",", lineterminator=end)
    writer.writerows([("key", "image", "text"), *((key, f"images/{key}.png", text) for key, text in zip(KEYS, CAPTIONS, strict=True))])
    (folder / name).write_bytes(mark + buffer.getvalue().encode())


LAYOUTS = {
    "pax tar": ("webdataset", write_tar),
    "GNU tar": ("webdataset", lambda folder: write_tar(folder, tarfile.GNU_FORMAT)),
    "ustar": ("webdataset", lambda folder: write_tar(folder, tarfile.USTAR_FORMAT)),
    "parquet, bytes": ("parquet", lambda folder: write_parquet(folder, "bytes")),
    "parquet, struct": ("parquet", lambda folder: write_parquet(folder, "struct")),
    "parquet, path": ("parquet", lambda folder: write_parquet(folder, "path")),
    "parquet, struct of path": ("parquet", lambda folder: write_parquet(folder, "struct of path")),
    "JSONL": ("jsonl", write_jsonl),
    "JSONL, BOM, CRLF, no last newline": ("jsonl", lambda folder: write_jsonl(folder, b"\xef\xbb\xbf", "\r\n", "")),
    "CSV, CRLF": ("csv", write_csv),
    "CSV, BOM, LF": ("csv", lambda folder: write_csv(folder, mark=b"\xef\xbb\xbf", end="\n")),
    "TSV": ("csv", lambda folder: write_csv(folder, "a.tsv")),
}


def units_of(source, rows_per_shard=10):
    made = plan(source, rows_per_shard)
    return [open_unit(source, made, shard) for shard in range(made.shards.num_rows)]


def all_rows(source, rows_per_shard=10, images=True):
    return [row for unit in units_of(source, rows_per_shard) for row in unit.rows(images=images)]


def codes(rows):
    """Return what is wrong with each row or its image, None where nothing is."""
    problems = [row.reject or row.image for row in rows]
    return [problem.code if isinstance(problem, Reject) else None for problem in problems]


@pytest.mark.parametrize("case", LAYOUTS)
def test_every_layout_gives_the_same_rows_in_order(tmp_path, case):
    layout, write = LAYOUTS[case]
    write_images(tmp_path)
    write(tmp_path)
    source = Source(str(tmp_path))
    made = plan(source, 10, columns=["image", "text"])
    assert made.layout == layout and made.rows == ROWS and made.shards.num_rows == 3
    rows = all_rows(source)
    assert [row.index for row in rows] == [*range(10), *range(10), *range(3)]
    assert [row.key for row in rows] == KEYS
    assert [row.fields["text"] for row in rows] == CAPTIONS
    assert [row.image for row in rows] == [picture(number) for number in range(ROWS)]
    assert gate_image(rows[3].image, Limits()).getpixel((0, 0)) == (21, 93, 99)


@pytest.mark.parametrize("case", LAYOUTS)
def test_random_access_equals_a_full_read(tmp_path, case):
    write_images(tmp_path)
    LAYOUTS[case][1](tmp_path)
    for unit in units_of(Source(str(tmp_path)), 7):
        full = list(unit.rows())
        moved = pickle.loads(pickle.dumps(unit))
        for start in range(len(unit)):
            for stop in (start, start + 1, start + 3, None):
                assert list(moved.rows(start, stop)) == full[start:stop]
        without = list(moved.rows(images=False))
        assert [row.image for row in without] == [None] * len(full)
        assert [(row.key, row.fields) for row in without] == [(row.key, row.fields) for row in full]


@pytest.mark.parametrize("case", LAYOUTS)
def test_shard_size_does_not_change_the_rows(tmp_path, case):
    write_images(tmp_path)
    LAYOUTS[case][1](tmp_path)
    source = Source(str(tmp_path))
    read = [[(row.key, row.image) for row in all_rows(source, step)] for step in (1, 2, ROWS, 1000)]
    assert len(read[0]) == ROWS and all(rows == read[0] for rows in read)


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


def test_plan_is_a_pure_function_of_the_files(tmp_path):
    for place in ("here", "there"):
        write_images(tmp_path / place)
        write_jsonl(tmp_path / place)
    first, again, moved = (plan(Source(str(tmp_path / place)), 10) for place in ("here", "here", "there"))
    assert first.shards == again.shards and first.digest == again.digest == moved.digest
    os.utime(tmp_path / "there" / "a.jsonl", (1, 1))
    assert plan(Source(str(tmp_path / "there")), 10).digest == first.digest
    assert plan(Source(str(tmp_path / "there")), 11).digest != first.digest
    assert plan(Source(str(tmp_path / "there"), key="text"), 10).digest != first.digest
    with open(tmp_path / "there" / "a.jsonl", "a") as file:
        file.write('{"key": "more"}\n')
    assert plan(Source(str(tmp_path / "there")), 10).digest != first.digest
    folder = plan(Source(str(tmp_path / "here" / "images"), "folder"), 10)
    assert plan(Source(str(tmp_path / "there" / "images"), "folder"), 10).digest == folder.digest
    (tmp_path / "there" / "images" / "00003.png").rename(tmp_path / "there" / "images" / "0003.png")
    assert plan(Source(str(tmp_path / "there" / "images"), "folder"), 10).digest != folder.digest


@pytest.mark.parametrize("layout", ["jsonl", "folder"])
def test_saved_plan_loads_and_travels_to_workers(tmp_path, layout):
    write_images(tmp_path / "data")
    write_jsonl(tmp_path / "data")
    source = Source(str(tmp_path / "data"), layout)
    made = plan(source, 10)
    made.save(tmp_path)
    for loaded in (Plan.load(tmp_path), pickle.loads(pickle.dumps(Plan.load(tmp_path))), pickle.loads(pickle.dumps(made))):
        assert (loaded.layout, loaded.digest, loaded.shards, loaded.rows) == (layout, made.digest, made.shards, ROWS)
        assert list(open_unit(source, loaded, 2).rows()) == list(open_unit(source, made, 2).rows())
    assert not list(tmp_path.glob("*.partial"))
    (tmp_path / "plan.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(DamagedError, match="plan"):
        Plan.load(tmp_path)


def test_rows_of_a_shard_never_span_two_files(tmp_path):
    for name in "ba":
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"key": "{name}{number}"}}\n' for number in range(5)))
    (tmp_path / "empty.jsonl").write_text("")
    source = Source(str(tmp_path))
    shards = plan(source, 3).shards.to_pylist()
    assert [(Path(s["file"]).name, s["start"], s["stop"]) for s in shards] == [
        ("a.jsonl", 0, 3),
        ("a.jsonl", 3, 5),
        ("b.jsonl", 0, 3),
        ("b.jsonl", 3, 5),
    ]
    assert [s["shard"] for s in shards] == [0, 1, 2, 3]
    assert [row.key for row in all_rows(source, 3, images=False)] == [f"{name}{number}" for name in "ab" for number in range(5)]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_without_a_key_column_the_key_is_file_and_row_number(tmp_path, suffix):
    path = tmp_path / f"part-1.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"text": ["x"] * 5}), path)
    else:
        path.write_text("text\n" + "x\n" * 5 if suffix == "csv" else '{"text": "x"}\n' * 5)
    rows = all_rows(Source(str(path)), 2, images=False)
    assert [row.key for row in rows] == [f"part-1-{number:09d}" for number in range(5)]
    assert codes(rows) == [None] * 5


def test_whole_number_keys_and_named_columns(tmp_path):
    pq.write_table(pa.table({"id": [7, 8], "photo": [b"a", b"b"], "n": [1, 2]}), tmp_path / "a.parquet")
    rows = all_rows(Source(str(tmp_path), image="photo", key="id"))
    assert [(row.key, row.image, row.fields) for row in rows] == [("7", b"a", {"id": 7, "n": 1}), ("8", b"b", {"id": 8, "n": 2})]


# ---- choosing the layout


def test_img2dataset_metadata_beside_tars_is_not_a_second_layout(tmp_path):
    write_tar(tmp_path)
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "a.parquet")
    (tmp_path / "a_stats.json").write_text("{}")
    assert plan(Source(str(tmp_path)), 10).layout == "webdataset"
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"2 \.parquet, 1 \.tar"):
        plan(Source(str(tmp_path)), 10)


@pytest.mark.parametrize(
    ("name", "content", "layout", "message"),
    [
        ("a.dat", b"x", "auto", r"1 \.dat.*Known: \.tar"),
        ("a.tar.gz", b"\x1f\x8b\x08\x00", "webdataset", "gunzip"),
        ("a.tar", b"\x1f\x8b\x08\x00", "auto", "gunzip"),
        ("a.jsonl", b"BZh9", "auto", "bunzip2"),
        ("a.jsonl", b"\xff\xfea\x00", "auto", "iconv"),
        ("a.jsonl", b"[\n1,\n2]\n", "auto", "none of its first rows is a JSON object"),
        ("a.jsonl", b"", "auto", "no samples"),
        ("a.csv", b"key,text,key\n1,2,3\n", "auto", "twice"),
        ("a.csv", b'"key\n', "auto", "not a header"),
        ("a.csv", b"\xff\xfa,b\n1,2\n", "auto", "not UTF-8"),
        ("a.parquet", b"PAR1 nothing", "auto", "cannot be read as parquet"),
        ("a.png", b"", "folder", "not a folder"),
    ],
)
def test_unusable_data_is_refused_at_the_door(tmp_path, name, content, layout, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        plan(Source(str(tmp_path / name), layout), 10, columns=["image"])


def test_missing_data_and_wrong_numbers_are_refused(tmp_path):
    with pytest.raises(DataError, match="matches no file"):
        plan(Source(str(tmp_path / "no" / "*.tar")), 10)
    with pytest.raises(DataError, match="matches no file"):
        plan(Source(str(tmp_path), "jsonl"), 10)
    with pytest.raises(DataError, match="no samples"):
        plan(Source(str(tmp_path)), 10)
    with pytest.raises(UsageError, match="at least 1"):
        plan(Source(str(tmp_path)), 0)


def test_large_parquet_row_group_is_refused(tmp_path, monkeypatch):
    write_parquet(tmp_path, "bytes")
    monkeypatch.setattr("align.sources.plan.MAX_GROUP_BYTES", 100)
    with pytest.raises(DataError, match="row_group_size"):
        plan(Source(str(tmp_path)), 10)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_column_missing_everywhere_is_an_error_that_names_the_others(tmp_path, name):
    if name == "a.parquet":
        pq.write_table(pa.table({"url": ["x"], "text": ["y"]}), tmp_path / name)
    else:
        (tmp_path / name).write_text("url,text\nx,y\n" if name == "a.csv" else '{"url": "x", "text": "y"}\n')
    source = Source(str(tmp_path))
    message = "no column 'image'; it has 'url', 'text'"
    with pytest.raises(DataError, match=message):
        plan(source, 10, columns=["image"])
    (unit,) = units_of(source)
    with pytest.raises(DataError, match=message):
        list(unit.rows())
    assert [row.fields["text"] for row in unit.rows(images=False)] == ["y"]


@pytest.mark.parametrize("case", ["pax tar", "parquet, bytes", "JSONL", "TSV"])
def test_a_file_that_shrank_or_went_after_planning_is_an_error(tmp_path, case):
    write_images(tmp_path)
    LAYOUTS[case][1](tmp_path)
    source = Source(str(tmp_path))
    made = plan(source, 10)
    path = Path(made.shards["file"][2].as_py())
    if case == "parquet, bytes":
        pq.write_table(pq.read_table(path).slice(0, 15), path)
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="changed since it was planned"):
        [open_unit(source, made, shard) for shard in range(3)]
    path.unlink()
    with pytest.raises(DataError, match="cannot be read any more"):
        open_unit(source, made, 0)


# ---- bad rows of manifests

BAD_JSON = {
    "not JSON": (b"{'key': 1}", "row_syntax"),
    "cut": (b'{"key": "b", "text": "x', "row_syntax"),
    "control character": (b'{"key": "b", "text": "x\x00"}', "row_syntax"),
    "NaN literal": (b'{"key": "b", "text": NaN}', "row_nonfinite"),
    "Infinity literal": (b'{"key": "b", "text": -Infinity}', "row_nonfinite"),
    "duplicate names": (b'{"key": "b", "text": "x", "text": "y"}', "row_duplicate_name"),
    "duplicate names inside": (b'{"key": "b", "meta": {"a": 1, "a": 2}}', "row_duplicate_name"),
    "list": (b'["b", "x.png", "text"]', "row_type"),
    "null row": (b"null", "row_type"),
    "number": (b"3", "row_type"),
    "invalid UTF-8": (b'{"key": "b", "text": "\xff\xfe"}', "row_utf8"),
    "blank": (b"", "row_blank"),
    "nested too deep": (b'{"key": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "row_syntax"),
    "giant number": (b'{"key": ' + b"9" * 10_000 + b"}", "row_syntax"),
    "no key": (b'{"image": "x.png", "text": "t"}', "missing_column"),
    "null key": (b'{"key": null, "image": "x.png"}', "key_missing"),
    "empty key": (b'{"key": "", "image": "x.png"}', "key_missing"),
    "float key": (b'{"key": 1.5, "image": "x.png"}', "key_invalid"),
    "NUL in key": (b'{"key": "a\\u0000", "image": "x.png"}', "key_invalid"),
    "surrogate in key": (b'{"key": "\\ud800", "image": "x.png"}', "key_invalid"),
    "long key": (b'{"key": "' + b"k" * 513 + b'", "image": "x.png"}', "key_large"),
    "duplicate key": (b'{"key": "a", "image": "x.png"}', "duplicate_key"),
    "no image": (b'{"key": "b", "text": "t"}', "missing_column"),
    "null image": (b'{"key": "b", "image": null}', "image_missing"),
    "empty path": (b'{"key": "b", "image": ""}', "image_missing"),
    "number for a path": (b'{"key": "b", "image": 3}', "image_type"),
    "list for a path": (b'{"key": "b", "image": ["x.png"]}', "image_type"),
}
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


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_row_is_rejected_and_its_neighbors_survive(tmp_path, case):
    line, code = BAD_JSON[case]
    (tmp_path / "x.png").write_bytes(b"X")
    good = [b'{"key": "a", "image": "x.png"}', b'{"key": "z", "image": "x.png"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good[0], line, good[1], b""]))
    rows = all_rows(Source(str(tmp_path)))
    assert codes(rows) == [None, code, None]
    assert [rows[0].image, rows[2].image] == [b"X", b"X"] and rows[1].key != "" and rows[1].key.isprintable()


@pytest.mark.parametrize("path", PATHS)
def test_paths_reach_only_regular_files_below_the_image_root(tmp_path, path, monkeypatch):
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    root.mkdir()
    (outside / "x.png").write_bytes(b"secret")
    (root / "x.png").write_bytes(b"X")
    (root / "folder").mkdir()
    (root / "large.png").write_bytes(bytes(101))
    monkeypatch.setattr(units, "MAX_FILE_BYTES", 100)
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
    (unit,) = units_of(source, 100)
    (tmp_path / "images" / "00004.png").unlink()
    assert codes(unit.rows()) == [None] * 4 + ["file_missing"] + [None] * 18


BAD_CSV = {
    "open quote": ('b,"x.png,t', "row_syntax"),
    "text after a quoted cell": ('b,"x.png"s,t', "row_syntax"),
    "huge field": ("b,x.png," + "t" * 200_000, "row_syntax"),
    "too many cells": ("b,x.png,t,u", "row_syntax"),
    "blank": ("", "row_blank"),
    "too few cells": ("b", "missing_column"),
    "empty key": (",x.png,t", "key_missing"),
    "duplicate key": ("a,x.png,t", "duplicate_key"),
    "invalid UTF-8": ("b,x.png,\udcff", "row_utf8"),
    "unsafe path": ("b,../x.png,t", "unsafe_path"),
    "no image": ("b,,t", "image_missing"),
}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("case", BAD_CSV)
def test_bad_csv_row_is_rejected_and_its_neighbors_survive(tmp_path, case, end):
    line, code = BAD_CSV[case]
    (tmp_path / "x.png").write_bytes(b"X")
    text = end.join(["key,image,text", 'a,x.png,"one\ntwo"', line, 'z,x.png,"quo""ted"', ""])
    (tmp_path / "a.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    for step in (1, 2, 10):
        rows = all_rows(Source(str(tmp_path)), step)
        assert codes(rows) == [None, None if step == 1 and code == "duplicate_key" else code, None]
        assert [row.fields["text"] for row in (rows[0], rows[2])] == ["one\ntwo", 'quo"ted']


def test_an_open_quote_in_the_last_row_costs_one_row(tmp_path):
    (tmp_path / "a.csv").write_text('key,text\na,t\nb,"t\nc,t\nd,t')
    assert codes(all_rows(Source(str(tmp_path)), images=False)) == [None, "row_syntax", None, None]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_line_beyond_the_limit_is_not_read(tmp_path, monkeypatch, name):
    for module in (units, tabular):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 50)
    rows = (
        ['{"key": "a"}', '{"key": "b", "text": "' + "t" * 200 + '"}', '{"key": "c"}'] if name == "a.jsonl" else ["key", "a", "b" * 200, "c"]
    )
    (tmp_path / name).write_text("\n".join(rows) + "\n")
    found = all_rows(Source(str(tmp_path)), images=False)
    assert codes(found) == [None, "row_large" if name == "a.jsonl" else "row_syntax", None]
    assert [found[0].key, found[2].key] == ["a", "c"]


def test_bad_parquet_cells_are_rejected(tmp_path):
    text = pa.Array.from_buffers(pa.string(), 4, pa.binary() and pa.array([b"t", b"\xff", b"t", b"t"], pa.binary()).buffers())
    table = pa.table({"key": ["a", "b", None, "a"], "image": [b"x", b"x", b"x", b"x"], "text": text})
    pq.write_table(table, tmp_path / "a.parquet")
    assert codes(all_rows(Source(str(tmp_path)))) == [None, "row_utf8", "key_missing", "duplicate_key"]
    pq.write_table(pa.table({"image": [b"x", None, b""]}), tmp_path / "a.parquet")
    assert codes(all_rows(Source(str(tmp_path)))) == [None, "image_missing", None]  # no bytes at all is for the gate


def test_a_damaged_parquet_row_group_costs_its_rows(tmp_path):
    write_parquet(tmp_path, "bytes")
    path = tmp_path / "a.parquet"
    chunk = pq.read_metadata(path).row_group(1).column(1)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset : chunk.data_page_offset + 20] = b"\xff" * 20
    path.write_bytes(data)
    assert codes(all_rows(Source(str(tmp_path)))) == [None] * 5 + ["row_unreadable"] * 5 + [None] * 13
    assert codes(all_rows(Source(str(tmp_path)), images=False)) == [None] * ROWS, "without images their column is not read"


def test_a_parquet_unit_travels_without_the_rows_it_has_read(tmp_path):
    pq.write_table(pa.table({"image": [os.urandom(100_000)]}), tmp_path / "a.parquet")
    (unit,) = units_of(Source(str(tmp_path)))
    assert len(next(unit.rows()).image) == 100_000
    assert len(pickle.dumps(unit)) < 10_000


def test_large_cells_are_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "MAX_FILE_BYTES", 10)
    pq.write_table(pa.table({"image": [b"x" * 10, b"x" * 11]}), tmp_path / "a.parquet")
    assert codes(all_rows(Source(str(tmp_path)))) == [None, "file_large"]


# ---- hostile archives


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
    "NaN in JSON": ([("b.jpg", "x"), ("b.json", '{"similarity": NaN}')], "row_nonfinite"),
    "duplicate key": ([("first.jpg", "x"), ("b.jpg", "x"), ("first.jpg", "x")], "duplicate_key"),
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
        assert codes(all_rows(Source(str(tmp_path)))) == [None, "archive_truncated"]
    info.size = 300 << 20
    with open(path, "wb") as file:  # the bytes are there, as a hole in the file
        file.write(members()[:1024] + info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(file.tell() + info.size)
        file.seek(0, os.SEEK_END)
        file.write(members())
    tracemalloc.start()
    rows = all_rows(Source(str(path)))
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


# ---- folders


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


# ---- size


def test_a_million_rows_are_planned_in_little_memory(tmp_path):
    block = b"".join(b'{"key": "%07d", "image": "images/%07d.jpg", "text": "a dog on the grass"}\n' % (n, n) for n in range(10_000))
    with open(tmp_path / "a.jsonl", "wb") as file:
        for _ in range(100):
            file.write(block)
    tracemalloc.start()
    start = time.perf_counter()
    source = Source(str(tmp_path))
    made = plan(source, 10_000)
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made.rows == 1_000_000 and made.shards.num_rows == 100
    assert seconds < 10 and peak < 50 << 20, (seconds, peak)
    assert made.shards["offset"].to_pylist() == [len(block) * number for number in range(100)]
    last = open_unit(source, made, 99)
    assert [row.key for row in last.rows(9_998, images=False)] == ["0009998", "0009999"]


def test_a_folder_is_listed_once_and_sorted(tmp_path):
    for number in range(300):
        (tmp_path / f"{number * 7919 % 300}.png").touch()
    source = Source(str(tmp_path))
    made = plan(source, 100)
    assert made.rows == 300 and made.listing.to_pylist() == sorted(f"{number}.png".encode() for number in range(300))
    (tmp_path / "0.png").unlink()  # a unit goes by the listing and does not walk again
    assert len(open_unit(source, made, 0)) == 100
