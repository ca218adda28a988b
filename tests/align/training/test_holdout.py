"""What is held out is held out by image: neither its copies nor, on request, its near-duplicates are trained on."""

import numpy as np
import pytest

from align.common.errors import DataError, UsageError
from align.common.seeds import generator
from align.runtime.commandline import parse
from align.train import main
from align.training.config import TrainConfig
from align.training.holdout import content_ids, drawn_images, image_numbers, merged, near
from align.training.pairs import open_pairs
from tests.support.stores import build_store

IMAGES, EACH = 40, 5


@pytest.fixture
def per_row(tmp_path):
    """Stores with one row a caption: each image five times under five keys, in random order, and a near-duplicate of each image."""
    random = np.random.default_rng(0)
    images = random.normal(size=(IMAGES, 6)).astype(np.float16).astype(np.float32)
    order = random.permutation(np.repeat(np.arange(IMAGES), EACH))
    rows = [(f"r{n:03d}", 0, images[image]) for n, image in enumerate(order)]
    rows += [(f"s{n:03d}", 0, images[n] + 0.01 * random.normal(size=6)) for n in range(IMAGES)]
    build_store(tmp_path / "images", [rows[:100], rows[100:]], width=6)
    texts = [(key, 0, random.normal(size=6)) for key, _, _ in rows]
    build_store(tmp_path / "captions", [texts[:100], texts[100:]], kind="caption", width=6, fingerprint={"encoder": "text"})
    return open_pairs([str(tmp_path / "images")], [str(tmp_path / "captions")])


def test_a_photo_with_one_row_a_caption_is_held_out_with_all_of_them(per_row):
    held = per_row.split(10, seed=0)
    ours, theirs = (set(content_ids([pairs.batch(np.arange(len(pairs)), 0, 0).images]).tolist()) for pairs in (per_row, held))
    assert not ours & theirs and len(theirs) == 10 and len(per_row) + len(held) == IMAGES * (EACH + 1)
    images, captions, owners = held.everything()
    assert len(images) == 10 and len(captions) == len(held) == len(owners) and np.all(np.diff(owners) >= 0)
    with pytest.raises(UsageError, match=f"{2 * IMAGES} images cannot be held out of {2 * IMAGES - 10}"):
        per_row.split(2 * IMAGES, seed=0)


def test_where_every_image_has_one_pair_the_draw_is_the_one_of_pairs():
    chosen = drawn_images(image_numbers(np.arange(50), generator(0, 9).permutation(50)), 13, seed=3)
    assert np.array_equal(np.flatnonzero(chosen), np.sort(generator(3, 4).choice(50, 13, replace=False)))


def test_identities_join_through_each_other_and_equal_rows_have_equal_ids():
    assert image_numbers(np.array([5, 1, 5, 2, 3]), np.array([7, 7, 8, 9, 8])).tolist() == [0, 0, 0, 1, 0]
    rows = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float16)
    ids = content_ids([rows[:4], rows[4:], rows[[2]]])
    assert len(np.unique(ids)) == 9 and ids[-1] == ids[2]
    images, captions, owners = merged(rows[[0, 1, 0]], np.arange(6)[:, None], np.array([0, 0, 1, 1, 2, 2]))
    assert np.array_equal(images, rows[:2]) and captions[:, 0].tolist() == [0, 1, 4, 5, 2, 3] and owners.tolist() == [0, 0, 0, 0, 1, 1]


def test_nearness_is_the_cosine():
    rows = np.array([[1, 0], [1, 1], [0, 2], [0, 0]], dtype=np.float16)
    assert near(rows, np.array([[3, 0]], dtype=np.float16), 0.7).tolist() == [True, True, False, False]
    assert near(rows, np.zeros((0, 2), dtype=np.float16), 0.7).tolist() == [False] * 4


def test_near_duplicates_are_left_out_on_request(per_row, tmp_path, capsys):
    held = per_row.split(10, seed=0)
    before = len(per_row)
    others = held.everything()[0]
    left_out = per_row.leave_out_near(held, 0.99)
    assert left_out == before - len(per_row) >= 9
    assert not near(per_row.batch(np.arange(len(per_row)), 0, 0).images, others, 0.99).any()
    with pytest.raises(DataError, match="--val-apart 1e-09: every image is as near"):
        per_row.leave_out_near(per_row, 1e-9)
    flags = f"--images {tmp_path}/images --captions {tmp_path}/captions --output {tmp_path}/run --head linear --width 4 --steps 1"
    run = parse(TrainConfig, "train", [*flags.split(), *["--batch-size", "8", "--val-rows", "10", "--val-apart", "0.99", "--dry-run"]])
    main(run)
    assert "--val-apart 0.99: " in capsys.readouterr().out
    with pytest.raises(UsageError, match="needs --images, and --val-rows or --val-images"):
        TrainConfig(captions=("c",), output="o", images=("i",), steps=1, val_apart=0.9)
