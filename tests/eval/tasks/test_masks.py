"""Label maps and class names of every layout, written here by hand and read back."""

import numpy as np
import pytest
from PIL import Image

from align.common.errors import DataError, UsageError
from align.common.reject_codes import Reject
from align.sources.gate import Limits
from eval.tasks.masks import IGNORED, gate_labels, load_segmentation, split_names
from eval.tasks.registry import TASKS
from eval.tasks.task import Task

OWN = {"kind": "segmentation", "layout": "folder", "path": "own", "data": "images", "classes": "classes.txt"}


def picture(path, size=(8, 6), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)


def labels(path, values, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values))
    if palette:
        image.putpalette([n % 251 for n in range(768)])  # colors that are not the numbers
        assert image.mode == "P"
    image.save(path)


def whole(value, size=(8, 6)):
    return np.full(size[::-1], value, dtype=np.uint8)


@pytest.fixture
def own(tmp_path):
    """Four images of 8 x 6 with classes 0 to 2 and 255 ignored."""
    for n in range(4):
        picture(tmp_path / "own" / "images" / f"{n}.png", seed=n)
        values = whole(n % 3)
        values[0, 0] = 255
        labels(tmp_path / "own" / "labels" / f"{n}.png", values)
    (tmp_path / "own" / "classes.txt").write_text("cat, kitten\ndog\ngrass;lawn, meadow\n")
    return tmp_path


def load(root, **more):
    fraction = more.pop("max_reject_fraction", 1.0)
    return load_segmentation(Task("t", **{**OWN, **more}), root, max_reject_fraction=fraction)


def test_a_folder_is_read_with_synonyms_and_ignored_pixels(own):
    data = load(own)
    assert data.keys == ("0", "1", "2", "3") and data.rejected == {}
    assert data.class_names == ("cat", "dog", "grass")
    assert data.names == ("cat", "kitten", "dog", "grass", "lawn", "meadow")
    assert data.owner.tolist() == [0, 0, 1, 2, 2, 2]
    assert data.image(1).size == (8, 6) and data.image(1).mode == "RGB"
    truth = data.truth(2)
    assert truth.shape == (6, 8) and truth[0, 0] == IGNORED and (truth.ravel()[1:] == 2).all()


def test_another_value_may_be_ignored(own):
    labels(own / "own" / "labels" / "0.png", whole(3))
    with pytest.raises(DataError, match="label value 3"):
        load(own)
    for n in range(4):
        labels(own / "own" / "labels" / f"{n}.png", whole(3 if n == 0 else 1))
    assert (load(own, ignore=3).truth(0) == IGNORED).all()
    with pytest.raises(UsageError, match="ignore=2 is the number of a class"):
        load(own, ignore=2)


def test_a_value_that_is_no_class_is_an_error_that_names_file_and_value(own):
    values = whole(0)
    values[3, 3] = 7
    labels(own / "own" / "labels" / "2.png", values)
    with pytest.raises(DataError, match=r"labels/2\.png has the label value 7"):
        load(own)


def test_sixteen_bit_label_maps_hold_many_classes(own):
    (own / "own" / "classes.txt").write_text("\n".join(f"class {n}" for n in range(700)))
    labels(own / "own" / "labels" / "0.png", np.full((6, 8), 699, dtype=np.uint16))
    with pytest.raises(UsageError, match="ignore=255"):
        load(own)
    for n in (1, 2, 3):
        labels(own / "own" / "labels" / f"{n}.png", np.full((6, 8), 65_535, dtype=np.uint16))
    data = load(own, ignore=65_535)
    assert (data.truth(0) == 699).all() and (data.truth(1) == IGNORED).all()


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda root: (root / "labels" / "1.png").unlink(), "label_missing"),
        (lambda root: labels(root / "labels" / "1.png", whole(0, (6, 8))), "label_size"),
        (lambda root: damage(root / "labels" / "1.png"), "label_damaged"),
        (lambda root: (root / "labels" / "1.png").write_text("<html>"), "label_format"),
        (lambda root: damage(root / "images" / "1.png"), "image_damaged"),
        (lambda root: picture(root / "images" / "1.jpg"), "duplicate_key"),
    ],
)
def test_what_cannot_be_used_is_left_out_and_counted(own, spoil, code):
    before = load(own)
    spoil(own / "own")
    data = load(own)
    assert data.keys == ("0", "2", "3")
    assert data.rejected == {code: 2 if code == "duplicate_key" else 1}
    assert data.images_digest != before.images_digest and data.digest != before.digest
    with pytest.raises(DataError, match=code):
        load(own, max_reject_fraction=0.05)


def test_a_huge_label_map_is_refused_from_its_header(own):
    labels(own / "own" / "labels" / "1.png", whole(0, (400, 300)))
    data = (own / "own" / "labels" / "1.png").read_bytes()
    with pytest.raises(Reject, match="400x300"):
        gate_labels(data, Limits(max_pixels=1000))
    assert gate_labels(data, Limits()).shape == (300, 400)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_pictures_in_colors_are_no_label_maps(own, suffix):
    path = own / "own" / "labels" / "1.png"
    Image.new("RGB", (8, 6)).save(path, format={"png": "PNG", "jpg": "JPEG"}[suffix])
    with pytest.raises(DataError, match=r"1\.png: a label map is a PNG with one number a pixel"):
        load(own)


def test_digests_tell_labels_and_names_from_images(own):
    before = load(own)
    labels(own / "own" / "labels" / "1.png", whole(0))
    relabeled = load(own)
    assert relabeled.images_digest == before.images_digest and relabeled.digest != before.digest
    (own / "own" / "classes.txt").write_text("cat\ndog\ngrass\n")
    assert load(own).digest != relabeled.digest
    picture(own / "own" / "images" / "1.png", seed=9)
    assert load(own).images_digest != before.images_digest


def test_files_that_change_while_measuring_are_noticed(own):
    data = load(own)
    damage(own / "own" / "images" / "0.png")
    (own / "own" / "labels" / "0.png").unlink()
    for read in (data.image, data.truth):
        with pytest.raises(DataError, match="changed while it was measured"):
            read(0)


def test_images_may_lie_deeper_and_be_chosen_by_a_glob(own):
    picture(own / "own" / "images" / "night" / "4.jpg")
    labels(own / "own" / "labels" / "night" / "4.png", whole(1))
    assert load(own).keys == ("0", "1", "2", "3", "night/4")
    assert load(own, data="images/*/*.jpg").keys == ("night/4",)
    assert load(own, data="images/[23].png").keys == ("2", "3")


@pytest.mark.parametrize("missing", ["classes.txt", "images", "labels"])
def test_missing_parts_are_named(own, missing):
    (own / "own" / missing).rename(own / "elsewhere")
    with pytest.raises(DataError, match=rf"lacks .*{missing}"):
        load(own)


def test_a_missing_folder_says_what_belongs_there(tmp_path):
    with pytest.raises(DataError, match=r"ADEChallengeData2016: images/validation"):
        load_segmentation(TASKS["ade20k"], tmp_path)
    with pytest.raises(UsageError, match="protocol 'bg' is unknown"):
        load(tmp_path, protocol="bg")


def test_names_are_split_at_commas_and_semicolons():
    assert split_names(" person, man ;woman,") == ("person", "man", "woman")
    assert split_names("traffic light") == ("traffic light",)


def test_ade20k_counts_from_one_and_reads_the_names_of_its_table(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    values = whole(0)
    values[1], values[2] = 1, 150
    picture(root / "images" / "validation" / "ADE_val_1.jpg")
    labels(root / "annotations" / "validation" / "ADE_val_1.png", values)
    rows = [f"{n}\t0.1\t9\t9\t{'building, edifice' if n == 2 else f'thing {n}'}" for n in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]))
    data = load_segmentation(TASKS["ade20k"], tmp_path)
    assert len(data.class_names) == 150 and data.class_names[:2] == ("thing 1", "building")
    assert data.names[1:3] == ("building", "edifice") and data.owner[:4].tolist() == [0, 1, 1, 2]
    truth = data.truth(0)
    assert [truth[row, 0] for row in (0, 1, 2)] == [IGNORED, 0, 149]
    (root / "objectInfo150.txt").write_text("\n".join(f"own {n}, other {n}" for n in range(150)))  # one's own list of names
    assert load_segmentation(TASKS["ade20k"], tmp_path).names[:3] == ("own 0", "other 0", "own 1")
    (root / "objectInfo150.txt").write_text("wall\nfloor")
    with pytest.raises(DataError, match="names 2 classes, one a line; expected 150"):
        load_segmentation(TASKS["ade20k"], tmp_path)


def test_coco_stuff_has_171_classes_with_gaps_between_their_numbers(tmp_path):
    root = tmp_path / "coco_stuff164k"
    values = whole(255)
    values[0], values[1], values[2], values[3] = 0, 12, 181, 10
    picture(root / "images" / "val2017" / "000000000139.jpg")
    labels(root / "annotations" / "val2017" / "000000000139.png", values)
    names = {1: "person", 11: "fire hydrant", 12: "street sign", 13: "stop sign", 182: "wall-other"}
    lines = ["0: unlabeled", *(f"{n}: {names.get(n, f'stuff-{n}')}" for n in range(1, 183))]
    (root / "labels.txt").write_text("\n".join(lines))
    data = load_segmentation(TASKS["coco_stuff164k"], tmp_path)
    assert len(data.class_names) == 171
    assert "street sign" not in data.class_names and data.class_names[0] == "person" and data.class_names[-1] == "wall"
    assert data.class_names[10:13] == ("fire hydrant", "stop sign", "stuff 14")
    truth = data.truth(0)
    assert [truth[row, 0] for row in range(5)] == [0, 11, 170, 10, IGNORED]  # 11 is a gap, so 12 moves up by one
    (root / "labels.txt").write_text("\n".join(f"name {n}" for n in range(171)))
    assert load_segmentation(TASKS["coco_stuff164k"], tmp_path).class_names[11] == "name 11"
    labels(root / "annotations" / "val2017" / "000000000139.png", whole(11))
    with pytest.raises(DataError, match="label value 11"):
        load_segmentation(TASKS["coco_stuff164k"], tmp_path)


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    values = whole(0)
    values[1], values[2], values[3] = 1, 20, 255
    for key in ("2007_1", "2007_2"):
        picture(root / "JPEGImages" / f"{key}.jpg")
        labels(root / "SegmentationClass" / f"{key}.png", values, palette=True)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("2007_2\n")
    return tmp_path


def test_voc_without_background_ignores_what_is_not_labeled(voc):
    data = load_segmentation(TASKS["voc20"], voc)
    assert data.keys == ("2007_2",)  # those of val.txt only
    assert len(data.class_names) == 20 and data.class_names[0] == "aeroplane" and data.class_names[19] == "tv monitor"
    assert [data.truth(0)[row, 0] for row in range(5)] == [IGNORED, 0, 19, IGNORED, IGNORED]


def test_voc_with_background_has_a_class_of_many_names(voc):
    data = load_segmentation(TASKS["voc21"], voc)
    assert len(data.class_names) == 21 and data.class_names[:2] == ("background", "aeroplane")
    assert (data.owner == 0).sum() > 20 and {"sky", "wall"} <= set(data.names[: (data.owner == 0).sum()])
    assert [data.truth(0)[row, 0] for row in range(5)] == [0, 1, 20, IGNORED, 0]
    assert data.digest != load_segmentation(TASKS["voc20"], voc).digest
