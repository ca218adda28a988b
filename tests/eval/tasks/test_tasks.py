"""Tasks: exact ids, YAML of a user's own, the layouts on disk, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

from align.common.errors import DataError, UsageError
from eval.tasks.data import load_task, read_images
from eval.tasks.registry import TASKS, find_task
from eval.tasks.task import Task
from tests.support.archives import jpeg, write_tar


def clip_benchmark(folder, labels=(0, 1, 2, 1), classes=("dog", "hot dog", "cat")):
    """A classification set in CLIP_benchmark's webdataset layout, in two tars."""
    for part in (0, 1):
        members = []
        for number in range(part, len(labels), 2):
            members += [(f"s{number:07d}.jpg", jpeg(number)), (f"s{number:07d}.cls", str(labels[number]).encode())]
        write_tar(folder / "test" / f"{part}.tar", members)
    (folder / "test" / "nshards.txt").write_text("2")
    (folder / "classnames.txt").write_text("\n".join(classes) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na {c}.\n")
    return Task(
        "birds", "classification", "webdataset", folder.name, "test/*.tar", "zeroshot_classification_templates.txt", "classnames.txt"
    )


def test_classification_in_clip_benchmarks_layout(tmp_path):
    data = load_task(clip_benchmark(tmp_path / "wds"), tmp_path)
    assert data.keys == ("s0000000", "s0000002", "s0000001", "s0000003")
    assert data.labels.tolist() == [0, 2, 1, 1] and data.class_names == ("dog", "hot dog", "cat")
    assert data.rejected == {}


def test_retrieval_in_clip_benchmarks_layout(tmp_path):
    members = [("a.jpg", jpeg(0)), ("a.txt", b"one\ntwo\nthree\n"), ("b.jpg", jpeg(1)), ("b.txt", b"four")]
    write_tar(tmp_path / "coco" / "test" / "0.tar", members)
    data = load_task(Task("coco", "retrieval", "webdataset", "coco", "test/*.tar"), tmp_path)
    assert data.captions == ("one", "two", "three", "four")
    assert data.caption_image.tolist() == [0, 0, 0, 1] and data.keys == ("a", "b")


def test_retrieval_from_jsonl(tmp_path):
    folder = tmp_path / "photos"
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(3):
        (folder / "images" / f"{number}.jpg").write_bytes(jpeg(number))
        rows.append({"key": f"k{number}", "image": f"images/{number}.jpg", "captions": [f"c{number}.{part}" for part in range(number + 1)]})
    (folder / "images" / "3.jpg").write_bytes(jpeg(3))
    rows.append({"key": "bad", "image": "images/3.jpg", "captions": ["", " "]})
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_task(Task("photos", "retrieval", "jsonl", "photos", "test.jsonl"), tmp_path)
    assert data.keys == ("k0", "k1", "k2")
    assert data.captions == ("c0.0", "c1.0", "c1.1", "c2.0", "c2.1", "c2.2") and data.caption_image.tolist() == [0, 1, 1, 2, 2, 2]
    assert data.rejected == {"caption_empty": 1}
    shown = dict(read_images(data, [2, 0]))
    assert shown == {0: jpeg(0), 2: jpeg(2)}


def test_folders_of_images_name_their_classes(tmp_path):
    for name, count in (("hot_dog", 2), ("cat", 1)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "set" / name / f"{number}.jpg").write_bytes(jpeg(number))
    data = load_task(Task("set", "classification", "folder", "set"), tmp_path)
    assert data.class_names == ("cat", "hot dog")
    assert [(key, int(label)) for key, label in zip(data.keys, data.labels, strict=True)] == [
        ("cat/0", 0),
        ("hot_dog/0", 1),
        ("hot_dog/1", 1),
    ]
    (tmp_path / "set" / "names.txt").write_text("hot_dog\tsausage in bread\ncat\tcat\nbird\tbird\n")
    named = load_task(Task("set", "classification", "folder", "set", classes="names.txt"), tmp_path)
    assert named.class_names == ("sausage in bread", "cat", "bird") and named.labels.tolist() == [1, 0, 0]


def test_the_digest_changes_with_whatever_is_measured_and_with_nothing_else(tmp_path):
    task = clip_benchmark(tmp_path / "wds")
    first = load_task(task, tmp_path)
    clip_benchmark(tmp_path / "elsewhere" / "wds")
    moved = load_task(task, tmp_path / "elsewhere")
    assert (moved.digest, moved.images_digest) == (first.digest, first.images_digest)
    clip_benchmark(tmp_path / "wds", labels=(0, 1, 2, 2))
    relabeled = load_task(task, tmp_path)
    assert relabeled.digest != first.digest and relabeled.images_digest == first.images_digest
    clip_benchmark(tmp_path / "wds", classes=("dog", "hot dog", "kitten"))
    renamed = load_task(task, tmp_path)
    assert renamed.digest != first.digest and renamed.images_digest == first.images_digest
    clip_benchmark(tmp_path / "wds")
    tar = (tmp_path / "wds" / "test" / "0.tar").read_bytes()
    at = tar.index(jpeg(0)) + len(jpeg(0)) - 5
    (tmp_path / "wds" / "test" / "0.tar").write_bytes(tar[:at] + bytes([tar[at] ^ 1]) + tar[at + 1 :])
    assert load_task(task, tmp_path).images_digest != first.images_digest


def test_keys_that_stand_in_two_files_are_refused_or_get_the_file_before_them(tmp_path):
    task = clip_benchmark(tmp_path / "wds")
    whole = load_task(task, tmp_path)
    write_tar(tmp_path / "wds" / "test" / "2.tar", [("s0000000.jpg", jpeg(5)), ("s0000000.cls", b"1")])
    with pytest.raises(DataError, match=r"'s0000000': row 1 of .*0\.tar and row 1 of .*2\.tar.*key_prefix: file"):
        load_task(task, tmp_path)
    data = load_task(replace(task, key_prefix="file"), tmp_path)
    assert len(data.keys) == len(whole.keys) + 1 and {"0:s0000000", "2:s0000000"} <= set(data.keys) and not data.rejected


def test_one_caption_a_row_is_the_same_task_as_a_list_of_captions(tmp_path):
    (tmp_path / "set").mkdir()
    lines = ["image,captions"]
    for number in range(4):
        (tmp_path / "set" / f"{number}.jpg").write_bytes(jpeg(number))
    for caption in ("one {}", " ", "two {}"):  # the rows of an image are not neighbors, and one has no words
        lines += [f"{number}.jpg,{caption.format(number)}" for number in range(4)]
    (tmp_path / "set" / "a.csv").write_text("\n".join(lines))
    data = load_task(Task("a", "retrieval", "csv", "set", "a.csv"), tmp_path)
    assert data.captions == tuple(f"{word} {number}" for number in range(4) for word in ("one", "two"))
    assert data.caption_image.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and len(data.keys) == 4 and data.rejected == {"caption_empty": 4}
    said = "12 rows name 4 images"
    assert said in data.task.note and any(said in remark for remark in data.remarks)
    assert [encoded for _, encoded in read_images(data, range(4))] == [jpeg(number) for number in range(4)]
    apart = load_task(Task("a", "retrieval", "csv", "set", "a.csv", group="none"), tmp_path)
    assert len(apart.keys) == 8 and apart.digest != data.digest
    by_name = load_task(Task("a", "retrieval", "csv", "set", "a.csv", key="image"), tmp_path)
    assert by_name.captions == data.captions and by_name.keys == ("0.jpg", "1.jpg", "2.jpg", "3.jpg")


@pytest.mark.parametrize("field", ["group: images", "key_prefix: yes-please"])
def test_unknown_ways_of_grouping_are_refused(tmp_path, field):
    (tmp_path / "mine.yaml").write_text(f"id: a\nkind: retrieval\nlayout: csv\npath: x\n{field}\n")
    with pytest.raises(UsageError, match=f"unknown {field.partition(':')[0]}"):
        find_task(str(tmp_path / "mine.yaml"))


def test_samples_can_be_left_out_together_with_their_captions(tmp_path):
    members = [part for n in range(3) for part in ((f"{n}.jpg", jpeg(n)), (f"{n}.txt", f"a{n}\nb{n}".encode()))]
    write_tar(tmp_path / "coco" / "test" / "0.tar", members)
    data = load_task(Task("coco", "retrieval", "webdataset", "coco", "test/*.tar"), tmp_path)
    kept = data.keep(np.array([True, False, True]), {"image_damaged": 1})
    assert kept.keys == ("0", "2") and kept.captions == ("a0", "b0", "a2", "b2") and kept.caption_image.tolist() == [0, 0, 1, 1]
    assert kept.rejected == {"image_damaged": 1} and kept.places.tolist() == [[0, 0], [0, 2]]


def test_missing_data_says_what_to_put_where(tmp_path):
    with pytest.raises(DataError, match=r"put tars .* at .*sprites-unseen/test/\*\.tar, with classnames\.txt"):
        load_task(TASKS["sprites-unseen"], tmp_path)
    task = clip_benchmark(tmp_path / "wds")
    (tmp_path / "wds" / "classnames.txt").unlink()
    with pytest.raises(DataError, match=r"lacks .*classnames\.txt"):
        load_task(task, tmp_path)


def described(folder, **fields):
    """Write six pictures in `photos`, a CSV that names them, and a task file; return the task."""
    (folder / "data/photos").mkdir(parents=True, exist_ok=True)
    for number in range(6):
        (folder / f"data/photos/{number}.jpg").write_bytes(jpeg(number))
    rows = [f"n{number},{number}.jpg,\"['a {number}', 'b {number}']\"\n" for number in range(6)]
    (folder / "data/pairs.csv").write_text("name,pic,text\n" + "".join(rows))
    lines = {"id": "mine", "kind": "retrieval", "captions": "text", **fields}
    (folder / "task.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in lines.items()))
    return find_task(str(folder / "task.yaml"))


COLUMNS = {"image": "pic", "key": "name", "image_root": "photos"}


@pytest.mark.parametrize("fields", [
    {"path": "pairs.csv"}, {"path": "pairs.csv", "layout": "csv"}, {"path": "*.csv"}, {"path": ".", "data": "pairs.csv"},
    {"path": "{pairs,pairs}.csv"},
])  # fmt: skip
def test_a_path_may_be_a_file_or_a_pattern_and_columns_have_names(tmp_path, fields):
    data = load_task(described(tmp_path, **fields, **COLUMNS), tmp_path / "data")
    assert data.keys == tuple(f"n{number}" for number in range(6)) and data.captions[:2] == ("a 0", "b 0") and data.task.layout == "csv"
    flags = {"image_column": "pic", "key_column": "name", "image_root": "photos"}
    assert load_task(described(tmp_path, **fields, **flags), tmp_path / "data").digest == data.digest


def test_data_that_is_there_is_never_called_missing(tmp_path):
    with pytest.raises(DataError, match=f"give --data-root {tmp_path}/data, where pairs.csv is"):
        load_task(described(tmp_path, path="pairs.csv", **COLUMNS), tmp_path / "data" / "photos")
    without = {name: COLUMNS[name] for name in ("image", "key")}
    with pytest.raises(DataError, match="none of the 6 samples .* is usable .file_missing 6.*image_root"):
        load_task(described(tmp_path, path="pairs.csv", **without), tmp_path / "data")
    with pytest.raises(DataError, match="no column 'captions'; it has 'name', 'pic', 'text'"):
        load_task(described(tmp_path, path="pairs.csv", captions="captions", **without), tmp_path / "data")


@pytest.mark.parametrize(
    ("labels", "classes", "says"),
    [
        ((0, 1, 3), ("dog", "cat", "cow"), "labels from 0 to 3.*0 to 2"),
        ((0, 1, "dog"), ("dog", "cat", "cow"), "use one of them"),
        (("dog", "dogs"), ("dog", "cat"), "'dogs' is not in classnames.txt; did you mean 'dog'"),
        (("dog", "cat"), ("dog", "dog", "cat"), "twice"),
    ],
)
def test_labels_that_would_falsify_the_result_are_errors(tmp_path, labels, classes, says):
    task = clip_benchmark(tmp_path / "wds", labels, classes)
    with pytest.raises(DataError, match=says):
        load_task(task, tmp_path)


def test_a_yaml_file_describes_a_task(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("id: my-birds\nkind: classification\nlayout: folder\npath: birds/test\ntemplates: imagenet80\n")
    assert find_task(str(path)) == Task("my-birds", "classification", "folder", "birds/test", templates="imagenet80")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("id: a\nkind: classification\nlayout: folder\npth: x\n", "did you mean 'path'"),
        ("id: a\nkind: classify\nlayout: folder\npath: x\n", "did you mean 'classification'"),
        ("id: a\nkind: retrieval\nlayout: zip\npath: x\n", "unknown layout 'zip'"),
        ("id: a\nkind: retrieval\nlayout: jsonl\n", "lacks path"),
        ("id: 3\nkind: retrieval\nlayout: jsonl\npath: x\n", "id should be text"),
        ("id: a b\nkind: retrieval\nlayout: jsonl\npath: x\n", "letters, digits"),
        ("id: sprites-seen\nkind: retrieval\nlayout: jsonl\npath: x\n", "taken"),
        ("- id\n", "field: value"),
        ("id: &a x\nkind: *a\n", "aliases"),
        ("id: !!python/object/apply:os.system ['true']\n", "not plain YAML"),
    ],
)
def test_wrong_task_files_say_what_is_wrong(tmp_path, content, says):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=says):
        find_task(str(path))


def test_an_unknown_id_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'sprites-unseen'"):
        find_task("sprites-unsen")


def test_registered_ids_are_those_of_their_tasks():
    assert all(name == task.id for name, task in TASKS.items())
    assert {"sprites-seen", "sprites-unseen", "sprites-retrieval"} <= set(TASKS)
