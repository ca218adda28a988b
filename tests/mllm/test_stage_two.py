"""The whole line of stage two on tiny models, with the real launchers and the real lmms-eval around them.

A model is put together, pretrained, tuned with LoRA, exported and asked; and one run is trained by python, deepspeed (killed and
resumed) and accelerate alike.
"""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from align.demo.writing import question_row, write_questions
from align.runtime.checkpoints import newest_committed
from align.runtime.commandline import parse
from eval.results.records import load_answers, load_results
from mllm import finetune, upgrade
from mllm.assembly.config import UpgradeConfig
from mllm.loop.config import FinetuneConfig
from mllm.model.answering import Answerer, Conversation, Decoding
from mllm.model.saving import load_mllm
from tests.support.forking import free_port
from tests.support.tiny_mllm import tiny_llm, tiny_sail, tiny_vision

ROOT = Path(__file__).resolve().parents[2]
COLORS = {"red": (220, 40, 30), "green": (40, 200, 60), "blue": (30, 60, 220)}
QUESTION = "what is on the image?"


def photo(color: str, number: int) -> bytes:
    """A noisy PNG, mostly of one color, of a shape of its own."""
    random = np.random.default_rng((number, *COLORS[color]))
    pixels = random.normal(COLORS[color], 25, (36 + number % 5, 48 - number % 7, 3)).clip(0, 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An LLM, an encoder, a stage-one run, the model made of them, captions and conversations about 24 photos, 9 questions about others."""
    folder = tmp_path_factory.mktemp("stage-two")
    llm, vision = tiny_llm(folder / "llm"), tiny_vision(folder / "vision")
    sail = tiny_sail(folder / "sail" / "best", vision).parent
    (folder / "photos").mkdir()
    captions, talks = [], []
    for number in range(24):
        color = list(COLORS)[number % 3]
        name = f"photos/{number}.png"
        (folder / name).write_bytes(photo(color, number))
        row = {"id": str(number), "image": name}
        first = {"from": "human", "value": "<image>"}
        captions.append({**row, "conversations": [first, {"from": "gpt", "value": f"a {color} photo"}]})
        asked = {"from": "human", "value": f"<image>\n{QUESTION}"}
        talks.append({**row, "conversations": [asked, {"from": "gpt", "value": f"a {color} dog"}]})
    (folder / "pretrain.json").write_text(json.dumps(captions))
    (folder / "instruct.json").write_text(json.dumps(talks))
    others = [(color, photo(color, 100 + number)) for number in range(3) for color in COLORS]
    rows = [question_row(f"q{n}", (f"{n}.png", image), QUESTION, f"a {color} dog", "what") for n, (color, image) in enumerate(others)]
    rows.append(question_row("q9", ("0.png", others[0][1]), QUESTION, "in the middle", "where"))  # of another task
    write_questions(folder / "open.parquet", rows)
    assemble = ["--llm", llm, "--sail", sail, "--template", "vicuna_v1", "--output", folder / "init"]
    upgrade.main(parse(UpgradeConfig, "upgrade", list(map(str, assemble))))
    return folder


def flags(world, stage, output, **changes):
    values = {
        "stage": stage, "data": world / f"{stage}.json", "model": world / "init", "output": output, "max-length": 128, "workers": 0,
        "precision": "fp32", "cache": world / "cache", "batch-size": 6, "micro-batch-size": 6, "log-every": 1, **changes,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def train(*arguments, **changes):
    finetune.main(parse(FinetuneConfig, arguments[1], flags(*arguments, **changes)))


def launch(command, log, **environment):
    """Run a command of this environment in the kit's folder and return its exit code and what it said."""
    settings = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with open(log, "wb") as file:
        done = subprocess.run(list(map(str, command)), cwd=ROOT, env={**os.environ, "PATH": path, **settings}, stdout=file, stderr=file)
    return done.returncode, log.read_text(errors="replace")[-3000:]


@pytest.mark.slow
def test_from_an_llm_and_an_encoder_to_answers_in_the_results(world, forked, tmp_path):
    def both_stages():
        train(world, "pretrain", tmp_path / "pretrain", epochs=10)
        more = {"model": tmp_path / "pretrain/model", "lora-rank": 8, "lr-llm": 1e-2, "lr-projector": 1e-3, "epochs": 20}
        train(world, "instruct", tmp_path / "instruct", **more)

    assert forked(both_stages) == 0
    assert (tmp_path / "instruct/adapter/adapter_model.safetensors").is_file()
    names = load_file(tmp_path / "instruct/model/model.safetensors").keys()
    assert names == load_file(world / "init/model.safetensors").keys(), "the adapters are merged"

    command = [sys.executable, "eval/lmms.py", "--tasks", "sprites_what", "--data", world, "--output", tmp_path / "eval", "--batch-size", 4]
    command += ["--mllm", f"tuned={tmp_path}/instruct", f"pretrained={tmp_path}/pretrain"]
    code, said = launch(command, tmp_path / "log", LMMS_EVAL_DATASETS_CACHE=str(tmp_path / "cache"))
    assert code == 0, said

    results = load_results(tmp_path / "eval")
    tuned, before = (results.value("sprites_what", "exact_match", f"MLLM {name}") for name in ("tuned", "pretrained"))
    assert (tuned.n, before.n) == (9, 9), "the row of another kind was not asked"
    assert tuned.value > 0.8 and before.value < 0.2, "photos never seen are answered after tuning only"
    model, processor = load_mllm(tmp_path / "instruct/model")
    answerer, expected = Answerer(model, processor), []
    for number in range(9):
        image = Image.open(io.BytesIO(photo(list(COLORS)[number % 3], 100 + number // 3))).convert("RGB")
        talk = Conversation([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}], [image])
        expected += answerer.generate([talk], Decoding(16, until=("\n",)))
    answers = load_answers(tmp_path / "eval", "sprites_what", "MLLM tuned").to_pylist()
    assert [row["answer"] for row in answers] == expected and len(set(expected)) == 3


SMALL = {"batch-size": 4, "micro-batch-size": 2, "steps": 6, "save-every": 3, "lr-projector": 1e-3, "warmup": 0.1}


def weights_differ_by(folder, reference):
    """The largest difference between the weights of two exported models."""
    one, other = (load_file(place / "model/model.safetensors") for place in (folder, reference))
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def plain(world):
    """Six steps by python alone."""
    from tests.support.forking import exit_codes, fork

    assert exit_codes([fork(lambda: train(world, "instruct", world / "plain", **SMALL))]) == [0]
    before, after = (load_file(folder / "model.safetensors") for folder in (world / "init", world / "plain/model"))
    assert max(float((before[name] - after[name]).abs().max()) for name in before) > 1e-4
    return world / "plain"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_deepspeed_zero2_equals_python_also_when_killed(world, plain, tmp_path):
    assert shutil.which("deepspeed", path=str(Path(sys.executable).parent)), "pip install -e '.[mllm]'"
    command = ["deepspeed", "--num_gpus", 2, "--master_port", free_port(), "mllm/finetune.py", "--deepspeed", "zero2"]
    command += flags(world, "instruct", tmp_path / "run", **SMALL)
    code, said = launch(command, tmp_path / "log", SAIL_FAILPOINT="mllm-committed:1")
    path, step, _ = newest_committed(tmp_path / "run")
    assert code != 0 and step == 3 and not (tmp_path / "run/model").exists(), said
    code, said = launch(command, tmp_path / "log")
    assert code == 0 and f"going on from {path}" in said, said
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert weights_differ_by(tmp_path / "run", plain) < 1e-6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_checkpoint_of_two_deepspeed_processes_is_converted_for_one(world, plain, tmp_path):
    def run(processes, **environment):
        command = ["torchrun", "--nproc_per_node", processes, "--master_port", free_port(), "mllm/finetune.py", "--deepspeed", "zero2"]
        return launch([*command, *flags(world, "instruct", tmp_path / "run", **SMALL)], tmp_path / "log", **environment)

    run(2, SAIL_FAILPOINT="mllm-committed:1")
    assert newest_committed(tmp_path / "run")[1] == 3
    code, said = run(1)
    status = json.loads((tmp_path / "run/.work/status.json").read_text())
    assert code != 0 and status["exit_code"] == 5 and "processes: 2 there, 1 now" in status["message"], (said, status)
    convert = re.search(r"`(python -m deepspeed[^`]*)`", said)
    code, said = launch([sys.executable, *shlex.split(convert[1])[1:]], tmp_path / "log")
    assert code == 0, said
    code, said = run(1)
    assert code == 0, said
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert weights_differ_by(tmp_path / "run", plain) < 1e-6


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_accelerate_with_two_processes_equals_python(world, plain, tmp_path):
    command = ["accelerate", "launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", free_port(), "mllm/finetune.py"]
    code, said = launch([*command, *flags(world, "instruct", tmp_path / "run", **SMALL)], tmp_path / "log")
    assert code == 0, said
    assert "x 2 process(es)" in said and weights_differ_by(tmp_path / "run", plain) < 1e-6
