"""The entry: killed runs, parts and reruns give the same choice; text, shots and models meet in one space; notes are loud."""

import json
import os
import signal
import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from align.common.errors import DataError, FingerprintError, Preempted, UsageError
from align.common.files import arm_failpoint, hash_file
from align.curate import main
from align.curation.assignment import numbers_for
from align.curation.concepts import evaluation_sets, read_names
from align.curation.config import CurateConfig
from align.curation.pool import CandidatePool
from align.encoders.spec import TextSpec
from align.encoders.text import load_text_encoder
from align.features.store import FeatureStore, StoreHeader
from align.features.writer import StoreWriter
from align.model.dual_encoder import SailConfig, SailModel
from align.model.saving import save_model
from align.runtime.commandline import parse
from align.train import main as train
from align.training.config import TrainConfig
from tests.support.flags import as_flags
from tests.support.stores import all_features, build_store
from tests.support.tiny_encoders import save_bert

SHARDS, SHARD_ROWS = 6, 20


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """120 candidates in 6 shards of image and caption features around 4 directions, unevenly, and 2 labelled shots of each."""
    folder = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(0)
    centers = np.linalg.qr(random.normal(size=(8, 8)))[0][:4]
    owners = random.choice(4, 120, p=[0.7, 0.2, 0.07, 0.03])
    vectors = centers[owners] + 0.15 * random.normal(size=(120, 8))
    rows = [(f"k{n:03d}", 0, vectors[n]) for n in range(120)]
    shards = [rows[at : at + SHARD_ROWS] for at in range(0, 120, SHARD_ROWS)]
    build_store(folder / "images", shards)
    build_store(folder / "captions", shards, kind="caption", fingerprint={"encoder": "text"})
    shots = [(f"s{n}", 0, centers[n // 2] + 0.05 * random.normal(size=8)) for n in range(8)]
    build_store(folder / "shots", [shots], data="plan-shots")
    labels = pa.table({"key": [f"s{n}" for n in range(8)], "label": [("dog", "cat", "cow", "hen")[n // 2] for n in range(8)]})
    pyarrow.csv.write_csv(labels, folder / "labels.csv")
    return folder


def flags(folder, output, **changes):
    values = {
        "candidates": folder / "images", "output": output, "concept-store": folder / "shots", "concept-labels": folder / "labels.csv",
        "top": 12, "per-concept": 5, "save-every": 2, **changes,
    }  # fmt: skip
    return as_flags(values)


def curate(folder, output, failpoint=None, **changes):
    if failpoint:
        arm_failpoint(failpoint)
    main(parse(CurateConfig, "curate", flags(folder, output, **changes)))


def results(output):
    return {name: (output / name).read_bytes() for name in ("chosen.parquet", "coverage.csv", "coverage.json")}


@pytest.fixture(scope="module")
def straight(world):
    curate(world, world / "straight")
    return results(world / "straight")


def test_the_choice_is_that_of_plain_loops(world, straight):
    images = all_features(FeatureStore(world / "images")).astype(np.float32)
    shots = all_features(FeatureStore(world / "shots")).astype(np.float32)
    normed = lambda rows: rows / np.linalg.norm(rows, axis=-1, keepdims=True)  # noqa: E731
    prototypes = {name: normed(normed(shots[2 * n : 2 * n + 2]).mean(0)) for n, name in enumerate(("dog", "cat", "cow", "hen"))}
    scores = {name: normed(images) @ vector for name, vector in prototypes.items()}
    ranked = {name: np.argsort(-values, kind="stable")[:12] for name, values in scores.items()}
    taken, expected = set(), {}
    for name in sorted(scores, key=lambda name: scores[name][ranked[name][-1]]):
        expected[name] = [f"k{row:03d}" for row in ranked[name] if row not in taken][:5]
        taken |= {int(key[1:]) for key in expected[name]}
    table = pq.read_table(world / "straight" / "chosen.parquet")
    assert table.column_names == ["key", "data", "store", "concept", "score", "rank"]
    found = {name: table.filter(pa.compute.equal(table["concept"], name)) for name in scores}
    assert {name: rows["key"].to_pylist() for name, rows in found.items()} == expected
    for name, rows in found.items():
        assert np.allclose(rows["score"].to_numpy(), [scores[name][int(key[1:])] for key in expected[name]], atol=1e-6)
        assert rows["rank"].to_pylist() == [ranked[name].tolist().index(int(key[1:])) + 1 for key in expected[name]]
    coverage = pyarrow.csv.read_csv(world / "straight" / "coverage.csv").to_pydict()
    names = ["cat", "cow", "dog", "hen"]
    assert coverage["concept"] == names and coverage["chosen"] == [5] * 4
    best = np.stack([scores[name] for name in names]).argmax(axis=0)
    assert coverage["best_before"] == np.bincount(best, minlength=4).tolist()
    chosen = [int(key[1:]) for key in table["key"].to_pylist()]
    assert coverage["best_after"] == np.bincount(best[chosen], minlength=4).tolist()
    values = json.loads(straight["coverage.json"])
    assert values["effective_concepts_after"] > values["effective_concepts_before"] and values["note"] == ""
    assert (world / "straight" / "coverage.png").read_bytes()[:4] == b"\x89PNG"
    assert (world / "straight" / "manifest.json").exists()


# writes of one run: config, manifest, prototypes (checkpoint 1), lists after 2, 4 and 6 shards (2, 3, 4), then chosen and coverage
@pytest.mark.parametrize(
    "failpoint",
    [
        *("checkpoint-tensors:1", "checkpoint-commit:1", "checkpoint-saved:1", "checkpoint-tensors:2", "checkpoint-state:3"),
        *("checkpoint-saved:3", "checkpoint-commit:4", "checkpoint-saved:4", "write:1", "rename:2", "renamed:11", "rename:12"),
    ],
)
def test_killed_anywhere_the_same_command_gives_the_same_choice(world, straight, forked, tmp_path, failpoint):
    output = tmp_path / "out"
    assert forked(curate, world, output, failpoint) == -signal.SIGKILL
    assert forked(curate, world, output) == 0
    assert results(output) == straight
    assert not list(output.rglob("*.partial"))


def test_a_finished_run_serves_other_numbers_without_scoring_again(world, straight, monkeypatch):
    monkeypatch.setattr("align.curation.scoring.score_shard", None)
    curate(world, world / "straight", **{"per-concept": 2})
    assert len(pq.read_table(world / "straight" / "chosen.parquet")) == 8
    curate(world, world / "straight")
    assert results(world / "straight") == straight
    with pytest.raises(UsageError, match="top"):
        curate(world, world / "straight", top=13)


def test_parts_scored_apart_give_the_same_choice(world, tmp_path, straight):
    output = tmp_path / "out"
    curate(world, output, parts=4, part=2)
    assert not (output / "chosen.parquet").exists()
    curate(world, output, parts=4, part=0)
    curate(world, output, parts=4)  # scores what is missing
    assert results(output) == straight


def test_lists_of_other_concepts_or_a_damaged_newest_state_are_not_used(world, straight, tmp_path):
    output = tmp_path / "out"
    curate(world, output)
    newest = sorted((output / "lists" / "part-0-of-1").glob("step-*"))[-1]
    damaged = bytearray((newest / "tensors.safetensors").read_bytes())
    damaged[-3] ^= 1
    (newest / "tensors.safetensors").write_bytes(bytes(damaged))
    curate(world, output)
    assert results(output) == straight
    (tmp_path / "labels.csv").write_text((world / "labels.csv").read_text().replace("hen", "emu"))
    kept = (output / "config.yaml").read_text()
    (output / "config.yaml").write_text(kept.replace(str(world / "labels.csv"), str(tmp_path / "labels.csv")))
    with pytest.raises(FingerprintError, match="concepts"):
        curate(world, output, **{"concept-labels": tmp_path / "labels.csv"})


def test_sigterm_saves_and_goes_on(world, tmp_path, straight, monkeypatch):
    from align.curation import scoring

    def stop_after_three(candidates, shard, *rest, real=scoring.score_shard):
        if shard == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(candidates, shard, *rest)

    monkeypatch.setattr(scoring, "score_shard", stop_after_three)
    with pytest.raises(Preempted, match="after shard 3 of 6"):
        curate(world, tmp_path / "out")
    monkeypatch.undo()
    curate(world, tmp_path / "out")
    assert results(tmp_path / "out") == straight


def test_duplicates_are_judged_on_images_and_evaluation_images_are_kept_out(world, tmp_path, capsys):
    images, captions = FeatureStore(world / "images"), FeatureStore(world / "captions")
    vectors = all_features(images).astype(np.float32)
    keys = captions.keys.to_pylist()
    vectors[5::10] = vectors[4::10]  # every tenth image repeats the one before it
    rows = [(keys[n], 0, vectors[n]) for n in range(120) if n != 17]
    shards = [[row for row in rows if int(row[0][1:]) // SHARD_ROWS == shard] for shard in range(SHARDS)]
    build_store(world / "repeating", shards)
    build_store(world / "held", [[("e0", 0, vectors[30]), ("e1", 0, vectors[61])]], data="plan-eval")
    build_store(world / "text-shots", [[(f"s{n}", 0, v) for n, v in enumerate(all_features(FeatureStore(world / "shots")))]],
                kind="caption", fingerprint={"encoder": "text"}, data="plan-shots")  # fmt: skip
    settings = {"candidates": world / "captions", "concept-store": world / "text-shots", "images": world / "repeating", "top": 120,
                "per-concept": 120, "exclude": world / "held", "exclude-cosine": 0.9999}  # fmt: skip
    curate(world, tmp_path / "out", duplicates="identical", **settings)
    chosen = set(pq.read_table(tmp_path / "out" / "chosen.parquet")["key"].to_pylist())
    lost = {"k017", "k030", "k061"}
    for n in range(4, 120, 10):
        pair = {f"k{n:03d}", f"k{n + 1:03d}"}
        assert len(chosen & pair) == 1
        lost |= pair - chosen
    assert chosen == set(keys) - lost
    values = json.loads((tmp_path / "out" / "coverage.json").read_text())
    assert values["passed_over"] == {"excluded": 2, "identical": 12} and values["without_image"] == 1
    curate(world, tmp_path / "out", duplicates="near", **{**settings, "duplicate-cosine": 0.9})
    assert len(pq.read_table(tmp_path / "out" / "chosen.parquet")) < len(chosen)
    with pytest.raises(FingerprintError):
        curate(world, tmp_path / "out", **{**settings, "images": None})


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A tiny text encoder and a store of its captions."""
    folder = tmp_path_factory.mktemp("texts")
    save_bert(folder / "text")
    loader = {"name": str(folder / "text" / "st"), "revision": None, "prompt": "", "max_length": None}
    encoder = load_text_encoder(TextSpec(**loader))
    captions = ["a dog", "the red cat", "a cat runs", "the dog runs", "red", "a red dog", "dog dog", "the cat"]
    header = StoreHeader("caption", encoder.fingerprint, loader, encoder.width, "plan-t", 1, len(captions))
    writer = StoreWriter(folder / "captions", header)
    writer.write(0, encoder.encode(captions, 4).numpy(), [f"t{n}" for n in range(8)], [0] * 8, [])
    writer.finish()
    (folder / "names.txt").write_text("dog\n\ncat\n")
    return folder


TEXT_FLAGS = {"concept-store": None, "concept-labels": None, "top": 3, "per-concept": 2}


def test_text_concepts_go_through_the_encoder_of_the_captions(texts, tmp_path):
    settings = {**TEXT_FLAGS, "candidates": texts / "captions", "concepts": texts / "names.txt", "templates": ["a {c}", "the {c}"]}
    curate(texts, tmp_path / "out", **settings)
    encoder = load_text_encoder(str(texts / "text" / "st"))
    unit = lambda rows: torch.nn.functional.normalize(rows, dim=-1)  # noqa: E731
    dog = unit(unit(encoder.encode(["a dog", "the dog"], 2)).mean(0))
    table = pq.read_table(tmp_path / "out" / "chosen.parquet")
    features = torch.from_numpy(all_features(FeatureStore(texts / "captions"))).float()
    for row in table.filter(pa.compute.equal(table["concept"], "dog")).to_pylist():
        assert row["score"] == pytest.approx(float(unit(features[int(row["key"][1:])]) @ dog), abs=1e-5)


def test_a_model_brings_text_concepts_and_images_together(texts, world, tmp_path):
    store = FeatureStore(world / "images")
    captions = FeatureStore(texts / "captions")
    settings = SailConfig(
        text=captions.header.loader, vision_fingerprint=store.fingerprint, text_fingerprint=captions.fingerprint,
        vision_width=8, text_width=captions.width, width=6, head="linear",
    )  # fmt: skip
    model = SailModel(settings).initialize(0)
    save_model(model, tmp_path / "model")
    common = {**TEXT_FLAGS, "candidates": world / "images", "concepts": texts / "names.txt"}
    with pytest.raises(UsageError, match="--model"):
        curate(world, tmp_path / "out", **common)
    curate(world, tmp_path / "out", model=tmp_path / "model", **common)
    table = pq.read_table(tmp_path / "out" / "chosen.parquet").to_pylist()
    with torch.no_grad():
        images = model.project_image(torch.from_numpy(all_features(store)).float())
        encoder = load_text_encoder(str(texts / "text" / "st"))
        names = model.project_text(encoder.encode(["a photo of a dog.", "a photo of a cat."], 2))
    for row in table:
        expected = float(images[int(row["key"][1:])] @ names[("dog", "cat").index(row["concept"])])
        assert row["score"] == pytest.approx(expected, abs=1e-5)
    other = SailModel(SailConfig(**{**settings.to_dict(), "vision_fingerprint": {"encoder": "tiny", "layer": 2}})).initialize(0)
    save_model(other, tmp_path / "other")
    with pytest.raises(FingerprintError, match="layer"):
        curate(world, tmp_path / "out2", model=tmp_path / "other", **common)


def test_concepts_of_an_evaluation_set_are_said_aloud_everywhere(world, tmp_path, capsys):
    curate(world, tmp_path / "out", **{"concepts-from-evaluation": "farm animals"})
    assert "not zero-shot" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    for place in ("coverage.json", "manifest.json"):
        assert "farm animals" in (tmp_path / "out" / place).read_text()
    assert b"farm animals" in pq.read_schema(tmp_path / "out" / "chosen.parquet").metadata[b"note"]


def test_known_evaluation_sets_are_noticed(monkeypatch, tmp_path):
    listed = tmp_path / "clip_benchmark" / "datasets"
    listed.mkdir(parents=True)
    (tmp_path / "clip_benchmark" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (listed / "en_classnames.json").write_text(json.dumps({"farm": ["cow", "Hen"], "zoo": ["lion", "cow"]}))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "clip_benchmark", raising=False)  # another test may have imported the real one
    assert evaluation_sets(["hen", "Cow", "tractor"]) == ["farm"]
    assert evaluation_sets(["hen"]) == []


def test_wrong_input_is_refused_at_the_door(world, tmp_path):
    (tmp_path / "twice.txt").write_text("dog\ncat\ndog\n")
    with pytest.raises(UsageError, match="dog"):
        read_names(tmp_path / "twice.txt")
    (tmp_path / "none.txt").write_text("\n \n")
    with pytest.raises(UsageError, match="no names"):
        read_names(tmp_path / "none.txt")
    (tmp_path / "bad.csv").write_text("key,label\na,dog\na,cat\n")
    with pytest.raises(DataError, match="twice"):
        curate(world, tmp_path / "out", **{"concept-labels": tmp_path / "bad.csv"})
    for wrong in ({"concepts": "x.txt"}, {"per-concept": 13}, {"part": 1}, {"templates": ["no place"]}, {"images": ["a", "b"]}):
        with pytest.raises(SystemExit, match="2"):
            parse(CurateConfig, "curate", flags(world, tmp_path / "out", **wrong))


def test_little_data_is_still_a_choice(world, tmp_path, capsys):
    curate(world, tmp_path / "out", **{"top": 50_000, "per-concept": 2_000})
    said = capsys.readouterr().out
    assert "--top 50000 holds all 120 candidates: lists hold 30" in said and "than lists or candidates have: at most 15 each" in said
    chosen = pq.read_table(tmp_path / "out" / "chosen.parquet")["concept"].to_pylist()
    assert 40 <= len(chosen) <= 60 and all(chosen.count(name) <= 15 for name in ("dog", "cat", "cow", "hen"))
    curate(world, tmp_path / "out", **{"top": 50_000, "per-concept": 10})  # the lists serve again
    assert len(pq.read_table(tmp_path / "out" / "chosen.parquet")) <= 40
    curate(world, tmp_path / "few", **{"top": 5, "per-concept": 2_000})
    assert "at most 5 each" in capsys.readouterr().out


def test_samples_of_captions_are_counted_not_their_rows(world, tmp_path):
    rows = [(f"k{n}", item, np.eye(8)[n]) for n in range(4) for item in range(5)]
    build_store(tmp_path / "five", [rows[:10], rows[10:]], kind="caption")
    pool = CandidatePool.open(str(tmp_path / "five"))
    assert (len(pool), pool.samples()) == (20, 4)
    assert numbers_for(pool, 50_000, 2_000, 2)[:2] == (1, 1) and numbers_for(pool, 4, 2, 2)[:2] == (4, 2)
    assert numbers_for(pool, 1, 1, 1) == (1, 1, []), "there are more than 16 times as many rows"


@pytest.mark.parametrize("numbers", [{"top": 3, "per-concept": 3}, {"top": 2, "per-concept": 2}])
def test_choosing_everything_is_refused_and_writes_nothing(world, tmp_path, numbers):
    build_store(tmp_path / "three", [[(f"k{n}", 0, vector) for n, vector in enumerate(np.eye(8)[:3])]])
    with pytest.raises(DataError, match="all 3 candidates would be chosen"):
        curate(world, tmp_path / "out", candidates=tmp_path / "three", **numbers)
    assert not (tmp_path / "out/chosen.parquet").exists()


def test_a_dry_run_states_memory_and_work_and_leaves_nothing(world, tmp_path, capsys):
    main(parse(CurateConfig, "curate", [*flags(world, tmp_path / "out"), "--dry-run"]))
    out = capsys.readouterr().out
    assert "120 image rows x 4 concepts" in out and "TFLOP" in out and "of memory" in out
    assert not (tmp_path / "out").exists()


def test_training_takes_exactly_the_chosen_pairs(world, straight, tmp_path):
    chosen = world / "straight" / "chosen.parquet"
    wanted = ["--keys", chosen, "--images", world / "images", "--captions", world / "captions", "--output", tmp_path / "run"]
    settings = ["--head", "linear", "--width", "4", "--batch-size", "10", "--steps", "2", "--precision", "fp32", "--lr", "0.001"]
    train(parse(TrainConfig, "train", [str(word) for word in [*wanted, *settings]]))
    launch = json.loads((tmp_path / "run" / "manifest.json").read_text())["launches"][-1]
    assert launch["pairs"] == 20 and launch["inputs"]["keys"] == hash_file(chosen)
