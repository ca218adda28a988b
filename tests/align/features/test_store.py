"""A store returns what was committed, refuses what was not, and notices every changed byte."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from align.common.errors import DamagedError, DataError, FingerprintError, UsageError
from align.common.files import arm_failpoint, hash64
from align.common.reject_codes import RejectedRow
from align.features.store import FeatureStore, StoreHeader
from align.features.writer import StoreWriter
from tests.support.stores import all_features


def rows(count, start=0, width=8):
    values = np.random.default_rng(start).normal(size=(count, width)).astype(np.float32)
    return [(f"key-{start + n}", 0, values[n]) for n in range(count)]


def test_features_come_back_in_the_order_asked_for(tmp_path, make_store):
    shards = [rows(5), rows(3, 5), rows(7, 8)]
    store = make_store(tmp_path / "s", shards)
    flat = np.array([row[2] for shard in shards for row in shard]).astype(np.float16)
    wanted = np.array([14, 0, 7, 7, 4, 5])
    assert np.array_equal(store.features(wanted), flat[wanted])
    assert np.array_equal(all_features(store), flat)
    assert store.keys.to_pylist() == [f"key-{n}" for n in range(15)]
    assert store.shard_of(np.array([0, 4, 5, 7, 8, 14])).tolist() == [0, 0, 1, 1, 2, 2]


def test_an_empty_shard_and_an_empty_selection_are_fine(tmp_path, make_store):
    store = make_store(tmp_path / "s", [rows(2), [], rows(2, 2)])
    assert len(store) == 4 and store.features(np.array([3, 0])).shape == (2, 8)
    assert store.features(np.array([], dtype=np.int64)).shape == (0, 8)


def test_a_store_with_a_missing_shard_is_refused(tmp_path, make_store):
    make_store(tmp_path / "s", [rows(2), rows(2, 2)])
    (tmp_path / "s/commits/000001.json").unlink()
    with pytest.raises(DataError, match="shard 1 of 2 is not committed"):
        FeatureStore(tmp_path / "s")


def test_not_a_store(tmp_path):
    with pytest.raises(UsageError, match="not a feature store"):
        FeatureStore(tmp_path)


@pytest.mark.parametrize("field", ["encoder", "layer", "width", "data", "kind"])
def test_a_store_made_differently_is_refused_by_field(tmp_path, field):
    values = {"kind": "image", "fingerprint": {"encoder": "a", "layer": -1}, "loader": {}, "width": 8, "data": "d", "shards": 1, "rows": 2}
    StoreWriter(tmp_path / "s", StoreHeader(**values)).create()
    other = json.loads(json.dumps(values))
    if field in ("encoder", "layer"):
        other["fingerprint"][field] = "b"
    else:
        other[field] = {"width": 9, "data": "e", "kind": "caption"}[field]
    with pytest.raises(FingerprintError, match=f"{field}: "):
        StoreWriter(tmp_path / "s", StoreHeader(**other))
    StoreWriter(tmp_path / "s", StoreHeader(**{**values, "loader": {"name": "moved"}}))  # a moved encoder is the same encoder


def test_rows_that_do_not_fit_fp16_or_are_zero_are_rejected_not_stored(tmp_path, make_store):
    shard = rows(5)
    shard[1][2][:] = 0
    shard[2][2][3] = 1e6
    shard[3][2][0] = np.nan
    store = make_store(tmp_path / "s", [shard], rejects={0: [RejectedRow(9, "bad", "image", "image_empty", "0 bytes")]})
    assert store.keys.to_pylist() == ["key-0", "key-4"]
    rejects = pq.read_table(tmp_path / "s/rejects.parquet").to_pylist()
    assert [(r["key"], r["code"]) for r in rejects] == [
        ("bad", "image_empty"), ("key-1", "zero_feature"), ("key-2", "nonfinite_feature"), ("key-3", "nonfinite_feature"),
    ]  # fmt: skip


def test_captions_of_the_same_words_have_one_id_and_rejected_rows_none(tmp_path):
    shard = rows(4)
    shard[1][2][:] = 0
    writer = StoreWriter(tmp_path / "s", StoreHeader("caption", {}, {}, 8, "plan", 2, 8))
    for number, words in enumerate((["a dog", "rejected", "a cat", "a dog"], ["a bird", "rejected", "a dog", "\udcff"])):
        writer.write(number, np.array([row[2] for row in shard]), ["k0", "k1", "k2", "k3"], [0] * 4, [], words)
    store = FeatureStore(tmp_path / "s")
    assert np.array_equal(store.text_ids, hash64(["a dog", "a cat", "a dog", "a bird", "a dog", "\udcff"]))
    assert len(np.unique(store.text_ids)) == 4 and store.key_table.column_names == ["key", "item"]
    assert np.array_equal(store.key_ids, hash64(["k0", "k2", "k3"] * 2))


def test_a_store_written_before_captions_had_ids_opens_but_says_that_it_has_none(tmp_path, make_store):
    store = make_store(tmp_path / "s", [rows(4)], kind="caption")
    assert pq.read_schema(tmp_path / "s/shards/000000.parquet").names == ["key", "item"] and len(store.key_table) == 4
    with pytest.raises(UsageError, match="does not know which captions have the same words"):
        _ = store.text_ids


def test_a_flipped_bit_in_a_shard_never_loads(tmp_path, make_store):
    make_store(tmp_path / "s", [rows(16)])
    path = tmp_path / "s/shards/000000.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedError, match="000000.safetensors does not have the content .* delete .*commits/000000.json and run"):
        FeatureStore(tmp_path / "s").features(np.array([0]))


@pytest.mark.parametrize("damage", ["cut", "empty", "longer", "missing", "other width"])
def test_damaged_shards_do_not_load(tmp_path, make_store, damage):
    store = make_store(tmp_path / "s", [rows(16)])
    path = tmp_path / "s/shards/000000.safetensors"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "other width":
        make_store(tmp_path / "t", [rows(16, width=4)], width=4)
        path.write_bytes((tmp_path / "t/shards/000000.safetensors").read_bytes())
    else:
        path.write_bytes({"cut": content[:-10], "empty": b"", "longer": content + b"\0"}[damage])
    with pytest.raises(DamagedError, match="000000.safetensors"):
        store.features(np.array([0]))


def test_a_commit_whose_file_is_gone_is_done_again(tmp_path):
    writer = StoreWriter(tmp_path / "s", StoreHeader("image", {}, {}, 8, "d", 1, 2))
    assert not writer.done(0)
    data = rows(2)
    writer.write(0, np.array([row[2] for row in data]), [row[0] for row in data], [0, 0], [])
    assert writer.done(0)
    (tmp_path / "s/shards/000000.parquet").write_bytes(b"cut")
    assert not writer.done(0)


def write_all(folder, failpoint):
    writer = StoreWriter(folder, StoreHeader("image", {"encoder": "a"}, {}, 8, "d", 3, 30))
    writer.clean()
    if failpoint:
        arm_failpoint(failpoint)
    for shard in range(3):
        if not writer.done(shard):
            vectors = np.random.default_rng(shard).normal(size=(10, 8))
            writer.write(shard, vectors, [f"{shard}-{n}" for n in range(10)], [0] * 10, [])
    writer.finish()


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("spec", ["write:1", "rename:2", "renamed:3", "commit:2", "rename:4", "renamed:8", "write:9"])
def test_kill_at_a_write_boundary_then_rerun_gives_the_uninterrupted_store(tmp_path, forked, spec):
    assert forked(write_all, tmp_path / "straight", None) == 0
    assert forked(write_all, tmp_path / "killed", spec) == -9
    assert forked(write_all, tmp_path / "killed", None) == 0
    assert content(tmp_path / "killed") == content(tmp_path / "straight")


@pytest.mark.parametrize("field", ["kind", "fingerprint", "loader", "width", "data", "shards", "rows", "format_version"])
@pytest.mark.parametrize("value", ["abc", 1.5, None, [], {}, -1, True])
def test_a_header_of_other_types_is_refused_by_field(tmp_path, make_store, field, value):
    make_store(tmp_path / "s", [rows(2)])
    header = json.loads((tmp_path / "s/store.json").read_text())
    if type(header[field]) is type(value) and value != -1:
        return
    (tmp_path / "s/store.json").write_text(json.dumps({**header, field: value}))
    with pytest.raises(DamagedError, match="store"):
        FeatureStore(tmp_path / "s")
