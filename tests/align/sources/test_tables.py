"""JSONL, CSV and parquet: a bad row has a code and costs its neighbors nothing."""

import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.common.errors import DataError
from align.common.reject_codes import Reject
from align.sources import delimited, safe_files, tables
from align.sources.gate import Limits, gate_captions
from align.sources.plan import Source, plan
from tests.support.captioned_pictures import ROWS, all_rows, codes, readers_of, write_parquet


def test_large_parquet_row_group_is_refused(tmp_path, monkeypatch):
    write_parquet(tmp_path, "bytes")
    monkeypatch.setattr("align.sources.tables.MAX_GROUP_BYTES", 100)
    with pytest.raises(DataError, match="row_group_size"):
        plan(Source(str(tmp_path)), 10)


BAD_JSON = {
    "not JSON": (b"{'key': 1}", "row_syntax"),
    "cut": (b'{"key": "b", "text": "x', "row_syntax"),
    "control character": (b'{"key": "b", "text": "x\x00"}', "row_syntax"),
    "NaN for a key": (b'{"key": NaN, "image": "x.png"}', "key_missing"),
    "Infinity for a key": (b'{"key": -Infinity, "image": "x.png"}', "key_invalid"),
    "NaN for a path": (b'{"key": "b", "image": NaN}', "image_missing"),
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


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_row_is_rejected_and_its_neighbors_survive(tmp_path, case):
    line, code = BAD_JSON[case]
    (tmp_path / "x.png").write_bytes(b"X")
    good = [b'{"key": "a", "image": "x.png"}', b'{"key": "z", "image": "x.png"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good[0], line, good[1], b""]))
    rows = all_rows(Source(str(tmp_path), group="none"))
    assert codes(rows) == [None, code, None]
    assert [rows[0].image, rows[2].image] == [b"X", b"X"] and rows[1].key != "" and rows[1].key.isprintable()


def test_nan_costs_only_the_cell_that_has_it(tmp_path):
    (tmp_path / "x.png").write_bytes(b"X")
    lines = ['{"key": "a", "image": "x.png", "score": NaN, "meta": {"p": [Infinity, -Infinity]}, "text": "t"}']
    lines += ['{"key": "b", "image": "x.png", "text": NaN}', '{"key": "c", "image": "x.png", "text": ["u", NaN]}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    rows = all_rows(Source(str(tmp_path), group="none"))
    assert codes(rows) == [None, None, None]
    assert gate_captions(rows[0].cell("text"), Limits()) == ["t"] and gate_captions(rows[2].cell("text"), Limits()) == ["u"]
    with pytest.raises(Reject, match="caption_missing"):
        gate_captions(rows[1].cell("text"), Limits())


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
        rows = all_rows(Source(str(tmp_path), group="none"), step)
        assert codes(rows) == [None, code, None]
        assert [row.fields["text"] for row in (rows[0], rows[2])] == ["one\ntwo", 'quo"ted']


def test_an_open_quote_in_the_last_row_costs_one_row(tmp_path):
    (tmp_path / "a.csv").write_text('key,text\na,t\nb,"t\nc,t\nd,t')
    assert codes(all_rows(Source(str(tmp_path)), images=False)) == [None, "row_syntax", None, None]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_line_beyond_the_limit_is_not_read(tmp_path, monkeypatch, name):
    for module in (delimited, safe_files, tables):
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
    source = Source(str(tmp_path), group="none")
    assert codes(all_rows(source)) == [None, "row_utf8", "key_missing", "duplicate_key"]
    pq.write_table(pa.table({"image": [b"x", None, b""]}), tmp_path / "a.parquet")
    assert codes(all_rows(source)) == [None, "image_missing", None]  # no bytes at all is for the gate


def test_a_damaged_parquet_row_group_costs_its_rows(tmp_path):
    write_parquet(tmp_path, "bytes")
    path = tmp_path / "a.parquet"
    chunk = pq.read_metadata(path).row_group(1).column(1)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset : chunk.data_page_offset + 20] = b"\xff" * 20
    path.write_bytes(data)
    assert codes(all_rows(Source(str(tmp_path)))) == [None] * 5 + ["row_unreadable"] * 5 + [None] * 13
    assert codes(all_rows(Source(str(tmp_path)), images=False)) == [None] * ROWS, "without images their column is not read"


def test_a_parquet_reader_travels_without_the_rows_it_has_read(tmp_path):
    pq.write_table(pa.table({"image": [os.urandom(100_000)]}), tmp_path / "a.parquet")
    (reader,) = readers_of(Source(str(tmp_path)))
    assert len(next(reader.rows()).image) == 100_000
    assert len(pickle.dumps(reader)) < 10_000


def test_large_cells_are_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_files, "MAX_FILE_BYTES", 10)
    pq.write_table(pa.table({"image": [b"x" * 10, b"x" * 11]}), tmp_path / "a.parquet")
    assert codes(all_rows(Source(str(tmp_path)))) == [None, "file_large"]
