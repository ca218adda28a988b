"""Rows that name one image are one sample with all their captions, and no key names two samples: over all files and shards."""

import json
import pickle
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.common.errors import DataError
from align.sources.plan import Plan, Source, open_shard, plan
from tests.support.captioned_pictures import add, all_rows, codes, picture

IMAGES, EACH = 5, 3


def row_of(number, turn):
    return {"image": f"images/{number}.png", "text": f"{number} said {turn}", "url": f"u{turn}"}


NEIGHBORS = [row_of(number, turn) for number in range(IMAGES) for turn in range(EACH)]
SCATTERED = [row_of(number, turn) for turn in range(EACH) for number in range(IMAGES)]
CAPTIONS = [[f"{number} said {turn}" for turn in range(EACH)] for number in range(IMAGES)]


def write(folder, rows, layout):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(IMAGES):
        (folder / "images" / f"{number}.png").write_bytes(picture(number))
    if layout == "csv":
        lines = ["image,text,url", *(",".join(row.values()) for row in rows)]
        (folder / "a.csv").write_text("\n".join(lines) + "\n")
    elif layout == "jsonl":
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif layout == "two files":
        for name, part in (("a", rows[:7]), ("b", rows[7:])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    else:
        if layout == "bytes":
            rows = [{**row, "image": (folder / row["image"]).read_bytes()} for row in rows]
        pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=4)


@pytest.mark.parametrize("rows", [NEIGHBORS, SCATTERED], ids=["neighbors", "scattered"])
@pytest.mark.parametrize("layout", ["csv", "jsonl", "two files", "parquet", "bytes"])
@pytest.mark.parametrize("step", [1, 4, 100])
def test_rows_of_one_image_are_one_sample_wherever_they_are(tmp_path, rows, layout, step):
    write(tmp_path, rows, layout)
    source = Source(str(tmp_path))
    made = plan(source, step, columns=["text"])
    assert (made.rows, made.samples) == (IMAGES * EACH, IMAGES) and made.counted() == "5 samples (15 rows, grouped by image or key)"
    samples = all_rows(source, step)
    assert codes(samples) == [None] * IMAGES
    assert [sample.cell("text") for sample in samples] == CAPTIONS
    assert [sample.image for sample in samples] == [picture(number) for number in range(IMAGES)]
    assert len({sample.key for sample in samples}) == IMAGES
    made.keep(tmp_path / "kept", "files")
    for other in (Plan.load(tmp_path / "kept"), pickle.loads(pickle.dumps(made))):
        again = [sample for shard in range(len(other.shards)) for sample in open_shard(source, other, shard).rows()]
        assert again == samples and other.counts == made.counts


@pytest.mark.parametrize("step", [1, 4, 100])
def test_copies_of_an_image_under_several_keys_of_tars_are_one_sample(tmp_path, step):
    for name, rows in (("a", SCATTERED[:7]), ("b", SCATTERED[7:])):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for number, row in enumerate(rows):
                add(tar, f"{name}{number}.png", picture(int(row["image"][7])))
                add(tar, f"{name}{number}.txt", row["text"].encode())
    samples = all_rows(Source(str(tmp_path)), step)
    assert [(sample.key, sample.cell("txt")) for sample in samples] == [(f"a{n}", CAPTIONS[n]) for n in range(IMAGES)]
    assert [sample.image for sample in samples] == [picture(number) for number in range(IMAGES)]
    assert len(all_rows(Source(str(tmp_path), group="none"), step)) == IMAGES * EACH


def test_images_of_a_tar_with_one_size_and_one_end_are_told_apart(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, first in (("a", b"1"), ("b", b"2"), ("c", b"1"), ("d", b"")):
            add(tar, f"{key}.bmp", first and first + bytes(5000))
            add(tar, f"{key}.txt", key.encode())
    samples = all_rows(Source(str(tmp_path)))
    assert [(sample.key, sample.cell("txt")) for sample in samples] == [("a", ["a", "c"]), ("b", "b"), ("d", "d")]


def test_any_part_of_a_shard_gives_the_samples_that_begin_in_it(tmp_path):
    write(tmp_path, SCATTERED, "jsonl")
    source = Source(str(tmp_path))
    made = plan(source, 4)
    readers = [open_shard(source, made, shard) for shard in range(len(made.shards))]
    assert [made.sample_rows(shard).tolist() for shard in range(4)] == [[0, 1, 2, 3], [0], [], []]
    for reader in readers:
        assert [row for begin in range(len(reader)) for row in reader.rows(begin, begin + 1)] == list(reader.rows())
    part = made.part([1, 0])
    found = [row.cell("text") for shard in range(2) for row in open_shard(source, part, shard).rows()]
    assert found == [CAPTIONS[4], *CAPTIONS[:4]], "rows of shards that were not chosen are in their samples, too"


def test_other_spellings_of_a_path_name_the_same_image(tmp_path):
    write(
        tmp_path, [row_of(0, 0), {**row_of(0, 1), "image": "./images//0.png"}, {**row_of(0, 2), "image": "images/../images/0.png"}], "jsonl"
    )
    assert [len(row.cell("text")) for row in all_rows(Source(str(tmp_path))) if row.others] == [3]


def test_grouping_by_key_takes_the_first_image_and_none_keeps_rows_apart(tmp_path):
    rows = [{**row, "key": f"k{number % 4}"} for number, row in enumerate(NEIGHBORS[:8])]
    write(tmp_path, rows, "jsonl")
    by_key = all_rows(Source(str(tmp_path), group="key"), 3)
    assert [(row.key, row.image, len(row.cell("text"))) for row in by_key] == [
        (f"k{number}", picture(number // EACH), 2) for number in range(4)
    ]
    apart = all_rows(Source(str(tmp_path), group="none"), 3)
    assert codes(apart) == [None] * 4 + ["duplicate_key"] * 4
    by_image = all_rows(Source(str(tmp_path)), 3)
    assert [row.key for row in by_image] == ["k0", "k3", "k2"], "a sample has the key of its first row"


def test_what_a_row_of_a_sample_lacks_is_known(tmp_path):
    rows = [NEIGHBORS[0], {"image": NEIGHBORS[1]["image"]}, NEIGHBORS[2]]
    write(tmp_path, rows, "jsonl")
    (sample,) = all_rows(Source(str(tmp_path)))
    first, lacking, last = sample.cell("text")
    assert (first, lacking.code, last) == (CAPTIONS[0][0], "missing_column", CAPTIONS[0][2])


def test_a_first_row_that_is_unusable_does_not_cost_the_others(tmp_path):
    text = pa.Array.from_buffers(pa.string(), 3, pa.array([b"\xff", b"one", b"two"], pa.binary()).buffers())
    pq.write_table(pa.table({"image": [b"x"] * 3, "text": text}), tmp_path / "a.parquet")
    (sample,) = all_rows(Source(str(tmp_path)))
    assert sample.reject is None and sample.image == b"x" and sample.index == 0
    assert [getattr(value, "code", value) for value in sample.cell("text")] == ["one", "row_utf8", "two"]


def test_tars_that_count_from_zero_each_are_refused_with_both_places(tmp_path):
    for first, name in ((0, "one"), (3, "two")):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "0.tar", "w") as tar:
            for number in range(3):
                add(tar, f"{number:09d}.png", picture(first + number))
                add(tar, f"{number:09d}.txt", f"{name} {number}".encode())
    pattern = str(tmp_path / "*" / "0.tar")
    with pytest.raises(DataError, match=r"3 keys stand.*'000000000': row 1 of .*one/0\.tar and row 1 of .*two/0\.tar.*--key-prefix"):
        plan(Source(pattern), 2)
    source = Source(pattern, key_prefix="file")
    assert [row.key for row in all_rows(source, 2)] == [f"{name}/0:{n:09d}" for name in ("one", "two") for n in range(3)]
    (tmp_path / "moved").mkdir()
    for name in ("one", "two"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    moved = plan(Source(str(tmp_path / "moved" / "*" / "0.tar"), key_prefix="file"), 2)
    assert [row.key for row in open_shard(source, moved, 0).rows()][0] == "one/0:000000000", "keys do not depend on where the data lies"


@pytest.mark.parametrize("keyed", [True, False], ids=["key column", "numbered"])
def test_tables_with_the_same_keys_are_refused(tmp_path, keyed):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        rows = [{**({"key": f"k{n}"} if keyed else {}), "image": f"{name}{n}.png", "text": "t"} for n in range(3)]
        (tmp_path / name / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pattern = str(tmp_path / "*" / "a.jsonl")
    with pytest.raises(DataError, match=r"one/a\.jsonl and .*two/a\.jsonl.*--key-prefix"):
        plan(Source(pattern), 2)
    keys = [row.key for row in all_rows(Source(pattern, key_prefix="file"), 2)]
    assert len(set(keys)) == 6 and keys[0] == ("one/a:k0" if keyed else "one/a:a-000000000")


def test_a_key_twice_in_one_file_is_rejected_in_whichever_shard_it_is(tmp_path):
    rows = [{"key": key, "image": f"{number}.png", "text": "t"} for number, key in enumerate("abcbda")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (1, 2, 10):
        found = all_rows(Source(str(tmp_path)), step, images=False)
        assert codes(found) == [None, None, None, "duplicate_key", None, "duplicate_key"]
    assert "row 1 of" in found[5].reject.detail and "a.jsonl" in found[5].reject.detail
