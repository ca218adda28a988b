"""A process that is asked to stop ends with code 75: at once if it has nothing to save, and also when only its launcher was stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.utils.data import DataLoader

from align.common.errors import Preempted
from align.common.preemption import asked_to_stop, ended_by_sigterm, noted, reason, stay, stop_with
from tests.support.forking import exit_codes, fork, free_port

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import os, sys, time
from dataclasses import dataclass
from align.runtime.commandline import run
from align.common.errors import Preempted
from align.common.preemption import noted, reason

@dataclass(frozen=True)
class Config:
    place: str
    training: bool = False

def main(config):
    open(f"{config.place}/{os.getpid()}.started", "w").close()
    if not config.training:
        time.sleep(60)
    with noted() as stopping:
        while not stopping():
            time.sleep(0.05)
        open(f"{config.place}/{os.getpid()}.saved", "w").close()
        raise Preempted(f"stopped by {reason()}")

run(main, Config, "train")
"""


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def ended(process):
    return not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE


def test_without_anything_to_save_the_signal_ends_the_process_and_in_training_it_is_noted():
    with ended_by_sigterm():
        with pytest.raises(Preempted, match="stopped by SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        with noted() as stopping:
            assert not stopping()
            os.kill(os.getpid(), signal.SIGTERM)
            until(stopping, 5)
        assert asked_to_stop() and reason() == "SIGTERM"
    for timer in [thread for thread in __import__("threading").enumerate() if hasattr(thread, "cancel")]:
        timer.cancel()  # would end this process


def test_a_process_stops_when_a_parent_is_gone():
    def child():
        with ended_by_sigterm():
            parent = psutil.Process(os.getppid())
            stop_with([parent], 0.05)
            if os.fork() == 0:
                os._exit(0)
            time.sleep(60)

    def parent(place):
        worker = fork(end_with, child)
        place.write_text(str(worker))
        signal.pause()

    def end_with(function):
        try:
            function()
        except Preempted as error:
            assert "the end of its launcher" in str(error)
            raise SystemExit(error.exit_code) from error

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "worker"
        first = fork(parent, place)
        until(lambda: place.exists() and place.read_text())
        time.sleep(0.5)
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        until(lambda: ended(int(place.read_text())), 10)


def sleepy(numbers):
    time.sleep(0.05)
    return numbers


def test_a_signal_to_the_whole_group_leaves_the_workers_of_a_training_loop_alive():
    def training():
        os.setpgrp()
        with noted() as stopping:
            loader = DataLoader(range(40), 1, num_workers=2, collate_fn=sleepy, worker_init_fn=stay)
            for number, _ in enumerate(loader):
                if number == 5:
                    os.killpg(0, signal.SIGTERM)
                if number > 5:
                    assert stopping()
        assert number == 39

    assert exit_codes([fork(training)]) == [0]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("launcher", ["python", "accelerate", "torchrun", "deepspeed"])
@pytest.mark.slow
def test_a_signal_to_the_launcher_alone_stops_its_processes(tmp_path, launcher, training):
    (tmp_path / "entry.py").write_text(SCRIPT)
    start = {
        "python": [],
        "accelerate": ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
                       "--dynamo_backend", "no"],
        "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"],
        "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())],
    }[launcher]  # fmt: skip
    flags = ["--place", str(tmp_path), *(["--training"] if training else [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([sys.executable, *start, str(tmp_path / "entry.py"), *flags], env=environment)
    expected = 2 if launcher in ("torchrun", "deepspeed") else 1
    until(lambda: len(list(tmp_path.glob("*.started"))) == expected, 120)
    process.send_signal(signal.SIGTERM)
    code = process.wait(60)
    workers = [int(path.stem) for path in tmp_path.glob("*.started")]
    until(lambda: all(ended(worker) for worker in workers), 30)
    assert len(list(tmp_path.glob("*.saved"))) == (expected if training else 0)
    assert code == 75 if launcher == "python" else code != 0
