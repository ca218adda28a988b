"""Rows of one image and captions of the same words are positives: in batches from stores or from encoders in the loop, and in the loss."""

import json
import math
import os
import socket
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist

from align.common.errors import UsageError
from align.common.files import hash64
from align.features.store import StoreHeader
from align.features.writer import StoreWriter
from align.model.dual_encoder import SailConfig, SailModel
from align.runtime.commandline import parse
from align.train import main
from align.training.config import TrainConfig
from align.training.pairs import BatchOrder, open_pairs
from align.training.step import Objective, Schedule, Stepper, build_optimizer
from tests.support.forking import exit_codes, fork
from tests.support.stores import build_store

IMAGES, WIDTH, TEXT_WIDTH = 24, 12, 8
WORDS = ["a dog", "a cat", "two birds", "a red boat", "a dog on grass"]
KINDS = ["diagonal", "same_key", "same_caption"]


def caption_store(folder, keys, words, features):
    header = StoreHeader("caption", {"encoder": "text"}, {}, TEXT_WIDTH, folder.name, 1, len(keys))
    writer = StoreWriter(folder, header)
    writer.write(0, features, keys, [0] * len(keys), [], words)
    writer.finish()


@pytest.fixture
def folders(tmp_path):
    """The same 24 images in two data sets in another order, with raw and long captions; words repeat, their features never do."""
    random = np.random.default_rng(0)
    vectors = random.normal(size=(IMAGES, WIDTH)).astype(np.float32)
    for name, order in (("a", np.arange(IMAGES)), ("b", random.permutation(IMAGES))):
        keys = [f"photo-{n}" for n in order]
        rows = [(key, 0, vectors[n]) for key, n in zip(keys, order, strict=True)]
        build_store(tmp_path / name, [rows[:15], rows[15:]], width=WIDTH, data=name)
        for slot in ("raw", "long"):
            words = [WORDS[k] if slot == "raw" else f"{slot} {k}" for k in random.integers(0, len(WORDS), IMAGES)]
            caption_store(tmp_path / f"{name}-{slot}", keys, words, random.normal(size=(IMAGES, TEXT_WIDTH)))
            (tmp_path / f"{name}-{slot}.json").write_text(json.dumps(dict(zip(keys, words, strict=True))))
    return tmp_path


def pairs_of(folders, positives):
    slots = [f"{folders}/a-{slot}+{folders}/b-{slot}" for slot in ("raw", "long")]
    return open_pairs((f"{folders}/a", f"{folders}/b"), slots, positives)


def stepper(rank=0, **options):
    model = SailModel(SailConfig(vision_width=WIDTH, text_width=TEXT_WIDTH, width=16, head="linear")).initialize(0).to(torch.float64)
    optimizer = build_optimizer(model, "adamw", 0.01, (0.9, 0.99), 0.01)
    return Stepper(model, optimizer, Schedule(0.01, 10), Objective(tile=5, **options), seed=0, rank=rank, precision="fp32")


def batches(folders, positives, part=slice(None), steps=2):
    pairs = pairs_of(folders, positives)
    order = BatchOrder(len(pairs), 20, seed=3)
    return [pairs.keys(order.indices(step)) for step in range(steps)], list(pairs.batches(order, range(steps), part))


@torch.no_grad()
def brute_force(step, batch, names, folders, positives):
    """The sigmoid loss of a batch, pair by pair, with positives looked up in what the stores were made of."""
    keys = [name.split(":")[1] for name in names]
    sets = [name.split(":")[0].rsplit("/", 1)[1] for name in names]
    x = step.model.project_image(torch.from_numpy(batch.images))
    total, positive = 0.0, 0
    for slot, captions in zip(("raw", "long"), batch.captions, strict=True):
        words = [json.loads((folders / f"{s}-{slot}.json").read_text())[key] for s, key in zip(sets, keys, strict=True)]
        y = step.model.project_text(torch.from_numpy(captions))
        for i in range(len(keys)):
            for j in range(len(keys)):
                same_image = positives != "diagonal" and keys[i] == keys[j]
                alike = i == j or same_image or (positives == "same_caption" and words[i] == words[j])
                logit = step.model.logit_scale.exp() * (x[i] * y[j]).sum() + step.model.logit_bias
                total = total + math.log1p(math.exp(-float(logit) if alike else float(logit)))
                positive += alike
    return total / (2 * len(keys) ** 2), positive


def test_the_flag_changes_the_loss_of_batches_from_stores_to_what_a_loop_over_pairs_gives(folders):
    losses, counts = {}, {}
    for positives in KINDS:
        names, (first, second) = batches(folders, positives)
        assert len(set(names[0])) == 20 > len({name.split(":")[1] for name in names[0]})  # two rows of one image, from two data sets
        one = stepper()
        expected, counts[positives] = brute_force(one, first, names[0], folders, positives)
        losses[positives] = one.step(first, 0).loss
        assert losses[positives] == pytest.approx(expected, rel=1e-6)
        expected, _ = brute_force(one, second, names[1], folders, positives)
        assert one.step(second, 1).loss == pytest.approx(expected, rel=1e-6)
    assert 40 == counts["diagonal"] < counts["same_key"] < counts["same_caption"]
    assert len(set(losses.values())) == 3


def share(folders, rank, port, positives, loss):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    own = stepper(rank, loss=loss)
    results = [own.step(batch, step) for step, batch in enumerate(batches(folders, positives, slice(10 * rank, 10 * rank + 10))[1])]
    torch.save({"results": results, "weights": [p.detach() for p in own.model.parameters()]}, folders / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("positives", "loss"), [("same_key", "sigmoid"), ("same_caption", "sigmoid"), ("same_caption", "infonce")])
def test_several_processes_have_the_loss_of_one(folders, positives, loss):
    one = stepper(loss=loss)
    expected = [one.step(batch, step) for step, batch in enumerate(batches(folders, positives)[1])]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert exit_codes([fork(share, folders, rank, port, positives, loss) for rank in range(2)]) == [0, 0]
    for rank in range(2):
        found = torch.load(folders / f"{rank}.pt", weights_only=False)
        for ours, theirs in zip(found["results"], expected, strict=True):
            assert (ours.loss, ours.positive_logit, ours.negative_logit) == pytest.approx(
                (theirs.loss, theirs.positive_logit, theirs.negative_logit), rel=1e-5
            )
        assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(found["weights"], one.model.parameters(), strict=True))


def test_a_part_of_a_batch_has_the_ids_of_the_whole(folders):
    (_, (whole, _)), (_, (part, _)) = batches(folders, "same_caption"), batches(folders, "same_caption", slice(4, 9))
    assert np.array_equal(part.image_ids, whole.image_ids[4:9])
    assert all(np.array_equal(a, b[4:9]) for a, b in zip(part.caption_ids, whole.caption_ids, strict=True))
    assert len(np.unique(whole.caption_ids[0])) <= len(WORDS)


def test_a_run_from_the_command_line_hears_the_flag(folders, forked):
    def run(positives):
        flags = ["--images", str(folders / "a"), str(folders / "b"), "--captions", f"{folders}/a-raw+{folders}/b-raw"]
        flags += ["--output", str(folders / positives), "--head", "linear", "--width", "8", "--batch-size", "20", "--steps", "2"]
        main(parse(TrainConfig, "train", [*flags, "--precision", "fp32", "--log-every", "1", "--positives", positives]))

    logged = {}
    for positives in KINDS:
        assert forked(partial(run, positives)) == 0
        logged[positives] = json.loads((folders / positives / "metrics.jsonl").read_text().splitlines()[0])
    assert len({row["loss"] for row in logged.values()}) == len({row["positive_logit"] for row in logged.values()}) == 3


def test_how_many_pairs_share_their_image_is_counted(folders):
    pairs = pairs_of(folders, "same_key")
    assert len(pairs) == 2 * IMAGES and pairs.repeated == IMAGES
    pairs.split(IMAGES // 4, seed=0)
    assert pairs.repeated == IMAGES - IMAGES // 4, "both pairs of an image are held out"


def test_keys_that_name_other_images_in_the_other_data_set_are_refused(folders, tmp_path):
    random = np.random.default_rng(1)
    keys = [f"photo-{n}" for n in range(IMAGES)]
    build_store(tmp_path / "c", [[(key, 0, random.normal(size=WIDTH)) for key in keys]], width=WIDTH, data="c")
    slots = [f"{folders}/a-raw+{folders}/b-raw"]
    with pytest.raises(UsageError, match=r"share 24 keys, but they name different images.*--positives diagonal"):
        open_pairs((f"{folders}/a", f"{tmp_path}/c"), slots, "same_key")
    assert len(open_pairs((f"{folders}/a", f"{tmp_path}/c"), slots)) == 2 * IMAGES


def test_a_store_that_does_not_know_its_words_serves_all_but_same_caption(paired_folders):
    images, captions = (str(paired_folders / "images"),), (str(paired_folders / "captions-short"),)
    batch = open_pairs(images, captions, "same_key").batch(np.arange(4), 0, 0)
    assert np.array_equal(batch.image_ids, hash64(f"k{n:03d}" for n in range(4))) and batch.caption_ids is None
    with pytest.raises(UsageError, match="captions-short does not know which captions have the same words; encode them again"):
        open_pairs(images, captions, "same_caption")
