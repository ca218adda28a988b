"""Preparing the data sets: same bytes each time, nothing half-done taken for done, held-out sprites held out."""

import contextlib
import io
import json
import os
import re
import signal
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from align.common import files
from align.common.errors import DamagedError, DataError, LeaseError, UsageError
from align.common.locks import locked
from align.demo import rendering
from align.demo.building import BYTES_PER_SCENE, is_done
from align.demo.config import PrepareConfig
from align.demo.scenes import SpriteScenes, read_sprites, split_sprites
from align.demo.writing import write_retrieval, write_tars
from align.prepare import main
from tests.support.forking import exit_codes, fork
from tests.support.synthetic_sprites import make_sprites

SIZES = {"train": 60, "val": 5, "retrieval": 9, "held_out": 6, "per_class": 2, "image_size": 96, "swapped": 7, "segmentation": 8}


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    return make_sprites(tmp_path_factory.mktemp("sprites") / "folder")


@pytest.fixture
def config(sprites, tmp_path, monkeypatch):
    """A tiny run on drawn sprites, without fetching."""
    monkeypatch.setattr("align.embedded.assets.fetch", lambda asset, cache, progress: sprites)
    return PrepareConfig(output=str(tmp_path / "run" / "data"), assets=(), workers=1, **SIZES)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples(tar):
    """Return {key: {extension: bytes}} of a tar, in order."""
    found = {}
    with tarfile.open(tar) as archive:
        for member in archive:
            key, extension = member.name.split(".")
            found.setdefault(key, {})[extension] = archive.extractfile(member).read()
    return found


def no_worker_is_left():
    """Wait up to 20 s for the orphans of this test; they carry its name in their environment (pytest sets it)."""
    test = f"PYTEST_CURRENT_TEST={os.environ['PYTEST_CURRENT_TEST']}".encode()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        orphans = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if b"spawn_main" in (process / "cmdline").read_bytes() and test in (process / "environ").read_bytes():
                    orphans.append(process.name)
        if not orphans:
            return True
        time.sleep(0.1)
    return False


@pytest.fixture(scope="module")
def made(sprites, tmp_path_factory):
    """One finished run that the reading tests share."""
    patch = pytest.MonkeyPatch()
    patch.setattr("align.embedded.assets.fetch", lambda asset, cache, progress: sprites)
    folder = tmp_path_factory.mktemp("made") / "data"
    main(PrepareConfig(output=str(folder), assets=(), workers=1, **SIZES))
    patch.undo()
    return folder


def test_training_tars_are_webdataset_with_two_captions(made):
    train = samples(made / "train" / "000000.tar")
    assert len(train) == 60 and len(samples(made / "val" / "000000.tar")) == 5
    for key, sample in train.items():
        assert set(sample) == {"jpg", "json"}
        row = json.loads(sample["json"])
        assert set(row) == {"key", "short", "long"} and row["key"] == key and row["short"] and row["long"]
        image = Image.open(io.BytesIO(sample["jpg"]))
        assert image.size == (96, 96) and image.format == "JPEG" and image.mode == "RGB"
    assert next(iter(train)) == "train-0000000"


def test_parts_share_no_scene(made):
    every = [sample["jpg"] for part in ("train", "val") for sample in samples(made / part / "000000.tar").values()]
    every += [path.read_bytes() for path in (made / "tasks/sprites-retrieval/images").iterdir()]
    every += [sample["jpg"] for task in ("seen", "unseen") for sample in samples(made / f"tasks/sprites-{task}/test/0.tar").values()]
    every += [path.read_bytes() for task in ("swapped", "segmentation") for path in (made / f"tasks/sprites-{task}/images").iterdir()]
    assert len(set(every)) == len(every) == 60 + 5 + 9 + 12 + 12 + 14 + 8


def test_the_scenes_of_a_part_stay_the_same_when_parts_are_added():
    known = ("train", "val", "retrieval", "seen", "unseen", "mllm_pretrain", "mllm_instruct", "mllm_test", "swapped", "segmentation")
    assert {part: rendering.FIRST_INDEX[part] for part in known} == {part: at * 2**33 for at, part in enumerate(known)}


def test_held_out_sprites_are_in_no_training_or_retrieval_text(made, sprites):
    unseen = (made / "tasks/sprites-unseen/classnames.txt").read_text().splitlines()
    assert sorted(unseen) == sorted(sprite.name for sprite in split_sprites(read_sprites(sprites), 0, 6)[1])
    said = [sample["json"].decode() for part in ("train", "val") for sample in samples(made / part / "000000.tar").values()]
    said += (made / "tasks/sprites-retrieval/retrieval.jsonl").read_text().splitlines()
    said += (made / "tasks/sprites-swapped/pairs.jsonl").read_text().splitlines()
    said += (made / "tasks/sprites-segmentation/classes.txt").read_text().splitlines()
    for name in unseen:
        assert not [text for text in said if re.search(rf"\b{name}\b", text)], name
    seen = (made / "tasks/sprites-seen/classnames.txt").read_text().splitlines()
    assert not set(seen) & set(unseen) and len(seen) == len(unseen) == 6


@pytest.mark.parametrize("task", ["seen", "unseen"])
def test_classification_has_the_layout_of_clip_benchmark(made, task):
    folder = made / "tasks" / f"sprites-{task}"
    names = (folder / "classnames.txt").read_text().splitlines()
    assert (folder / "test" / "nshards.txt").read_text().strip() == "1"
    assert all("{c}" in line for line in (folder / "zeroshot_classification_templates.txt").read_text().splitlines())
    labels = [int(sample["cls"]) for sample in samples(folder / "test" / "0.tar").values()]
    assert labels == [label for label in range(len(names)) for _ in range(2)]


def test_labels_belong_to_their_pictures(sprites):
    world = rendering.World(str(sprites), seed=0, size=96, held_out=6, per_class=2)
    classes = rendering.generator(world, "unseen")[1]
    for number, scene in enumerate(rendering.render(rendering.Job(world, "unseen", 0, 12))):
        assert scene.names == (classes[number // 2],)
    assert [scene.key for scene in rendering.render(rendering.Job(world, "unseen", 3, 5))] == ["unseen-0000003", "unseen-0000004"]


def test_retrieval_scenes_show_different_objects(made, sprites):
    folder = made / "tasks" / "sprites-retrieval"
    rows = [json.loads(line) for line in (folder / "retrieval.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["key"] for row in rows}) == 9
    shown = set()
    for row in rows:
        assert (folder / row["image"]).is_file() and len(row["captions"]) == 2
        shown.add(frozenset(s.name for s in read_sprites(sprites) if re.search(rf"\b{s.name}\b", row["captions"][0])))
    assert len(shown) == 9


def test_swapped_pairs_show_what_their_captions_say(made, sprites):
    folder = made / "tasks" / "sprites-swapped"
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    scenes = SpriteScenes(sprites, 0, 96, split_sprites(read_sprites(sprites), 0, 6)[0])
    axis = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}  # the first is smaller (1) or larger along it
    for number, row in enumerate(rows):
        assert list(row) == ["key", "images", "captions", "category"] and row["key"] == f"swapped-{number:07d}"
        assert sorted(row["captions"][0].split()) == sorted(row["captions"][1].split()) and row["captions"][0] != row["captions"][1]
        for name, caption, scene in zip(row["images"], row["captions"], scenes.swapped(8 * 2**33 + number), strict=True):
            with Image.open(folder / name) as image:
                assert np.abs(np.asarray(image, dtype=float) - np.asarray(scene.image, dtype=float)).mean() < 8, "a JPEG of that scene"
            first, second = (re.sub("^an? ", "", said) for said in caption.split(f" {row['category']} "))
            boxes = {placed.sprite.name: placed.box for placed in scene.objects}
            at, sign = axis[row["category"]]
            assert sign * (boxes[first][at] + boxes[first][at + 2]) < sign * (boxes[second][at] + boxes[second][at + 2])
    assert len(rows) == 7 and len({row["category"] for row in rows}) > 1
    assert {path.name for path in (folder / "images").iterdir()} == {Path(name).name for row in rows for name in row["images"]}


def test_label_maps_are_the_exact_masks(made, sprites):
    folder = made / "tasks" / "sprites-segmentation"
    names = (folder / "classes.txt").read_text().splitlines()
    trained = split_sprites(read_sprites(sprites), 0, 6)[0]
    scenes = SpriteScenes(sprites, 0, 96, rendering.mllm_subset(trained, rendering.World("", 0, 96, 6, 2, len(trained))))
    found = set()
    for number in range(8):
        scene = scenes.scene(9 * 2**33 + number)
        with Image.open(folder / f"images/segmentation-{number:07d}.png") as image:
            assert image.mode == "RGB" and image.tobytes() == scene.image.tobytes()
        with Image.open(folder / f"labels/segmentation-{number:07d}.png") as image:
            assert image.mode == "L"
            labels = np.asarray(image)
        shown = [None, *(placed.sprite.name for placed in scene.objects)]
        assert [[names[n] if n < 255 else None for n in line] for line in labels] == [[shown[n] for n in line] for line in scene.mask()]
        found |= set(np.unique(labels).tolist()) - {255}
    assert found == set(range(len(names))) and names == sorted(set(names)) and 2 < len(names) < len(trained), "only what occurs"
    assert len(list((folder / "images").iterdir())) == len(list((folder / "labels").iterdir())) == 8


def test_segmentation_shows_few_sprites_the_first_of_those_of_stage_two(sprites, monkeypatch):
    monkeypatch.setattr(rendering, "SEGMENTATION_SPRITES", 16)
    world = rendering.World(str(sprites), 0, 96, 6, 2)
    scenes, names = rendering.generator.__wrapped__(world, "segmentation")
    trained = split_sprites(read_sprites(sprites), 0, 6)[0]
    assert {sprite.name for sprite in scenes.sprites} == set(names) and len(names) == 16
    assert set(scenes.sprites) == set(rendering.mllm_subset(trained, rendering.World("", 0, 96, 6, 2, 16)))


def test_without_swapped_and_segmentation_the_rest_is_the_same(config, made):
    main(replace(config, swapped=0, segmentation=0))
    without, whole = contents(Path(config.output)), contents(made)
    assert "swapped" not in without["COMMIT.json"].decode() and "segmentation" not in without["COMMIT.json"].decode()
    new = ("tasks/sprites-swapped/", "tasks/sprites-segmentation/")
    assert {name: data for name, data in whole.items() if name != "COMMIT.json" and not name.startswith(new)} == {
        name: data for name, data in without.items() if name != "COMMIT.json"
    }
    with pytest.raises(UsageError, match="swapped 0 there, 7 asked; segmentation 0 there, 8 asked"):
        main(config)


def test_fewer_pairs_are_the_first_of_more(config, made):
    main(replace(config, swapped=3, segmentation=0))
    few, more = Path(config.output) / "tasks/sprites-swapped", made / "tasks/sprites-swapped"
    assert contents(few).items() - {("pairs.jsonl", (few / "pairs.jsonl").read_bytes())} <= contents(more).items()
    assert (more / "pairs.jsonl").read_text().startswith((few / "pairs.jsonl").read_text())


def test_the_space_for_pairs_and_masks_is_asked_for(config, made, monkeypatch):
    asked = []
    monkeypatch.setattr("align.demo.building.require_free", lambda folder, needed: asked.append(needed))
    main(config)
    assert asked == [(60 + 5 + 9 + 2 * 6 * 2 + 2 * 7 + 2 * 8) * BYTES_PER_SCENE] and asked[0] > sum(map(len, contents(made).values()))


class FewScenes:
    """Stands in for the renderer: scene k shows one of `kinds` objects in turn."""

    def __init__(self, kinds):
        self.kinds = kinds

    def scenes(self, part, start, stop):
        for number in range(start, stop):
            shown = rendering.Shown((), (), 64, "short")
            yield rendering.Rendered(f"{part}-{number}", b"jpeg", "short", "long", (f"thing {number % self.kinds}",), shown)


def test_a_retrieval_scene_that_would_be_a_second_right_answer_is_left_out(tmp_path):
    write_retrieval(FewScenes(kinds=4), tmp_path / "enough", 4)
    rows = [json.loads(line) for line in (tmp_path / "enough" / "retrieval.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == ["retrieval-0", "retrieval-1", "retrieval-2", "retrieval-3"]
    write_retrieval(FewScenes(kinds=9), tmp_path / "more", 9)
    with pytest.raises(DataError, match="lower --retrieval"):
        write_retrieval(FewScenes(kinds=3), tmp_path / "few", 4)


def test_the_same_settings_give_the_same_bytes_with_any_number_of_workers(config, made, tmp_path):
    main(replace(config, workers=2))
    again = contents(tmp_path / "run" / "data")
    assert again == contents(made)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["data"], "nothing temporary is left"


def test_a_finished_folder_is_verified_and_kept(config, made, monkeypatch, capsys):
    monkeypatch.setattr("align.demo.building.ProcessPoolExecutor", None)  # any rendering would now fail
    main(replace(config, output=str(made)))
    assert "nothing to do" in capsys.readouterr().out


def test_other_settings_in_the_same_folder_are_refused_by_name(config, made):
    with pytest.raises(UsageError, match=r"seed 0 there, 1 asked.*choose another --output"):
        main(replace(config, output=str(made), seed=1))
    with pytest.raises(UsageError, match="train 60 there, 70 asked"):
        main(replace(config, output=str(made), train=70))


def test_a_folder_of_something_else_is_refused(config, tmp_path):
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "data" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="not empty and was not written by this command"):
        main(config)
    assert (tmp_path / "run" / "data" / "thesis.tex").exists()


def test_a_changed_byte_is_detected(config, tmp_path):
    main(config)
    tar = tmp_path / "run" / "data" / "train" / "000000.tar"
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(data)
    with pytest.raises(DamagedError, match="000000.tar"):
        main(config)


@pytest.mark.parametrize("place", ["prepare-train", "prepare-val", "prepare-swapped", "prepare-segmentation", "write", "prepare-rename"])
def test_a_kill_leaves_nothing_that_is_taken_for_done(config, made, tmp_path, forked, place):
    def killed():
        files.arm_failpoint(place)
        main(config)

    assert forked(killed) == -signal.SIGKILL
    assert not (tmp_path / "run" / "data").exists()
    assert no_worker_is_left(), "workers outlive a killed parent"
    main(config)
    assert contents(tmp_path / "run" / "data") == contents(made)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["data"]


def hold(lock, ready):
    with locked(lock):
        ready.write_text("")
        signal.pause()


def test_a_second_writer_is_refused(config, tmp_path, monkeypatch):
    output = tmp_path / "run" / "data"
    output.parent.mkdir(parents=True)
    holder = fork(hold, tmp_path / "run" / "data.lock", tmp_path / "ready")  # a process of its own, as a second writer is
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    monkeypatch.setattr("align.common.locks.PATIENCE_SECONDS", 0.1)
    with pytest.raises(LeaseError, match="another process holds .*data.lock"):
        main(config)
    os.kill(holder, signal.SIGKILL)
    assert exit_codes([holder]) == [-signal.SIGKILL]
    assert not is_done(output, {})


def test_tars_carry_no_times_or_owners(tmp_path):
    write_tars(tmp_path / "a", "{:02d}.tar", 2, ((f"k{i}", {"txt": b"x", "cls": b"1"}) for i in range(5)))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["00.tar", "01.tar", "02.tar"]
    with tarfile.open(tmp_path / "a" / "02.tar") as archive:
        assert [(m.name, m.mtime, m.uid, m.gid, m.uname) for m in archive] == [("k4.txt", 0, 0, 0, ""), ("k4.cls", 0, 0, 0, "")]


@pytest.mark.parametrize("wrong", [{"train": 0}, {"per_class": 0}, {"seed": -1}, {"workers": -1}, {"swapped": -1}, {"segmentation": -1}])
def test_impossible_sizes_are_refused_at_the_door(wrong):
    with pytest.raises(UsageError, match=f"--{next(iter(wrong)).replace('_', '-')} .*must be at least"):
        PrepareConfig(**wrong)


def test_too_few_sprites_for_the_split_are_named(config):
    with pytest.raises(UsageError, match="held_out is 28, but there are 28"):
        main(replace(config, held_out=28))
    assert not Path(config.output).parent.exists() or not list(Path(config.output).parent.iterdir()), "the temporary folder is left"
