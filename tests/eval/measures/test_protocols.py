"""Protocol traps, from data on disk to recorded numbers: what is easily measured wrongly gives other numbers here, and says so."""

import json
from math import comb

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import align.model.dual_encoder
from align.encoders.vision import load_vision_encoder
from align.model.dual_encoder import SailConfig, SailModel
from eval.measures.config import EvalConfig
from eval.measures.segmentation import segmentation_answers, segmentation_entries
from eval.models.dual_encoder import SailDualEncoder
from eval.models.features import FeatureCache
from eval.models.openclip import load_openclip
from eval.models.transformers_clip import load_transformers_clip
from eval.results.records import load_answers, load_results
from eval.run import main
from eval.tasks.data import load_task
from eval.tasks.masks import load_segmentation
from eval.tasks.registry import TASKS, describe
from eval.tasks.task import MASKS, Task
from tests.support.color_world import NAMES, Ear, Eye, picture, save_model, values
from tests.support.tiny_clip import save_hugging_face


@pytest.fixture
def encoders(monkeypatch):
    """Encoders that see and hear colors."""
    monkeypatch.setattr(align.model.dual_encoder, "load_vision_encoder", lambda *_: Eye())
    monkeypatch.setattr(align.model.dual_encoder, "load_text_encoder", lambda *_: Ear())


def measure(folder, *tasks):
    """Return the results of a model of colors on tasks given as dicts of Task's fields."""
    save_model(folder / "run" / "best")
    for task in tasks:
        (folder / f"{task['id']}.yaml").write_text(json.dumps(task))
    main(
        EvalConfig(
            model=(str(folder / "run"),),
            tasks=tuple(str(folder / f"{task['id']}.yaml") for task in tasks),
            data_root=str(folder),
            output=str(folder / "out"),
            workers=0,
            device="cpu",
            report=False,
            examples=2,
        )  # fmt: skip
    )
    return load_results(folder / "out")


def squares(folder, names=NAMES):
    """Write two pictures of each color in folders of their own."""
    for at, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in (0, 1):
            (folder / name / f"{name}{number}.png").write_bytes(picture(name, 10 * at + number))
    return {"id": folder.name, "kind": "classification", "layout": "folder", "path": folder.name}


def captioned(folder, captions):
    """Write a picture of each color with the `captions` of its name."""
    folder.mkdir()
    rows = [{"key": name, "image": f"{name}.png", "captions": captions(name)} for name in NAMES]
    for number, name in enumerate(NAMES):
        (folder / f"{name}.png").write_bytes(picture(name, number))
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"id": folder.name, "kind": "retrieval", "layout": "jsonl", "path": folder.name, "data": "test.jsonl"}


def test_one_caption_and_five_of_the_same_images_are_two_measurements(tmp_path, encoders):
    def captions(name):  # the last is another picture's
        return [*(f"{article} {name} square" for article in ("a", "one", "the", "my")), f"a {NAMES[NAMES.index(name) - 1]} square"]

    five = captioned(tmp_path / "five", captions)
    results = measure(tmp_path, five, {**five, "id": "one", "captions_each": 1})
    found = values(results)
    assert [(task.id, task.images, task.targets) for task in results.tasks] == [("five", 6, 30), ("one", 6, 6)]
    assert results.tasks[0].digest != results.tasks[1].digest, "so that their numbers never stand beside each other as the same task's"
    assert found["five", "t2i_r@1", "trained"].value == pytest.approx(4 / 5) and found["five", "t2i_r@1", "trained"].n == 30
    assert found["one", "t2i_r@1", "trained"].value == 1.0 and found["one", "t2i_r@1", "trained"].n == 6
    assert found["five", "i2t_r@5", "chance"].value == pytest.approx(1 - comb(25, 5) / comb(30, 5))  # any of five among 30
    assert found["one", "i2t_r@5", "chance"].value == pytest.approx(5 / 6)


def test_a_collapsed_model_scores_nothing_from_end_to_end(tmp_path, encoders, monkeypatch):
    same = torch.tensor([[0.0, 2.0, 0.0, 0.0]])
    monkeypatch.setattr(Eye, "forward", lambda self, pixels: same.repeat(len(pixels), 1))
    monkeypatch.setattr(Ear, "encode", lambda self, texts, batch_size: same.repeat(len(texts), 1))
    found = values(measure(tmp_path, squares(tmp_path / "six"), captioned(tmp_path / "pairs", lambda name: [f"a {name}", name])))
    scores = {metric: entry.value for (_, metric, model), entry in found.items() if model == "trained"}
    assert scores.pop("t2i_median_rank") == 6 and scores.pop("i2t_median_rank") == 11  # last of 6 images; after 10 captions of others
    assert scores.pop("t2i_r@10") == 1.0, "there are only 6 images"
    assert set(scores) == {"acc@1", "acc@5", "mean_per_class", "t2i_r@1", "t2i_r@5", "i2t_r@1", "i2t_r@5", "i2t_r@10"}
    assert set(scores.values()) == {0.0}


def test_accuracy_at_5_is_left_out_of_everything_with_4_classes(tmp_path, encoders):
    results = measure(tmp_path, squares(tmp_path / "four", NAMES[:4]), squares(tmp_path / "five", NAMES[:5]))
    found = values(results)
    models = {"trained", "untrained", "majority", "chance"}
    assert {model for task, metric, model in found if (task, metric) == ("four", "acc@1")} == models
    assert not [key for key in found if key[:2] == ("four", "acc@5")]
    assert {found["five", "acc@5", model].value for model in models} == {1.0}
    assert {len(top) for top in load_answers(tmp_path / "out", "four", "trained")["top"].to_pylist()} == {4}


# the encoder's own mean and standard deviation


PREPARED = {"one": ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]), "other": ([0.1, 0.6, 0.2], [0.5, 0.25, 0.5])}


def openers(folder, kind, monkeypatch):
    """Return {name: a DualEncoder}: the same weights, prepared with the numbers of PREPARED."""
    stock, _ = save_hugging_face(folder / "stock", "clip")
    architecture = {
        "embed_dim": 20,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "kit-protocols", architecture)
    weights = open_clip.create_model("kit-protocols").state_dict() if kind == "openclip" else None
    opened = {}
    for name, (mean, std) in PREPARED.items():
        place = folder / name
        if weights:
            place.mkdir()
            save_file(weights, place / "w.safetensors")
            described = {"model_cfg": architecture, "preprocess_cfg": {"mean": mean, "std": std}}
            (place / "open_clip_config.json").write_text(json.dumps(described))
            opened[name] = load_openclip(f"kit-protocols/{place}/w.safetensors")
            continue
        save_hugging_face(place, "clip")
        stock.save_pretrained(place)
        processing = json.loads((place / "preprocessor_config.json").read_text())
        (place / "preprocessor_config.json").write_text(json.dumps({**processing, "image_mean": mean, "image_std": std}))
        if kind == "hf":
            opened[name] = load_transformers_clip(str(place))
        else:
            encoder = load_vision_encoder(str(place))
            settings = {"vision": {"name": str(place)}, "vision_fingerprint": encoder.fingerprint, "vision_width": encoder.feature_width}
            opened[name] = SailDualEncoder(SailModel(SailConfig(**settings, head="linear")).initialize(0))
    return opened


@pytest.mark.parametrize("kind", ["sail", "hf", "openclip"])
def test_every_encoder_sees_pixels_of_its_own_mean_and_deviation(tmp_path, kind, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)  # of the encoders' size: nothing is resized
    for number, values_of in enumerate(pixels):
        folder = tmp_path / "noise" / ("loud" if number < 2 else "quiet")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values_of).save(folder / f"{number}.png")
    data = load_task(Task("noise", "classification", "folder", "noise"), tmp_path)
    models = openers(tmp_path, kind, monkeypatch)
    cache = FeatureCache(tmp_path / "cache", workers=0)  # one for both: features of one preparation are not taken for the other's
    features = {name: torch.from_numpy(cache.images(data, model)[1]).float() for name, model in models.items()}
    expected = {}
    for name, (mean, std) in PREPARED.items():
        by_hand = (pixels / 255 - np.array(mean)) / np.array(std)
        with torch.no_grad():
            expected[name] = models["one"].vision_encoder(torch.from_numpy(by_hand).float().permute(0, 3, 1, 2)).cpu()
        torch.testing.assert_close(features[name], expected[name], rtol=2e-3, atol=2e-3)
    assert (expected["one"] - expected["other"]).abs().max() > 0.05, "the two are told apart"


# VOC with and without background


def test_voc_without_and_with_background_are_two_measurements_of_one_folder(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    truth = np.zeros((8, 8), dtype=np.uint8)  # half background, a quarter aeroplane, a quarter bicycle
    truth[:4, :4], truth[:4, 4:] = 1, 2
    border = np.full((1, 8), 255, dtype=np.uint8)
    Image.fromarray(np.zeros((9, 8, 3), dtype=np.uint8)).save(root / "JPEGImages" / "a.jpg")
    Image.fromarray(np.concatenate([truth, border])).save(root / "SegmentationClass" / "a.png")
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("a\n")
    found = {}
    for task in ("voc20", "voc21"):
        data = load_segmentation(TASKS[task], tmp_path)
        everywhere = np.full((9, 8), data.class_names.index("aeroplane"), dtype=np.int16)
        answers = segmentation_answers(data, [everywhere])
        entries = segmentation_entries(answers, task, "m", np.random.default_rng(0), 0.95, resamples=10)
        found[task] = {entry.metric: entry.value for entry in entries}
        found[task]["pixels"] = int(answers.confusion.sum())
    # without: right on half of the labelled 32; IoU 1/2 and 0. With: on a quarter of 64; IoU 1/4, 0 and 0
    assert found["voc20"] == pytest.approx({"miou": 1 / 4, "pixel_accuracy": 1 / 2, "mean_class_accuracy": 1 / 2, "pixels": 32})
    assert found["voc21"] == pytest.approx({"miou": 1 / 12, "pixel_accuracy": 1 / 4, "mean_class_accuracy": 1 / 3, "pixels": 64})


# the list of tasks


def test_the_list_names_every_task_once_and_says_where_its_data_belongs(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # a line stays a line in a narrow terminal
    main(EvalConfig(list_tasks=True))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(TASKS)
    for line, task in zip(lines, TASKS.values(), strict=True):
        assert line == describe(task), "nothing is taken for markup"
        assert f"{task.kind}, DATA_ROOT/{task.path}" in line
        assert not task.published or f"{task.published:,} images" in line
        assert task.kind != "segmentation" or MASKS[task.layout] in line
