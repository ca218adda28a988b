"""Classes are not taken on trust: one class, lost classes and numbers without names are refused; ids and unread files are named."""

import json

import pytest

from align.common.errors import DataError
from eval.tasks.data import load_task
from eval.tasks.task import Task
from tests.support.archives import jpeg


def folders(root, files):
    for number, name in enumerate(files):
        (root / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "set" / name).write_bytes(jpeg(number))
    return Task("set", "classification", "folder", "set")


def table(root, labels, names=()):
    (root / "set").mkdir()
    for number in range(len(labels)):
        (root / "set" / f"{number}.jpg").write_bytes(jpeg(number))
    lines = [f"{number}.jpg,{label}" for number, label in enumerate(labels)]
    (root / "set" / "a.csv").write_text("\n".join(["image,label", *lines]))
    (root / "set" / "names.txt").write_text("\n".join(names))
    return Task("set", "classification", "csv", "set", "a.csv", classes="names.txt" if names else "")


def test_one_class_is_refused(tmp_path):
    with pytest.raises(DataError, match="all 2 images have the class 'images', so any answer is right.*not class/images/1.jpg"):
        load_task(folders(tmp_path, ["cat/images/0.jpg", "dog/images/1.jpg"]), tmp_path)


def test_empty_labels_are_no_class(tmp_path):
    with pytest.raises(DataError, match="2 of 5 rows have an empty label"):
        load_task(table(tmp_path, ["cat", "", "dog", " ", "cat"]), tmp_path)


def test_class_folders_of_different_depths_are_refused(tmp_path):
    with pytest.raises(DataError, match="different depths, 'car' and 'cat/images'.*directly into the folder of its class"):
        load_task(folders(tmp_path, ["dog/0.jpg", "cat/images/1.jpg", "car/2.jpg"]), tmp_path)


def test_a_class_of_several_folders_is_named(tmp_path):
    data = load_task(folders(tmp_path, [f"{split}/{name}/{split}.jpg" for split in ("train", "val") for name in ("cat", "dog")]), tmp_path)
    assert "2 classes have images in several folders, the first is 'cat': train/cat, val/cat" in " ".join(data.remarks)


def test_a_class_whose_name_is_not_utf_8_does_not_vanish(tmp_path):
    task = folders(tmp_path, ["cat/0.jpg", "dog/1.jpg", "d\udcffg/2.jpg"])
    with pytest.raises(DataError, match="without a usable image: d\ufffdg"):
        load_task(task, tmp_path)


@pytest.mark.parametrize("names", [["001.Albatross", "002.Auk"], ["00ff11aa", "a3f9c2d1"]])
def test_names_with_numbers_and_hashes_are_named(tmp_path, names):
    said = " ".join(load_task(folders(tmp_path, [f"{name}/{name}.jpg" for name in names]), tmp_path).remarks)
    assert names[0] in said and "Give `classes`" in said


def test_a_class_without_a_file_that_is_read_is_refused_with_its_files(tmp_path):
    task = folders(tmp_path, ["cat/0.jpg", "dog/1.jpg", "bird/2.avif", "bird/3.heic", "bird/4.avif"])
    with pytest.raises(DataError, match=r"without a usable image: bird \(2 \.avif, 1 \.heic\)"):
        load_task(task, tmp_path)


def test_a_class_whose_images_are_all_rejected_is_refused(tmp_path):
    task = table(tmp_path, ["cat", "dog", "bird", "bird"])
    for number in (2, 3):
        (tmp_path / "set" / f"{number}.jpg").unlink()
    with pytest.raises(DataError, match=r"without a usable image: bird \(2 rejected\)"):
        load_task(task, tmp_path)


def test_jfif_is_read_and_names_in_use_unread_files_and_ids_are_said(tmp_path):
    data = load_task(folders(tmp_path, ["n01440764/0.jfif", "n02102040/1.jpg", "n02102040/2.avif"]), tmp_path)
    assert data.class_names == ("n01440764", "n02102040")
    assert data.remarks[0] == "2 classes in use: n01440764, n02102040"
    assert any("2 class names are ids" in said for said in data.remarks) and "files that are not read: 1 .avif" in data.remarks


def test_class_numbers_in_a_csv_are_indices_of_the_names(tmp_path):
    data = load_task(table(tmp_path, [2, 0, 1, 0], ["red", "green", "blue", "white"]), tmp_path)
    assert data.labels.tolist() == [2, 0, 1, 0] and data.class_names == ("red", "green", "blue", "white")
    assert "1 of 4 class names have no image" in data.remarks


def test_class_numbers_without_names_are_refused(tmp_path):
    with pytest.raises(DataError, match="labels are numbers, so it needs `classes`"):
        load_task(table(tmp_path, [0, 1]), tmp_path)


@pytest.mark.parametrize(
    ("label", "message"), [(2**64, f"labels from 0 to {2**64}, but names.txt names classes 0 to 1"), ("9" * 5000, "has 5000 digits")]
)
def test_class_numbers_beyond_64_bits_are_refused_like_all_that_name_no_class(tmp_path, label, message):
    with pytest.raises(DataError, match=message):
        load_task(table(tmp_path, [0, 1, label], ["red", "green"]), tmp_path)


def test_numbers_beyond_64_bits_in_json_are_refused_too(tmp_path):
    table(tmp_path, [0, 1], ["red", "green"])
    rows = [{"key": f"{number}", "image": f"{number}.jpg", "label": label} for number, label in enumerate((0, -(10**30)))]
    (tmp_path / "set/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=f"labels from -{10**30} to 0, but names.txt names classes 0 to 1"):
        load_task(Task("set", "classification", "jsonl", "set", "a.jsonl", classes="names.txt"), tmp_path)


def test_a_number_may_be_the_label_of_a_name(tmp_path):
    data = load_task(table(tmp_path, [7, 3], ["3\tcat", "7\tdog"]), tmp_path)
    assert data.class_names == ("cat", "dog") and data.labels.tolist() == [1, 0]
