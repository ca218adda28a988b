"""A run leaves evidence: every launch in its manifest, rows that a crash and a resume leave as if nothing had happened."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from align.common.errors import DamagedError, UsageError
from align.runtime.runs import JsonLines, RunLog, add_launch, require_trackers

ROOT = Path(__file__).resolve().parents[3]


def test_metrics_are_cut_back_to_the_checkpoint_and_to_whole_lines(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        lines.append({"step": step, "loss": 1 / step})
    with open(lines.path, "ab") as file:
        file.write(b'{"step": 4, "lo')
    lines.cut(2)
    assert [row["step"] for row in lines.rows()] == [1, 2]
    with pytest.raises(ValueError):
        lines.append({"step": 3, "loss": float("nan")})


def test_the_manifest_keeps_every_launch(tmp_path):
    add_launch(tmp_path, {"pairs": 3})
    add_launch(tmp_path, {"pairs": 4})
    launches = json.loads((tmp_path / "manifest.json").read_text())["launches"]
    assert [launch["pairs"] for launch in launches] == [3, 4]
    assert {"command", "versions", "started"} <= launches[0].keys() and "torch" in launches[0]["versions"]


def test_a_log_writes_rows_rates_and_curves_and_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
    # Files are read by name: second, host, process, number in the process. Within a second the tenth would precede the ninth.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    log = RunLog(tmp_path)
    for step in (0, 1, 2):
        log.log({"step": step, "loss": None if step == 1 else 1.5 - step}, {"rate": 10.0 * step} if step else None)
    log.close()
    again = RunLog(tmp_path, resumed=1)
    again.log({"step": 2, "loss": 7.0}, {"rate": 30.0})
    again.close()
    assert again.metrics.rows() == [{"step": 0, "loss": 1.5}, {"step": 1, "loss": None}, {"step": 2, "loss": 7.0}]
    assert again.speed.rows() == [{"step": 1, "rate": 10.0}, {"step": 2, "rate": 30.0}]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in board.Scalars("loss")] == [(0, 1.5), (2, 7.0)]
    RunLog(tmp_path, resumed=0)
    assert [row["step"] for row in again.metrics.rows()] == [0], "a run that goes on from step 0 keeps what was measured before it"
    RunLog(tmp_path)
    assert again.metrics.rows() == [], "a new run begins anew"


def test_processes_that_do_not_write_leave_no_file(tmp_path):
    log = RunLog(tmp_path, writing=False)
    log.log({"step": 1, "loss": 1.0}, {"rate": 1.0})
    log.close()
    assert not list(tmp_path.iterdir())


def test_trackers_get_every_row(tmp_path, monkeypatch):
    PartialState(cpu=True)  # trackers ask it whether they are the main process; a training has one
    sent = []
    run = SimpleNamespace(log=lambda values, step, **_: sent.append((step, values)), finish=lambda: sent.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda project, **_: sent.append(project) or run))
    log = RunLog(tmp_path, trackers=["wandb"])
    log.log({"step": 3, "loss": 0.5, "grad_norm": None}, {"rate": 2.0})
    log.close()
    assert sent == ["sail-upgrade-kit", (3, {"loss": 0.5, "rate": 2.0}), "finished"]


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    (tmp_path / "absent").mkdir()  # a folder of this name is no package
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="absent is not installed; run `pip install absent`"):
        require_trackers(["torch", "absent"])


@pytest.mark.parametrize("entry", ["align/train.py --captions c --images i --steps 1", "mllm/finetune.py --data d"])
def test_an_entry_asks_for_its_trackers_before_it_loads_anything(entry):
    code = (
        "import sys, runpy\nfrom importlib import metadata\nknown = metadata.version\n"
        "def version(name):\n    if name == 'trackio':\n        raise metadata.PackageNotFoundError(name)\n    return known(name)\n"
        f"metadata.version = version\nsys.argv = {entry.split()!r} + ['--output', 'nowhere', '--report-to', 'trackio']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2 and "pip install trackio" in ran.stderr, ran.stderr[-400:]


@pytest.mark.parametrize(
    "foreign", [b"loss = 3\n", b"[1, 2]\n", b'{"loss": 1}\n', b'{"step": "a"}\n', b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"7\n"]
)
def test_a_foreign_line_is_named_and_nothing_behind_it_is_lost(tmp_path, foreign):
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 1}\n' + foreign + b'{"step": 2}\n'
    path.write_bytes(content)
    for read in (lambda lines: lines.rows(stepped=True), lambda lines: lines.cut(1), lambda lines: lines.cut(5)):
        with pytest.raises(DamagedError, match="metrics.jsonl, line 2"):
            read(JsonLines(path))
    assert path.read_bytes() == content
    path.write_bytes(b'{"step": 1}\n{"step": 2')
    assert JsonLines(path).rows(stepped=True) == [{"step": 1}]
