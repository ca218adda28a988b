"""eval/run.py from end to end in a world of colors: an aligned model is right, an untrained one is not, and nothing runs twice."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import align.model.dual_encoder
from align.common.errors import DataError, FingerprintError, UsageError
from align.model.dual_encoder import SailModel
from eval.measures.config import EvalConfig
from eval.models.dual_encoder import SailDualEncoder
from eval.models.features import FeatureCache
from eval.results.records import load_answers, load_results
from eval.run import main
from eval.tasks.data import load_task
from eval.tasks.registry import find_task
from tests.support.color_world import (
    NAMES,
    RGB,
    VISION_FINGERPRINT,
    Ear,
    Eye,
    picture,
    save_model,
    to_vector,
    values,
)


@pytest.fixture
def loads(monkeypatch):
    """Count how often each encoder is loaded."""
    counts = {"vision": 0, "text": 0}

    def loader(side, kind):
        def load(*_):
            counts[side] += 1
            return kind()

        return load

    monkeypatch.setattr(align.model.dual_encoder, "load_vision_encoder", loader("vision", Eye))
    monkeypatch.setattr(align.model.dual_encoder, "load_text_encoder", loader("text", Ear))
    return counts


@pytest.fixture
def world(tmp_path):
    """A model folder and two tasks: 24 pictures of 6 colors to classify (one of them damaged), 6 to retrieve with 2 captions each."""
    root = tmp_path / "data"
    (root / "colors" / "test").mkdir(parents=True)
    with tarfile.open(root / "colors" / "test" / "0.tar", "w") as archive:
        for number in range(24):
            data = picture(NAMES[number % 6], number)
            for name, content in (("png", data[:-60] if number == 7 else data), ("cls", str(number % 6).encode())):
                info = tarfile.TarInfo(f"{number:04d}.{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    (root / "colors" / "classnames.txt").write_text("\n".join(NAMES))
    rows = []
    (root / "pairs").mkdir()
    for number, name in enumerate(NAMES):
        (root / "pairs" / f"{name}.png").write_bytes(picture(name, number))
        rows.append({"key": name, "image": f"{name}.png", "captions": [f"a {name} square", f"<b>{name}</b>"]})
    (root / "pairs" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "colors.yaml").write_text(
        "id: colors\nkind: classification\nlayout: webdataset\npath: colors\ndata: test/*.tar\nclasses: classnames.txt\n"
    )
    (tmp_path / "pairs.yaml").write_text("id: pairs\nkind: retrieval\nlayout: jsonl\npath: pairs\ndata: test.jsonl\n")
    save_model(tmp_path / "run" / "best")
    return tmp_path


def config(world, **changes):
    settings = {
        "model": (str(world / "run"),), "tasks": (str(world / "colors.yaml"), str(world / "pairs.yaml")), "data_root": str(world / "data"),
        "output": str(world / "out"), "workers": 0, "batch_size": 5, "device": "cpu", "report": False, "examples": 3,
    }  # fmt: skip
    return EvalConfig(**{**settings, **changes})


def test_an_aligned_model_is_right_and_a_second_run_loads_no_encoder(world, loads):
    main(config(world, report=True))
    first = load_results(world / "out")
    found = values(first)
    assert found["colors", "acc@1", "trained"].value == 1.0 and found["colors", "acc@1", "trained"].n == 23
    assert found["pairs", "t2i_r@1", "trained"].value == 1.0 and found["pairs", "t2i_r@1", "trained"].n == 12
    assert found["pairs", "i2t_r@1", "trained"].n == 6
    assert found["colors", "acc@1", "untrained"].value < 0.9
    assert found["colors", "acc@1", "majority"].value == 4 / 23 and found["colors", "acc@1", "chance"].value == pytest.approx(1 / 6)
    assert found["pairs", "t2i_r@1", "chance"].value == pytest.approx(1 / 6)
    assert [task.rejected for task in first.tasks] == [{"image_damaged": 1}, {}]
    assert first.tasks[0].prompts == "simple" and first.tasks[1].prompts == ""
    assert loads == {"vision": 1, "text": 1}, "before and after share the encoders and the features of both tasks"
    assert (world / "out" / "report.html").is_file()

    main(config(world))
    assert loads == {"vision": 1, "text": 1}
    assert load_results(world / "out").entries == first.entries


def test_answers_and_examples_lie_beside_the_results(world, loads):
    main(config(world))
    answers = load_answers(world / "out", "colors", "trained")
    assert len(answers) == 23 and "0007" not in answers["key"].to_pylist()
    assert answers["label_name"].to_pylist() == answers["predicted_name"].to_pylist()
    assert len(load_answers(world / "out", "pairs", "untrained")) == 6 + 12
    examples = json.loads((world / "out" / "examples" / "pairs.json").read_text())
    assert len(examples["t2i"]) == len(examples["i2t"]) == 3 and len(examples["matrix"]["captions"]) == 6
    assert np.argmax(examples["matrix"]["scores"]["trained"], axis=1).tolist() == list(range(6))
    for example in examples["i2t"]:
        assert all(NAMES[example["image"]] in said["best"] for said in example["answers"].values())
        assert example["answers"]["trained"]["top"][0]["right"]
    for path in examples["thumbs"].values():
        with Image.open(world / "out" / "examples" / path) as image:
            assert image.format == "JPEG"


def test_features_are_made_again_when_pictures_or_encoder_change(world, loads):
    main(config(world, tasks=(str(world / "pairs.yaml"),)))
    (world / "data" / "pairs" / "red.png").write_bytes(picture("red", 99))
    main(config(world, tasks=(str(world / "pairs.yaml"),)))
    assert loads == {"vision": 2, "text": 1}


def test_a_damaged_text_cache_is_made_again(world, loads):
    main(config(world))
    before = load_results(world / "out").entries
    for path in (world / "out" / "cache" / "texts").rglob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-3] ^= 64
        path.write_bytes(bytes(data))
    main(config(world))
    assert loads["text"] == 2 and load_results(world / "out").entries == before


def test_a_renamed_encoder_is_the_same_encoder_but_another_is_refused(world, loads):
    main(config(world))
    save_model(world / "renamed", vision_fingerprint={**VISION_FINGERPRINT, "encoder": "moved/eye"})
    main(config(world, model=(str(world / "renamed"),)))
    assert loads["vision"] == 1
    save_model(world / "other", vision_fingerprint={**VISION_FINGERPRINT, "weights": "33"})
    with pytest.raises(FingerprintError, match="weights"):
        main(config(world, model=(str(world / "other"),)))


def test_two_models_side_by_side_without_baselines(world, loads):
    save_model(world / "second")
    main(config(world, model=(f"a={world / 'run' / 'best'}", f"b={world / 'second'}"), baseline=False))
    results = load_results(world / "out")
    assert [model.name for model in results.models] == ["a", "b"] and {entry.model for entry in results.entries} == {"a", "b"}
    assert results.models[0].fingerprint == results.models[1].fingerprint
    main(config(world, model=(f"a={world / 'run'}", f"b={world / 'second'}")))
    assert [m.name for m in load_results(world / "out").models] == ["a", "b", "a untrained", "b untrained", "majority", "chance"]


def test_untrained_heads_follow_the_seed(world, loads):
    main(config(world))
    first = values(load_results(world / "out"))
    main(config(world, seed=5))
    second = values(load_results(world / "out"))
    assert first["pairs", "t2i_median_rank", "trained"].value == second["pairs", "t2i_median_rank", "trained"].value
    answers = [load_results(world / "out").models[1].fingerprint["heads"], load_results(world / "out").models[0].fingerprint["heads"]]
    assert answers[0] != answers[1]


def test_other_prompts_are_recorded(world, loads):
    (world / "data" / "colors" / "own.txt").write_text("{c}\na {c} thing\n")
    main(config(world, tasks=(str(world / "colors.yaml"),), templates="own.txt"))
    assert load_results(world / "out").tasks[0].prompts.startswith("templates:own.txt@")


def test_too_many_rejects_stop_the_measurement(world, loads):
    with pytest.raises(DataError, match="reject"):
        main(config(world, max_reject_fraction=0.01))
    with pytest.raises(DataError, match="reject"):  # and again when the features are cached
        main(config(world, max_reject_fraction=0.01))
    assert not (world / "out" / "results.json").exists()


def test_wrong_models_are_refused_at_the_door(world, loads):
    with pytest.raises(UsageError, match="neither an aligned model"):
        main(config(world, model=(str(world / "data"),)))
    with pytest.raises(UsageError, match="same name"):
        main(config(world, model=(f"a={world / 'run'}", f"a={world / 'run'}")))
    assert loads == {"vision": 0, "text": 0}


def test_pairs_are_matched_and_a_second_run_loads_no_encoder(world, loads):
    folder = world / "data" / "matched"
    folder.mkdir()
    rows = []
    for number, (one, other) in enumerate([("red", "green"), ("blue", "pink"), ("black", "yellow")]):
        for name in (one, other):
            (folder / f"{name}.png").write_bytes(picture(name, 50 + number))
        captions = [f"a {one} thing", f"a {other} thing"] if number else ["a red thing", "a red thing"]  # which is which: not said
        rows.append({"key": f"p{number}", "images": [f"{one}.png", f"{other}.png"], "captions": captions, "category": f"c{number % 2}"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = "id: matched\nkind: compositional\nlayout: pairs\npath: matched\ndata: pairs.jsonl\nprotocol: winoground\n"
    (world / "matched.yaml").write_text(task)
    main(config(world, tasks=(str(world / "matched.yaml"),)))
    first = load_results(world / "out")
    found = values(first)
    for metric in ("text_score", "image_score", "group_score"):
        assert found["matched", metric, "trained"].value == pytest.approx(2 / 3) and found["matched", metric, "trained"].n == 3
    assert found["matched", "group_score", "chance"].value == pytest.approx(1 / 6)
    table = load_answers(world / "out", "matched", "trained").to_pylist()
    assert [(row["key"], row["category"], row["group"]) for row in table] == [("p0", "c0", False), ("p1", "c1", True), ("p2", "c0", True)]
    examples = json.loads((world / "out" / "examples" / "matched.json").read_text())
    assert len(examples["items"]) == 3 and set(examples["items"][0]["answers"]) == {"trained", "untrained"}
    assert len(examples["thumbs"]) == 6
    main(config(world, tasks=(str(world / "matched.yaml"),)))
    assert loads == {"vision": 1, "text": 1} and load_results(world / "out").entries == first.entries


def test_nothing_to_measure_is_a_usage_error(capsys):
    with pytest.raises(UsageError, match="--list-tasks"):
        EvalConfig()
    main(EvalConfig(list_tasks=True))
    assert "sprites-unseen: classification" in capsys.readouterr().out


def test_text_features_keep_the_order_and_encode_equal_texts_once(world, loads):
    model = SailModel.from_pretrained(world / "run" / "best")
    encoded = []

    class Counting(Ear):
        def encode(self, texts, batch_size):
            encoded.extend(texts)
            return super().encode(texts, batch_size)

    model._encoders["text"] = Counting()
    features = FeatureCache(world / "cache").texts(["red", "blue", "red", "a green one"], SailDualEncoder(model))
    assert sorted(encoded) == ["a green one", "blue", "red"]
    assert torch.equal(features[0], features[2])
    assert features.float().tolist()[1] == pytest.approx(to_vector(RGB["blue"]).tolist(), abs=1e-3)
    assert features.float().tolist()[3] == pytest.approx(to_vector(RGB["green"]).tolist(), abs=1e-3)


def test_features_follow_their_keys(world, loads):
    data = load_task(find_task(str(world / "colors.yaml")), world / "data")
    model = SailModel.from_pretrained(world / "run" / "best")
    kept, features = FeatureCache(world / "cache", batch_size=4, workers=0).images(data, SailDualEncoder(model))
    assert len(kept.keys) == len(features) == 23
    for key, label, feature in zip(kept.keys, kept.labels, features, strict=True):
        assert int(key) % 6 == label
        assert feature.astype(float)[:3] == pytest.approx(np.array(RGB[NAMES[label]]) / 255, abs=0.06)
