"""Rules of the house that a machine can check: import arrows, names, config fields, recipes, README's map."""

import ast
import dataclasses
import importlib.metadata
import inspect
import re
import sys
from pathlib import Path

import pytest

from align.assessment.config import AssessConfig
from align.common import commandline as cli
from align.curation.config import CurateConfig
from align.demo.config import PrepareConfig
from align.features.config import EncodeConfig
from align.model.config import ConvertConfig
from align.training.config import TrainConfig
from eval.harness.config import LmmsConfig
from eval.measures.config import EvalConfig
from eval.page.config import ReportConfig
from mllm.assembly.config import UpgradeConfig
from mllm.conversations.config import CheckConfig
from mllm.loop.config import FinetuneConfig
from mllm.model.config import ChatConfig

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"align": (), "mllm": ("align",), "eval": ("align", "mllm")}
ENTRIES = {
    *("align/encode.py", "align/curate.py", "align/train.py", "align/prepare.py", "eval/run.py"),
    *("eval/report.py", "eval/lmms.py", "align/assess.py", "align/convert.py", "mllm/upgrade.py"),
    *("mllm/check.py", "mllm/finetune.py", "mllm/chat_cli.py"),
}
CONFIGS = {
    "prepare": PrepareConfig, "encode": EncodeConfig, "curate": CurateConfig, "train": TrainConfig,
    "eval": EvalConfig, "report": ReportConfig, "lmms": LmmsConfig, "upgrade": UpgradeConfig,
    "check": CheckConfig, "pretrain": FinetuneConfig, "instruct": FinetuneConfig, "chat": ChatConfig,
    "convert": ConvertConfig, "assess": AssessConfig,
}  # fmt: skip
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
RECIPES = sorted(path for package in ("align", "mllm") for path in (ROOT / package / "recipes").glob("*.yaml"))


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_arrows_point_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    for module in imports_of(path):
        top = module.split(".")[0]
        if top in PACKAGES:
            assert top == package or top in PACKAGES[package], f"{path} imports {module}: arrows are eval -> mllm -> align"
            entry = module.replace(".", "/") + ".py"
            assert entry not in ENTRIES, f"{path} imports the entry {module}"
        assert module != "eval", f"{path}: `import eval` hides the builtin; use `from eval.x import y`"


def test_no_file_shadows_a_library():
    installed = set(importlib.metadata.packages_distributions()) - set(PACKAGES)
    taken = set(sys.stdlib_module_names) | installed
    shadows = [str(path.relative_to(ROOT)) for path in FILES if path.stem in taken and path.stem != "__init__"]
    assert not shadows, f"a script's own folder comes first on sys.path, so these files replace a library: {shadows}"


def test_entries_are_the_files_that_can_be_run():
    runnable = {str(path.relative_to(ROOT)) for path in FILES if '__name__ == "__main__"' in path.read_text()}
    assert runnable == ENTRIES


@pytest.mark.parametrize("section", CONFIGS)
def test_every_config_field_is_documented_and_read(section):
    kind = CONFIGS[section]
    source = "\n".join(path.read_text() for path in FILES if path.name != "config.py")
    definition = (ROOT / Path(*kind.__module__.split("."))).with_suffix(".py").read_text()
    methods = "".join(inspect.getsource(value) for name, value in vars(kind).items() if inspect.isfunction(value) and name[:2] != "__")
    for field in dataclasses.fields(kind):
        used = re.search(rf"config\.{field.name}\b", source) or re.search(rf"self\.{field.name}\b", methods)
        assert used, f"{kind.__name__}.{field.name} is never read"
        assert re.search(rf'^    {field.name}: .*\n    """', definition, re.MULTILINE), f"{kind.__name__}.{field.name} has no description"
    assert dataclasses.fields(kind) and kind.__dataclass_params__.frozen


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_parses_and_says_its_command(recipe):
    sections = cli.load_yaml(recipe)
    for section in sections:
        config = cli.parse(CONFIGS[section], section, ["--config", str(recipe)])
        assert dataclasses.is_dataclass(config)
        assert section not in ("pretrain", "instruct") or config.stage == section
    header = recipe.read_text().split("\n\n")[0]
    assert header.startswith("#") and f"--config {recipe.parent.parent.name}/recipes/{recipe.name}" in header, (
        "the header shows the command"
    )


def test_there_are_recipes():
    names = {path.name for path in RECIPES}
    assert {"quickstart.yaml", "sail_l_gte.yaml", "sail_l_nv2.yaml", "workshop.yaml", "flickr8k.yaml"} <= names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_say_what_they_are_and_stay_small(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
    assert len(text.splitlines()) <= 450, f"{path} has outgrown its room: split it"


def test_no_unsafe_loading():
    for path in FILES:
        text = path.read_text()
        for banned in ("pickle.load", "LOAD_TRUNCATED_IMAGES = ", "MAX_IMAGE_PIXELS = ", "yaml.load(", "breakpoint("):
            allowed = banned == "yaml.load(" and path.name == "commandline.py"  # with its own plain loader
            assert allowed or banned not in text, f"{path}: {banned}"
        assert not re.search(r"load_state_dict\([^\n]*strict=False", text), f"{path}: loads what it finds"
        for call in re.findall(r"torch\.load\([^\n]*", text):
            assert "weights_only=True" in call, f"{path}: {call}"
