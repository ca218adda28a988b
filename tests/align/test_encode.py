"""Encoding: one process, two processes, other batch sizes and killed runs all give the same store; bad samples are counted."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from align.common.errors import DataError, FingerprintError
from align.common.files import arm_failpoint, hash64
from align.encode import main
from align.encoders.vision import load_vision_encoder
from align.features.config import EncodeConfig
from align.features.store import FeatureStore
from align.model.dual_encoder import SailModel
from align.runtime.commandline import parse
from align.train import main as train
from align.training.config import TrainConfig
from tests.support.flags import as_flags
from tests.support.stores import all_features
from tests.support.tiny_encoders import save, save_bert

SHARDS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """40 pictures with two caption columns in a JSONL, two of them bad, and two tiny encoders."""
    folder = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    rows = []
    for n in range(40):
        Image.fromarray(random.integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(folder / f"images/{n}.png")
        rows.append({"key": f"k{n}", "image": f"images/{n}.png", "short": f"dog {n}", "many": [f"cat {n}", f"the red cat {n} runs"]})
    (folder / "images/7.png").write_bytes((folder / "images/7.png").read_bytes()[:200])
    rows[21]["short"] = "  "
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save(folder / "vision", "dinov2")
    save_bert(folder / "text")
    return folder


def flags(world, output, **changes):
    values = {
        "data": world / "data.jsonl", "output": output, "vision": world / "vision", "text": world / "text" / "st",
        "captions": ["short", "many"],
        "precision": "fp32", "batch-size": 4, "shard-rows": 14, "workers": 0, "max-reject-fraction": 0.2, **changes,
    }  # fmt: skip
    return as_flags(values)


def encode(world, output, failpoint=None, **changes):
    if failpoint:
        arm_failpoint(failpoint)
    main(parse(EncodeConfig, "encode", flags(world, output, **changes)))


def content(output):
    return {str(p.relative_to(output)): p.read_bytes() for p in sorted(output.rglob("*")) if p.is_file() and ".work" not in p.parts}


@pytest.fixture(scope="module")
def straight(world):
    encode(world, world / "straight")
    return world / "straight"


def test_features_are_those_of_the_encoder_by_key(world, straight):
    store = FeatureStore(straight / "images")
    encoder = load_vision_encoder(str(world / "vision"))
    assert store.keys.to_pylist() == [f"k{n}" for n in range(40) if n != 7]
    for row, key in enumerate(store.keys.to_pylist()):
        expected = encoder(encoder.transform(Image.open(world / f"images/{key[1:]}.png"))[None])[0].numpy()
        np.testing.assert_allclose(store.features(np.array([row]))[0].astype(np.float32), expected, rtol=2e-3, atol=2e-3)
    many = FeatureStore(straight / "captions-many").key_table.to_pylist()
    assert many[:3] == [{"key": "k0", "item": 0}, {"key": "k0", "item": 1}, {"key": "k1", "item": 0}] and len(many) == 80
    assert "k21" not in FeatureStore(straight / "captions-short").keys.to_pylist()
    words = [text for n in range(40) for text in (f"cat {n}", f"the red cat {n} runs")]
    assert np.array_equal(FeatureStore(straight / "captions-many").text_ids, hash64(words))


def test_every_reject_is_listed_with_its_code(straight):
    images = pq.read_table(straight / "images/rejects.parquet").to_pylist()
    assert [(r["key"], r["column"], r["code"], r["shard"], r["row"]) for r in images] == [("k7", "image", "image_damaged", 0, 7)]
    captions = pq.read_table(straight / "captions-short/rejects.parquet").to_pylist()
    assert [(r["key"], r["code"]) for r in captions] == [("k21", "caption_empty")]


def test_one_caption_a_row_is_one_image_with_several_captions(world, straight, tmp_path):
    """The rows of an image are not neighbors, and lie in other shards than their first."""
    rows = [json.loads(line) for line in (world / "data.jsonl").read_text().splitlines()]
    lines = [{"image": row["image"], "many": row["many"][turn] if turn < 2 else " "} for turn in range(3) for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = {"data": tmp_path / "rows.jsonl", "image-root": world, "captions": ["many"]}
    encode(world, tmp_path / "out", **changes, **{"shard-rows": 13})
    images, captions = (FeatureStore(tmp_path / "out" / name) for name in ("images", "captions-many"))
    assert len(images) == 39 and np.array_equal(all_features(images), all_features(FeatureStore(straight / "images")))
    assert np.array_equal(captions.text_ids, FeatureStore(straight / "captions-many").text_ids)
    dropped = pq.read_table(tmp_path / "out/captions-many/rejects.parquet").to_pylist()
    assert {(row["column"], row["code"]) for row in dropped} == {("many[]", "caption_empty")} and len(dropped) == 40
    assert len(pq.read_table(tmp_path / "out/images/rejects.parquet")) == 1, "a bad image is rejected once"


@pytest.mark.parametrize("failpoint", ["write:1", "rename:6", "commit:2", "renamed:9", "commit:5", "rename:20", "renamed:33"])
def test_killed_anywhere_the_same_command_gives_the_same_store(world, straight, forked, tmp_path, failpoint):
    assert forked(encode, world, tmp_path / "out", failpoint) == -signal.SIGKILL
    assert forked(encode, world, tmp_path / "out") == 0
    assert content(tmp_path / "out") == content(straight)


def close_to(first, second):
    for name in ("images", "captions-short", "captions-many"):
        a, b = FeatureStore(first / name), FeatureStore(second / name)
        assert a.key_table.equals(b.key_table) and np.array_equal(a.starts, b.starts)
        np.testing.assert_allclose(all_features(a).astype(np.float32), all_features(b).astype(np.float32), rtol=2e-3, atol=2e-3)


def test_batch_sizes_and_workers_do_not_matter(world, straight, tmp_path):
    encode(world, tmp_path / "out", **{"batch-size": 9, "text-batch-size": 5, "workers": 2})
    close_to(tmp_path / "out", straight)


def test_images_and_captions_can_be_encoded_separately(world, straight, tmp_path):
    encode(world, tmp_path / "out", text=None, captions=None)
    encode(world, tmp_path / "out", vision=None)
    assert content(tmp_path / "out") == content(straight)


@pytest.mark.slow
def test_a_model_trained_on_inner_layers_reads_them_again(world, tmp_path):
    encode(world, tmp_path / "inner", **{"layer": 2, "text-layer": 1})
    places = {"images": tmp_path / "inner/images", "captions": tmp_path / "inner/captions-short", "output": tmp_path / "run"}
    settings = {"val-rows": 8, "batch-size": 8, "steps": 2, "width": 8, "head": "linear", **places}
    train(parse(TrainConfig, "train", [part for name, value in settings.items() for part in (f"--{name}", str(value))]))
    model = SailModel.from_pretrained(tmp_path / "run/last")
    assert (model.config.vision["layer"], model.config.text["layer"]) == (2, 1)
    store = FeatureStore(tmp_path / "inner/captions-short")
    assert model.text_encoder.fingerprint == store.fingerprint and model.text_encoder.layers == 1
    expected = model.text_encoder.encode(["dog 3"], 1)[0].numpy()
    row = store.keys.to_pylist().index("k3")
    np.testing.assert_allclose(store.features(np.array([row]))[0], expected, rtol=3e-3, atol=3e-3)


@pytest.mark.slow
def test_two_processes_under_accelerate_give_the_store_of_one(world, straight, tmp_path):
    script = str(Path(main.__code__.co_filename))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", script, *flags(world, tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=280)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "on 2 process" in ran.stdout
    assert content(tmp_path / "out") == content(straight)


def test_a_store_of_another_encoder_or_other_data_is_refused_by_field(world, straight, tmp_path):
    with pytest.raises(FingerprintError, match="layer: "):
        encode(world, straight, layer=0)
    with pytest.raises(FingerprintError, match="prompt: "):
        encode(world, straight, prompt="query: ")
    with pytest.raises(FingerprintError, match="data: "):
        encode(world, straight, **{"shard-rows": 20})
    assert content(straight)  # nothing was written over
    encode(world, straight)


def change(what, world):
    """Change an image or a caption under the same name and with the same number of bytes."""
    if what == "image":
        Image.new("RGB", (40, 56), "red").save(world / "images/5.bmp")
    else:
        text = (world / "data.jsonl").read_text()
        (world / "data.jsonl").write_text(text.replace('"dog 30"', '"cat 30"'))


@pytest.mark.parametrize(("what", "store"), [("image", "images"), ("caption", "captions-short")])
@pytest.mark.parametrize("finished", [False, True])
def test_other_content_under_the_same_names_and_sizes_is_refused(world, forked, tmp_path, what, store, finished):
    mine = tmp_path / "mine"
    (mine / "images").mkdir(parents=True)
    rows = []
    for n in range(40):
        Image.new("RGB", (40, 56), (n, 2 * n, 3 * n)).save(mine / f"images/{n}.bmp")
        rows.append({"key": f"k{n}", "image": f"images/{n}.bmp", "short": f"dog {n}", "many": f"the cat {n}"})
    (mine / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data": mine / "data.jsonl"}
    run = partial(encode, world, tmp_path / "out", **changes)
    assert forked(run) == 0 if finished else forked(partial(run, "commit:4")) == -signal.SIGKILL
    for path in (mine / "data.jsonl", *(mine / "images").iterdir()):
        os.utime(path, (1, 1))  # another time is not another content
    assert not finished or forked(run) == 0
    before, sizes = content(tmp_path / "out"), {path.name: path.stat().st_size for path in mine.rglob("*.*")}
    change(what, mine)
    assert sizes == {path.name: path.stat().st_size for path in mine.rglob("*.*")}
    with pytest.raises(FingerprintError, match=f"{store} was begun with other samples .content: "):
        run()
    assert content(tmp_path / "out") == before
    if what == "caption":
        encode(world, tmp_path / "out", text=None, captions=None, **changes)  # the images are the same


def test_too_many_rejects_stop_the_job_with_the_codes(world, tmp_path):
    with pytest.raises(DataError, match="image_damaged 1"):
        encode(world, tmp_path / "out", **{"max-reject-fraction": 0.01})
    rows = [{"key": f"k{n}", "image": f"{world}/images/{n % 40 if n < 20 or n > 31 else n + 100}.png"} for n in range(72)]
    (tmp_path / "gone.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data": tmp_path / "gone.jsonl", "image-root": world, "group": "none", "text": None, "captions": None}
    with pytest.raises(DataError, match="10 samples in a row were rejected .*file_missing.*--image-root"):
        encode(world, tmp_path / "none", **changes, **{"max-rejects-in-a-row": 10})


def test_images_that_are_not_there_are_told_before_an_encoder_is_opened(world, tmp_path, monkeypatch):
    """With the place that was tried and the one where they are, for a dry run and a start; nothing is left of it."""
    for name in ("vision.load_vision_encoder", "text.load_text_encoder"):
        monkeypatch.setattr(f"align.encoders.{name}", lambda *given: pytest.fail("an encoder was opened"))
    rows = [{"key": f"k{n}", "image": f"{n}.png", "short": "a dog"} for n in range(40)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data": tmp_path / "in" / "pairs.jsonl", "captions": ["short"]}
    for more in ([], ["--dry-run"]):
        with pytest.raises(DataError) as refused:
            main(parse(EncodeConfig, "encode", [*flags(world, tmp_path / "out", **changes), *more]))
        said = str(refused.value)
        assert f"'k0': file_missing: '{tmp_path}/in/0.png': No such file" in said and "--image-root" in said and "max-reject" not in said
        assert not list((tmp_path / "out").glob("*.parquet"))
    (tmp_path / "photos").symlink_to(world / "images")
    with pytest.raises(DataError, match=f"0.png is in {tmp_path}/photos: give --image-root {tmp_path}/photos"):
        main(parse(EncodeConfig, "encode", flags(world, tmp_path / "out", **changes)))


def test_dark_16_bit_images_are_told_before_and_after(world, tmp_path, capsys):
    (tmp_path / "x-rays").mkdir()
    for n in range(6):
        Image.fromarray(np.full((8, 8), 4095 - n, np.uint16)).save(tmp_path / f"x-rays/{n}.png")
    changes = {"data": tmp_path / "x-rays", "text": None, "captions": None}
    encode(world, tmp_path / "dark", **changes)
    said = "6 of 6 16-bit gray images hold values of 12 bits at most and come out dark: if their white is 4095, give --gray-bits 12"
    assert " ".join(capsys.readouterr().out.split()).count(said) == 2
    encode(world, tmp_path / "light", **changes, **{"gray-bits": 12})
    assert "come out dark" not in capsys.readouterr().out
    dark, light = (all_features(FeatureStore(tmp_path / name / "images")) for name in ("dark", "light"))
    assert not np.array_equal(dark, light)
    with pytest.raises(FingerprintError):
        encode(world, tmp_path / "dark", **changes, **{"gray-bits": 12})


def test_verify_and_dry_run_touch_nothing(world, straight, tmp_path, capsys):
    before = content(straight)
    encode(world, straight, verify=None)
    main(parse(EncodeConfig, "encode", [*flags(world, straight), "--verify"]))
    assert "every byte as committed" in capsys.readouterr().out and content(straight) == before
    main(parse(EncodeConfig, "encode", [*flags(world, tmp_path / "dry"), "--dry-run"]))
    assert "40 samples in 3 shards, 3 to encode" in capsys.readouterr().out
    assert not (tmp_path / "dry").exists()
    main(parse(EncodeConfig, "encode", [*flags(world, straight), "--dry-run"]))
    assert "3 shards, 0 to encode" in capsys.readouterr().out and content(straight) == before


def test_space_is_asked_for_all_stores_together(world, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("align.encode.require_free", lambda folder, size: asked.append((folder, size)))
    encode(world, tmp_path / "out")
    stores = [FeatureStore(path) for path in sorted((tmp_path / "out").iterdir()) if (path / "store.json").exists()]
    assert len(asked) == 1 and len(stores) == 3 and asked[0][0] == tmp_path / "out"
    assert asked[0][1] == pytest.approx(sum(store.header.rows * (2 * store.width + 40) for store in stores), abs=3)
