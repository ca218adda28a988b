"""Readers of every layout: the same rows in the same order, whatever is read and in which order."""

import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.common.errors import DataError
from align.sources.gate import Limits, gate_image
from align.sources.plan import Source, open_shard, plan
from tests.support.captioned_pictures import CAPTIONS, KEYS, LAYOUTS, ROWS, all_rows, codes, picture, readers_of, write_images


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
    for reader in readers_of(Source(str(tmp_path)), 7):
        full = list(reader.rows())
        moved = pickle.loads(pickle.dumps(reader))
        for start in range(len(reader)):
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
    (reader,) = readers_of(source)
    with pytest.raises(DataError, match=message):
        list(reader.rows())
    assert [row.fields["text"] for row in reader.rows(images=False)] == ["y"]


@pytest.mark.parametrize("case", ["pax tar", "parquet, bytes", "JSONL", "CSV, BOM, LF"])
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
        [open_shard(source, made, shard) for shard in range(3)]
    path.unlink()
    with pytest.raises(DataError, match="cannot be read any more"):
        open_shard(source, made, 0)
