"""Rules of the house that a machine can check: import arrows, names, sizes, config fields, recipes."""

import ast
import dataclasses
import importlib.machinery
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from align.assessment.config import AssessConfig
from align.curation.config import CurateConfig
from align.demo.config import PrepareConfig
from align.features.config import EncodeConfig
from align.model.config import ConvertConfig, PackageConfig
from align.runtime import commandline as cli
from align.runtime.recipes_yaml import load_yaml
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
    "align/package.py",
    *("mllm/check.py", "mllm/finetune.py", "mllm/chat_cli.py"),
}
CONFIGS = {
    "prepare": PrepareConfig, "encode": EncodeConfig, "curate": CurateConfig, "train": TrainConfig,
    "eval": EvalConfig, "report": ReportConfig, "lmms": LmmsConfig, "upgrade": UpgradeConfig,
    "check": CheckConfig, "pretrain": FinetuneConfig, "instruct": FinetuneConfig, "chat": ChatConfig,
    "convert": ConvertConfig, "package": PackageConfig, "assess": AssessConfig,
}  # fmt: skip
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
RECIPES = sorted(path for package in ("align", "mllm") for path in (ROOT / package / "recipes").glob("*.yaml"))


# folder: the folders it may import, besides itself. `align` stands for all of it.
ARROWS = {
    "align/common": (),
    "align/runtime": ("align/common",),
    "align/embedded": ("align/common",),
    "align/sources": ("align/common",),
    "align/encoders": ("align/common", "align/embedded"),
    "align/features": ("align/common", "align/runtime", "align/sources", "align/encoders"),
    "align/model": ("align/common", "align/encoders"),
    "align/training": ("align/common", "align/runtime", "align/sources", "align/encoders", "align/features", "align/model"),
    "align/assessment": (
        "align/common",
        "align/runtime",
        "align/sources",
        "align/encoders",
        "align/features",
        "align/model",
        "align/training",
    ),
    "align/curation": ("align/common", "align/runtime", "align/encoders", "align/features", "align/model"),
    "align/demo": ("align/common", "align/runtime", "align/embedded"),
    "mllm/conversations": ("align",),
    "mllm/model": ("align", "mllm/conversations"),
    "mllm/assembly": ("align", "mllm/conversations", "mllm/model"),
    "mllm/loop": ("align", "mllm/conversations", "mllm/model"),
    "eval/results": ("align",),
    "eval/page": ("align", "eval/results"),
    "eval/tasks": ("align", "mllm"),
    "eval/models": ("align", "mllm", "eval/tasks", "eval/results"),
    "eval/measures": ("align", "mllm", "eval/tasks", "eval/models", "eval/results"),
    "eval/harness": ("align", "mllm", "eval/tasks", "eval/models", "eval/measures", "eval/results", "eval/page"),
}
# folders whose files import no torch, neither themselves nor through what they import
WITHOUT_TORCH = ("align/common", "align/runtime", "align/sources", "eval/results", "eval/page")
ABOUT_TORCH = {
    "align/runtime/checkpoints.py",
    "align/runtime/processes.py",
    "align/common/tensor_files.py",
}  # files of these folders that are about it


def names_of(path):
    """Yield the modules and `module.name`s that a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folder_of(path):
    return "/".join(path.relative_to(ROOT).parts[:2])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_arrows_point_one_way(path):
    package, inside = path.relative_to(ROOT).parts[0], len(path.relative_to(ROOT).parts) > 2
    for name in names_of(path):
        top, *rest = name.split(".")
        if top not in PACKAGES or not rest:
            assert name != "eval", f"{path}: `import eval` hides the builtin; use `from eval.x import y`"
            continue
        assert top == package or top in PACKAGES[package], f"{path} imports {name}: arrows are eval -> mllm -> align"
        target = f"{top}/{rest[0]}"
        assert f"{target}.py" not in ENTRIES, f"{path} imports the entry {target}.py"
        if inside:
            allowed = (folder_of(path), *ARROWS[folder_of(path)])
            assert target in allowed or top in allowed, f"{path} imports {name}: {folder_of(path)} may import {', '.join(allowed)}"


def test_the_arrows_between_folders_make_no_circle():
    folders = {folder_of(path) for path in FILES if len(path.relative_to(ROOT).parts) > 2}
    assert folders == set(ARROWS), "every folder has its line in the table"
    left = {folder: {a for a in allowed if "/" in a} for folder, allowed in ARROWS.items()}
    while left:
        free = {folder for folder, waiting in left.items() if not waiting & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {folder: waiting for folder, waiting in left.items() if folder not in free}


def test_folders_without_torch_load_none():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in FILES
        if folder_of(path) in WITHOUT_TORCH and str(path.relative_to(ROOT)) not in ABOUT_TORCH and path.name != "__init__.py"
    ]
    code = (
        f"import importlib, sys\nfor name in {modules!r}:\n    importlib.import_module(name)\n    assert 'torch' not in sys.modules, name"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-400:]


@pytest.mark.parametrize("entry", sorted(ENTRIES))
def test_help_is_answered_before_anything_heavy_is_loaded(entry):
    code = (
        f"import sys, time, runpy\nsys.argv = [{entry!r}, '--help']\nsys.path[0] = {str((ROOT / entry).parent)!r}\n"
        f"try:\n    runpy.run_path({str(ROOT / entry)!r}, run_name='__main__')\n"
        "except SystemExit as leaving:\n    assert not leaving.code\n"
        "heavy = [name for name in ('torch', 'transformers', 'pyarrow', 'matplotlib', 'datasets', 'scipy') if name in sys.modules]\n"
        "assert not heavy, heavy"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0 and "usage:" in ran.stdout, ran.stderr[-400:]


def test_nothing_beside_an_entry_shadows_a_library():
    """A script's own folder comes first on `sys.path`: a file or folder in it replaces a library of the same name."""
    taken = set(sys.stdlib_module_names)
    elsewhere = [place for place in sys.path if place and Path(place).resolve() not in (ROOT, *(ROOT / package for package in PACKAGES))]
    for package in PACKAGES:
        for path in (ROOT / package).iterdir():
            name = path.stem if path.suffix == ".py" else path.name
            if path.is_dir() and name != "__pycache__" or path.suffix == ".py" and name != "__init__":
                found = importlib.machinery.PathFinder.find_spec(name, elsewhere)
                assert name not in taken and found is None, f"{path} replaces {found or 'a module of the standard library'}"


@pytest.mark.parametrize("entry", sorted(ENTRIES))
def test_entries_compose(entry):
    text = (ROOT / entry).read_text()
    assert len(text.splitlines()) <= 150, f"{entry}: what computes belongs into a folder"
    classes = [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    assert not classes, f"{entry}: classes {classes} belong into a folder"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_fit_on_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{path}: {node.name} has {length} lines; split it"


def test_every_folder_says_what_belongs_there():
    for folder in ARROWS:
        words = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text())) or ""
        assert 2 <= len([line for line in words.splitlines() if line]) <= 5, (
            f"{folder}/__init__.py: two or three lines on what belongs there"
        )


def test_entries_are_the_files_that_can_be_run():
    runnable = {str(path.relative_to(ROOT)) for path in FILES if '__name__ == "__main__"' in path.read_text()}
    assert runnable == ENTRIES


@pytest.mark.parametrize("section", CONFIGS)
def test_every_config_field_is_documented_and_read(section):
    kind = CONFIGS[section]
    source = "\n".join(path.read_text() for path in FILES if path.name != "config.py")
    bases = [base for base in kind.__mro__ if base is not object]
    definition = "".join(inspect.getsource(base) for base in bases)
    members = [item for base in bases for item in vars(base).items()]
    methods = "".join(inspect.getsource(value) for name, value in members if inspect.isfunction(value) and name[:2] != "__")
    for field in dataclasses.fields(kind):
        used = re.search(rf"config\.{field.name}\b", source) or re.search(rf"self\.{field.name}\b", methods)
        assert used, f"{kind.__name__}.{field.name} is never read"
        assert re.search(rf'^    {field.name}: .*\n    """', definition, re.MULTILINE), f"{kind.__name__}.{field.name} has no description"
    assert dataclasses.fields(kind) and kind.__dataclass_params__.frozen


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_parses_and_says_its_command(recipe):
    sections = load_yaml(recipe)
    for section in sections:
        config = cli.parse(CONFIGS[section], section, ["--config", str(recipe)])
        assert dataclasses.is_dataclass(config)
        assert section not in ("pretrain", "instruct") or config.stage == section
    header = recipe.read_text().split("\n\n")[0]
    assert header.startswith("#") and f"--config {recipe.parent.parent.name}/recipes/{recipe.name}" in header, (
        "the header shows the command"
    )
    if recipe.is_relative_to(ROOT / "align"):
        assert "Expected" in header or "Published" in header, "the header says what comes out"


def test_there_are_recipes():
    names = {path.name for path in RECIPES}
    assert {"quickstart.yaml", "sail_l_gte.yaml", "sail_l_nv2.yaml", "workshop.yaml", "flickr8k.yaml"} <= names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_say_what_they_are_and_stay_small(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
    assert len(text.splitlines()) <= 450, f"{path} has outgrown its room: split it"


def calls_of(path):
    """Yield (owner, name, call) of every call of a file: `AutoModel.from_config(x)` has the owner `AutoModel`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
            yield owner, node.func.attr if owner else getattr(node.func, "id", ""), node


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "docs").rglob("*.py"))], ids=lambda path: str(path.relative_to(ROOT)))
def test_whoever_opens_a_model_says_whether_its_code_may_run(path):
    """Where `trust_remote_code` is not given, transformers asks on the terminal, and runs the code of the folder after a yes."""
    for owner, name, call in calls_of(path):
        if name not in ("from_pretrained", "from_config", "SentenceTransformer", "pipeline") or owner in ("super()", "SailModel", "cls"):
            continue
        said = [keyword.arg or ast.unparse(keyword.value) for keyword in call.keywords]
        known = {"trust_remote_code", "remote", "spec.from_pretrained"}
        assert known & set(said), f"{path}:{call.lineno}: pass trust_remote_code=False, or what EncoderSpec.from_pretrained gives"


def test_no_unsafe_loading():
    for path in FILES:
        text = path.read_text()
        for banned in ("pickle.load", "LOAD_TRUNCATED_IMAGES = ", "MAX_IMAGE_PIXELS = ", "yaml.load(", "breakpoint("):
            allowed = banned == "yaml.load(" and path.name == "recipes_yaml.py"  # with its own plain loader
            assert allowed or banned not in text, f"{path}: {banned}"
        assert not re.search(r"load_state_dict\([^\n]*strict=False", text), f"{path}: loads what it finds"
        for call in re.findall(r"torch\.load\([^\n]*", text):
            assert "weights_only=True" in call, f"{path}: {call}"
