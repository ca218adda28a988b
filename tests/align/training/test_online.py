"""Encoders in the loop: the same as stores without augmentation, exact to resume, one process or two; bad samples are counted."""

import json
import os
import signal
import socket
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from PIL import Image
from torchvision import transforms

from align.common.errors import DataError, FingerprintError, Preempted, UsageError
from align.common.files import arm_failpoint, hash64
from align.encode import main as encode_main
from align.encoders.spec import TextSpec, VisionSpec
from align.encoders.text import load_text_encoder
from align.encoders.transforms import pixel_normalizer
from align.encoders.vision import load_vision_encoder
from align.features.config import EncodeConfig
from align.features.store import FeatureStore
from align.model.dual_encoder import SailModel
from align.runtime.checkpoints import newest_checkpoint
from align.runtime.commandline import parse
from align.runtime.runs import JsonLines
from align.sources.plan import Source, plan
from align.train import main
from align.training.config import TrainConfig
from align.training.online import Augmentation, OnlinePairs
from align.training.pairs import BatchOrder
from align.training.step import Stepper
from tests.support.flags import as_flags
from tests.support.forking import exit_codes, fork
from tests.support.tiny_encoders import save, save_bert

ROWS = 28


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """28 pictures with captions in three columns, one of them a list, and two tiny encoders."""
    folder = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    colors, sizes = ["red", "blue", "the", "small"], ["a", "big", "on"]
    rows = []
    for n in range(ROWS):
        Image.fromarray(random.integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(folder / f"images/{n}.png")
        text = f"{colors[n % 4]} {sizes[n % 3]} dog " + "cat " * (n % 5)
        rows.append({"key": f"k{n}", "image": f"images/{n}.png", "short": text, "long": f"a photo of {text}", "many": ["dog", "red cat"]})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save(folder / "vision", "dinov2")
    save_bert(folder / "text")
    return folder


def recipe(world, output, **changes):
    return {
        "data": world / "data.jsonl", "vision": world / "vision", "text": world / "text/st", "captions": ["short", "long"],
        "output": output, "head": "token", "width": 8, "loss": "infonce", "batch-size": 8, "steps": 6, "optimizer": "adamw", "lr": 0.01,
        "log-scale": 2.66, "log-scale-range": [0.69, 6.91], "precision": "fp32", "val-rows": 4, "workers": 0, "encoder-batch-size": 3,
        "log-every": 1, "val-every": 3, "save-every": 2, **changes,
    }  # fmt: skip


def train(world, output, failpoint=None, **changes):
    if failpoint:
        arm_failpoint(failpoint)
    main(parse(TrainConfig, "train", as_flags(recipe(world, output, **changes))))


def evidence(output):
    path, tensors, state, _ = newest_checkpoint(output / "checkpoints")
    weights = {name: (output / name / "model.safetensors").read_bytes() for name in ("best", "last")}
    return path.name, {k: v.numpy().tobytes() for k, v in tensors.items()}, state, (output / "metrics.jsonl").read_bytes(), weights


def tokens(world, output):
    """Encode the token stores of the world."""
    values = {"data": world / "data.jsonl", "output": output, "vision": world / "vision", "text": world / "text/st"}
    values |= {"captions": ["short", "long"], "feature": "tokens", "precision": "fp32", "workers": 0, "shard-rows": 10, "batch-size": 5}
    encode_main(parse(EncodeConfig, "encode", as_flags(values)))
    return {"images": output / "images", "captions": [output / "captions-short", output / "captions-long"]}


@pytest.fixture(scope="module")
def stores(world):
    return tokens(world, world / "tokens")


@pytest.fixture(scope="module")
def encoders(world):
    vision = load_vision_encoder(VisionSpec(str(world / "vision"), feature="tokens"))
    return vision, load_text_encoder(TextSpec(str(world / "text/st"), feature="tokens"))


def opened(world, encoders, slots=("short",), file="data.jsonl", **options):
    source = Source(str(world / file))
    return OnlinePairs(source, plan(source, 1024, slots), slots, *encoders, batch_size=3, workers=0, **options)


def test_rows_of_one_image_are_one_sample_and_a_caption_left_out_is_listed(world, encoders, tmp_path):
    lines = [{"image": f"images/{n}.png", "short": text} for text in ("dog", " ", "red cat") for n in range(4)]
    (world / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = opened(world, encoders, ("short", "short"), "rows.jsonl")
    pairs.resume(JsonLines(tmp_path / "rejects.jsonl"), 0)
    assert len(pairs) == 4
    _, captions, owners = pairs.everything()
    assert len(captions) == 8 and sorted(owners.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    order = BatchOrder(4, 4, 0)
    (batch,) = pairs.batches(order, range(1), slice(None))
    assert len(batch.images) == 4 and not torch.equal(*batch.captions), "two slots draw two captions of an image"
    listed = [(row["row"], row["code"]) for row in JsonLines(tmp_path / "rejects.jsonl").rows()]
    assert sorted(listed) == [(n, "caption_empty") for n in range(4)]


def test_token_stores_hold_every_token_and_zeros_for_padding(world, stores):
    vision, text = load_vision_encoder(str(world / "vision")), load_text_encoder(str(world / "text/st"))
    images, captions = FeatureStore(stores["images"]), FeatureStore(stores["captions"][0])
    cls, patches = vision.encode(vision.transform(Image.open(world / "images/5.png"))[None])
    expected = torch.cat([cls[:, None], patches], 1)[0].numpy()
    np.testing.assert_allclose(images.features(np.array([5]))[0].reshape(10, 32), expected, rtol=2e-3, atol=2e-3)
    found = captions.features(np.array([9]))[0].reshape(16, 32)
    (token,), (mask,) = text.encode_tokens(["blue a dog " + "cat " * 4])
    length = int(mask.sum())
    np.testing.assert_allclose(found[:length], token.numpy(), rtol=2e-3, atol=2e-3)
    assert not found[length:].any() and found[:length].any(1).all()
    assert images.fingerprint["tokens"] == 10 and images.fingerprint["has_cls"] is True and captions.fingerprint["pooling"] == "tokens"
    pooled = vision.pool(cls, patches)
    torch.testing.assert_close(torch.cat([cls, patches.mean(1)], -1), pooled)  # pooled features are as before


def test_a_shard_of_tokens_that_would_not_fit_is_refused_with_a_size_that_does(world, tmp_path, monkeypatch):
    monkeypatch.setattr("align.encode.MAX_SHARD_BYTES", 8 * 4 * 16 * 32)
    with pytest.raises(UsageError, match="give --shard-rows 8 or less"):
        tokens(world, tmp_path / "tokens")


def test_without_augmentation_it_trains_like_the_stores(world, stores, tmp_path):
    train(world, tmp_path / "online")
    cached = dict.fromkeys(("data", "vision", "text", "workers", "encoder-batch-size"))
    train(world, tmp_path / "stores", **cached, **stores)
    rows = [[json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()] for run in ("online", "stores")]
    assert len(rows[0]) == len(rows[1]) == 9
    losses, theirs = ([row["loss"] for row in run if "loss" in row] for run in rows)
    assert losses[0] == pytest.approx(theirs[0], rel=1e-6) and losses == pytest.approx(theirs, rel=1e-5)  # batches of other sizes
    for ours, other in zip(*rows, strict=True):
        assert ours == pytest.approx(other, rel=1e-3, abs=1e-3)
    assert losses[-1] < losses[0] - 0.1
    models = [SailModel.from_pretrained(tmp_path / run / "last") for run in ("online", "stores")]
    for (name, ours), theirs in zip(models[0].state_dict().items(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.data, rtol=1e-3, atol=1e-3, msg=name)  # Adam makes much of little gradients
    assert models[0].config.vision_fingerprint == models[1].config.vision_fingerprint and models[0].logit_bias is None
    assert models[0].config.text_fingerprint == models[1].config.text_fingerprint


def stopped(world, output, **changes):
    """Train with workers until the whole process group gets SIGTERM, as schedulers send it."""
    os.setsid()
    original = Stepper.step

    def step(self, batch, number):
        if number == 2:
            os.killpg(0, signal.SIGTERM)
        return original(self, batch, number)

    Stepper.step = step
    try:
        train(world, output, workers=2, **changes)
    except Preempted as error:
        raise SystemExit(error.exit_code) from error


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({"augment": True, "captions": ["many", "many"]}, "kill"),
        ({"augment": True, "accumulate": 2, "head": "linear"}, "terminate"),
    ],
)
def test_killed_or_stopped_the_same_command_gives_the_same_run(world, forked, tmp_path, changes, way):
    assert forked(partial(train, world, tmp_path / "a", **changes)) == 0
    if way == "kill":
        assert forked(partial(train, world, tmp_path / "b", failpoint="checkpoint-saved:2", **changes)) == -signal.SIGKILL
    else:
        assert forked(partial(stopped, world, tmp_path / "b", **changes)) == 75
        assert newest_checkpoint(tmp_path / "b/checkpoints")[2]["step"] == 3
    assert forked(partial(train, world, tmp_path / "b", workers=2, **changes)) == 0
    assert evidence(tmp_path / "b") == evidence(tmp_path / "a")


def test_augmentation_is_a_pure_function_of_image_and_seed(world):
    vision = load_vision_encoder(str(world / "vision"))
    normalizer = pixel_normalizer(vision.transform)
    augment = Augmentation(vision.image_size, normalizer)
    image = Image.open(world / "images/3.png")
    before = torch.get_rng_state()
    first, again, other = augment(image, 5), augment(image, 5), augment(image, 6)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == (3, *vision.image_size)
    torch.manual_seed(5)
    crop = transforms.RandomResizedCrop(vision.image_size, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)(image)
    crop = transforms.RandAugment(2, 7)(transforms.RandomHorizontalFlip()(crop))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(first, ((transforms.functional.to_tensor(crop).permute(1, 2, 0) - mean) / std).permute(2, 0, 1))


def test_batches_follow_the_order_and_draw_anew_each_epoch(world, encoders):
    pairs = opened(world, encoders, ("many", "short", "many"), augment=True, seed=3, positives="same_key")
    order = BatchOrder(len(pairs), 14, seed=3)
    first, second, third, fourth = list(pairs.batches(order, range(4), slice(None)))
    for step, batch in enumerate((first, second, third, fourth)):
        assert np.array_equal(batch.image_ids, hash64(pairs.keys(order.indices(step))))
    assert first.caption_ids is None
    assert not torch.equal(first.captions[0], first.captions[2])  # a column named twice gives both of its captions
    texts = {text: encoders[1].encode([text], 1).half()[0] for text in ("dog", "red cat")}
    for one, two in zip(first.captions[0], first.captions[2], strict=True):
        drawn = {name for row in (one, two) for name, value in texts.items() if torch.allclose(row, value, atol=1e-3)}
        assert drawn == {"dog", "red cat"}
    epochs = [
        torch.cat([a.images, b.images])[np.argsort(np.concatenate([a.image_ids, b.image_ids]))]
        for a, b in ((first, second), (third, fourth))
    ]
    assert (epochs[0] != epochs[1]).any(1).all()  # another crop of every image
    part = list(pairs.batches(order, range(1, 2), slice(5, 12)))[0]
    assert np.array_equal(part.image_ids, second.image_ids[5:12]) and torch.equal(part.captions[0], second.captions[0][5:12])
    torch.testing.assert_close(part.images, second.images[5:12], rtol=1e-2, atol=1e-2)


def test_captions_of_the_same_words_have_one_id(world, encoders):
    pairs = opened(world, encoders, ("many", "short", "many"), positives="same_caption")
    batch = next(pairs.batches(BatchOrder(ROWS, ROWS, seed=0), range(1), slice(None)))
    first, second = hash64(["dog", "red cat"])
    assert set(batch.caption_ids[0]) == {first, second} and np.array_equal(batch.caption_ids[0] == first, batch.caption_ids[2] == second)
    rows = [json.loads(line) for line in (world / "data.jsonl").read_text().splitlines()]
    texts = dict(zip(hash64(row["key"] for row in rows), hash64(row["short"].strip() for row in rows), strict=True))
    assert batch.caption_ids[1].tolist() == [texts[key] for key in batch.image_ids]


def test_held_out_samples_are_apart_and_validated_with_all_captions(world, encoders):
    pairs = opened(world, encoders, ("many", "short", "many"), augment=True)
    held_out = pairs.split(6, seed=1)
    assert len(pairs) == ROWS - 6 and len(held_out) == 6
    keys = held_out.keys(np.arange(6))
    assert not set(keys) & set(pairs.keys(np.arange(len(pairs))))
    images, captions, owners = held_out.everything(5)
    assert images.shape == (5, 320) and captions.shape == (15, 16 * 32) and images.dtype == np.float16
    assert owners.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 1, 2, 3, 4]
    vision = encoders[0]
    for key, row in zip(keys[:5], images, strict=True):  # not augmented
        expected = vision(vision.transform(Image.open(world / f"images/{key[1:]}.png"))[None])[0]
        np.testing.assert_allclose(row.astype(np.float32), expected.numpy(), rtol=2e-3, atol=2e-3)
    assert held_out.everything(5)[0] is images  # kept


def test_only_the_chosen_keys_are_trained_on(world, encoders):
    pairs = opened(world, encoders)
    assert pairs.only(pa.table({"key": ["k3", "k17", "nobody"]})) == 1
    assert pairs.keys(np.arange(2)) == ["k3", "k17"] and len(pairs) == 2
    with pytest.raises(DataError, match="none of the 1 chosen"):
        pairs.only(pa.table({"key": ["nobody"]}))


@pytest.fixture
def spoiled(world):
    """The world's data with a cut image, a blank caption and a missing file."""
    rows = [json.loads(line) for line in (world / "data.jsonl").read_text().splitlines()]
    (world / "images/cut.png").write_bytes((world / "images/7.png").read_bytes()[:200])
    rows[7]["image"], rows[11]["short"], rows[20]["image"] = "images/cut.png", " ", "images/gone.png"
    (world / "spoiled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return world


def test_bad_samples_are_left_out_and_listed_once(spoiled, encoders, tmp_path):
    pairs = opened(spoiled, encoders, file="spoiled.jsonl", positives="same_key")
    pairs.resume(JsonLines(tmp_path / "rejects.jsonl"), 0)
    order = BatchOrder(ROWS, 14, seed=0)
    batches = list(pairs.batches(order, range(4), slice(None)))
    good = hash64(f"k{n}" for n in range(ROWS) if n not in (7, 11, 20))
    assert sorted(np.concatenate([batch.image_ids for batch in batches[:2]])) == sorted(good)
    assert all(len(batch.images) == len(batch.image_ids) == len(batch.captions[0]) for batch in batches)
    listed = {row["key"]: row["code"] for row in pairs.rejects.rows()}
    assert listed == {"k7": "image_damaged", "k11": "caption_empty", "k20": "file_missing"} and len(pairs.rejects.rows()) == 3
    again = opened(spoiled, encoders, file="spoiled.jsonl")
    again.resume(JsonLines(tmp_path / "rejects.jsonl"), 0)  # what later steps listed is dropped, and listed again
    assert not again.rejects.rows()
    list(again.batches(order, range(2), slice(None)))
    assert {row["key"]: row["code"] for row in again.rejects.rows()} == listed


def test_too_many_rejects_stop_the_run(spoiled, encoders, monkeypatch):
    monkeypatch.setattr("align.training.online.MIN_ROWS_FOR_SHARE", 20)
    pairs = opened(spoiled, encoders, file="spoiled.jsonl", max_reject_fraction=0.05)
    with pytest.raises(DataError, match="3 of .* samples were rejected, for example .*--image-root"):
        list(pairs.batches(BatchOrder(ROWS, 28, seed=0), range(1), slice(None)))
    monkeypatch.setattr("align.training.online.IN_A_ROW", 1)
    with pytest.raises(DataError, match="1 samples in a row"):
        opened(spoiled, encoders, file="spoiled.jsonl").everything()


def test_other_data_and_other_heads_are_refused(world, stores, tmp_path):
    none = dict.fromkeys(("data", "vision", "text", "workers", "encoder-batch-size"))
    with pytest.raises(UsageError, match="--feature tokens"):
        train(world, tmp_path / "a", **{**none, **stores, "head": "linear"})
    for values, message in (
        ({"images": ("i",), "augment": True}, "--augment without --data"),
        ({"images": ("i",), "data": "d"}, "exactly one"),
        ({"data": "d", "vision": "v"}, "name both encoders"),
        ({"images": ("i",), "log_scale": 5.0}, "--log-scale-range"),
        ({"images": ("i",), "val_limit": 0}, "--val-limit 0: must be at least 1"),
    ):
        with pytest.raises(UsageError, match=message):
            TrainConfig(captions=("c",), output="o", steps=1, **values)
    train(world, tmp_path / "c", steps=1)
    (world / "fewer.jsonl").write_text("".join((world / "data.jsonl").read_text().splitlines(keepends=True)[:20]))
    (tmp_path / "c/config.yaml").unlink()
    with pytest.raises(FingerprintError, match="data: "):
        train(world, tmp_path / "c", data=world / "fewer.jsonl", steps=1)


def worker(world, folder, rank, size, port):
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
    }
    os.environ["ACCELERATE_USE_CPU"] = "true"
    PartialState._reset_state()  # of earlier tests
    train(world, folder / f"of-{size}", steps=3, augment=True, dropout=0.0)
    assert PartialState().num_processes == size
    if size > 1:
        dist.destroy_process_group()


def test_two_processes_train_like_one(world, tmp_path):
    for size in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        assert exit_codes([fork(worker, world, tmp_path, rank, size, port) for rank in range(size)]) == [0] * size
    one, two = (SailModel.from_pretrained(tmp_path / f"of-{size}" / "last").state_dict() for size in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-4, msg=name)
