"""The stage-two data of `align/prepare.py`: LLaVA's format, other scenes of trained sprites, nothing else changed by it."""

import io
import json
import re
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from align.common import files
from align.common.errors import UsageError
from align.demo import rendering
from align.demo.building import BYTES_PER_SCENE
from align.demo.config import PrepareConfig
from align.demo.scenes import read_sprites, split_sprites
from align.demo.wording import article
from align.demo.writing import conversation_row, question_row, write_conversations, write_questions
from align.prepare import main
from tests.support.synthetic_sprites import make_sprites

SIZES = {"train": 3, "val": 2, "retrieval": 2, "held_out": 6, "per_class": 1, "image_size": 96, "swapped": 0, "segmentation": 0}
STAGE_TWO = {"mllm_pretrain": 7, "mllm_instruct": 60, "mllm_test": 40}


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    return make_sprites(tmp_path_factory.mktemp("sprites") / "folder")


@pytest.fixture
def config(sprites, tmp_path, monkeypatch):
    monkeypatch.setattr("align.embedded.assets.fetch", lambda asset, cache, progress: sprites)
    return PrepareConfig(output=str(tmp_path / "run" / "data"), assets=(), workers=1, **SIZES, **STAGE_TWO)


@pytest.fixture(scope="module")
def made(sprites, tmp_path_factory):
    """One finished run that the reading tests share."""
    patch = pytest.MonkeyPatch()
    patch.setattr("align.embedded.assets.fetch", lambda asset, cache, progress: sprites)
    folder = tmp_path_factory.mktemp("made") / "data"
    main(PrepareConfig(output=str(folder), assets=(), workers=1, **SIZES, **STAGE_TWO))
    patch.undo()
    return folder


@pytest.fixture
def mllm(made):
    return made / "mllm"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(path):
    return pq.read_table(path).to_pylist()


def test_pretraining_rows_are_a_picture_and_its_caption(mllm):
    rows = json.loads((mllm / "pretrain.json").read_text())
    assert [row["id"] for row in rows] == [f"mllm_pretrain-{number:07d}" for number in range(7)]
    for row in rows:
        assert set(row) == {"id", "image", "conversations"} and row["image"] == f"images/{row['id']}.jpg"
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"]
        assert row["conversations"][0]["value"] == "<image>" and row["conversations"][1]["value"]


def test_instruction_rows_are_conversations_about_one_picture(mllm):
    rows = json.loads((mllm / "instruct.json").read_text())
    assert len(rows) == len({row["id"] for row in rows}) == 60
    for row in rows:
        turns = row["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[0]["value"].startswith("<image>\n") and str(turns).count("<image>") == 1
        assert all(turn["value"] == turn["value"].lower() for turn in turns[1::2]), "short answers in lower case"
    described = [row["conversations"][-2]["value"].removeprefix("<image>\n") == "Describe the picture." for row in rows]
    assert all(described[::8]) and sum(described) < len(rows) / 4
    assert max(len(row["conversations"]) for row in rows) >= 8


def test_every_picture_is_there_and_none_is_left_over(mllm):
    rows = [row for name in ("pretrain", "instruct") for row in json.loads((mllm / f"{name}.json").read_text())]
    assert {path.name for path in (mllm / "images").iterdir()} == {row["image"].removeprefix("images/") for row in rows}
    for row in rows[::10]:
        with Image.open(mllm / row["image"]) as image:
            assert image.size == (96, 96) and image.format == "JPEG"


@pytest.mark.parametrize(
    ("name", "kinds"), [("yesno", {"exists", "relation"}), ("open", {"what", "where", "count"}), ("caption", {"caption"})]
)
def test_test_questions_carry_their_pictures(mllm, name, kinds):
    rows = rows_of(mllm / f"{name}.parquet")
    assert {row["kind"] for row in rows} == kinds and len({row["id"] for row in rows}) == len(rows) >= 30
    for row in rows:
        assert list(row) == ["id", "image", "question", "answer", "kind"]
        assert row["id"].rpartition("-")[0] + ".jpg" == row["image"]["path"]
        assert row["question"] and row["answer"]
        assert (row["answer"] in ("yes", "no")) == (name == "yesno")
    for row in rows[::10]:
        assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (96, 96)
    if name == "yesno":
        assert sum(row["answer"] == "yes" for row in rows) * 2 == len(rows)
    if name == "caption":
        assert len(rows) == 40


def test_answers_belong_to_their_pictures(mllm, sprites):
    world = rendering.World(str(sprites), 0, 96, 6, 1)
    scenes = {scene.key: scene for scene in rendering.render(rendering.Job(world, "mllm_test", 0, 40))}
    for row in rows_of(mllm / "caption.parquet"):
        scene = scenes[row["id"].rpartition("-")[0]]
        assert (row["answer"], row["image"]["bytes"]) == (scene.short, scene.jpeg)
    for row in rows_of(mllm / "yesno.parquet"):
        name = re.match(r"Is there an? (.*)\?$", row["question"])
        if name:
            assert (name[1] in scenes[row["id"].rpartition("-")[0]].names) == (row["answer"] == "yes")


def test_held_out_sprites_are_neither_shown_nor_named(made, mllm, sprites):
    text = (mllm / "pretrain.json").read_text() + (mllm / "instruct.json").read_text()
    text += str([(row["question"], row["answer"]) for name in ("yesno", "open", "caption") for row in rows_of(mllm / f"{name}.parquet")])
    unseen = [sprite.name for sprite in split_sprites(read_sprites(sprites), 0, 6)[1]]
    assert len(unseen) == 6 and not [name for name in unseen if re.search(rf"\b{name}\b", text)]


def test_no_scene_is_used_twice(mllm):
    pictures = [path.read_bytes() for path in (mllm / "images").iterdir()]
    pictures += [row["image"]["bytes"] for row in rows_of(mllm / "caption.parquet")]
    assert len(set(pictures)) == len(pictures) == 7 + 60 + 40
    indices = [rendering.FIRST_INDEX[part] for part in rendering.PARTS]
    assert all(later - earlier == 1 << 33 for earlier, later in zip(indices, indices[1:], strict=False))


def test_without_stage_two_nothing_changes(config, made):
    main(replace(config, mllm_pretrain=0, mllm_instruct=0, mllm_test=0, mllm_sprites=16))  # of no effect without scenes
    alone = contents(made.parent / "data")
    without = contents(Path(config.output))
    assert "settings" in json.loads(without["COMMIT.json"]) and "mllm" not in without["COMMIT.json"].decode()
    assert {name: data for name, data in alone.items() if not name.startswith(("mllm/", "COMMIT"))} == {
        name: data for name, data in without.items() if name != "COMMIT.json"
    }


def test_one_part_alone_is_the_same_as_with_the_others(config, mllm):
    main(replace(config, mllm_pretrain=0, mllm_test=0))
    folder = Path(config.output) / "mllm"
    assert sorted(path.name for path in folder.iterdir()) == ["images", "instruct.json"]
    assert (folder / "instruct.json").read_bytes() == (mllm / "instruct.json").read_bytes()


def test_the_same_settings_give_the_same_bytes_with_any_number_of_workers(config, made):
    main(replace(config, workers=2))
    assert contents(Path(config.output)) == contents(made)


def test_other_numbers_in_the_same_folder_are_refused(config, made):
    for change, message in (({"mllm_test": 41}, "mllm_test 40 there, 41 asked"), ({"mllm_instruct": 0}, "mllm_instruct 60 there, 0 asked")):
        with pytest.raises(UsageError, match=message):
            main(replace(config, output=str(made), **change))
    main(replace(config, output=str(made)))


def test_stage_two_can_show_fewer_sprites(config, made, sprites, tmp_path):
    main(replace(config, mllm_sprites=16, mllm_test=20))
    output = Path(config.output)
    assert json.loads((output / "COMMIT.json").read_text())["settings"]["mllm_sprites"] == 16
    trained = split_sprites(read_sprites(sprites), 0, 6)[0]
    world = rendering.World(str(sprites), 0, 96, 6, 1, 16)
    subset = rendering.mllm_subset(trained, world)
    shown = {
        name
        for part, count in (("mllm_pretrain", 7), ("mllm_instruct", 60), ("mllm_test", 20))
        for scene in rendering.render(rendering.Job(world, part, 0, count))
        for name in scene.names
    }
    assert shown == {sprite.name for sprite in subset} and len(subset) == 16 and set(subset) < set(trained)
    asked = re.findall(r"Is there an? ([^?]*)\?", (output / "mllm" / "instruct.json").read_text())
    asked += [name for row in rows_of(output / "mllm/yesno.parquet") for name in re.findall(r"Is there an? (.*)\?", row["question"])]
    assert len(asked) > 60 and set(asked) <= shown
    both, alone = contents(output), contents(made)
    assert all(both[name] == data for name, data in alone.items() if not name.startswith(("mllm/", "COMMIT"))), "only stage two"
    for change, message in (({"mllm_sprites": 17}, "mllm_sprites 16 there, 17 asked"), ({}, "mllm_sprites 16 there, 0 asked")):
        with pytest.raises(UsageError, match=message):
            main(replace(config, mllm_test=20, **change))
    with pytest.raises(UsageError, match="mllm_sprites 0 there, 16 asked"):
        main(replace(config, output=str(made), mllm_sprites=16))


def test_only_the_kinds_of_turns_asked_for(config):
    kinds = ("where", "exists")
    main(replace(config, mllm_sprites=16, mllm_described=60, mllm_instruct=60, mllm_kinds=kinds))
    for name in ("instruct", "described"):
        asked = Counter()
        for row in json.loads((Path(config.output) / f"mllm/{name}.json").read_text()):
            turns = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"][::2]]
            assert turns == ["Describe the picture."] or all(turn.startswith(("Where", "Is there")) for turn in turns)
            asked.update(turn.split()[0] for turn in turns)
        assert asked["Where"] > 10 and asked["Is"] > 40
    with pytest.raises(UsageError, match=r"mllm_kinds \['exists', 'where'\] there, 0 asked"):
        main(replace(config, mllm_sprites=16, mllm_described=60, mllm_instruct=60))


def test_described_scenes_name_all_training_sprites_and_have_no_pictures(config, made, sprites):
    main(replace(config, mllm_sprites=16, mllm_described=200))
    rows = json.loads((Path(config.output) / "mllm/described.json").read_text())
    pictures = {path.stem for path in (Path(config.output) / "mllm/images").iterdir()}
    assert len(rows) == 200 and not pictures & {row["id"] for row in rows}
    texts = {region["text"] for row in rows for region in row["image"]["regions"]}
    trained = split_sprites(read_sprites(sprites), 0, 6)[0]
    assert texts == {article(sprite.name) for sprite in trained}
    for row in rows:
        shown = {region["text"]: region["box"] for region in row["image"]["regions"]}
        for asked, answered in zip(row["conversations"][::2], row["conversations"][1::2], strict=True):
            if found := re.search(r"Is there (an? .*)\?", asked["value"]):
                assert (found[1] in shown) == (answered["value"] == "yes")
            if answered["value"] == "in the top left":
                name = re.search(r"the (.*)\?", asked["value"])[1]
                left, top, right, bottom = shown[article(name)]
                assert left + right < 1 and top + bottom < 1
    with pytest.raises(UsageError, match="mllm_described 200 there, 0 asked"):
        main(replace(config, mllm_sprites=16))


def test_questions_come_in_three_groups_of_sprites(config, sprites, tmp_path, monkeypatch):
    """Taught in stage two; in stage one's scenes only; in neither."""
    folder = shutil.copytree(sprites, tmp_path / "more")
    table = json.loads((folder / "sprites.json").read_text())
    table += [{**row, "id": f"a{row['id']}", "name": f"gadget{number}", "group": "object"} for number, row in enumerate(table)]
    (folder / "sprites.json").write_text(json.dumps(table))
    monkeypatch.setattr("align.embedded.assets.fetch", lambda asset, cache, progress: folder)
    main(replace(config, held_out=12, mllm_sprites=16, mllm_pretrain=60))
    trained, unseen = ({sprite.name for sprite in part} for part in split_sprites(read_sprites(folder), 0, 12))
    world = rendering.World(str(folder), 0, 96, 12, 1, 16)
    taught = {sprite.name for sprite in rendering.sprites_of(world, "mllm_test")}
    mllm = Path(config.output) / "mllm"
    named = {
        name: {row["answer"] for row in rows_of(mllm / f"open{name}.parquet") if row["kind"] == "what"}
        for name in ("", "-aligned", "-unseen")
    }
    assert all(len(names) > 3 for names in named.values()), named
    assert named[""] <= taught and named["-aligned"] <= trained - taught and named["-unseen"] <= unseen
    for group, names in (("aligned", trained - taught), ("unseen", unseen)):
        questions = rows_of(mllm / f"yesno-{group}.parquet")
        asked = {name for row in questions for name in re.findall(r"Is there an? (.*)\?", row["question"])}
        assert len(asked) > 3 and asked <= names and {row["kind"] for row in questions} == {"exists"}
    said = (mllm / "pretrain.json").read_text()
    assert not any(re.search(rf"\b{name}\b", said) for name in trained - taught)


def test_groups_without_sprites_enough_are_left_out(mllm):
    assert {path.stem for path in mllm.glob("*.parquet")} == {"yesno", "open", "caption"}


def test_a_larger_subset_holds_a_smaller_one_and_the_seed_chooses(sprites):
    trained = split_sprites(read_sprites(sprites), 0, 6)[0]
    few, more, other = (
        set(rendering.mllm_subset(trained, rendering.World("", seed, 96, 6, 1, count))) for seed, count in ((0, 16), (0, 19), (1, 16))
    )
    assert few < more < set(trained) and other != few
    assert rendering.mllm_subset(trained, rendering.World("", 0, 96, 6, 1)) == trained


def test_more_sprites_than_there_are_are_refused_before_anything_is_rendered(config):
    with pytest.raises(UsageError, match="--mllm-sprites is 23, but scenes of the training data show 22 sprites"):
        main(replace(config, mllm_sprites=23))
    assert not Path(config.output).parent.exists() or not list(Path(config.output).parent.iterdir())
    with pytest.raises(UsageError, match="--mllm-sprites 15: is 0"):
        PrepareConfig(mllm_sprites=15)


def test_a_kill_leaves_nothing_that_is_taken_for_done(config, made, forked):
    def killed():
        files.arm_failpoint("prepare-mllm")
        main(config)

    assert forked(killed) == -signal.SIGKILL
    assert not Path(config.output).exists()
    main(config)
    assert contents(Path(config.output)) == contents(made)


def test_the_space_is_asked_for_beforehand(config, made, monkeypatch):
    asked = []
    monkeypatch.setattr("align.demo.building.require_free", lambda folder, needed: asked.append(needed))
    main(config)
    scenes = 3 + 2 + 2 + 2 * 6 + 7 + 60 + 7 * 40
    assert asked == [scenes * BYTES_PER_SCENE] and asked[0] > sum(map(len, contents(made).values()))


@pytest.mark.parametrize("field", STAGE_TWO)
def test_negative_numbers_are_refused_at_the_door(field):
    with pytest.raises(UsageError, match=f"--{field.replace('_', '-')} -1: must be at least 0"):
        PrepareConfig(**{field: -1})


def test_rows_as_llava_holds_them(tmp_path):
    row = conversation_row("a", "images/a.jpg", [("", "a dog")])
    assert row == {
        "id": "a",
        "image": "images/a.jpg",
        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a dog"}],
    }
    two = conversation_row("b", "b.jpg", [("Where?", "here"), ("Who?", "me")])
    assert [turn["value"] for turn in two["conversations"]] == ["<image>\nWhere?", "here", "Who?", "me"]
    write_conversations(tmp_path / "rows.json", [row, two])
    write_conversations(tmp_path / "rows.jsonl", [row, two])
    assert json.loads((tmp_path / "rows.json").read_text()) == [row, two]
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == [row, two]
    write_conversations(tmp_path / "none.json", [])
    assert json.loads((tmp_path / "none.json").read_text()) == []


def test_several_right_answers_are_a_list(tmp_path):
    write_questions(tmp_path / "a.parquet", [question_row("0", ("a.jpg", b"x"), "q", ["one", "two"], "caption")])
    write_questions(tmp_path / "none.parquet", [])
    assert rows_of(tmp_path / "a.parquet")[0]["answer"] == ["one", "two"] and rows_of(tmp_path / "none.parquet") == []


def test_a_picture_asked_about_often_takes_its_space_once(tmp_path):
    picture = bytes(range(256)) * 40 + bytes(hash(("x", n)) % 256 for n in range(30_000))
    write_questions(tmp_path / "one.parquet", [question_row("0", ("a.jpg", picture), "q", "a", "what")])
    write_questions(tmp_path / "ten.parquet", [question_row(str(n), ("a.jpg", picture), "q", "a", "what") for n in range(10)])
    assert (tmp_path / "ten.parquet").stat().st_size < 1.2 * (tmp_path / "one.parquet").stat().st_size
    assert rows_of(tmp_path / "ten.parquet")[9]["image"] == {"bytes": picture, "path": "a.jpg"}
