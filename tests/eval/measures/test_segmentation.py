"""Sliding window, label maps on disk, mIoU and examples against plain loops, hand-worked cases and other libraries."""

import os
import signal
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score
from torch.nn.functional import interpolate, normalize
from torchvision import transforms

from align.common.errors import DamagedError, DataError, NonFiniteError, UsageError
from align.common.files import arm_failpoint
from align.encoders.text import load_text_encoder
from align.encoders.vision import VisionEncoder, load_vision_encoder
from align.model.dual_encoder import SailConfig, SailModel
from align.model.saving import save_model
from align.runtime.commandline import parse
from eval.measures import segmentation, windows
from eval.measures.config import EvalConfig
from eval.measures.segmentation import (
    Prompted,
    SegmentationAnswers,
    class_iou,
    confusion_matrix,
    label_maps,
    majority_answers,
    segmentation_answers,
    segmentation_entries,
    segmentation_examples,
    segmentation_metrics,
    segmentation_table,
)
from eval.measures.windows import Windows, best_classes, patch_cosines, segment
from eval.results.overlays import palette
from eval.results.records import load_results
from eval.run import main
from eval.tasks.masks import IGNORED, load_segmentation
from eval.tasks.task import Task
from tests.support.tiny_encoders import save, save_bert

COLORS = torch.eye(3)  # names: red, green, blue


@dataclass
class ColorModel:
    """Its patch embedding is the mean color of the patch, plus `leak` of the whole window's: a stand-in for an encoder with CLS."""

    patch_size: int = 4
    leak: float = 0.0
    seen: list = field(default_factory=list)
    device = torch.device("cpu")

    @property
    def vision_encoder(self):
        return self

    transform = transforms.Compose([transforms.Resize(8, interpolation=transforms.InterpolationMode.NEAREST), transforms.ToTensor()])

    @property
    def patch_fingerprint(self):
        return {"encoder": "colors", "patch": self.patch_size}

    def encode_patches(self, pixels):
        self.seen.append(tuple(pixels.shape))
        return torch.nn.functional.avg_pool2d(pixels, self.patch_size).flatten(2).transpose(1, 2)

    def project_patches(self, patches):
        return normalize(patches + self.leak * patches.mean(1, keepdim=True) + 1e-3, dim=-1)


def stripes(width=24, height=16, colors=(0, 1, 2)):
    values = np.zeros((height, width, 3), dtype=np.uint8)
    step = width // len(colors)
    for n, color in enumerate(colors):
        values[:, n * step : (n + 1) * step, color] = 255
    return Image.fromarray(values)


# the sliding window


def test_the_protocol_of_a_landscape_photo_by_hand():
    protocol = Windows()
    grid = protocol.grid((480, 640), 14)
    assert grid == (32, 43)  # 448 x 597.3 pixels: 42.7 patches
    places = list(protocol.places(grid, 14))
    assert [(r.start, r.stop, c.start, c.stop) for r, c in places] == [(0, 32, 0, 32), (0, 32, 11, 43)]
    wide = protocol.grid((448, 1344), 16)
    assert [c.start for _, c in protocol.places(wide, 16)] == [0, 14, 28, 42, 56]
    assert protocol.grid((1000, 500), 32) == (28, 14)


@pytest.mark.parametrize("patch", [4, 14, 16, 32])
@pytest.mark.parametrize("size", [(375, 500), (60, 61), (2000, 300), (448, 448), (30, 1400)])
@pytest.mark.parametrize("protocol", [Windows(), Windows(224, 448, 100), Windows(300, 224, 224), Windows(100, 70, 10)])
def test_windows_cover_every_patch_and_stay_inside(patch, size, protocol):
    grid = protocol.grid(size, patch)
    count = np.zeros(grid, dtype=int)
    shapes = set()
    for rows, columns in protocol.places(grid, patch):
        count[rows, columns] += 1
        shapes.add((rows.stop - rows.start, columns.stop - columns.start))
        assert rows.start >= 0 and rows.stop <= grid[0] and columns.start >= 0 and columns.stop <= grid[1]
    assert (count > 0).all() and len(shapes) == 1
    assert abs(min(grid) * patch - protocol.side) <= patch / 2 or min(grid) == 1
    [shape] = shapes
    assert shape == tuple(min(cells, max(1, round(protocol.window / patch))) for cells in grid)


@pytest.mark.parametrize("wrong", [{"stride": 0}, {"stride": 500}, {"side": 0}])
def test_windows_with_gaps_are_refused(wrong):
    with pytest.raises(UsageError, match="stride <= window"):
        Windows(**wrong)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_cosines_are_averaged_where_windows_overlap(batch_size):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 36, 3), dtype=np.uint8))
    protocol, weights = Windows(16, 12, 8), normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    model = ColorModel(leak=2.0)
    [cosines] = patch_cosines([model], photo, [weights], protocol, batch_size)
    assert sum(shape[0] for shape in model.seen) == 8 and max(shape[0] for shape in model.seen) == min(8, batch_size)
    pixels = transforms.ToTensor()(photo)
    total, count = torch.zeros(5, 4, 9), torch.zeros(4, 9)
    for top in (0, 4):  # windows of 12 pixels every 8; the last one ends with the image
        for left in (0, 8, 16, 24):
            embedded = model.project_patches(model.encode_patches(pixels[None, :, top : top + 12, left : left + 12]))[0]  # 9 patches
            for n in range(9):
                row, column = top // 4 + n // 3, left // 4 + n % 3
                count[row, column] += 1
                for name in range(5):
                    total[name, row, column] += embedded[n] @ weights[name]
    torch.testing.assert_close(cosines, total / count)


@pytest.mark.parametrize("names", [1, 7, 300])
@pytest.mark.parametrize("size", [(50, 70), (5, 4), (1, 33)])
def test_pixels_get_the_class_of_the_best_name(names, size, monkeypatch):
    cosines = torch.randn(names, 6, 9, generator=torch.Generator().manual_seed(1))
    owner = np.sort(np.random.default_rng(0).integers(0, 4, names))
    full = interpolate(cosines[None], size=size, mode="bilinear", align_corners=False)[0].softmax(0)  # (S, H, W), all at once
    of_class = torch.stack([full[owner == n].max(0).values if (owner == n).any() else torch.zeros(size) for n in range(4)])
    for budget in (windows._BYTES, 1, 10_000):
        monkeypatch.setattr(windows, "_BYTES", budget)
        found = best_classes(cosines, owner, size)
        assert found.shape == size and found.dtype == np.uint8
        assert (found == of_class.argmax(0).numpy()).mean() > 0.999  # rounding may turn a near tie
    assert best_classes(cosines, owner + 300, size).dtype == np.uint16


def test_a_picture_of_colors_is_segmented():
    [found] = segment([ColorModel()], stripes(), [COLORS], np.arange(3), Windows(16, 16, 8))
    assert found.shape == (16, 24)
    assert [found[8, column] for column in (2, 12, 22)] == [0, 1, 2]
    truth = np.repeat(np.arange(3), 8)[None].repeat(16, 0)
    assert (found == truth).all()
    [named] = segment([ColorModel()], stripes(), [COLORS[[2, 0, 1]]], np.array([0, 0, 1]), Windows(16, 16, 8))  # class 0: blue or red
    assert (named == np.array([0, 1, 0])[truth]).all()


def test_small_and_narrow_images_become_one_window():
    model = ColorModel()
    assert segment([model], stripes(6, 3), [COLORS], np.arange(3), Windows(16, 32, 32))[0].shape == (3, 6)
    assert model.seen == [(1, 3, 16, 32)]


def test_models_with_other_patches_or_without_numbers_are_refused():
    model = ColorModel()
    model.patch_size = 8
    model.encode_patches = ColorModel(4).encode_patches
    with pytest.raises(UsageError, match="16 patches, not 2 x 2"):
        segment([model], stripes(16, 16, (0,)), [COLORS], np.arange(3), Windows(16, 16, 16))
    model.encode_patches = lambda pixels: torch.full((len(pixels), 4, 3), torch.nan)
    with pytest.raises(NonFiniteError, match="not finite"):
        segment([model], stripes(16, 16, (0,)), [COLORS], np.arange(3), Windows(16, 16, 16))


# counts and metrics


def test_the_confusion_matrix_is_a_plain_count():
    random = np.random.default_rng(0)
    truth, predicted = random.integers(-1, 5, (13, 7)).astype(np.int16), random.integers(0, 5, (13, 7)).astype(np.uint8)
    expected = np.zeros((5, 5), dtype=int)
    for row in range(13):
        for column in range(7):
            if truth[row, column] != IGNORED:
                expected[truth[row, column], predicted[row, column]] += 1
    found = confusion_matrix(truth, predicted, 5)
    assert found.dtype == np.int64 and (found == expected).all()


def counts_of(confusion):
    confusion = np.asarray(confusion)
    right = confusion.diagonal()
    return right, confusion.sum(0) - right, confusion.sum(1) - right


def test_miou_by_hand():
    # 4 classes: class 2 is nowhere, class 3 is only ever predicted
    tp, fp, fn = counts_of([[6, 2, 0, 2], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    iou = class_iou(tp, fp, fn)
    assert iou[:2].tolist() == pytest.approx([6 / 11, 3 / 6]) and np.isnan(iou[2]) and iou[3] == 0
    values = segmentation_metrics(tp, fp, fn)
    assert values["miou"] == pytest.approx((6 / 11 + 1 / 2 + 0) / 3)
    assert values["pixel_accuracy"] == pytest.approx(9 / 14)
    assert values["mean_class_accuracy"] == pytest.approx((6 / 10 + 3 / 4) / 2)


def test_miou_is_that_of_scikit_learn():
    random = np.random.default_rng(1)
    truth, predicted = random.integers(0, 6, 500), random.integers(0, 6, 500)
    values = segmentation_metrics(*counts_of(confusion_matrix(truth, predicted, 6)))
    assert values["miou"] == pytest.approx(jaccard_score(truth, predicted, average="macro"))
    assert values["pixel_accuracy"] == pytest.approx((truth == predicted).mean())


def answers_of(matrices):
    counts = [np.stack(part) for part in zip(*map(counts_of, matrices), strict=True)]
    return SegmentationAnswers(np.sum(matrices, axis=0), *counts)


def test_entries_are_of_the_whole_set_with_intervals_over_images():
    answers = answers_of([[[90, 10], [0, 0]], [[0, 0], [5, 5]], [[3, 1], [2, 4]]])
    entries = segmentation_entries(answers, "t", "m", np.random.default_rng(0), 0.95)
    assert [entry.metric for entry in entries] == ["miou", "pixel_accuracy", "mean_class_accuracy"]
    miou, accuracy, _ = entries
    assert miou.value == pytest.approx((93 / 111 + 9 / 27) / 2)  # counts of all images together, not a mean over images
    assert accuracy.value == pytest.approx(102 / 120)
    assert all(entry.low <= entry.value <= entry.high and entry.n == 3 for entry in entries)
    again = segmentation_entries(answers, "t", "m", np.random.default_rng(0), 0.95)
    assert again == entries
    draws = np.random.default_rng(5).integers(0, 3, (4000, 3))  # the plain bootstrap
    plain = [answers.tp[rows].sum() / (answers.tp + answers.fn)[rows].sum() for rows in draws]
    assert (accuracy.low, accuracy.high) == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.02)
    [only, *_] = segmentation_entries(answers_of([[[3, 1], [0, 4]]]), "t", "m", np.random.default_rng(0), 0.95)
    assert only.low == only.value == only.high


def test_the_majority_is_counted_from_the_true_labels():
    answers = answers_of([[[2, 6], [1, 1]], [[0, 2], [3, 0]]])  # 10 pixels of class 0, 5 of class 1
    most = majority_answers(answers)
    assert most.confusion.tolist() == [[10, 0], [5, 0]]
    assert (most.tp.tolist(), most.fp.tolist(), most.fn.tolist()) == ([[8, 0], [2, 0]], [[2, 0], [3, 0]], [[0, 2], [0, 3]])
    values = segmentation_metrics(*(part.sum(0) for part in (most.tp, most.fp, most.fn)))
    assert values["miou"] == pytest.approx((10 / 15 + 0) / 2) and values["pixel_accuracy"] == pytest.approx(10 / 15)


def test_the_table_has_a_row_an_image():
    table = segmentation_table(answers_of([[[2, 6], [1, 1]], [[0, 2], [3, 0]]]), ["a", "b"])
    assert table.to_pylist() == [
        {"key": "a", "pixels": 10, "right": 3, "tp": [2, 1], "fp": [1, 6], "fn": [6, 1]},
        {"key": "b", "pixels": 5, "right": 0, "tp": [0, 0], "fp": [3, 2], "fn": [2, 3]},
    ]


# label maps of a task, on disk

ORDERS = [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1), (2, 0, 1), (1, 0, 2), (0, 1, 2)]
PROTOCOL = Windows(16, 16, 8)
SENTENCES = (("red",), ("green", "a green one"), ("blue",))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Seven pictures of 24 x 16 whose left column does not count; 2 label maps a shard, so 4 shards."""
    monkeypatch.setattr(segmentation, "SHARD_IMAGES", 2)
    for part in ("images", "labels"):
        (tmp_path / "colors" / part).mkdir(parents=True)
    for n, order in enumerate(ORDERS):
        stripes(colors=order).save(tmp_path / "colors" / "images" / f"{n}.png")
        truth = np.repeat(np.array(order, dtype=np.uint8), 8)[None].repeat(16, 0)
        truth[:, 0] = 255
        Image.fromarray(truth).save(tmp_path / "colors" / "labels" / f"{n}.png")
    (tmp_path / "colors" / "classes.txt").write_text("red\ngreen\nblue")
    return load_segmentation(Task("colors", "segmentation", "folder", "colors", classes="classes.txt"), tmp_path)


def make(data, cache, model=None, fingerprint=None, sentences=SENTENCES, protocol=PROTOCOL, weights=COLORS, **more):
    one = Prompted(model or ColorModel(), fingerprint or {"heads": "1"}, weights, sentences)
    return label_maps(data, [one], cache, windows=protocol, **more)[0]


def test_a_task_is_measured_and_a_second_run_touches_no_encoder(data, tmp_path):
    seen = []
    maps = make(data, tmp_path, report=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 7) for n in range(1, 8)]
    answers = segmentation_answers(data, maps)
    assert (answers.confusion == np.diag(answers.confusion.diagonal())).all()
    assert answers.tp.sum() == answers.confusion.sum() == 7 * 16 * 23 and answers.fp.sum() == answers.fn.sum() == 0
    assert answers.tp[1].tolist() == [16 * 8, 16 * 8, 16 * 7]  # blue lost the column that does not count
    again = ColorModel()
    second = make(data, tmp_path, again)
    assert again.seen == [] and all((a == b).all() for a, b in zip(maps, second, strict=True))
    assert [second[n].tolist() for n in range(7)] == [one.tolist() for one in maps]


def test_a_model_folder_is_measured_from_the_command_line(data, tmp_path, monkeypatch, capsys):
    vision = load_vision_encoder(place := str(save(tmp_path / "vision", "dinov2")))
    text = load_text_encoder(words := save_bert(tmp_path / "text")[0])
    settings = SailConfig(
        vision={"name": place}, text={"name": words}, width=8, head="glu", vision_fingerprint=vision.fingerprint,
        text_fingerprint=text.fingerprint, vision_width=vision.feature_width, text_width=text.width,
    )  # fmt: skip
    text.tokenizer.save_pretrained(tmp_path / "tokenizer")
    save_model(SailModel(settings).initialize(1), tmp_path / "model", tmp_path / "tokenizer")
    (tmp_path / "task.yaml").write_text(
        "id: mine\nkind: segmentation\nlayout: folder\npath: colors\nclasses: classes.txt\ntemplates: simple\nnote: drawn."
    )
    passes = []
    whole = VisionEncoder.dense
    monkeypatch.setattr(VisionEncoder, "dense", lambda self, pixels: passes.append(tuple(pixels.shape)) or whole(self, pixels))

    def measure(*windows):
        flags = ["--model", tmp_path / "model", "--tasks", tmp_path / "task.yaml", "--data-root", tmp_path, "--no-report"]
        main(parse(EvalConfig, "eval", [*map(str, [*flags, "--output", tmp_path / "out"]), *windows]))
        return load_results(tmp_path / "out")

    results = measure("--windows", "56", "56", "28")
    side = 56 // vision.patch_size * vision.patch_size
    assert {shape[2:] for shape in passes} == {(side, side)} and len(passes) == 7  # the untrained twin needs no pass of its own
    assert {entry.model for entry in results.entries} == {"trained", "untrained", "majority"}
    assert results.tasks[0].note == "shorter side 56, windows of 56, stride 28 pixels, not the default. drawn."
    again = measure("--windows", "56", "56", "28")
    assert len(passes) == 7 and again.entries == results.entries
    with pytest.raises(UsageError, match="SIDE WINDOW STRIDE"):
        EvalConfig(model=("m",), tasks=("t",), windows=(56, 28, 56))


def test_answers_are_those_of_a_plain_loop(data, tmp_path):
    maps = make(data, tmp_path, weights=COLORS[[1, 0, 2]])  # takes red for green
    answers = segmentation_answers(data, maps)
    for number in range(7):
        truth, predicted = data.truth(number), maps[number]
        for n in range(3):
            counted = truth != IGNORED
            assert answers.tp[number, n] == ((truth == n) & (predicted == n)).sum()
            assert answers.fp[number, n] == (counted & (truth != n) & (predicted == n)).sum()
            assert answers.fn[number, n] == ((truth == n) & (predicted != n)).sum()
    values = segmentation_metrics(answers.tp.sum(0), answers.fp.sum(0), answers.fn.sum(0))
    assert values["miou"] == pytest.approx(1 / 3)


def test_models_with_one_encoder_share_its_forward_pass(data, tmp_path):
    trained, twin, other = ColorModel(), ColorModel(leak=2.0), ColorModel(patch_size=8)
    apart = [make(data, tmp_path / f"{n}", model, {"heads": str(n)}) for n, model in enumerate((ColorModel(), ColorModel(leak=2.0)))]
    make(data, tmp_path, trained, {"heads": "0"})
    trained.seen.clear()
    (next((tmp_path / "segmentation").glob("*")) / sorted(os.listdir(apart[0].folder))[1]).unlink()  # two of its images are gone
    named = [Prompted(model, {"heads": str(n)}, COLORS, SENTENCES) for n, model in enumerate((trained, twin, other))]
    seen = []
    maps = label_maps(data, named, tmp_path, windows=PROTOCOL, report=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 7) for n in range(1, 8)]
    assert len(trained.seen) == 2 and len(twin.seen) == 5 and len(other.seen) == 7  # the twin's own pass only where it was alone
    for mine, alone in zip(maps[:2], apart, strict=True):
        assert all((a == b).all() for a, b in zip(mine, alone, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": {"heads": "2"}},
        {"sentences": (("red",), ("green",), ("blue",))},
        {"protocol": Windows(16, 8, 8)},
    ],
)
def test_another_model_prompt_or_protocol_is_another_cache(data, tmp_path, change):
    make(data, tmp_path)
    model = ColorModel()
    make(data, tmp_path, model, **change)
    assert sum(shape[0] for shape in model.seen) >= 7


def test_a_moved_encoder_folder_is_the_same_model(data, tmp_path):
    make(data, tmp_path, fingerprint={"vision encoder": "a", "vision weights": "1"})
    model = ColorModel()
    make(data, tmp_path, model, fingerprint={"vision encoder": "b", "vision weights": "1"})
    assert model.seen == []


@pytest.mark.parametrize("boundary", ["write:2", "rename:3", "renamed:3"])
def test_a_killed_run_goes_on_where_it_was(data, tmp_path, forked, boundary):
    def killed():
        arm_failpoint(boundary)
        make(data, tmp_path)

    assert forked(killed) == -signal.SIGKILL
    model, seen = ColorModel(), []
    maps = make(data, tmp_path, model, report=lambda done, total: seen.append(done))
    shards = {"write:2": 1, "rename:3": 2, "renamed:3": 3}[boundary]
    assert seen == list(range(2 * shards + 1, 8)) and len(model.seen) == len(seen)
    assert not list(maps.folder.glob("*.partial"))
    straight = make(data, tmp_path / "straight")
    assert {path.name for path in maps.folder.glob("*.parquet")} == {path.name for path in straight.folder.glob("*.parquet")}


def test_damaged_maps_are_made_again(data, tmp_path):
    maps = make(data, tmp_path)
    names = sorted(path.name for path in maps.folder.glob("*.parquet"))
    for position in (-1, 0, 100):
        content = bytearray((maps.folder / names[1]).read_bytes())
        content[position] ^= 1
        (maps.folder / names[1]).write_bytes(content)
        with pytest.raises(DamagedError, match="run again"):
            list(maps)
        model = ColorModel()
        make(data, tmp_path, model)
        assert len(model.seen) == 2
        assert sorted(path.name for path in maps.folder.glob("*.parquet")) == names


def test_label_maps_without_a_counted_pixel_are_no_measurement(data, tmp_path):
    maps = make(data, tmp_path)
    for n in range(7):
        Image.fromarray(np.full((16, 24), 255, dtype=np.uint8)).save(tmp_path / "colors" / "labels" / f"{n}.png")
    with pytest.raises(DataError, match="no pixel of its label maps counts"):
        segmentation_answers(data, maps)


def test_examples_name_what_is_there_and_write_pictures(data, tmp_path):
    wrong = COLORS[[0, 1, 1]] * torch.tensor([[1.0], [1.0], [0.0]])  # never blue
    maps = {"good": make(data, tmp_path / "cache"), "bad one": make(data, tmp_path / "cache", fingerprint={"heads": "2"}, weights=wrong)}
    shown = segmentation_examples(tmp_path, data, maps, 3, np.random.default_rng(0))
    assert len({item["image"] for item in shown["items"]}) == 3
    colors = palette(3)
    for item in shown["items"]:
        assert item["key"] == data.keys[item["image"]]
        assert {one["name"] for one in item["classes"]} == {"red", "green", "blue"}
        assert all(one["color"] == "#" + bytes(colors[data.class_names.index(one["name"])]).hex() for one in item["classes"])
        assert item["answers"]["good"]["pixel_accuracy"] == 1 and item["answers"]["bad one"]["pixel_accuracy"] < 0.7
        for path in (item["truth"], *(said["overlay"] for said in item["answers"].values())):
            assert path.startswith("colors/") and Image.open(tmp_path / "examples" / path).size == (24, 16)
    assert shown == segmentation_examples(tmp_path, data, maps, 3, np.random.default_rng(0))
    assert len(segmentation_examples(tmp_path, data, maps, 99, np.random.default_rng(0))["items"]) == 7
    assert not [name for name in os.listdir(tmp_path / "examples" / "colors") if name.endswith(".partial")]
