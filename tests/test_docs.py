"""What README and the pages say is true: commands parse, flags and files exist, links lead somewhere, generated pages are current."""

import ast
import dataclasses
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from align.assessment.config import AssessConfig
from align.curation.config import CurateConfig
from align.demo.config import PrepareConfig
from align.embedded.assets import EMBEDDED
from align.encoders.families import VISION_ADAPTERS
from align.encoders.text import load_text_encoder
from align.encoders.vision import load_vision_encoder
from align.features.config import EncodeConfig
from align.model.config import ConvertConfig, PackageConfig
from align.model.dual_encoder import SailConfig, SailModel
from align.model.saving import save_model
from align.runtime import commandline as cli
from align.training.config import TrainConfig
from eval.harness.config import LmmsConfig
from eval.measures.config import EvalConfig
from eval.page.config import ReportConfig
from eval.tasks.registry import TASKS, find_task
from mllm.assembly.config import UpgradeConfig
from mllm.conversations.config import CheckConfig
from mllm.conversations.templates import TEMPLATES
from mllm.finetune import section
from mllm.loop.config import FinetuneConfig
from mllm.model.config import ChatConfig
from mllm.model.saving import save_mllm
from tests.support.tiny_encoders import save, save_bert
from tests.support.tiny_mllm import tiny_model

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {
    "align/prepare.py": ("prepare", PrepareConfig),
    "align/encode.py": ("encode", EncodeConfig),
    "align/train.py": ("train", TrainConfig),
    "align/assess.py": ("assess", AssessConfig),
    "align/curate.py": ("curate", CurateConfig),
    "align/convert.py": ("convert", ConvertConfig),
    "align/package.py": ("package", PackageConfig),
    "eval/run.py": ("eval", EvalConfig),
    "eval/report.py": ("report", ReportConfig),
    "eval/lmms.py": ("lmms", LmmsConfig),
    "mllm/upgrade.py": ("upgrade", UpgradeConfig),
    "mllm/check.py": ("check", CheckConfig),
    "mllm/finetune.py": (section, FinetuneConfig),
    "mllm/chat_cli.py": ("chat", ChatConfig),
}
# The log and the decisions are dated: what they quote was true on their day. The map is made from docstrings, the cases from what was run.
RECORDS = {"LOG.md", "decisions.md", "map.md", "cases.md"}
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
LIVING = {name: text for name, text in PAGES.items() if Path(name).name not in RECORDS}
RECIPES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(ROOT.glob("*/recipes/*.yaml"))}
SCRIPTS = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(ROOT.glob("scripts/*.sh"))}
LAUNCHERS = {  # flags of accelerate, pip, codespell, lmms-eval
    *("multi_gpu", "num_processes", "num_machines", "cpu", "model_args", "include_path", "output_path", "log_samples", "batch_size"),
    *("config", "help", "print-config", "debug", "check"),
}
README = PAGES["README.md"]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text):
    """Every command line that runs an entry, from code blocks and recipe headers, with continuation lines joined."""
    joined = re.sub(r"\\\n\s*#?\s*", " ", text)
    for line in joined.splitlines():
        words = line.strip("# ").split("  (")[0]
        match = re.search(r"((?:align|eval|mllm)/\w+\.py)\s+(--.*)", words)
        if match and match.group(1) in CONFIGS and "..." not in words and "`" not in words:
            yield match.group(1), shlex.split(match.group(2).replace("<commit>", "0" * 40), comments=True)


DOCUMENTED = [command for text in (*LIVING.values(), *RECIPES.values()) for command in commands(text)]
DOCUMENTED += [c for path in CONFIGS for c in commands(ast.get_docstring(ast.parse((ROOT / path).read_text())))]


def test_every_entry_has_a_command_to_check():
    assert {entry for entry, _ in DOCUMENTED} == set(CONFIGS)


@pytest.mark.parametrize(("entry", "flags"), DOCUMENTED, ids=lambda value: value if isinstance(value, str) else None)
def test_documented_commands_parse(entry, flags, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, kind = CONFIGS[entry]
    if "--config" in flags and not Path(flags[flags.index("--config") + 1]).exists():
        at = flags.index("--config")
        assert flags[at + 1] == "recipe.yaml", "a made-up recipe is called recipe.yaml"
        package = "mllm" if entry.startswith("mllm/") else "align"
        flags = ["--config", f"{package}/recipes/quickstart.yaml", *flags[:at], *flags[at + 2 :]]
    assert isinstance(cli.parse(kind, name if isinstance(name, str) else name(flags), flags), kind)


@pytest.mark.parametrize("page", LIVING)
def test_flags_named_on_a_page_exist(page):
    known = {field.name for _, kind in CONFIGS.values() for field in dataclasses.fields(kind)} | LAUNCHERS
    for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", LIVING[page]):
        names = {flag, flag.replace("-", "_"), flag.replace("-", "_").removeprefix("no_")}
        assert names & known, f"{page}: no command has --{flag}"


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CREDITS.md"])
def test_links_lead_to_files(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text()):
        assert target.startswith("https://") or (folder / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", [*LIVING, "CONTRIBUTING.md", "CREDITS.md", "docs/map.md", *RECIPES, *SCRIPTS, "Makefile"])
def test_files_named_on_a_page_exist(page):
    for name in re.findall(
        r"(?<![\w./-])(?:align|eval|mllm|scripts|docs|tests)/[\w./-]*\w\.(?:py|md|sh|yaml|tsv|json)\b", (ROOT / page).read_text()
    ):
        assert (ROOT / name).exists(), f"{page}: {name}"


@pytest.mark.parametrize("page", [*LIVING, "CONTRIBUTING.md"])
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([\w-]+)", (ROOT / page).read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}: make {target}"


def test_pages_name_all_that_there_is_to_choose_from():
    for page, names in (
        ("docs/encoders.md", [*VISION_ADAPTERS, *EMBEDDED]),
        ("docs/measure.md", TASKS),
        ("docs/recipes.md", RECIPES),
        ("docs/mllm.md", {"own", *TEMPLATES}),
    ):
        missing = [name for name in names if f"`{name}`" not in PAGES[page]]
        assert not missing, f"{page} does not name {missing}"


def test_the_yaml_task_of_the_pages_is_a_task(tmp_path):
    for block, kind in zip(blocks(PAGES["docs/measure.md"], "yaml"), ("classification", "retrieval"), strict=True):
        (tmp_path / "task.yaml").write_text(block)
        assert find_task(str(tmp_path / "task.yaml")).kind == kind


def defined(module):
    """Return the names that a module of the kit defines at its top level, read from its text: nothing is imported."""
    path = ROOT / Path(*module.split("."))
    tree = ast.parse((path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py").read_text())
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    targets += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names | {alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}


SNIPPETS = {f"{page} {number}": code for page, text in LIVING.items() for number, code in enumerate(blocks(text, "python"))}
SNIPPETS |= {
    f"{page} {n}": code
    for page, text in SCRIPTS.items()
    for n, code in enumerate(re.findall(r"<<'PY'.*?\n(.*?)^PY$", text, re.DOTALL | re.MULTILINE))
}
SNIPPETS |= {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "docs").rglob("*.py"))}


@pytest.mark.parametrize("where", SNIPPETS)
def test_python_on_pages_in_scripts_and_in_benchmarks_imports_what_exists(where):
    for node in ast.walk(ast.parse(SNIPPETS[where])):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("align", "eval", "mllm"):
            for alias in node.names:
                submodule = ROOT / Path(*node.module.split(".")) / f"{alias.name}.py"
                assert alias.name in defined(node.module) or submodule.exists(), f"{where}: {node.module} has no {alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name.split(".")[0] not in ("align", "eval", "mllm") or defined(alias.name), f"{where}: no {alias.name}"


def test_the_python_of_readme_runs_on_models_where_it_looks_for_them(tmp_path, monkeypatch, capsys):
    vision, (text, _) = save(tmp_path / "vision", "dinov2"), save_bert(tmp_path / "text")
    encoders = load_vision_encoder(vision), load_text_encoder(text)
    config = SailConfig(
        vision={"name": vision}, text={"name": text}, vision_fingerprint=encoders[0].fingerprint, text_fingerprint=encoders[1].fingerprint,
        vision_width=encoders[0].feature_width, text_width=encoders[1].width, width=16, head="linear",
    )  # fmt: skip
    encoders[1].tokenizer.save_pretrained(tmp_path / "tokenizer")
    save_model(SailModel(config).initialize(0), tmp_path / "runs/mine/best", tmp_path / "tokenizer")
    model, processor = tiny_model()
    processor.chat_template = processor.tokenizer.chat_template = TEMPLATES["vicuna_v1"]
    save_mllm(model, processor, tmp_path / "runs/mine/instruct/model")
    Image.new("RGB", (40, 50), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    for block in blocks(README, "python"):
        exec(block, {})
    printed = capsys.readouterr().out
    assert "'label': 'a dog'" in printed and "'label': 'a cat'" in printed and "What is on the table?" in printed


def test_generated_pages_are_current():
    ran = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, f"run `make docs` (or `python docs/generate.py`) and commit what it writes: {ran.stderr[-400:]}"


def test_planned_figures_start_from_the_published_sizes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    planned = importlib.import_module("planned")
    for text, expansion, published in ((1024, 4, 54.55e6), (1024, 8, 109.10e6), (4096, 8, 385.98e6)):  # parameters of both glu heads
        ours = planned.glu(2048, expansion, 1024)[0] + planned.glu(text, expansion, 1024)[0]
        assert ours == pytest.approx(published, rel=1e-3)
    assert "188 GB" in planned.stage_one("sail_l_gte").row and "471 GB" in planned.stage_one("sail_l_nv2").row
    encoding = planned.hours(2 * planned.DINOV2_L.parameters * planned.DINOV2_L.tokens * 23e6)
    assert 6 < encoding < 9, "about 7 A100 hours for 23M images"


def test_a_page_that_is_not_current_is_named(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("bench", "assess"))
    for name in ("README.md", "align", "eval", "mllm"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs" / "map.md").write_text("old")
    ran = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 1 and "docs/map.md" in ran.stderr


def test_the_site_builds_without_a_broken_link_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-800:]
    assert "Teach a frozen vision encoder language" in (tmp_path / "index.html").read_text()
    for page in tmp_path.rglob("*.html"):
        assert not re.search(r'(?:src|<link[^>]*href)="https?://', page.read_text()), page


def test_readme_fits_on_a_screen_or_two():
    assert len(README.encode()) <= 9000
    assert (ROOT / "docs/assets/report.png").stat().st_size < 200_000 and (ROOT / "docs/assets/stages.svg").stat().st_size < 20_000
