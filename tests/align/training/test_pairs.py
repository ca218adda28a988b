"""Pairs are joined by key and by nothing else, and batches are a pure function of seed and step."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.common.errors import DataError, FingerprintError, UsageError
from align.features.store import FeatureStore
from align.training.pairs import BatchOrder, PairedFeatures, open_pairs, read_keys


def number(key):
    return float(int(key.strip("k")) + 1)


def shards_of(keys, items=None, size=7, width=8, offset=0.0):
    items = items or [0] * len(keys)
    rows = [(key, item, np.full(width, number(key) + offset * item)) for key, item in zip(keys, items, strict=True)]
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def test_shuffled_dropped_and_duplicated_rows_are_never_mispaired(tmp_path, make_store):
    random = np.random.default_rng(0)
    keys = [f"k{n}" for n in range(300)]
    image_keys = list(random.permutation(keys)[:250]) + ["k3", "k4"]  # dropped rows, two ambiguous keys
    caption_keys = list(random.permutation(keys)[:260]) + ["k7"]
    images = make_store(tmp_path / "i", shards_of(image_keys), data="plan-a")
    captions = make_store(tmp_path / "c", shards_of(caption_keys, size=11), kind="caption", data="plan-b")
    pairs = PairedFeatures([images], [[captions]])
    batch = pairs.batch(np.arange(len(pairs)), seed=0, step=0)
    assert np.array_equal(batch.images, batch.captions[0])
    usable = {k for k in set(image_keys) & set(caption_keys) if image_keys.count(k) == 1 and caption_keys.count(k) == 1}
    assert set(pairs.keys(np.arange(len(pairs)))) == usable
    assert pairs.unpaired == len(image_keys) - len(usable)


def test_a_key_shared_by_two_samples_is_left_out_even_if_each_lost_one_side(tmp_path, make_store):
    # sample 1 (shard 0) has a bad image, sample 2 (shard 1) a bad caption, both are called k5
    images = make_store(tmp_path / "i", [shards_of(["k1", "k2"])[0], shards_of(["k5", "k6"])[0]])
    captions = make_store(tmp_path / "c", [shards_of(["k1", "k5", "k2"])[0], shards_of(["k6"])[0]], kind="caption")
    assert PairedFeatures([images], [[captions]]).keys(np.arange(3)) == ["k1", "k2", "k6"]


def test_each_slot_draws_its_own_caption_and_one_store_twice_gives_different_ones(tmp_path, make_store):
    keys = [f"k{n}" for n in range(40)]
    images = make_store(tmp_path / "i", shards_of(keys))
    captions = make_store(
        tmp_path / "c", shards_of([k for k in keys for _ in range(5)], [0, 1, 2, 3, 4] * 40, size=35, offset=0.125), kind="caption"
    )
    pairs = PairedFeatures([images], [[captions], [captions]])
    seen = [set(), set()]
    for step in range(30):
        batch = pairs.batch(np.arange(40), seed=0, step=step)
        drawn = [(c[:, 0] - batch.images[:, 0]) / 0.125 for c in batch.captions]
        assert (drawn[0] != drawn[1]).all()
        for slot in (0, 1):
            assert set(drawn[slot]) <= {0, 1, 2, 3, 4}
            seen[slot] |= set(drawn[slot])
    assert seen == [{0, 1, 2, 3, 4}] * 2


def test_a_part_of_a_batch_is_the_same_rows_of_the_whole(paired_folders):
    pairs = PairedFeatures([FeatureStore(paired_folders / "images")], [[FeatureStore(paired_folders / "captions-short")]])
    indices = np.random.default_rng(1).permutation(len(pairs))
    whole = pairs.batch(indices, seed=3, step=5)
    part = pairs.batch(indices, seed=3, step=5, part=slice(10, 20))
    assert np.array_equal(part.images, whole.images[10:20]) and np.array_equal(part.captions[0], whole.captions[0][10:20])
    assert part.image_ids is part.caption_ids is None  # nobody asked for them


def test_two_data_sets_with_the_same_keys_stay_apart(tmp_path, make_store):
    keys = [f"k{n}" for n in range(20)]
    stores = {}
    for name, offset in (("a", 0), ("b", 100)):
        shifted = [[(k, i, v + offset) for k, i, v in shard] for shard in shards_of(keys)]
        stores[name] = make_store(tmp_path / f"{name}i", shifted), make_store(tmp_path / f"{name}c", shifted, kind="caption")
    pairs = PairedFeatures([stores["a"][0], stores["b"][0]], [[stores["a"][1], stores["b"][1]]])
    batch = pairs.batch(np.random.default_rng(0).permutation(40), seed=0, step=0)
    assert np.array_equal(batch.images, batch.captions[0]) and len(np.unique(batch.images[:, 0])) == 40
    images, captions, owners = pairs.everything()
    assert np.array_equal(images[owners], captions)


def test_validation_sees_every_caption_once(tmp_path, make_store):
    keys = [f"k{n}" for n in range(6)]
    images = make_store(tmp_path / "i", shards_of(keys, size=3))
    captions = make_store(tmp_path / "c", shards_of([k for k in keys for _ in range(3)], [0, 1, 2] * 6, size=9), kind="caption")
    pairs = PairedFeatures([images], [[captions], [captions]])
    features, texts, owners = pairs.everything()
    assert len(texts) == 18 and np.array_equal(features[owners], texts)
    assert len(pairs.everything(limit=2)[1]) == 6


def test_stores_of_other_encoders_or_without_common_keys_are_refused(tmp_path, make_store):
    images = make_store(tmp_path / "i", shards_of(["k1", "k2"]))
    one = make_store(tmp_path / "c", shards_of(["k1", "k2"]), kind="caption", fingerprint={"encoder": "a"})
    other = make_store(tmp_path / "d", shards_of(["k1", "k2"]), kind="caption", fingerprint={"encoder": "b"})
    stranger = make_store(tmp_path / "e", shards_of(["k8", "k9"]), kind="caption", fingerprint={"encoder": "a"})
    with pytest.raises(FingerprintError, match="encoder: "):
        PairedFeatures([images], [[one], [other]])
    with pytest.raises(DataError, match="no image"):
        PairedFeatures([images], [[stranger]])
    with pytest.raises(UsageError, match="one per image store"):
        PairedFeatures([images], [[one, one]])


def test_pairs_held_out_are_never_trained_on_and_stay_paired(tmp_path, make_store, monkeypatch):
    keys = [f"k{n}" for n in range(30)]
    names = [str(tmp_path / name) for name in ("ai", "bi", "ac", "bc")]
    for name in names:
        make_store(tmp_path / name, shards_of(keys), kind="image" if name.endswith("i") else "caption")
    opened = []
    monkeypatch.setattr("align.training.pairs.FeatureStore", lambda name: opened.append(name) or FeatureStore(name))
    pairs = open_pairs(names[:2], ["+".join(names[2:])] * 2)
    assert opened == names, "each store is opened once"
    held_out = pairs.split(13, seed=0)
    assert len(pairs) == 34 and len(held_out) == 26, "an image is held out with its pairs of both data sets"
    ours, theirs = set(pairs.keys(np.arange(34))), set(held_out.keys(np.arange(26)))
    assert not ours & theirs and len(ours | theirs) == 60
    batch = pairs.batch(np.arange(34), seed=0, step=0)
    assert np.array_equal(batch.images, batch.captions[0])
    images, captions, owners = held_out.everything()
    assert len(images) == 13 and len(captions) == 26 and np.array_equal(images[owners], captions)
    again = open_pairs(names[:2], ["+".join(names[2:])]).split(13, seed=0)
    assert set(again.keys(np.arange(26))) == theirs
    with pytest.raises(UsageError, match="cannot be held out"):
        pairs.split(17, seed=0)


def test_only_the_chosen_keys_are_trained_on_each_in_its_data_set(tmp_path, make_store):
    keys = [f"k{n}" for n in range(20)]
    for name in ("a", "b"):
        make_store(tmp_path / f"{name}i", shards_of(keys), data=f"plan-{name}")
        make_store(tmp_path / f"{name}c", shards_of(keys), kind="caption", data=f"plan-{name}")
    names = [str(tmp_path / name) for name in ("ai", "bi", "ac", "bc")]

    def chosen_from(table):
        pairs = open_pairs(names[:2], ["+".join(names[2:])])
        pq.write_table(pa.table(table), tmp_path / "chosen.parquet")
        missing = pairs.only(read_keys(str(tmp_path / "chosen.parquet")))
        batch = pairs.batch(np.arange(len(pairs)), seed=0, step=0)
        assert np.array_equal(batch.images, batch.captions[0])
        return [name.removeprefix(str(tmp_path)) for name in pairs.keys(np.arange(len(pairs)))], missing

    tied = {"key": ["k3", "k5", "k3", "k99"], "data": ["plan-a", "plan-a", "plan-b", "plan-b"], "concept": ["x"] * 4}
    assert chosen_from(tied) == (["/ai:k3", "/ai:k5", "/bi:k3"], 1)
    assert chosen_from({"key": ["k7", "k7", "k99"]}) == (["/ai:k7", "/bi:k7"], 1)
    with pytest.raises(DataError, match="plan-z"):
        chosen_from({"key": ["k3"], "data": ["plan-z"]})
    with pytest.raises(DataError, match="none of the 1"):
        chosen_from({"key": ["x"]})
    with pytest.raises(DataError, match="column key"):
        chosen_from({"name": ["x"]})


@pytest.mark.parametrize("block", [1, 16])
def test_each_epoch_sees_every_pair_at_most_once_in_another_order(block):
    order = BatchOrder(103, 10, seed=0, block_rows=block)
    epochs = [np.concatenate([order.indices(e * order.steps_per_epoch + s) for s in range(10)]) for e in range(3)]
    for epoch in epochs:
        assert len(np.unique(epoch)) == 100 and epoch.min() >= 0 and epoch.max() < 103
    assert not np.array_equal(epochs[0], epochs[1])
    fresh = BatchOrder(103, 10, seed=0, block_rows=block)
    assert np.array_equal(fresh.indices(27), epochs[2][70:80]), "a resumed run reads the same batch"
    assert not np.array_equal(BatchOrder(103, 10, seed=1, block_rows=block).indices(27), epochs[2][70:80])


def test_blocks_are_read_in_one_piece():
    order = BatchOrder(1024, 64, seed=0, block_rows=16)
    assert sum(np.diff(order.indices(3)) == 1) >= 64 - 64 // 16 - 2


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UsageError, match=r"a batch of 11 is larger than the data \(10 pairs\).*few_photos\.yaml"):
        BatchOrder(10, 11, seed=0)
