"""A recipe is a saved command line; whatever is wrong with it is said once, with the nearest right word, and exit code 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.common.errors import DataError, OfflineError, UsageError
from align.features.config import EncodeConfig
from align.runtime import commandline as cli
from align.training.config import TrainConfig

TRAIN = """train:
  images: [a/images]
  captions: [a/captions-raw, a/captions-long]
  output: runs/x
  steps: 10
  lr: 1e-4
"""


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_recipe_then_flags_and_the_last_one_wins(tmp_path):
    recipe = write(tmp_path, TRAIN)
    config = cli.parse(TrainConfig, "train", ["--lr", "1", "--config", recipe, "--batch-size", "64", "--steps", "20"])
    assert config.captions == ("a/captions-raw", "a/captions-long") and config.batch_size == 64 and config.steps == 20
    assert cli.parse(TrainConfig, "train", [f"--config={recipe}"]).lr == 1e-4, "1e-4 is a number although YAML reads it as text"


def test_launchers_local_rank_is_dropped(tmp_path):
    recipe = write(tmp_path, TRAIN)
    assert cli.parse(TrainConfig, "train", ["--local_rank=1", "--config", recipe]).steps == 10


def test_print_config_is_a_recipe_for_the_same_config(tmp_path, capsys):
    recipe = write(tmp_path, TRAIN)
    with pytest.raises(SystemExit) as leaving:
        cli.parse(TrainConfig, "train", ["--config", recipe, "--seed", "3", "--embed-encoders", "--print-config"])
    assert leaving.value.code == 0
    again = write(tmp_path, capsys.readouterr().out)
    direct = cli.parse(TrainConfig, "train", ["--config", write(tmp_path / "..", TRAIN), "--seed", "3", "--embed-encoders"])
    assert cli.parse(TrainConfig, "train", ["--config", again]) == direct


@pytest.mark.parametrize("given", ["~/a/images", "--images=~/a/images", "recipe"])
def test_a_home_is_written_out_in_flags_and_recipes_and_no_folder_is_named_by_it(tmp_path, monkeypatch, given):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, TRAIN.replace("runs/x", "~/runs").replace("a/captions-raw", "~/a/short+~/b/short").replace("[a/images]", "~/a/images"))
    flags = {"recipe": []}.get(given, [given] if "=" in given else ["--images", given])
    config = cli.parse(TrainConfig, "train", ["--config=~/recipe.yaml", *flags])
    assert (config.output, config.images) == (f"{tmp_path}/runs", (f"{tmp_path}/a/images",))
    assert config.captions[0] == f"{tmp_path}/a/short+{tmp_path}/b/short"


def test_other_tildes_stay_and_the_home_of_nobody_is_refused():
    encode = ["--output", "o", "--vision", "v"]
    assert cli.parse(EncodeConfig, "encode", ["--data", "./~/b~/~c", "--prompt", "~/ is a home", *encode]).data == "./~/b~/~c"
    assert cli.parse(EncodeConfig, "encode", ["--data", "d", "--prompt", "~/ is a home", *encode]).prompt == "~/ is a home"
    with pytest.raises(UsageError, match="'~nobody-here/x'.*home of no user here; write the path out"):
        cli.parse(EncodeConfig, "encode", ["--data", "~nobody-here/x", *encode])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TRAIN.replace("steps", "stps"), "did you mean 'steps'"),
        (TRAIN.replace("train:", "trian:"), "did you mean 'train'"),
        ("encode:\n  data: x\n", "has no section 'train'"),
        (TRAIN + "  lr: 1e-3\n", "appears twice"),
        ("a: &a [x, x]\nb: [*a, *a]\n", "aliases are not allowed"),
        ("train: !!python/object/apply:os.system ['true']\n", "not plain YAML"),
        ("- just\n- a list\n", "expected sections"),
        ("train: {", "not plain YAML"),
        ("[" * 100_000, "nested too deep"),
        ("a:\n" + "".join(" " * n + "a:\n" for n in range(1, 3000)), "nested too deep"),
        ("train:\n  since: 2024-99-99\n", "not plain YAML"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_place(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        cli.parse(TrainConfig, "train", ["--config", write(tmp_path, text)])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--stpes", "3"], "--steps"),
        (["--head", "gluu"], "linear"),
        (["--lr", "fast"], "--lr"),
    ],
)
def test_a_wrong_flag_ends_with_code_2_and_help(tmp_path, capsys, extra, message):
    with pytest.raises(SystemExit) as leaving:
        cli.parse(TrainConfig, "train", ["--config", write(tmp_path, TRAIN), *extra])
    assert leaving.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "above 0"),
        ({"epochs": 2.0}, "exactly one"),
        ({"batch_size": 1}, "at least 2"),
        ({"lr": 0.0}, "lr > 0"),
        ({"warmup": 1.0}, "share of the steps"),
        ({"val_images": "v"}, "both or neither"),
    ],
)
def test_rules_across_fields(values, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**{"images": ("i",), "captions": ("c",), "output": "o", "steps": 5, **values})


def test_encode_needs_an_encoder_and_pinned_remote_code():
    with pytest.raises(UsageError, match="at least one encoder"):
        EncodeConfig(data="d", output="o")
    with pytest.raises(UsageError, match="give both or neither"):
        EncodeConfig(data="d", output="o", text="t")
    with pytest.raises(UsageError, match="pinned"):
        EncodeConfig(data="d", output="o", vision="v", trust_remote_code=True)


@pytest.mark.parametrize(("error", "code"), [(UsageError, 2), (DataError, 3), (OfflineError, 4), (KeyboardInterrupt, 130)])
def test_errors_become_one_line_and_an_exit_code(tmp_path, capsys, monkeypatch, error, code):
    def main(config):
        raise error("what was wrong")

    monkeypatch.setattr(sys, "argv", ["train.py", "--config", write(tmp_path, TRAIN)])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as leaving:
        cli.run(main, TrainConfig, "train")
    err = capsys.readouterr().err
    assert leaving.value.code == code and err.startswith("train: loading libraries\n") and err.count("\n") == 2
    assert "Traceback" not in err and (code == 130 or "error: what was wrong" in err)


def test_an_entry_run_as_a_script_from_elsewhere_says_what_is_wrong(tmp_path):
    script = Path(__file__).resolve().parents[3] / "align" / "train.py"
    ran = subprocess.run([sys.executable, script, "--config", "nothing.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stderr == "error: no such file: nothing.yaml\n"


def test_below_a_launchers_traceback_the_error_stands_again(tmp_path):
    script = Path(__file__).resolve().parents[3] / "align" / "train.py"
    launcher = tmp_path / "launcher.py"  # as `accelerate launch` of one process does
    launcher.write_text(
        "import subprocess, sys, time\ncommand = [sys.executable, *sys.argv[1:]]\ncode = subprocess.run(command).returncode\n"
        "time.sleep(0.2)\nraise subprocess.CalledProcessError(code, command)\n"
    )
    command = [sys.executable, launcher, script, "--config", "nothing.yaml"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    first, *_, last = ran.stderr.splitlines()
    assert first == last == "error: no such file: nothing.yaml" and "returned non-zero exit status 2" in ran.stderr


@pytest.mark.parametrize("flags", [[], ["--debug"]])
def test_libraries_are_quiet_unless_asked(tmp_path, flags):
    code = (
        "import logging, os, sys, warnings\nfrom align.runtime.commandline import run\nfrom align.training.config import TrainConfig\n"
        "def main(config):\n    warnings.warn('old name', FutureWarning)\n    log = logging.getLogger('DeepSpeed')\n"
        "    log.warning('Setting accelerator to CPU')\n    log.warning('lost a gradient')\n"
        "    sys.stderr.write(os.environ.get('TRANSFORMERS_VERBOSITY', 'its own'))\nrun(main, TrainConfig, 'train')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    command = [sys.executable, "-c", code, "--config", write(tmp_path, TRAIN), *flags]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).resolve().parents[3])
    heard = [word in ran.stderr for word in ("old name", "Setting accelerator", "lost a gradient", "its own")]
    assert heard == ([True] * 4 if flags else [False, False, True, False]), ran.stderr
