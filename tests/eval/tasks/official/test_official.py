"""Official layouts: small copies of each as its archives unpack, with training images and other files that must not be read."""

import csv
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import Flowers102

from align.common.errors import DataError, UsageError
from eval.tasks.data import load_task, read_images
from eval.tasks.masks import LAYOUTS
from eval.tasks.official.manifest import READERS, write_manifest
from eval.tasks.prompts import TEMPLATES, package_classes, prompt_set
from eval.tasks.registry import TASKS, describe, find_task
from eval.tasks.task import MASKS, Task
from tests.support.archives import jpeg, write_tar

CALTECH_CATEGORIES = (
    "accordion airplanes anchor ant barrel bass beaver binocular bonsai brain brontosaurus buddha butterfly camera cannon car_side "
    "ceiling_fan cellphone chair chandelier cougar_body cougar_face crab crayfish crocodile crocodile_head cup dalmatian dollar_bill "
    "dolphin dragonfly electric_guitar elephant emu euphonium ewer Faces Faces_easy ferry flamingo flamingo_head garfield gerenuk "
    "gramophone grand_piano hawksbill headphone hedgehog helicopter ibis inline_skate joshua_tree kangaroo ketch lamp laptop Leopards "
    "llama lobster lotus mandolin mayfly menorah metronome minaret Motorbikes nautilus octopus okapi pagoda panda pigeon pizza platypus "
    "pyramid revolver rhino rooster saxophone schooner scissors scorpion sea_horse snoopy soccer_ball stapler starfish stegosaurus "
    "stop_sign strawberry sunflower tick trilobite umbrella watch water_lilly wheelchair wild_cat windsor_chair wrench yin_yang"
)
CALTECH = CALTECH_CATEGORIES.split()
EUROSAT = (
    *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"),
    *("Pasture", "PermanentCrop", "Residential", "River", "SeaLake"),
)


def photo(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(number))


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def imagenet(root):
    for number in range(1000):
        (root / f"imagenet/val/n{number * 7:08d}").mkdir(parents=True)
    for name in ("n00000000/ILSVRC2012_val_00000002", "n00000007/ILSVRC2012_val_00000001", "n00006993/ILSVRC2012_val_00000003"):
        photo(root / f"imagenet/val/{name}.JPEG")
    photo(root / "imagenet/train/n00000007/n00000007_1.JPEG")
    return [
        ("n00000000/ILSVRC2012_val_00000002", 0, "tench"),
        ("n00000007/ILSVRC2012_val_00000001", 1, "goldfish"),
        ("n00006993/ILSVRC2012_val_00000003", 999, "toilet paper"),
    ]


def imagenetv2(root):
    folder = root / "imagenetv2-matched-frequency-format-val"
    for number in range(1000):
        (folder / str(number)).mkdir(parents=True)
    for number in (2, 10):
        photo(folder / f"{number}/abc.jpeg", number)
    return [("2/abc", 2, "great white shark"), ("10/abc", 10, "brambling")]


def food101(root):
    folder = root / "food-101"
    text(folder / "meta/classes.txt", "apple_pie", "beef_tartare", "waffles")
    text(folder / "meta/test.txt", "beef_tartare/7", "apple_pie/3", "waffles/9")
    text(folder / "meta/train.txt", "apple_pie/1")
    for name in ("beef_tartare/7", "apple_pie/3", "apple_pie/1"):
        photo(folder / f"images/{name}.jpg")
    return [("beef_tartare/7", 1, "beef tartare"), ("apple_pie/3", 0, "apple pie")], {"file_missing": 1}


def cifar(root, folder, batch, names, classes, head):
    pixels = np.arange(2 * 3072).reshape(2, 3072) % 251
    data = b"".join(bytes(head) + bytes([label]) + row.astype(np.uint8).tobytes() for label, row in zip((2, 0), pixels, strict=True))
    (root / folder).mkdir(parents=True)
    (root / folder / batch).write_bytes(data)
    text(root / folder / names, *classes, "")
    return [("00000", 2, classes[2].replace("_", " ")), ("00001", 0, classes[0])]


def cifar10(root):
    return cifar(root, "cifar-10-batches-bin", "test_batch.bin", "batches.meta.txt", ("airplane", "automobile", "bird"), [])


def cifar100(root):
    return cifar(root, "cifar-100-binary", "test.bin", "fine_label_names.txt", ("apple", "bear", "aquarium_fish"), [1])


def sun397(root):
    folder = root / "SUN397"
    text(folder / "ClassName.txt", "/a/abbey", "/a/apse/indoor", "/b/bus_depot/outdoor")
    text(folder / "Testing_01.txt", "/b/bus_depot/outdoor/sun_a.jpg", "/a/abbey/sun_b.jpg")
    text(folder / "Training_01.txt", "/a/abbey/sun_c.jpg")
    for name in ("b/bus_depot/outdoor/sun_a", "a/abbey/sun_b", "a/abbey/sun_c"):
        photo(folder / f"{name}.jpg")
    return [("b/bus_depot/outdoor/sun_a", 2, "bus depot outdoor"), ("a/abbey/sun_b", 0, "abbey")]


def cars(root, labels=(3, 1)):
    folder = root / "stanford_cars"
    fields = [("bbox_x1", object), ("class", object), ("fname", object)]
    (folder / "devkit").mkdir(parents=True)
    for name, part in (("cars_test_annos_withlabels.mat", "cars_test"), ("devkit/cars_train_annos.mat", "cars_train")):
        rows = [(7, label, f"{number:05d}.jpg") for number, label in enumerate(labels, start=1)]
        savemat(folder / name, {"annotations": np.array([rows], dtype=fields) if len(rows) > 1 else np.array(rows, dtype=fields)})
        for number in range(1, len(labels) + 1):
            photo(folder / f"{part}/{number:05d}.jpg")
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo Convertible 2012"], dtype=object)
    savemat(folder / "devkit/cars_meta.mat", {"class_names": names})
    return [("00001", 2, "smart fortwo Convertible 2012"), ("00002", 0, "AM General Hummer SUV 2000")]


def fgvc_aircraft(root):
    folder = root / "fgvc-aircraft-2013b/data"
    text(folder / "variants.txt", "707-320", "Beechcraft 1900", "Yak-42")
    text(folder / "images_variant_test.txt", "0123456 Beechcraft 1900", "0000007 707-320")
    text(folder / "images_variant_trainval.txt", "0000001 Yak-42")
    for name in ("0123456", "0000007", "0000001"):
        photo(folder / f"images/{name}.jpg")
    return [("0123456", 1, "Beechcraft 1900"), ("0000007", 0, "707-320")]


def dtd(root):
    folder = root / "dtd"
    for number in range(45):
        (folder / f"images/t{number:02d}").mkdir(parents=True)
    text(folder / "labels/test1.txt", "zigzagged/zigzagged_0001.jpg", "banded/banded_0002.jpg")
    text(folder / "labels/train1.txt", "banded/banded_0001.jpg")
    for name in ("zigzagged/zigzagged_0001", "banded/banded_0002", "banded/banded_0001"):
        photo(folder / f"images/{name}.jpg")
    return [("zigzagged/zigzagged_0001", 46, "zigzagged"), ("banded/banded_0002", 0, "banded")]


def pets(root, german=15):
    folder = root / "oxford-iiit-pet"
    text(folder / "annotations/test.txt", "Abyssinian_201 1 1 1", f"german_shorthaired_7 {german} 2 9", "yorkshire_terrier_9 37 2 25")
    text(folder / "annotations/trainval.txt", "Abyssinian_100 1 1 1")
    for name in ("Abyssinian_201", "german_shorthaired_7", "yorkshire_terrier_9", "Abyssinian_100"):
        photo(folder / f"images/{name}.jpg")
    rows = [("Abyssinian_201", 0, "Abyssinian"), ("german_shorthaired_7", 14, "German Shorthaired")]
    return [*rows, ("yorkshire_terrier_9", 36, "Yorkshire Terrier")]


def caltech101(root):
    place = root / "caltech101/101_ObjectCategories"
    for name in (*CALTECH, "BACKGROUND_Google"):
        (place / name).mkdir(parents=True)
    for name in ("BACKGROUND_Google", "Faces", "accordion", "car_side", "yin_yang"):
        photo(place / name / "image_0001.jpg")
    order = sorted(CALTECH)
    found = [("Faces", "off-center face"), ("accordion", "accordion"), ("car_side", "side of a car"), ("yin_yang", "yin and yang symbol")]
    return [(f"{name}/image_0001", order.index(name), said) for name, said in found]


def flowers(root):
    folder = root / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[77, 1, 102, 5]], dtype=np.uint8)})
    savemat(folder / "setid.mat", {"trnid": np.array([[1]]), "valid": np.array([[4]]), "tstid": np.array([[3, 2]], dtype=np.uint16)})
    for number in (1, 2, 3, 4):
        photo(folder / f"jpg/image_{number:05d}.jpg")
    return [("image_00003", 101, "blackberry lily"), ("image_00002", 0, "pink primrose")]


def eurosat(root):
    for name in EUROSAT:
        photo(root / f"eurosat/2750/{name}/{name}_1.jpg")
    said = ("annual crop land", "forest", "brushland or shrubland", "highway or road", "industrial buildings or commercial buildings")
    said += ("pasture land", "permanent crop land", "residential buildings or homes or apartments", "river", "lake or sea")
    return [(f"{name}/{name}_1", number, said[number]) for number, name in enumerate(EUROSAT)]


def ucf101(root):
    lists = root / "ucf101/ucfTrainTestlist"
    text(lists / "classInd.txt", "1 ApplyEyeMakeup", "2 Archery", "3 YoYo")
    text(lists / "testlist01.txt", "YoYo/v_YoYo_g01_c01.avi", "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c02.avi")
    text(lists / "trainlist01.txt", "Archery/v_Archery_g08_c01.avi 2")
    for name in ("Yo_Yo/v_YoYo_g01_c01", "Apply_Eye_Makeup/v_ApplyEyeMakeup_g01_c02", "Archery/v_Archery_g08_c01"):
        photo(root / f"ucf101/UCF-101-midframes/{name}.jpg")
    return [("Yo_Yo/v_YoYo_g01_c01", 2, "Yo Yo"), ("Apply_Eye_Makeup/v_ApplyEyeMakeup_g01_c02", 0, "Apply Eye Makeup")]


def cub(root):
    folder = root / "CUB_200_2011"
    text(folder / "classes.txt", "1 001.Black_footed_Albatross", "2 002.Laysan_Albatross")
    names = ("001.Black_footed_Albatross/B_0046_18", "001.Black_footed_Albatross/B_0009_34", "002.Laysan_Albatross/L_0001_5")
    text(folder / "images.txt", *(f"{number} {name}.jpg" for number, name in enumerate(names, start=1)))
    text(folder / "image_class_labels.txt", "1 1", "2 1", "3 2")
    text(folder / "train_test_split.txt", "1 0", "2 1", "3 0")
    for name in names:
        photo(folder / f"images/{name}.jpg")
    return [(names[0], 0, "Black footed Albatross"), (names[2], 1, "Laysan Albatross")]


CLASSIFICATION = {
    one.__name__: one
    for one in (
        *(imagenet, imagenetv2, food101, cifar10, cifar100, sun397, cars, fgvc_aircraft),
        *(dtd, pets, caltech101, flowers, eurosat, ucf101, cub),
    )
}


@pytest.mark.parametrize("layout", CLASSIFICATION)
def test_a_classification_set_in_its_official_layout(tmp_path, layout):
    made = CLASSIFICATION[layout](tmp_path / "data")
    expected, rejected = made if isinstance(made, tuple) else (made, {})
    task = TASKS["imagenet1k" if layout == "imagenet" else layout]
    data = load_task(task, tmp_path / "data", cache=tmp_path / "cache")
    named = [(key, int(label), data.class_names[label]) for key, label in zip(data.keys, data.labels, strict=True)]
    assert named == expected
    assert data.rejected == rejected
    assert not (tmp_path / "data" / ".manifests").exists()
    images = dict(read_images(data, range(len(data.keys))))
    assert all(Image.open(io.BytesIO(image)).size[0] in (24, 32) for image in images.values()), "the very images can be read again"
    prompts = prompt_set(data.task.templates, data.class_names, data.folder)
    assert len(prompts.sentences) == len(data.class_names) and data.class_names[0] in prompts.sentences[0][0]
    assert "not the published protocol" in data.task.note if task.published else "no test split" in data.task.note


def test_cifar_images_are_planes_of_red_green_blue(tmp_path):
    cifar100(tmp_path)
    data = load_task(TASKS["cifar100"], tmp_path)
    image = np.asarray(Image.open(io.BytesIO(dict(read_images(data, [1]))[1])))
    value = lambda channel, row, column: (3072 + channel * 1024 + row * 32 + column) % 251  # noqa: E731
    assert [image[3, 9, channel] for channel in range(3)] == [value(channel, 3, 9) for channel in range(3)]
    assert (tmp_path / ".manifests/manifests/cifar100.parquet").exists()


def test_python_versions_of_cifar_are_refused_because_they_are_pickles(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match=r"pickles.*cifar-10-binary\.tar\.gz"):
        load_task(TASKS["cifar10"], tmp_path)


def test_packaged_names_are_in_the_order_of_the_labels(tmp_path):
    ours, theirs = package_classes("flowers"), Flowers102.classes
    differing = [pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]]
    assert len(differing) < 10 and not any(one in theirs for one, _ in differing), "spelled otherwise, not placed otherwise"
    caltech101(tmp_path)
    names = load_task(TASKS["caltech101"], tmp_path).class_names
    packaged = package_classes("caltech101")
    assert names == packaged[1:], "the packaged order is that of the sorted folders, the background first"


def written(name, content):
    return lambda root: (root / name).write_text(content)


def renamed(name, to):
    return lambda root: (root / name).rename((root / name).with_name(to))


def crashing(root):
    """A damaged byte in a .mat file that makes scipy's reader crash the process, not raise."""
    path = root / "stanford_cars/devkit/cars_meta.mat"
    savemat(path, {"class_names": np.array(["a", "b"], dtype=object)})
    data = bytearray(path.read_bytes())
    data[144] = 14
    path.write_bytes(data)


_PETS = "oxford-iiit-pet/annotations/test.txt"


@pytest.mark.parametrize(
    ("task", "damage", "says"),
    [
        ("imagenet1k", renamed("imagenet/val/n00000007", ".gone"), "999 class"),
        ("imagenet1k", renamed("imagenet/val/n00000007", "goldfish"), "'goldfish' is not a WordNet id"),
        ("food101", written("food-101/meta/test.txt", "apple_pies/3"), "'apple_pies' is not a known class; did you mean 'apple_pie'"),
        ("food101", written("food-101/meta/test.txt", "apple_pie/404"), "none of the 1 samples.*file_missing 1"),
        ("pets", written(_PETS, "Abyssinian_201"), "line 1: expected 3 fields"),
        ("pets", written(_PETS, "Abyssinian_201 38 1 1"), "'38' is no class; expected 1 to 37"),
        ("pets", written(_PETS, "Abyssinian_201 2 1 1"), "label of 'American Bulldog'"),
        ("cifar10", written("cifar-10-batches-bin/test_batch.bin", "x" * 100), "not a multiple of 3073"),
        ("caltech101", renamed("caltech101/101_ObjectCategories/yin_yang", "yang"), "yang are no categories"),
        ("eurosat", renamed("eurosat/2750/River", "Rivers"), "expected AnnualCrop"),
        ("flowers", written("flowers-102/setid.mat", "no matlab"), "'tstid' could be read"),
        ("flowers", lambda root: savemat(root / "flowers-102/setid.mat", {"tstid": np.array([[1, 5]])}), "beyond the 4"),
        ("cars", crashing, r"'class_names' could be read \(exit code -11\)"),
        ("cars", renamed("stanford_cars/cars_test_annos_withlabels.mat", "other.mat"), "missing: cars_test_annos_withlabels.mat"),
        ("dtd", written("dtd/classnames.txt", "banded"), "names 1 classes, the data has 47"),
    ],
)
def test_data_that_would_give_wrong_labels_is_refused(tmp_path, task, damage, says):
    CLASSIFICATION["imagenet" if task == "imagenet1k" else task](tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=says):
        load_task(TASKS[task], tmp_path)


def test_own_names_and_templates_in_the_data_sets_folder_win_and_need_no_package(tmp_path, monkeypatch):
    pets(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'sail-upgrade-kit\[clip\]'"):
        load_task(TASKS["pets"], tmp_path)
    text(tmp_path / "oxford-iiit-pet/classnames.txt", *(f"breed {number}" for number in range(37)))
    text(tmp_path / "oxford-iiit-pet/zeroshot_classification_templates.txt", "my {c}")
    data = load_task(TASKS["pets"], tmp_path)
    assert data.class_names[14] == "breed 14"
    assert prompt_set(data.task.templates, data.class_names, data.folder).sentences[14] == ("my breed 14",)


def test_clip_benchmarks_tars_stand_in_for_an_official_folder(tmp_path):
    folder = tmp_path / "wds_vtab-pets"
    write_tar(folder / "test/0.tar", [("s0.jpg", jpeg(0)), ("s0.cls", b"1"), ("s1.jpg", jpeg(1)), ("s1.cls", b"0")])
    text(folder / "classnames.txt", "cat", "dog")
    text(folder / "zeroshot_classification_templates.txt", "a photo of a {c}, a type of pet.")
    data = load_task(TASKS["pets"], tmp_path)
    assert (data.keys, data.class_names, data.labels.tolist()) == (("s0", "s1"), ("cat", "dog"), [1, 0])
    assert data.task.id == "pets" and "tars in wds_vtab-pets" in data.task.note
    assert prompt_set(data.task.templates, data.class_names, data.folder).id.startswith("templates:")
    imagenet = tmp_path / "wds_imagenet1k"
    write_tar(imagenet / "test/0.tar", [("s0.jpg", jpeg(0)), ("s0.cls", b"1"), ("s1.jpg", jpeg(1)), ("s1.cls", b"0")])
    text(imagenet / "classnames.txt", "cat", "dog")
    text(imagenet / "zeroshot_classification_templates.txt", *reversed(TEMPLATES["imagenet80"]))
    assert load_task(TASKS["imagenet1k"], tmp_path).task.templates == "imagenet80", "the published 80, in whatever order"


def karpathy(root, path="coco/dataset_coco.json", place="val2014", count=6, **extra):
    images = []
    for number, split in enumerate(("test", "train", "restval", "test", "val")):
        name = f"COCO_{number:012d}.jpg"
        sentences = [{"tokens": ["a"], "raw": f"caption {n} of {number}", "imgid": number, "sentid": n} for n in range(count)]
        images.append({"filename": name, "imgid": number, "split": split, "sentences": sentences, "sentids": [], "cocoid": number})
        images[-1] |= {"filepath": place} if place else {}
        photo(root / (f"coco/{place}" if place else "flickr30k/flickr30k-images") / name, number)
    text(root / path, json.dumps({"images": images, "dataset": "coco", **extra}))


def test_the_karpathy_test_split_takes_five_captions_of_each_image(tmp_path):
    karpathy(tmp_path)
    data = load_task(TASKS["coco_karpathy"], tmp_path)
    assert data.keys == ("COCO_000000000000", "COCO_000000000003")
    assert data.captions == tuple(f"caption {n} of {image}" for image in (0, 3) for n in range(5)), "the sixth does not count"
    assert data.caption_image.tolist() == [0] * 5 + [1] * 5
    assert data.task.note == "2 of 5,000 images: not the published protocol."
    karpathy(tmp_path, "flickr30k/dataset_flickr30k.json", "", 5)
    flickr = load_task(TASKS["flickr30k_karpathy"], tmp_path)
    assert len(flickr.captions) == 10 and flickr.task.note == "2 of 1,000 images: not the published protocol."


def test_one_caption_an_image_is_not_the_five_caption_protocol(tmp_path):
    karpathy(tmp_path, count=1)
    data = load_task(TASKS["coco_karpathy"], tmp_path)
    assert data.task.note == "2 of 5,000 images and 2 images with fewer than 5 captions: not the published protocol."


def test_the_published_number_of_images_needs_no_note(tmp_path):
    karpathy(tmp_path)
    whole = Task("two", "retrieval", "coco_karpathy", "coco", captions_each=5, published=2)
    assert load_task(whole, tmp_path).task.note == ""


def test_val2017_is_not_the_karpathy_split(tmp_path):
    photo(tmp_path / "coco/val2017/000000000139.jpg")
    with pytest.raises(DataError, match=r"put dataset_coco\.json.*missing: dataset_coco\.json, val2014.*val2017 is not the Karpathy test"):
        load_task(TASKS["coco_karpathy"], tmp_path)
    captions = {"images": [{"file_name": "000000000139.jpg", "id": 139}], "annotations": [{"image_id": 139, "caption": "a room"}]}
    text(tmp_path / "coco/dataset_coco.json", json.dumps(captions))
    (tmp_path / "coco/val2014").mkdir()
    with pytest.raises(DataError, match="COCO's own captions, not a Karpathy split"):
        load_task(TASKS["coco_karpathy"], tmp_path)
    karpathy(tmp_path, place="val2017")
    with pytest.raises(DataError, match="lists images of val2017"):
        load_task(TASKS["coco_karpathy"], tmp_path)


def test_coco_in_clip_benchmarks_tars(tmp_path):
    members = [("a.jpg", jpeg(0)), ("a.txt", b"1\n2\n3\n4\n5\n6"), ("b.jpg", jpeg(1)), ("b.txt", b"1\n2\n3\n4\n5")]
    write_tar(tmp_path / "wds_mscoco_captions/test/0.tar", members)
    data = load_task(TASKS["coco_karpathy"], tmp_path)
    assert data.caption_image.tolist() == [0] * 5 + [1] * 5


@pytest.mark.parametrize("layout", sorted(READERS))
def test_every_official_layout_says_what_to_put_where_when_it_is_not_there(tmp_path, layout):
    task = next(task for task in TASKS.values() if task.layout == layout)
    with pytest.raises(DataError) as raised:
        load_task(task, tmp_path)
    assert str(tmp_path / task.path) in str(raised.value) and READERS[layout].what in str(raised.value)
    assert task.id in describe(task) and f"DATA_ROOT/{task.path}" in describe(task)
    assert not any(tmp_path.iterdir())


def test_layouts_of_masks_are_those_that_are_read():
    assert set(MASKS) == set(LAYOUTS)
    known = {"sprites-segmentation", "ade20k", "coco_stuff164k", "voc20", "voc21"}
    assert {task.id for task in TASKS.values() if task.kind == "segmentation"} == known


def test_an_official_layout_may_lie_elsewhere_under_another_id(tmp_path):
    food101(tmp_path)
    text(tmp_path / "mine.yaml", "id: my-food", "kind: classification", "layout: food101", "path: food-101", "templates: clip:food101")
    data = load_task(find_task(str(tmp_path / "mine.yaml")), tmp_path)
    assert data.keys == ("beef_tartare/7", "apple_pie/3") and data.task.note == ""


def test_a_manifest_of_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="no test image"):
        write_manifest([], tmp_path, "empty")


def test_the_digest_of_official_data_is_that_of_its_content(tmp_path):
    for root in ("a", "b", "c"):
        cub(tmp_path / root)
    first, moved = (load_task(TASKS["cub"], tmp_path / root) for root in ("a", "b"))
    assert (first.digest, first.images_digest) == (moved.digest, moved.images_digest)
    text(tmp_path / "c/CUB_200_2011/classes.txt", "1 001.Albatross", "2 002.Laysan_Albatross")
    renamed = load_task(TASKS["cub"], tmp_path / "c")
    assert renamed.images_digest == first.images_digest and renamed.digest != first.digest


def pairs(root, rows=3):
    folder = root / "sprites-swapped"
    lines = []
    for number in range(rows):
        for side in "ab":
            photo(folder / f"images/{number}{side}.png", number)
        row = {
            "key": f"p{number}",
            "images": [f"images/{number}a.png", f"images/{number}b.png"],
            "captions": [f"x {number}", f"y {number}"],
        }
        lines.append(json.dumps({**row, "category": ("left", "count")[number % 2]}))
    text(folder / "pairs.jsonl", *lines)
    return folder


def test_pairs_become_groups_of_two(tmp_path):
    folder = pairs(tmp_path)
    data = load_task(TASKS["sprites-swapped"], tmp_path)
    assert data.keys == ("p0/0", "p0/1", "p1/0", "p1/1", "p2/0", "p2/1") and data.groups == ("p0", "p0", "p1", "p1", "p2", "p2")
    assert data.captions == ("x 0", "y 0", "x 1", "y 1", "x 2", "y 2") and data.caption_image.tolist() == list(range(6))
    assert data.categories == ("left", "left", "count", "count", "left", "left") and data.class_names == ()
    kept = data.keep(np.array([True, True, False, True, True, True]), {"image_damaged": 1})
    assert kept.groups == ("p0", "p0", "p2", "p2") and kept.captions == ("x 0", "y 0", "x 2", "y 2")
    assert kept.rejected == {"image_damaged": 1, "group_incomplete": 1} and kept.categories == ("left",) * 4
    (folder / "images/2b.png").unlink()
    partial = load_task(TASKS["sprites-swapped"], tmp_path)
    assert partial.groups == ("p0", "p0", "p1", "p1") and partial.rejected == {"file_missing": 1, "group_incomplete": 1}
    text(folder / "pairs.jsonl", json.dumps({"key": "p", "images": ["images/0a.png"], "captions": ["x", "y"]}))
    with pytest.raises(DataError, match="line 1: images should be two texts"):
        load_task(TASKS["sprites-swapped"], tmp_path)


def winoground_rows(count):
    shared = {"tag": "Noun", "secondary_tag": "", "num_main_preds": 1, "collapsed_tag": "Object"}
    captions = lambda number: {"caption_0": f"some {number} eat", "caption_1": f"eat {number} some"}  # noqa: E731
    names = lambda number: {"image_0": f"ex_{number}_img_0", "image_1": f"ex_{number}_img_1"}  # noqa: E731
    return [{"id": number, **names(number), **captions(number), **shared} for number in range(count)]


@pytest.mark.parametrize("below", ["", "data/"])
def test_winoground_as_hugging_face_has_it(tmp_path, below):
    for number in range(2):
        for side in range(2):
            photo(tmp_path / f"winoground/{below}images/ex_{number}_img_{side}.png", number)
    text(tmp_path / f"winoground/{below}examples.jsonl", *map(json.dumps, winoground_rows(2)))
    data = load_task(TASKS["winoground"], tmp_path)
    assert data.groups == ("0", "0", "1", "1") and data.keys[3] == "1/1" and data.categories[0] == "Object"
    assert data.captions[:2] == ("some 0 eat", "eat 0 some")
    assert data.task.note == "4 of 800 images: not the published protocol."


def test_winoground_as_parquet(tmp_path):
    rows = [
        {**row, "image_0": {"bytes": jpeg(row["id"]), "path": None}, "image_1": {"bytes": jpeg(5), "path": None}}
        for row in winoground_rows(3)
    ]
    (tmp_path / "winoground/data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "winoground/data/test-00000-of-00001.parquet")
    data = load_task(TASKS["winoground"], tmp_path)
    assert data.groups == ("0", "0", "1", "1", "2", "2") and dict(read_images(data, [2]))[2] == jpeg(1)


def mmvp(root, ids=(1, 2, 3, 4), categories=("Texts", "Texts", "State and Condition", "State and Condition")):
    for number, category in zip(ids, categories, strict=True):
        photo(root / f"MMVP_VLM/MLLM_VLM Images/{category}/{number}.jpg", number)
    with open(root / "MMVP_VLM/Questions.csv", "w", newline="") as file:
        rows = [(number, category, f"a sign, {number}") for number, category in zip(ids, categories, strict=True)]
        csv.writer(file).writerows([("Question ID", "Type", "Statement"), *rows])


def test_mmvp_statements_get_their_prefix(tmp_path):
    mmvp(tmp_path)
    data = load_task(TASKS["mmvp_vlm"], tmp_path)
    assert data.captions[:2] == ("a photo of a sign, 1", "a photo of a sign, 2")
    assert data.groups == ("1", "1", "3", "3") and data.categories[2:] == ("State and Condition",) * 2
    assert dict(read_images(data, [3]))[3] == jpeg(4) and data.task.note == "4 of 270 images: not the published protocol."
    mmvp(tmp_path, ids=(1, 3, 2, 4))
    with pytest.raises(DataError, match=r"questions 1 \(Texts\) and 3 \(Texts\) are no pair"):
        load_task(TASKS["mmvp_vlm"], tmp_path)


def test_a_yaml_file_describes_a_compositional_or_a_segmentation_task(tmp_path):
    pairs(tmp_path)
    lines = ("id: swaps", "kind: compositional", "layout: pairs", "path: sprites-swapped", "data: pairs.jsonl", "protocol: mmvp")
    text(tmp_path / "swaps.yaml", *lines, 'prefix: "a photo of "')
    assert load_task(find_task(str(tmp_path / "swaps.yaml")), tmp_path).captions[0] == "a photo of x 0"
    text(tmp_path / "masks.yaml", "id: streets", "kind: segmentation", "layout: folder", "path: streets", "ignore: 0", "labels: gt")
    assert find_task(str(tmp_path / "masks.yaml")) == Task("streets", "segmentation", "folder", "streets", ignore=0, labels="gt")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("a", "retrieval", "food101", "x"), "retrieval cannot be read from the layout 'food101'"),
        (("a", "classification", "voc", "x"), "classification cannot be read from the layout 'voc'"),
        (("a", "compositional", "jsonl", "x"), "pairs can"),
        (("a", "compositional", "pairs", "x"), "winoground or mmvp"),
    ],
)
def test_layouts_must_fit_the_kind(given, says):
    with pytest.raises(UsageError, match=says):
        Task(*given)
