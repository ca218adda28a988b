"""What README says is true: its commands parse, its numbers have an origin, its files exist."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from align.common import commandline as cli
from align.demo.config import PrepareConfig
from align.features.config import EncodeConfig
from align.training.config import TrainConfig
from eval.harness.config import LmmsConfig
from eval.measures.config import EvalConfig
from eval.tasks.data import find_task
from mllm.assembly.config import UpgradeConfig
from mllm.conversations.config import CheckConfig
from mllm.finetune import section
from mllm.loop.config import FinetuneConfig
from mllm.model.config import ChatConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CONFIGS = {
    "align/prepare.py": ("prepare", PrepareConfig),
    "align/encode.py": ("encode", EncodeConfig),
    "align/train.py": ("train", TrainConfig),
    "eval/run.py": ("eval", EvalConfig),
    "eval/lmms.py": ("lmms", LmmsConfig),
    "mllm/upgrade.py": ("upgrade", UpgradeConfig),
    "mllm/check.py": ("check", CheckConfig),
    "mllm/finetune.py": (section, FinetuneConfig),
    "mllm/chat_cli.py": ("chat", ChatConfig),
}


def commands(text):
    """Every command line that runs an entry, from code blocks and recipe headers, with continuation lines joined."""
    joined = re.sub(r"\\\n\s*#?\s*", " ", text)
    for line in joined.splitlines():
        words = line.strip("# ").split("  (")[0]
        match = re.search(r"((?:align|eval|mllm)/\w+\.py)\s+(--.*)", words)
        if match and match.group(1) in CONFIGS and "..." not in words and "`" not in words:
            yield match.group(1), shlex.split(match.group(2).replace("<commit>", "0" * 40), comments=True)


DOCUMENTED = [*commands(README), *(c for path in sorted(ROOT.glob("*/recipes/*.yaml")) for c in commands(path.read_text()))]
DOCUMENTED += [c for path in CONFIGS for c in commands(ast.get_docstring(ast.parse((ROOT / path).read_text())))]


def test_there_are_commands_to_check():
    assert len(DOCUMENTED) >= 15


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


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_files_of_the_readme_exist():
    for name in re.findall(r"`((?:align|eval|scripts|docs|tests)/[\w./-]*)`", README):
        assert (ROOT / name).exists(), name


def test_the_yaml_task_of_the_readme_is_a_task(tmp_path):
    block = re.search(r"```yaml\n(.*?)```", README, re.DOTALL).group(1)
    (tmp_path / "task.yaml").write_text(block)
    assert find_task(str(tmp_path / "task.yaml")).kind == "classification"


def test_the_python_block_of_the_readme_compiles():
    compile(re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1), "README", "exec")
