"""Assessment: one pass fills the stores of all layers, scores are of the same images, the report says what the numbers say."""

import csv
import functools
import json
import re
import shlex
import shutil
import signal

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from PIL import Image

from align import assess
from align.assessment import scores as assess_scores
from align.assessment.candidates import (
    Candidate,
    chosen_features,
    chosen_layers,
    feature_columns,
    folder_name,
    random_copy,
    read_labels,
    sampled_plan,
)
from align.assessment.commands import next_commands
from align.assessment.config import AssessConfig
from align.assessment.figures import heat_map, scatter
from align.assessment.probing import Training
from align.assessment.scores import Score, Scorer, Settings, TextSide, cached
from align.assessment.tables import Assessed, correlations, follows, recommend, shown, shown_follows, table_csv
from align.common.errors import DataError, FingerprintError, UsageError
from align.common.files import arm_failpoint
from align.common.intervals import bootstrap_weights
from align.encoders.spec import TextSpec, VisionSpec
from align.encoders.text import load_text_encoder
from align.encoders.vision import load_vision_encoder
from align.features.config import EncodeConfig
from align.features.layers import LayerFeatures
from align.features.store import FeatureStore
from align.runtime.commandline import parse
from align.sources.plan import Source
from align.train import main as train
from align.training.config import TrainConfig
from tests.support.flags import as_flags
from tests.support.tiny_encoders import TIMM_CASES, save, save_bert, save_timm

IMAGES = 120
QUICK = {"probe-width": 16, "probe-batch": 32, "probe-steps": 20, "probe-every": 10, "resamples": 100, "workers": 0, "patch-images": 100}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """120 pictures of one color with captions that name it, one of them bad; the same pictures in a folder a color; tiny encoders."""
    folder = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(0)
    colors = {"dog": (200, 30, 30), "cat": (30, 200, 30), "red": (30, 30, 200)}
    (folder / "images").mkdir()
    rows = []
    for n in range(IMAGES):
        word = list(colors)[n % 3]
        pixels = (np.array(colors[word]) + random.integers(-25, 25, 3) + random.integers(-8, 8, (48, 48, 3))).clip(0, 255)
        image = Image.fromarray(pixels.astype(np.uint8))
        image.save(folder / f"images/{n}.png")
        (folder / "labelled" / word).mkdir(parents=True, exist_ok=True)
        image.save(folder / "labelled" / word / f"{n}.png")
        rows.append({"key": f"k{n}", "image": f"images/{n}.png", "short": f"the {word} {n % 7}", "many": [f"{word} runs", f"a {word}"]})
    (folder / "images/7.png").write_bytes((folder / "images/7.png").read_bytes()[:100])
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save(folder / "vit", "dinov2")
    save_timm(folder / "cnn", *TIMM_CASES["efficientnet"][:2])
    save_bert(folder / "text")
    return folder


def flags(world, output, **changes):
    values = {
        "data": world / "data.jsonl", "output": output, "vision": [world / "vit"], "text": [world / "text" / "st"],
        "captions": ["short", "many"], "precision": "fp32", "rows": 1000, **QUICK, **changes,
    }  # fmt: skip
    return as_flags(values)


def run(world, output, failpoint=None, **changes):
    if failpoint:
        arm_failpoint(failpoint)
    assess.main(parse(AssessConfig, "assess", flags(world, output, **changes)))


@pytest.fixture(scope="module")
def assessed(world):
    """A finished assessment: three layers of a ViT in three features, a CNN and a random floor, with labels."""
    changes = {"vision": [world / "vit", world / "cnn"], "layers": ["1", "2", "last"], "features": ["cls", "mean", "cls_mean"]}
    changes |= {"labelled": world / "labelled", "random-weights": [world / "cnn"]}
    run(world, world / "out", **changes)
    return world / "out", changes


def content(output):
    left_out = ("scores", "manifest.json", ".work")
    return {
        str(p.relative_to(output)): p.read_bytes() for p in sorted(output.rglob("*")) if p.is_file() and not set(left_out) & set(p.parts)
    }


def test_each_layer_store_is_what_encode_writes(world, assessed):
    for layer in (1, 2, 3):
        store = FeatureStore(assessed[0] / f"pairs/vit/layer-{layer:02d}")
        encoder = load_vision_encoder(VisionSpec(str(world / "vit"), layer=layer))
        assert store.fingerprint == encoder.fingerprint and store.header.loader["layer"] == layer
        assert len(store) == IMAGES - 1 and "k7" not in store.keys.to_pylist()
        for row in (0, 50, 118):
            image = Image.open(world / f"images/{store.keys[row].as_py()[1:]}.png")
            expected = encoder(encoder.transform(image)[None])[0].numpy()
            np.testing.assert_allclose(store.features(np.array([row]))[0], expected, rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("feature", ["cls", "mean", "cls_mean"])
def test_features_are_columns_of_the_layer_store(world, assessed, feature):
    store = FeatureStore(assessed[0] / "pairs/vit/layer-03")
    encoder = load_vision_encoder(VisionSpec(str(world / "vit"), feature=feature))
    image = Image.open(world / f"images/{store.keys[0].as_py()[1:]}.png")
    expected = encoder(encoder.transform(image)[None]).numpy()
    np.testing.assert_allclose(feature_columns(store.features(np.array([0])), feature, True), expected, rtol=3e-3, atol=3e-3)
    assert feature_columns(np.ones((1, 4)), "mean", False).shape == (1, 4)


def test_patches_are_kept_of_the_first_images(world, assessed):
    store = FeatureStore(assessed[0] / "pairs/vit/patches-02")
    assert (
        95 <= len(store) <= 100
        and store.keys.to_pylist() == FeatureStore(assessed[0] / "pairs/vit/layer-02").keys.to_pylist()[: len(store)]
    )
    encoder = load_vision_encoder(VisionSpec(str(world / "vit"), layer=2))
    _, patches = encoder.encode(encoder.transform(Image.open(world / f"images/{store.keys[3].as_py()[1:]}.png"))[None])
    np.testing.assert_allclose(store.features(np.array([3]))[0], patches[0].flatten().numpy(), rtol=3e-3, atol=3e-3)


def test_large_patch_grids_are_averaged(world, monkeypatch):
    encoder = load_vision_encoder(str(world / "vit"))
    monkeypatch.setattr("align.features.layers.PATCH_SIDE", 1)
    outputs = LayerFeatures(encoder, [3], with_patches=True)
    pixels = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    features = outputs(pixels)
    assert features.shape == (2, outputs.feature_width) == (2, 3 * 32)
    torch.testing.assert_close(features[:, 64:], features[:, 32:64], rtol=1e-2, atol=2e-3)  # the mean of all patches


def test_killed_anywhere_the_same_command_gives_the_same_stores(world, forked, tmp_path):
    changes = {"layers": ["2", "3"], "text": [world / "text" / "st"]}
    run(world, tmp_path / "straight", **changes)
    for number, failpoint in enumerate(("commit:2", "rename:30")):
        out = tmp_path / str(number)
        assert forked(_run, world, out, failpoint, changes) == -signal.SIGKILL
        assert forked(_run, world, out, None, changes) == 0
        assert content(out / "pairs") == content(tmp_path / "straight" / "pairs")


def _run(world, output, failpoint, changes):
    run(world, output, failpoint, **changes)


def test_more_layers_add_to_what_is_there(world, tmp_path):
    run(world, tmp_path / "out", layers=["2"])
    before = content(tmp_path / "out/pairs/vit/layer-02")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/pairs/vit").rglob("*.*") if ".work" not in path.parts}
    run(world, tmp_path / "out", layers=["1", "2"])
    assert content(tmp_path / "out/pairs/vit/layer-02") == before
    rewritten = [
        path for path, time in times.items() if path.stat().st_mtime_ns != time and path.name not in ("rejects.parquet", "COMMIT.json")
    ]
    assert not rewritten
    assert len(FeatureStore(tmp_path / "out/pairs/vit/layer-01")) == IMAGES - 1


def test_layers_of_text_encoders_are_candidates_too(world, tmp_path):
    run(world, tmp_path / "out", **{"text-layers": ["1", "last"]})
    content = json.loads((tmp_path / "out/assessment.json").read_text())
    assert {row["candidate"]["text"] if "candidate" in row else row["text"] for row in content["candidates"]} == {"st", "st-layer-01"}
    inner = FeatureStore(tmp_path / "out/pairs/st-layer-01/captions-short")
    again = load_text_encoder(TextSpec(**inner.header.loader))
    assert again.fingerprint == inner.fingerprint and inner.header.loader["layer"] == 1
    assert FeatureStore(tmp_path / "out/pairs/st/captions-short").fingerprint != inner.fingerprint


def test_other_data_in_the_same_folder_is_refused(world, assessed):
    with pytest.raises(FingerprintError, match="--rows or --seed"):
        run(world, assessed[0], seed=1)


def test_the_table_has_every_candidate_and_score(assessed):
    rows = list(csv.DictReader((assessed[0] / "table.csv").open()))
    assert len(rows) == 3 * 3 + 3 + 1  # ViT layers x features, CNN layers, floor
    assert {row["feature"] for row in rows if row["vision"] == "cnn"} == {"mean"}
    assert [row["vision"] for row in rows if row["random"] == "True"] == ["cnn-random"]
    for row in rows:
        for name in assess_scores.SCORES:
            assert float(row[f"{name}_low"]) - 1e-6 <= float(row[name]) <= float(row[f"{name}_high"]) + 1e-6, name
            assert float(row[f"{name}_seconds"]) > 0
    best = max(rows, key=lambda row: float(row["probing"]))
    assert float(best["knn"]) > 0.9  # the pictures are of three colors


def test_the_report_is_complete(assessed):
    out = assessed[0]
    for picture in ("heat-st.png", "scatter-st.png"):
        assert (out / picture).read_bytes()[:4] == b"\x89PNG" and (out / picture).stat().st_size < 150_000
    found = json.loads((out / "assessment.json").read_text())
    assert found["recommendation"][0].startswith("Take ") and any("Floor: random weights" in line for line in found["recommendation"])
    assert {row["score"] for row in found["correlations"]["probing"]} == set(assess_scores.SCORES) - {"probing"}
    assert all(row["n"] == 12 for row in found["correlations"]["probing"])  # the floor is left out
    assert found["follows"][0]["text"] == "st"
    [worth] = found["worth"]
    assert worth["candidate"]["vision"] in ("vit", "cnn") and {"worth", "low", "high", "curve"} < worth["score"]["details"].keys()
    assert list(worth["score"]["details"]["curve"]) == ["50", "76"] and any("Worth to an MLLM" in line for line in found["recommendation"])
    assert (out / "worth.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((out / "manifest.json").read_text())["launches"][0]["config"]["seed"] == 0


def test_scores_are_kept(world, assessed, monkeypatch, capsys):
    out, changes = assessed
    table = (out / "table.csv").read_text()
    monkeypatch.setattr(assess_scores, "probe_alignment", None)
    monkeypatch.setattr(assess_scores, "linear_probe_correct", None)
    monkeypatch.setattr("align.assessment.worth.measured", None)
    run(world, out, **changes)
    assert (out / "table.csv").read_text() == table
    with pytest.raises(TypeError):
        run(world, out, **{**changes, "test-rows": 100, "probe-lr": 0.01})  # other settings are other scores
    assert "Take " in capsys.readouterr().out


def test_few_labelled_images_a_class_are_told(world, assessed, monkeypatch, capsys):
    output, changes = assessed
    run(world, output, **changes)
    assert "labelled images of" not in capsys.readouterr().out
    monkeypatch.setattr("align.assessment.assessment.FEW_OF_CLASS", 100)
    run(world, output, **changes)
    assert "labelled images of 3 classes: below 100 a class" in capsys.readouterr().out


def test_without_labels_the_columns_are_absent_and_it_says_so(world, tmp_path, capsys):
    run(world, tmp_path / "out", **{"patch-images": 0})
    head = (tmp_path / "out/table.csv").read_text().splitlines()[0]
    assert "knn_low" in head and ",knn," not in head and "linear_probe" not in head and "patch_overlap" not in head
    said = capsys.readouterr().out
    assert "--labelled" in said and "--patch-images" in said
    assert not (tmp_path / "out/pairs/vit/patches-03").exists()


def test_trained_runs_are_matched_by_fingerprint(world, assessed, tmp_path, capsys):
    out, changes = assessed
    names = {}
    for store in ("vit/layer-02", "vit/layer-03", "cnn/layer-01"):  # of the random CNN's last layer all images are equal
        names[store] = tmp_path / store.replace("/", "-")
        values = {
            "images": out / "pairs" / store, "captions": out / "pairs/st/captions-short", "output": names[store], "val-rows": 20,
            "head": "linear", "width": 8, "batch-size": 32, "steps": 4, "val-every": 2, "precision": "fp32",
        }  # fmt: skip
        train(parse(TrainConfig, "train", [part for name, value in values.items() for part in (f"--{name}", str(value))]))
    run(world, out, **changes, trained=list(names.values()), worth=100)
    said = capsys.readouterr().out
    assert "aligned in closed form, is worth" in said and "is worth what cannot be told here" in said, "its training saw all pairs"
    rows = list(csv.DictReader((out / "table.csv").open()))
    trained = {(row["vision"], row["layer"], row["feature"]) for row in rows if row["trained"]}
    assert {("vit", "2", "cls_mean"), ("vit", "3", "cls_mean")} < trained and len(trained) == 3
    capsys.readouterr()
    with pytest.raises(UsageError, match="not a validated run"):
        run(world, out, **changes, trained=[tmp_path / "nothing"])


def test_dry_run_encodes_nothing(world, tmp_path, capsys):
    command = flags(world, tmp_path / "out") + ["--dry-run"]
    assess.main(parse(AssessConfig, "assess", command))
    said = capsys.readouterr().out
    assert "1 candidates" in said and re.search(r"to encode", said)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_plans_are_random_samples(world, tmp_path):
    source = Source(str(world / "data.jsonl"))
    some = sampled_plan(source, 40, 0, ("short",), tmp_path / "a")
    assert 40 <= some.rows <= 44 and some.shards["shard"].to_pylist() == list(range(len(some.shards)))
    again, other = sampled_plan(source, 40, 0, (), tmp_path / "b"), sampled_plan(source, 40, 1, (), tmp_path / "c")
    assert again.digest == some.digest != other.digest
    starts = some.shards["start"].to_pylist()
    assert starts != sorted(starts) and len(set(starts)) == len(starts)
    assert sampled_plan(source, 1000, 0, (), tmp_path / "d").rows == IMAGES
    assert pc.sum(pc.subtract(some.shards["stop"], some.shards["start"])).as_py() == some.rows


def test_layers_and_features_are_those_the_encoder_has(world):
    vit, cnn = load_vision_encoder(str(world / "vit")), load_vision_encoder(str(world / "cnn"))
    assert (vit.backbone.first, vit.layers, cnn.backbone.first) == (0, 3, 1)
    assert chosen_layers(["all"], "vit", 0, 3) == [1, 2, 3]
    assert chosen_layers(["last", "0", "-2", "9"], "vit", 0, 3) == [0, 2, 3]
    assert chosen_layers(["0", "last"], "cnn", 1, cnn.layers) == [cnn.layers]
    with pytest.raises(UsageError, match="vit has layers 0 to 3, none of 7"):
        chosen_layers(["7"], "vit", 0, 3)
    assert chosen_features(["auto", "cls", "cls_mean"], True) == ["cls_mean", "cls"]
    assert chosen_features(["cls"], False) == ["mean"]


def test_layers_of_a_cnn_have_their_own_widths(world):
    cnn = load_vision_encoder(str(world / "cnn"))
    layers = chosen_layers(["all"], "cnn", 1, cnn.layers)
    outputs = LayerFeatures(cnn, layers, with_patches=True)
    pixels = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    features, at = outputs(pixels).float(), 0
    for layer, (_, patches) in zip(layers, cnn.encode_layers(pixels, layers), strict=True):
        width = outputs.widths(False)[layer]
        torch.testing.assert_close(features[:, at : at + width], patches.mean(1), rtol=1e-2, atol=1e-2)
        at += width
    assert features.shape[1] == outputs.feature_width == at + sum(outputs.widths(True).values())


@pytest.mark.parametrize("name", ["vit", "cnn"])
def test_random_copies_are_other_encoders_of_the_same_shape(world, tmp_path, name):
    state = torch.random.get_rng_state()
    first = load_vision_encoder(random_copy(str(world / name), tmp_path / "first", 0))
    again = load_vision_encoder(random_copy(str(world / name), tmp_path / "again", 0))
    other = load_vision_encoder(random_copy(str(world / name), tmp_path / "other", 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    learned = load_vision_encoder(str(world / name))
    hashes = [encoder.fingerprint["weights"] for encoder in (learned, first, again, other)]
    assert hashes[1] == hashes[2] and len(set(hashes)) == 3
    assert first.feature_width == learned.feature_width
    assert first.fingerprint["preprocessing"] == learned.fingerprint["preprocessing"]
    features = first(torch.randn(4, 3, 42, 42, generator=torch.Generator().manual_seed(0)))
    assert torch.isfinite(features).all() and 1e-2 < float(features.abs().mean()) < 1e2  # fit for fp16
    assert float((features[0] - features[1]).abs().max()) > 1e-4


def test_labels_come_from_the_source(world, tmp_path):
    source = Source(str(world / "labelled"))
    plan = sampled_plan(source, 1000, 0, (), tmp_path / "plan")
    labels = read_labels(source, plan, "label")
    assert len(labels) == IMAGES and labels["cat/1"] == 0 and labels["dog/0"] == 1 and labels["red/2"] == 2
    with pytest.raises(DataError, match="0 classes in column 'species'"):
        read_labels(source, plan, "species")


def test_names_of_encoders():
    assert folder_name("embedded:minilm") == "minilm"
    assert folder_name("facebook/dinov2-base") == "facebook-dinov2-base"
    assert folder_name("embedded:minilm", random=True) == "minilm-random"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ("nine",)}, "--layers nine"),
        ({"layers": ("2", "2")}, "each once"),
        ({"random_weights": ("other",)}, "must be among --vision"),
        ({"rows": 10}, "--rows 10"),
        ({"patch_images": 50}, "--patch-images 50"),
        ({"probe_lr": 0.0}, "--probe-lr"),
        ({"resamples": 5}, "--resamples 5"),
        ({"worth": -1}, "--worth -1"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        AssessConfig(**{"data": "d", "output": "o", "vision": ("v",), "text": ("t",), "captions": ("c",), **changes})


def test_two_encoders_of_one_name_are_refused(world, tmp_path):
    shutil.copytree(world / "vit", tmp_path / "vit")
    with pytest.raises(UsageError, match="share a name"):
        run(world, tmp_path / "out", vision=[world / "vit", tmp_path / "vit"])


def made(vision, layer, values, feature="mean", text="t", random=False, **others):
    values = np.asarray(values, dtype=float)
    details = {"values": values.tolist(), "steps": 10, "converged": True}
    scores = {"probing": Score(float(values.mean()), 0.0, 1.0, len(values), 1.0, details)}
    scores |= {name: Score(value, value - 0.1, value + 0.1, 10, 0.1) for name, value in others.items()}
    return Assessed(Candidate(vision, layer, feature, text, random), scores)


def test_the_recommendation_says_which_and_how_sure():
    random = np.random.default_rng(0)
    base = random.random(400)
    weights = bootstrap_weights(400, 500, np.random.default_rng(1))
    clear = [made("a", 1, base + 0.3), made("a", 2, base), made("floor", 1, base - 0.5, random=True)]
    said = recommend(clear, weights)
    assert said[0].startswith("Take a layer 1 mean + t:") and "clear" in said[1] and "100%" in said[1]
    assert any(line.startswith("Layer 1 instead of 2: +30.0 points (+30.0 to +30.0)") for line in said)
    assert any("Floor" in line and "floor" in line for line in said)
    close = [made("a", 1, base), made("b", 1, base + random.normal(0, 0.5, 400) * 1e-1)]
    assert "open" in recommend(close, weights)[1] or "likely" in recommend(close, weights)[1]
    other = [
        made("a", 1, base, text="t"),
        made("a", 1, base - 0.1, text="u"),
        made("b", 1, base - 0.2, text="t"),
        made("b", 1, base - 0.4, text="u"),
    ]
    assert any(line.startswith("t instead of u, mean of 2 candidates: +15.0 points") for line in recommend(other, weights))


def test_a_probe_that_was_cut_short_is_told():
    result = made("a", 1, np.ones(20))
    result.scores["probing"].details["converged"] = False
    assert any("raise --probe-steps" in line for line in recommend([result], bootstrap_weights(20, 100, np.random.default_rng(0))))


def test_correlations_are_per_text_and_without_the_floor():
    results = [made("v", k, [0.1 * k] * 5, knn=0.1 * k, linear_probe=0.1 * (k * 7 % 5), cka=0.9 - 0.1 * k) for k in range(1, 7)]
    results += [made("w", 1, [0.0] * 5, random=True, knn=0.9, linear_probe=0.9, cka=0.9)]
    rows = {row["score"]: row for row in correlations(results, "probing", 0)}
    assert rows["knn"]["r"] == pytest.approx(1) and rows["knn"]["n"] == 6 and rows["knn"]["rho"] == pytest.approx(1)
    assert rows["cka"]["r"] == pytest.approx(-1) and rows["cka"]["rho"] == pytest.approx(-1)
    assert abs(rows["linear_probe"]["r"]) < 0.8
    assert correlations(results[:3], "probing", 0) == []
    assert rows["knn"]["r_low"] is None, "layers of one encoder say nothing of other encoders"
    assert follows(results, 0)[0]["answer"].startswith("open: an interval needs 4 vision encoders")
    results = [made(f"v{k % 6}", k, [0.1 * k] * 5, knn=0.1 * k, linear_probe=0.1 * (k * 7 % 5)) for k in range(1, 19)]
    assert next(row for row in correlations(results, "probing", 0) if row["score"] == "knn")["r_low"] == pytest.approx(1)
    answer = follows(results, 0)[0]
    assert answer["answer"] == "yes" and answer["difference"] > 0 and answer["low"] > 0
    flipped = [made(f"v{k % 6}", k, [0.1 * k] * 5, knn=0.1 * (k * 7 % 5), linear_probe=0.1 * k) for k in range(1, 19)]
    assert follows(flipped, 0)[0]["answer"] == "no, the other way round"
    (perfect,) = follows([made("v", k, [0.1 * k] * 5, knn=1.0, linear_probe=0.1 * k) for k in range(1, 9)], 0)
    assert perfect["difference"] is None and shown_follows(perfect).endswith("unknown: a score is the same for all candidates.")


def test_tables_and_figures_take_candidates_without_some_scores():
    results = [made("v", k, [0.1 * k] * 5, knn=0.1 * k) for k in range(1, 6)] + [made("w", 1, [0.3] * 5)]
    lines = table_csv(results).splitlines()
    assert len(lines) == 7 and lines[-1].startswith("w,1,mean,t,False")
    assert shown(results, 3).row_count == 4
    rows = correlations(results, "probing", 0)
    for picture in (heat_map(results, "t"), scatter(results, "t", "probing", rows)):
        assert picture[:4] == b"\x89PNG"


def test_equal_scores_have_equal_shades(monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda _, shades, **__: drawn.append(shades))
    heat_map([made("v", k, [0.1 * k] * 5, knn=0.9 + 0.001 * k) for k in range(1, 4)], "t")
    probing, knn = drawn[0].T
    assert probing == pytest.approx([1 / 3, 2 / 3, 1]) and knn.min() > 0.99


def test_the_next_commands_name_the_winner_as_it_was_given(tmp_path):
    given = {
        "data": "d.csv",
        "output": str(tmp_path),
        "vision": ("v/x y",),
        "text": (f"o/t@{'a' * 40}",),
        "captions": ("c",),
        "image_root": "r",
    }
    encode, train = next_commands(AssessConfig(**given), Candidate(folder_name("v/x y"), 3, "mean", "o-t-layer-02"), pairs=60)
    config = parse(EncodeConfig, "encode", shlex.split(encode)[2:])
    assert (config.vision, config.text, config.text_revision, config.layer, config.text_layer) == ("v/x y", "o/t", "a" * 40, 3, 2)
    assert (config.data, config.image_root, config.feature, config.captions) == ("d.csv", "r", "mean", ("c",))
    config = parse(TrainConfig, "train", shlex.split(train)[2:])
    assert config.images == (f"{tmp_path}/best/images",) and config.val_rows == 6 and config.start == "cca" and config.val_images is None
    assert "few_photos" not in next_commands(AssessConfig(**given), Candidate(folder_name("v/x y"), 3, "mean", "o-t"), pairs=5000)[1]


def test_the_same_encoder_under_two_names_is_assessed_once(world, tmp_path, capsys):
    shutil.copytree(world / "vit", tmp_path / "copy")
    shutil.copytree(world / "text" / "st", tmp_path / "st-copy")
    run(world, tmp_path / "out", vision=[world / "vit", tmp_path / "copy"], text=[world / "text" / "st", tmp_path / "st-copy"])
    said = capsys.readouterr().out
    assert "copy is the same encoder as vit: it is assessed once" in said and "st-copy is the same encoder as st" in said
    assert "scores of 1 candidates" in said and "next:\n  python align/encode.py --data" in said


def test_the_cache_tells_settings_and_methods_apart(tmp_path, monkeypatch):
    kept, calls = functools.partial(cached, tmp_path), []

    def compute():
        calls.append(1)
        return {"x": Score(0.5, 0.4, 0.6, 10, 1.0, {"steps": 3})}

    assert kept({"kind": "x", "b": [1]}, compute) == kept({"b": [1], "kind": "x"}, compute) and len(calls) == 1
    assert kept({"kind": "y", "b": [1]}, compute)["x"].details == {"steps": 3} and len(calls) == 2
    monkeypatch.setitem(assess_scores.METHODS, "x", 7)  # now computed in another way
    kept({"kind": "x", "b": [1]}, compute)
    kept({"kind": "y", "b": [1]}, compute)
    assert len(calls) == 3


def test_mean_captions_are_per_image():
    captions = np.array([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0]], dtype=np.float16)
    side = TextSide(captions, np.array([0, 0, 1]), np.array([1, 0]), torch.device("cpu"))
    assert side.means.tolist() == [[2, 1], [5, 5]]
    assert side.linear.tolist() == [[6.25, -6.25], [-6.25, 6.25]]  # centered: (1.5, 2) and its opposite


def test_classes_of_one_image_are_left_out():
    scorer = Scorer(Settings(Training(), resamples=100), 100, torch.device("cpu"))
    features = np.random.default_rng(0).normal(size=(21, 4)).astype(np.float16)
    labels = np.array([0] * 10 + [3] + [5] * 10)
    features[:10, 0] += 9
    scores = scorer.with_labels(features, labels)
    assert scores["knn"].n == scores["linear_probe"].n == 20 and min(scores["knn"].value, scores["linear_probe"].value) >= 0.9
    with pytest.raises(DataError, match="fewer than two classes"):
        scorer.with_labels(features[:11], labels[:11])
