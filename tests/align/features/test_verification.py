"""--verify finds a flipped bit in any file of a store, invents none, writes nothing, and its advice mends the store."""

import random
import re
import shutil

import numpy as np
import pytest

from align.common.errors import DamagedError, UsageError
from align.features.store import FeatureStore, StoreHeader
from align.features.verification import find_stores, verify_store
from align.features.writer import StoreWriter


def write(folder):
    """Write a store with everything that align/encode.py puts there, its plan beside it; rerun, it only writes what is missing."""
    folder.parent.mkdir(exist_ok=True)
    if not (folder.parent / "plan.parquet").exists():
        (folder.parent / "plan.parquet").write_bytes(b"the plan of the rows")
    writer = StoreWriter(folder, StoreHeader("caption", {"encoder": "a"}, {"name": "b"}, 8, "d", 2, 8))
    writer.create()
    writer.keep("tokenizer/vocab.txt", b"one two three")
    for shard in range(2):
        if not writer.done(shard):
            vectors = np.random.default_rng(shard).normal(size=(4, 8))
            writer.write(shard, vectors, [f"{shard}-{n}" for n in range(4)], [0] * 4, [], ["a dog"] * 4)
    writer.finish()
    return folder


def everything(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_flipped_bit_in_any_file_is_found_and_none_is_invented(tmp_path):
    store, draw = write(tmp_path / "out/s"), random.Random(0)
    assert verify_store(store) == sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    files = everything(tmp_path / "out")
    assert {path.name for path in files} >= {"plan.parquet", "vocab.txt", "store.json", "rejects.parquet", "COMMIT.json", "000000.json"}
    for path in list(files) * 12:
        bad = bytearray(files[path])
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(DamagedError, match=path.name):
            verify_store(store)
        path.write_bytes(files[path])
    verify_store(store)
    assert everything(tmp_path / "out") == files


@pytest.mark.parametrize(
    "name",
    ["shards/000001.parquet", "shards/000000.safetensors", "commits/000001.json", "rejects.parquet", "tokenizer/vocab.txt", "COMMIT.json",
     "shards/000000.rejects.parquet", "../plan.parquet"],
)  # fmt: skip
@pytest.mark.parametrize("missing", [False, True])
def test_the_advice_mends_the_store(tmp_path, name, missing):
    store = write(tmp_path / "out/s")
    before = everything(tmp_path / "out")
    if missing:
        (store / name).unlink()
        write(store)
    else:
        content = bytearray((store / name).read_bytes())
        content[len(content) // 2] ^= 1
        (store / name).write_bytes(content)
        with pytest.raises(DamagedError) as told:
            verify_store(store)
        for path in re.findall(r"delete (\S+) and run", str(told.value)):
            (store / path).resolve().unlink(missing_ok=True)
        write(store)
    verify_store(store)
    assert everything(tmp_path / "out") == before


def test_a_damaged_header_is_not_committed_anew_nor_read(tmp_path):
    store = write(tmp_path / "out/s")
    header = store / "store.json"
    header.write_text(header.read_text().replace('"name": "b"', '"name": "c"'))
    for use in (lambda: write(store), lambda: FeatureStore(store), lambda: verify_store(store)):
        with pytest.raises(DamagedError, match="store.json does not have the content"):
            use()


def test_a_foreign_file_is_named_and_a_store_that_lost_its_header_is_still_found(tmp_path):
    store = write(tmp_path / "out/s")
    (store / "shards/000007.safetensors").write_bytes(b"")
    with pytest.raises(DamagedError, match="000007.safetensors was not committed .delete it"):
        verify_store(store)
    (store / "store.json").unlink()
    assert find_stores(tmp_path / "out") == [store]
    with pytest.raises(DamagedError, match="restore .*store.json"):
        verify_store(store)
    shutil.rmtree(store)
    with pytest.raises(UsageError, match="no feature store"):
        find_stores(tmp_path / "out")
