"""Readers of classification sets in their official layouts: the test split, with class names in label order.

The layouts are those of the data sets' archives, as torchvision.datasets reads them. Class names are CLIP_benchmark's if it has some,
else the data set's own with spaces for `_` and `/`.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from align.common.errors import DataError
from eval.tasks.official.layout import (
    ManifestRow,
    Official,
    OfficialLayout,
    class_folders,
    class_number,
    class_of,
    columns,
    image_row,
    images_of_folders,
    load_mat,
    numbered,
    own_names,
)
from eval.tasks.prompts import package_classes, read_lines

CIFAR_SIDE = 32  # pixels
_EUROSAT = (
    *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"),
    *("Pasture", "PermanentCrop", "Residential", "River", "SeaLake"),
)
_BACKGROUND = "BACKGROUND_Google"  # of Caltech101: random pictures, not a class
_CALTECH = {  # folders whose packaged name differs from their own
    "Faces": "off-center face", "Faces_easy": "centered face", "Leopards": "leopard",
    "Motorbikes": "motorbike", "airplanes": "airplane", "car_side": "side of a car",
    "cougar_body": "body of a cougar cat", "cougar_face": "face of a cougar cat", "crocodile_head": "head of a crocodile",
    "flamingo_head": "head of a flamingo", "snoopy": "snoopy (cartoon beagle)", "yin_yang": "yin and yang symbol",
}  # fmt: skip


def imagenet(folder: Path) -> Official:
    """Return ImageNet-1k's validation set, val/<wnid>/*.JPEG. Class i is the i-th of the 1,000 sorted WordNet ids."""
    wnids = class_folders(folder / "val", 1000)
    if wrong := [name for name in wnids if not re.fullmatch(r"n\d{8}", name)]:
        raise DataError(f"{folder / 'val'}: {wrong[0]!r} is not a WordNet id such as n01440764; remove it")
    return Official(images_of_folders(folder / "val", "val", numbered(wnids)), _imagenet_names(folder))


def imagenet_v2(folder: Path) -> Official:
    """Return ImageNet-V2. Its folders 0 to 999 are class numbers, so they are sorted as numbers, not as text."""
    found = class_folders(folder, 1000)
    if set(found) != {str(number) for number in range(1000)}:
        raise DataError(f"{folder}: expected the folders 0 to 999, found {found[0]!r} to {found[-1]!r}; unpack the official archive")
    return Official(images_of_folders(folder, "", {str(number): number for number in range(1000)}), _imagenet_names(folder))


def food101(folder: Path) -> Official:
    """Return Food-101's test split (meta/test.txt), with class names from meta/classes.txt."""
    classes, path = read_lines(folder / "meta/classes.txt"), folder / "meta/test.txt"
    known = numbered(classes)
    rows = (image_row(f"{name}.jpg", "images", class_of(name.split("/")[0], known, path)) for name in read_lines(path))
    return Official(rows, own_names(folder, len(classes)) or _spaced(classes))


def cifar10(folder: Path) -> Official:
    """Return CIFAR-10's test batch from its binary version: one label byte before each image."""
    return _cifar(folder, "test_batch.bin", "batches.meta.txt", label_bytes=1)


def cifar100(folder: Path) -> Official:
    """Return CIFAR-100's test set from its binary version: a coarse and a fine label byte before each image. The fine one is used."""
    return _cifar(folder, "test.bin", "fine_label_names.txt", label_bytes=2)


def sun397(folder: Path) -> Official:
    """Return the test half of SUN397's first official partition (Testing_01.txt), classes in the order of ClassName.txt."""
    classes, path = read_lines(folder / "ClassName.txt"), folder / "Testing_01.txt"
    known = numbered(classes)
    rows = (image_row(name[1:], "", class_of(name.rpartition("/")[0], known, path)) for name in read_lines(path))
    names = _spaced(name[3:].replace("/", " ") for name in classes)  # /a/abbey
    return Official(rows, own_names(folder, len(classes)) or names)


def stanford_cars(folder: Path) -> Official:
    """Return Stanford Cars' test split from cars_test_annos_withlabels.mat, with class names from devkit/cars_meta.mat."""
    path = folder / "cars_test_annos_withlabels.mat"
    names = tuple(str(name) for name in load_mat(folder / "devkit/cars_meta.mat", "class_names"))
    found = load_mat(path, "annotations")
    if not all(isinstance(one, dict) and {"fname", "class"} <= set(one) for one in found):
        raise DataError(f"{path} has no labels; the devkit's cars_test_annos.mat will not do, get the file `with labels`")
    rows = (image_row(str(one["fname"]), "cars_test", class_number(one["class"], len(names), path)) for one in found)
    return Official(rows, own_names(folder, len(names)) or names)


def fgvc_aircraft(folder: Path) -> Official:
    """Return FGVC-Aircraft's test split with variants as classes."""
    names, path = read_lines(folder / "data/variants.txt"), folder / "data/images_variant_test.txt"
    known = numbered(names)
    rows = (image_row(f"{image}.jpg", "data/images", class_of(name, known, path)) for image, name in columns(path, 2))
    return Official(rows, own_names(folder, len(names)) or names)


def dtd(folder: Path) -> Official:
    """Return the first official test split of DTD (Describable Textures), labels/test1.txt. A class is a folder of images."""
    classes, path = class_folders(folder / "images", 47), folder / "labels/test1.txt"
    known = numbered(classes)
    rows = (image_row(name, "images", class_of(name.split("/")[0], known, path)) for name in read_lines(path))
    return Official(rows, own_names(folder, len(classes)) or _spaced(classes))


def pets(folder: Path) -> Official:
    """Return the Oxford-IIIT Pets' test split; DataError if the breed in an image's name is not the name of its label."""
    path = folder / "annotations/test.txt"
    names = (own := own_names(folder, 37)) or package_classes("pets")
    labels = [(image, class_number(label, len(names), path)) for image, label, _ in columns(path, 3)]
    for image, label in labels:
        if not own and _plain(image.rpartition("_")[0]) != _plain(names[label]):
            raise DataError(f"{path}: {image!r} has the label of {names[label]!r}; get the file again")
    return Official((image_row(f"{image}.jpg", "images", label) for image, label in labels), names)


def caltech101(folder: Path) -> Official:
    """Return all images of the 101 categories of Caltech101 (there is no official split), without BACKGROUND_Google."""
    place = folder / "101_ObjectCategories"
    classes = class_folders(place, 101, ignored=_BACKGROUND)
    names = own_names(folder, 101)
    if not names:
        packaged = {_plain(name): name for name in package_classes("caltech101")}
        wanted = [_plain(_CALTECH.get(name, name)) for name in classes]
        names = tuple(packaged[name] for name in wanted if name in packaged)
        if unknown := [name for name, plain in zip(classes, wanted, strict=True) if plain not in packaged]:
            raise DataError(f"{place}: {', '.join(unknown)} are no categories of Caltech101; remove them, or add classnames.txt")
    return Official(images_of_folders(place, place.name, numbered(classes)), names)


def flowers(folder: Path) -> Official:
    """Return the Oxford 102 Flowers' test split: image numbers `tstid` of setid.mat, labels 1 to 102 of imagelabels.mat."""
    names = own_names(folder, 102) or package_classes("flowers")
    path = folder / "imagelabels.mat"
    labels, chosen = load_mat(path, "labels"), load_mat(folder / "setid.mat", "tstid")
    if not all(isinstance(number, int) and 1 <= number <= len(labels) for number in chosen):
        raise DataError(f"{folder / 'setid.mat'} chooses images beyond the {len(labels)} that {path} has labels for; get the files again")
    rows = (image_row(f"image_{n:05d}.jpg", "jpg", class_number(labels[n - 1], len(names), path)) for n in chosen)
    return Official(rows, names)


def eurosat(folder: Path) -> Official:
    """Return all RGB images of EuroSAT, 2750/<Class>/*.jpg (there is no official split)."""
    classes = class_folders(folder / "2750", 10)
    if tuple(classes) != _EUROSAT:
        raise DataError(f"{folder / '2750'}: found {', '.join(classes)}; expected {', '.join(_EUROSAT)}")
    names = own_names(folder, 10) or package_classes("eurosat")
    return Official(images_of_folders(folder / "2750", "2750", numbered(classes)), names)


def ucf101(folder: Path) -> Official:
    """Return the middle frames of UCF101's first test list: UCF-101-midframes/Apply_Eye_Makeup/v_ApplyEyeMakeup_g01_c01.jpg."""
    classes, path = [name for _, name in columns(folder / "ucfTrainTestlist/classInd.txt", 2)], folder / "ucfTrainTestlist/testlist01.txt"
    known = numbered(classes)
    videos = (line.partition("/")[::2] for line in read_lines(path))
    frames = ((action, f"{_words(action, '_')}/{name.removesuffix('.avi')}.jpg") for action, name in videos)
    rows = (image_row(frame, "UCF-101-midframes", class_of(action, known, path)) for action, frame in frames)
    return Official(rows, own_names(folder, len(classes)) or tuple(_words(name, " ") for name in classes))


def cub(folder: Path) -> Official:
    """Return the test split of CUB-200-2011: the images that train_test_split.txt marks with 0."""
    classes = [name for _, name in columns(folder / "classes.txt", 2)]  # 001.Black_footed_Albatross
    path = folder / "image_class_labels.txt"
    test = {image for image, training in columns(folder / "train_test_split.txt", 2) if training == "0"}
    label_of = {line[0]: line[1] for line in columns(path, 2)}
    images = ((image, name) for image, name in columns(folder / "images.txt", 2) if image in test)
    rows = (image_row(name, "images", class_number(label_of.get(image), len(classes), path)) for image, name in images)
    return Official(rows, own_names(folder, len(classes)) or _spaced(name.partition(".")[2] for name in classes))


def _cifar(folder: Path, batch: str, names: str, label_bytes: int) -> Official:
    path, classes = folder / batch, read_lines(folder / names)
    record = label_bytes + 3 * CIFAR_SIDE**2
    if path.stat().st_size % record:
        raise DataError(f"{path} has {path.stat().st_size} bytes, not a multiple of {record}; get the file again")

    def rows() -> Iterator[ManifestRow]:
        with open(path, "rb") as file:
            for number, data in enumerate(iter(lambda: file.read(record), b"")):
                label = class_number(data[label_bytes - 1] + 1, len(classes), path)
                planes = np.frombuffer(data, dtype=np.uint8, offset=label_bytes).reshape(3, CIFAR_SIDE, CIFAR_SIDE)
                image = io.BytesIO()
                Image.fromarray(planes.transpose(1, 2, 0).copy()).save(image, format="PNG", compress_level=0)  # the same bytes everywhere
                yield {"key": f"{number:05d}", "image": image.getvalue(), "label": label}

    return Official(rows(), own_names(folder, len(classes)) or _spaced(classes))


def _imagenet_names(folder: Path) -> tuple[str, ...]:
    return own_names(folder, 1000) or package_classes("imagenet1k")


def _spaced(names: Iterator[str] | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    return tuple(name.replace("_", " ") for name in names)


def _words(name: str, between: str) -> str:
    """Return the words of a CamelCase name (ApplyEyeMakeup, YoYo), joined with `between`."""
    return between.join(re.findall("[A-Z][^A-Z]*", name))


def _plain(name: str) -> str:
    """Return a name in lower case with single spaces for all but letters and digits, to compare spellings."""
    return " ".join(re.findall(r"[a-z0-9]+", name.lower()))


_PICKLES = "holds pickles, which can run code when they are read; get the binary version instead:"
_READERS: dict[str, tuple[Any, ...]] = {  # the fields of an OfficialLayout after its kind
    "imagenet": (imagenet, ("val",), "val/<WordNet id>/*.JPEG, 1,000 folders (image-net.org, ILSVRC2012_img_val.tar)"),
    "imagenetv2": (imagenet_v2, ("0", "999"),
        "the folders 0 to 999 of *.jpeg (imagenetv2-matched-frequency.tar.gz, huggingface.co/datasets/vaishaal/ImageNetV2)"),
    "food101": (food101, ("images", "meta/classes.txt", "meta/test.txt"),
        "images/<class>/<number>.jpg, meta/classes.txt and meta/test.txt (food-101.tar.gz, ETH Zurich)"),
    "cifar10": (cifar10, ("test_batch.bin", "batches.meta.txt"),
        "test_batch.bin and batches.meta.txt (cifar-10-binary.tar.gz, cs.toronto.edu/~kriz/cifar.html)",
        dict.fromkeys(("../cifar-10-batches-py", "test_batch"), f"cifar-10-batches-py {_PICKLES} cifar-10-binary.tar.gz")),
    "cifar100": (cifar100, ("test.bin", "fine_label_names.txt"),
        "test.bin and fine_label_names.txt (cifar-100-binary.tar.gz, cs.toronto.edu/~kriz/cifar.html)",
        dict.fromkeys(("../cifar-100-python", "test"), f"cifar-100-python {_PICKLES} cifar-100-binary.tar.gz")),
    "sun397": (sun397, ("ClassName.txt", "Testing_01.txt"),
        "<letter>/<class>/sun_*.jpg, ClassName.txt (SUN397.tar.gz) and Testing_01.txt (Partitions.zip), vision.princeton.edu"),
    "cars": (stanford_cars, ("cars_test", "cars_test_annos_withlabels.mat", "devkit/cars_meta.mat"),
        "cars_test/<number>.jpg, cars_test_annos_withlabels.mat and devkit/cars_meta.mat (Stanford Cars by J. Krause)"),
    "fgvc_aircraft": (fgvc_aircraft, ("data/images", "data/variants.txt", "data/images_variant_test.txt"),
        "data/images/<number>.jpg, data/variants.txt and data/images_variant_test.txt (fgvc-aircraft-2013b.tar.gz, Oxford VGG)"),
    "dtd": (dtd, ("images", "labels/test1.txt"),
        "images/<class>/*.jpg and labels/test1.txt (dtd-r1.0.1.tar.gz, Oxford VGG)"),
    "pets": (pets, ("images", "annotations/test.txt"),
        "images/<Breed>_<number>.jpg and annotations/test.txt (images.tar.gz and annotations.tar.gz, Oxford VGG)"),
    "caltech101": (caltech101, ("101_ObjectCategories",),
        "101_ObjectCategories/<category>/image_*.jpg (caltech-101.zip, data.caltech.edu/records/mzrjq-6wc02)"),
    "flowers": (flowers, ("jpg", "imagelabels.mat", "setid.mat"),
        "jpg/image_<number>.jpg, imagelabels.mat and setid.mat (102flowers.tgz and two files, Oxford VGG)"),
    "eurosat": (eurosat, ("2750",), "2750/<Class>/*.jpg (EuroSAT.zip, the RGB version, github.com/phelber/EuroSAT)"),
    "ucf101": (ucf101,
        ("UCF-101-midframes", "ucfTrainTestlist/classInd.txt", "ucfTrainTestlist/testlist01.txt"),
        "UCF-101-midframes/<Class_Name>/*.jpg (the middle frame of each video, as CoOp publishes them) and ucfTrainTestlist/"
        "{classInd,testlist01}.txt (UCF101TrainTestSplits-RecognitionTask.zip, crcv.ucf.edu)"),
    "cub": (cub, ("images", "images.txt", "classes.txt", "image_class_labels.txt", "train_test_split.txt"),
        "images/<class>/*.jpg, {images,classes,image_class_labels,train_test_split}.txt (CUB_200_2011.tgz, Caltech)"),
}  # fmt: skip
PHOTOS = {name: OfficialLayout("classification", *given) for name, given in _READERS.items()}
