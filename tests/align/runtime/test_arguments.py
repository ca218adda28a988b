"""A typed flag wins over what a recipe says, also over another key that excludes it; messages say what came from the recipe."""

import sys
from dataclasses import fields

import pytest

from align.assessment.config import AssessConfig
from align.common.errors import UsageError
from align.curation.config import CurateConfig
from align.model.config import ConvertConfig
from align.runtime import commandline as cli
from align.runtime.arguments import Arguments
from align.training.config import TrainConfig
from mllm.assembly.config import UpgradeConfig
from mllm.loop.config import FinetuneConfig

STORES = {"images": ["i"], "captions": ["c"], "output": "o"}
RECIPES = {
    "train": (TrainConfig, STORES | {"steps": 80, "val_rows": 200, "start": "cca", "head": "linear"}),
    "encoders": (TrainConfig, {"data": "d", "captions": ["c"], "output": "o", "steps": 8, "vision": "v", "text": "t", "augment": True}),
    "held out": (TrainConfig, STORES | {"epochs": 2, "val_images": "v", "val_captions": ["w"]}),
    "assess": (AssessConfig, {"data": "d", "output": "o", "vision": ["a"], "text": ["t"], "captions": ["c"], "random_weights": ["a"]}),
    "curate": (CurateConfig, {"candidates": ["c"], "output": "o", "concept_store": "s", "concept_labels": "l.csv"}),
    "convert": (ConvertConfig, {"model": "m", "to_published": "p.pt"}),
    "upgrade": (UpgradeConfig, {"llm": "l", "revision": "abc", "sail": ["s"], "captions": ["c"], "image_root": "r", "texts": ["t"]}),
    "instruct": (FinetuneConfig, {"data": ["d"], "steps": 130}),
}


def write(tmp_path, name):
    import yaml

    kind, keys = RECIPES[name]
    section = {"encoders": "train", "held out": "train"}.get(name, name)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({section: keys}))
    return kind, section, str(path)


@pytest.mark.parametrize(
    ("recipe", "typed", "gone"),
    [
        ("train", "--epochs 3", {"steps": None}),
        ("train", "--val-images a --val-captions b", {"val_rows": 0}),
        ("train", "--val_images=a --val_captions=b", {"val_rows": 0}),
        ("train", "--data d --vision v --text t --captions txt", {"images": (), "start": "random"}),
        ("encoders", "--images i", {"data": None, "vision": None, "text": None, "augment": False}),
        ("held out", "--val-rows 50", {"val_images": None, "val_captions": ()}),
        ("held out", "--val-rows 0", {}),
        ("held out", "--steps 9", {"epochs": None}),
        ("assess", "--vision b", {"random_weights": None}),
        ("curate", "--concepts names.txt", {"concept_store": None, "concept_labels": None}),
        ("convert", "--embeddings e --kind image --encoder-name n --output o", {"model": None, "to_published": None}),
        ("upgrade", "--llava v", {"llm": None, "revision": None}),
        ("upgrade", "--projector p", {"captions": (), "texts": (), "image_root": None}),
        ("upgrade", "--vision v --sail-head none --texts", {"sail": ()}),
        ("upgrade", "--vision v --sail s --texts --captions c --image-root r", {}),
        ("instruct", "--epochs 2", {"steps": None}),
    ],
)
def test_a_typed_flag_takes_the_place_of_what_excludes_it(tmp_path, capsys, recipe, typed, gone):
    kind, section, path = write(tmp_path, recipe)
    config = cli.parse(kind, section, ["--config", path, *typed.split()])
    for name, value in gone.items():
        assert getattr(config, name) == value
    said = [line for line in capsys.readouterr().err.splitlines() if "takes the place of" in line]
    assert len(said) == sum(name in RECIPES[recipe][1] for name in gone), said
    assert all(path in line for line in said)


def test_what_replaces_what_are_fields():
    for kind in {kind for kind, _ in RECIPES.values()}:
        known = {field.name for field in fields(kind)}
        assert {*kind.REPLACES, *(name for names in kind.REPLACES.values() for name in names)} <= known


def test_both_typed_are_refused_as_before(tmp_path):
    kind, section, path = write(tmp_path, "train")
    with pytest.raises(SystemExit) as leaving:
        cli.parse(kind, section, ["--config", path, "--epochs", "3", "--steps", "2"])
    assert leaving.value.code == 2


def test_a_message_says_which_value_the_recipe_gives(tmp_path, capsys):
    kind, section, path = write(tmp_path, "train")
    with pytest.raises(SystemExit):
        cli.parse(kind, section, ["--config", path, "--head", "glu"])
    err = capsys.readouterr().err
    assert f"--start cca is what {path} says" in err and "--head glu is" not in err
    arguments = Arguments.of(kind, section, ["--config", path, "--steps", "4"])
    assert "--val-rows 200" in arguments.origin("--val-rows and --steps") and "--steps" not in arguments.origin("--val-rows and --steps")
    assert arguments.origin("nothing of it") == ""


def test_an_error_of_a_run_says_it_too(tmp_path, capsys, monkeypatch):
    def main(config):
        raise UsageError(f"--val-rows {config.val_rows}: too many")

    kind, section, path = write(tmp_path, "train")
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", path])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit):
        cli.run(main, kind, section)
    assert f"error: --val-rows 200: too many (--val-rows 200 is what {path} says" in capsys.readouterr().err
