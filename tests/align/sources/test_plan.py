"""Plans: a pure function of the files, and unusable data is refused at the door."""

import os
import pickle
import time
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.common.errors import DamagedError, DataError, FingerprintError, UsageError
from align.sources.plan import Plan, Source, open_shard, plan
from tests.support.captioned_pictures import ROWS, all_rows, write_images, write_jsonl, write_tar


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


def test_a_kept_plan_is_not_replaced_by_one_of_other_data(tmp_path):
    write_images(tmp_path / "data")
    write_jsonl(tmp_path / "data")
    made = plan(Source(str(tmp_path / "data")), 10)
    made.keep(tmp_path / "kept", "files or --shard-rows")
    made.keep(tmp_path / "kept", "files or --shard-rows")
    with pytest.raises(FingerprintError, match=r"kept \(files or --shard-rows\)"):
        plan(Source(str(tmp_path / "data")), 9).keep(tmp_path / "kept", "files or --shard-rows")
    assert Plan.load(tmp_path / "kept").digest == made.digest


@pytest.mark.parametrize("layout", ["jsonl", "folder"])
def test_saved_plan_loads_and_travels_to_workers(tmp_path, layout):
    write_images(tmp_path / "data")
    write_jsonl(tmp_path / "data")
    source = Source(str(tmp_path / "data"), layout)
    made = plan(source, 10)
    made.keep(tmp_path, "files")
    for loaded in (Plan.load(tmp_path), pickle.loads(pickle.dumps(Plan.load(tmp_path))), pickle.loads(pickle.dumps(made))):
        assert (loaded.layout, loaded.digest, loaded.shards, loaded.rows) == (layout, made.digest, made.shards, ROWS)
        assert list(open_shard(source, loaded, 2).rows()) == list(open_shard(source, made, 2).rows())
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


def test_many_rows_are_planned_in_little_memory(tmp_path):
    line = b'{"key": "%07d", "image": "images/%07d.jpg", "text": "a dog on the grass"}\n'
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.writelines(line % (number, number) for number in range(300_000))
    tracemalloc.start()
    start = time.perf_counter()
    source = Source(str(tmp_path))
    made = plan(source, 10_000)
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made.rows == made.samples == 300_000 and made.shards.num_rows == 30 and made.joined is None
    assert seconds < 60 and peak < 50 << 20, (seconds, peak)
    assert made.shards["offset"].to_pylist() == [10_000 * len(line % (0, 0)) * number for number in range(30)]
    last = open_shard(source, made, 29)
    assert [row.key for row in last.rows(9_998, images=False)] == ["0299998", "0299999"]
