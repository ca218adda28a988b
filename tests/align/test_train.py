"""Training is exact: accumulation is one big batch, several processes are one, a killed run is the uninterrupted one."""

import json
import os
import signal
import socket
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist

from align.common.checkpoints import newest_checkpoint
from align.common.commandline import parse
from align.common.errors import NonFiniteError, UsageError
from align.common.files import arm_failpoint
from align.model.dual_encoder import SailConfig, SailModel
from align.model.losses import sigmoid_loss
from align.train import main
from align.training.config import TrainConfig
from align.training.pairs import BatchOrder, PairBatch, open_pairs
from align.training.regularizers import structure
from align.training.step import Objective, Schedule, Stepper, build_optimizer
from tests.support.forking import exit_codes, fork


def flags(folder, output, **changes):
    values = {
        "images": folder / "images", "captions": [folder / "captions-short", folder / "captions-long"], "output": output,
        "val-images": folder / "images", "val-captions": [folder / "captions-short"],
        "head": "glu", "expansion": 2, "width": 16, "batch-size": 32, "steps": 12, "optimizer": "adamw", "lr": 0.01,
        "precision": "fp32", "log-every": 2, "val-every": 4, "save-every": 3, **changes,
    }  # fmt: skip
    listed = []
    for name, value in values.items():
        if value is None:
            continue
        listed += [f"--{name}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return listed


def train(folder, output, failpoint=None, **changes):
    if failpoint:
        arm_failpoint(failpoint)
    main(parse(TrainConfig, "train", flags(folder, output, **changes)))


def evidence(output):
    path, tensors, state, _ = newest_checkpoint(output / "checkpoints")
    models = {name: (output / name / "model.safetensors").read_bytes() for name in ("best", "last")}
    return path.name, {k: v.numpy().tobytes() for k, v in tensors.items()}, state, (output / "metrics.jsonl").read_bytes(), models


@pytest.fixture
def straight(paired_folders, forked):
    assert forked(train, paired_folders, paired_folders / "straight") == 0
    return evidence(paired_folders / "straight")


def test_it_learns(paired_folders, straight):
    rows = [json.loads(line) for line in straight[3].decode().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    recalls = [row["val_mean_recall"] for row in rows if "val_mean_recall" in row]
    assert losses[-1] < losses[0] and recalls[-1] > recalls[0] + 0.2
    last = [row for row in rows if "loss" in row][-1]
    assert last["step"] == 12 and last["positive_logit"] > last["negative_logit"] and last["epoch"] == 4


@pytest.mark.parametrize(
    "failpoint",
    [
        "checkpoint-tensors:2",
        "checkpoint-state:3",
        "checkpoint-commit:1",
        "checkpoint-saved:2",
        "renamed:5",
        "rename:9",
        "model-saved:3",
        "model-retired:2",
    ],
)
def test_kill_anywhere_then_the_same_command_gives_the_same_run(paired_folders, forked, straight, failpoint):
    output = paired_folders / "killed"
    assert forked(train, paired_folders, output, failpoint) == -signal.SIGKILL
    assert forked(train, paired_folders, output) == 0
    assert evidence(output) == straight
    assert not list(output.rglob("*.partial")) and not list(output.rglob("*.retired"))


def test_a_resumed_run_that_is_killed_again_still_arrives(paired_folders, forked, straight):
    output = paired_folders / "killed"
    for failpoint in ("checkpoint-saved:1", "checkpoint-tensors:2", "checkpoint-commit:1"):
        assert forked(train, paired_folders, output, failpoint) == -signal.SIGKILL
    assert forked(train, paired_folders, output) == 0
    assert evidence(output) == straight


@pytest.mark.parametrize(
    "changes", [{"optimizer": "lion", "lr": 1e-3}, {"loss": "infonce", "accumulate": 3}, {"val-images": None, "val-rows": 20}]
)
def test_other_recipes_resume_exactly_too(paired_folders, forked, changes):
    if "val-rows" in changes:
        changes = {**changes, "val-captions": None}
    assert forked(partial(train, paired_folders, paired_folders / "a", **changes)) == 0
    assert forked(partial(train, paired_folders, paired_folders / "b", failpoint="checkpoint-saved:2", **changes)) == -signal.SIGKILL
    assert forked(partial(train, paired_folders, paired_folders / "b", **changes)) == 0
    assert evidence(paired_folders / "b") == evidence(paired_folders / "a")


def stopped(folder, output):
    steps = []
    original = Stepper.step

    def step(self, batch, number):
        steps.append(number)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, number)

    Stepper.step = step
    try:
        train(folder, output)
    except Exception as error:
        raise SystemExit(error.exit_code) from error


def test_sigterm_saves_exits_75_and_resumes_exactly(paired_folders, forked, straight):
    output = paired_folders / "preempted"
    assert forked(stopped, paired_folders, output) == 75
    assert newest_checkpoint(output / "checkpoints")[2]["step"] == 5
    assert forked(train, paired_folders, output) == 0
    ours, theirs = evidence(output), straight
    assert ours == theirs


def test_another_config_in_the_same_folder_is_refused_by_field(paired_folders, straight):
    with pytest.raises(UsageError, match="batch_size: 32 there, 16 given"):
        train(paired_folders, paired_folders / "straight", **{"batch-size": 16})


def tiny(seed=0, head="glu", dtype=torch.float64, **changes):
    config = SailConfig(vision_width=12, text_width=8, width=16, head=head, expansion=2 if head == "glu" else None)
    model = SailModel(config).initialize(seed).to(dtype)
    values = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.01, **changes}
    return model, build_optimizer(model, "adamw", **values)


def batch(rows=24, bad=False):
    random = np.random.default_rng(5)
    images, first, second = (random.normal(size=(rows, w)).astype(np.float16) for w in (12, 8, 8))
    if bad:
        images[3, 2] = np.inf
    return PairBatch(images, [first, second], np.arange(rows) % 20)


@pytest.mark.parametrize("loss", ["sigmoid", "infonce"])
@pytest.mark.parametrize("pieces", [2, 5])
def test_accumulating_pieces_equals_one_big_batch(loss, pieces):
    results = []
    for accumulate in (1, pieces):
        model, optimizer = tiny()
        stepper = Stepper(model, optimizer, Schedule(0.01, 10), Objective(loss, tile=7), seed=0, accumulate=accumulate, precision="fp32")
        result = stepper.step(batch(), 0)
        results.append(([p.grad.clone() for p in model.parameters()], result))
    (whole, first), (pieced, second) = results
    assert first.loss == pytest.approx(second.loss, rel=1e-6) and first.grad_norm == pytest.approx(second.grad_norm, rel=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(whole, pieced, strict=True))
    assert max(float(g.abs().max()) for g in whole) > 1e-6


REGULARIZED = {"fusemix": 0.5, "structure": 3.0, "structure_levels": 2}


def one_step(step=0, accumulate=1, **options):
    model, optimizer = tiny()
    stepper = Stepper(
        model, optimizer, Schedule(0.01, 10, warmup=0.5), Objective(tile=7, **options), seed=0, accumulate=accumulate, precision="fp32"
    )
    result = stepper.step(batch(), step)
    return result, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("pieces", [2, 5])
def test_accumulating_is_exact_with_regularizers_too(pieces):
    (whole, gradients), (pieced, others) = one_step(**REGULARIZED), one_step(accumulate=pieces, **REGULARIZED)
    assert whole.loss == pytest.approx(pieced.loss, rel=1e-6) and whole.structure == pytest.approx(pieced.structure, rel=1e-5)
    assert whole.structure > 0.01
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(gradients, others, strict=True))
    plain = one_step()[1]
    assert not any(torch.allclose(a, b, rtol=0.1) for a, b in zip(gradients, plain, strict=True) if b.ndim == 2)


def test_regularizers_that_are_off_change_no_bit_and_those_that_are_on_do():
    result, gradients = one_step()
    off, same = one_step(fusemix=0, structure=0, structure_levels=3, feature_dropout=0)
    assert off == result and off.structure == 0 and all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    for options in ({"fusemix": 1.0}, {"structure": 1.0}, {"feature_dropout": 0.3}):
        first, again = one_step(**options), one_step(**options)
        assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))  # a pure function of (state, seed, step)
        assert not all(torch.equal(a, b) for a, b in zip(first[1], gradients, strict=True))


def test_structure_adds_its_weighted_gradient_which_warms_up():
    plain = one_step()[1]
    light, heavy = one_step(structure=1.0)[1], one_step(structure=2.0)[1]
    late = one_step(step=1, structure=1.0)[1]  # the second of five steps of warm-up has twice the first's weight
    for base, one, two, later in zip(plain, light, heavy, late, strict=True):
        assert torch.allclose(two - base, 2 * (one - base), rtol=1e-4, atol=1e-7) and torch.allclose(later, two, rtol=1e-4, atol=1e-7)
    assert [Schedule(1, 10, warmup=0.5).risen(step) for step in (0, 3, 4, 9)] == [0.2, 0.8, 1, 1]
    assert Schedule(1, 10, warmup=0).risen(0) == 1


def test_a_regularized_run_that_is_killed_is_the_straight_one(paired_folders, forked):
    changes = {"fusemix": 0.5, "structure": 1, "structure-levels": 2, "feature-dropout": 0.1}
    assert forked(partial(train, paired_folders, paired_folders / "a", **changes)) == 0
    assert forked(partial(train, paired_folders, paired_folders / "b", failpoint="checkpoint-saved:2", **changes)) == -signal.SIGKILL
    assert forked(partial(train, paired_folders, paired_folders / "b", **changes)) == 0
    ours = evidence(paired_folders / "a")
    assert ours == evidence(paired_folders / "b")
    logged = [json.loads(line) for line in ours[3].decode().splitlines()]
    assert all(0 < row["structure"] < 2 * np.log(2) for row in logged if "loss" in row)


@pytest.mark.parametrize(
    "changes", [{"fusemix": -1}, {"structure": -1}, {"structure_levels": 0}, {"feature_dropout": 1}, {"fusemix": 1, "head": "token"}]
)
def test_regularizers_out_of_range_are_refused(changes):
    with pytest.raises(UsageError, match="--" + next(iter(changes)).replace("_", "-")):
        TrainConfig(captions=("c",), images=("i",), output="run", steps=1, **changes)


def share_worker(folder, rank, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model, optimizer = tiny()
    stepper = Stepper(model, optimizer, Schedule(0.01, 10, warmup=0), Objective(structure=3.0), seed=0, rank=rank, precision="fp32")
    whole, rows = batch(), slice(12 * rank, 12 * rank + 12)
    stepper.step(PairBatch(whole.images[rows], [c[rows] for c in whole.captions], whole.ids[rows]), 0)
    torch.save([p.grad for p in model.parameters()], folder / f"gradients{rank}.pt")
    dist.destroy_process_group()


def test_with_several_processes_structure_is_the_mean_over_their_shares(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert exit_codes([fork(share_worker, tmp_path, rank, port) for rank in range(2)]) == [0, 0]
    first, second = (torch.load(tmp_path / f"gradients{rank}.pt", weights_only=True) for rank in range(2))
    model, whole = tiny()[0], batch()
    images, captions = torch.from_numpy(whole.images), [torch.from_numpy(c) for c in whole.captions]
    x, y = model.project_image(images), [model.project_text(c) for c in captions]
    loss = sigmoid_loss(x, y, model.logit_scale, model.logit_bias)
    for rows in (slice(0, 12), slice(12, 24)):
        features = [images[rows], *(c[rows] for c in captions)]
        loss = loss + 3 / 2 * structure(features, [e[rows] for e in (x, *y)], 1, seed=0, step=0)
    loss.backward()
    for one, other, p in zip(first, second, model.parameters(), strict=True):
        assert torch.equal(one, other) and torch.allclose(one, p.grad, rtol=1e-4, atol=1e-7)


def worker(folder, rank, world, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    pairs = open_pairs((str(folder / "images"),), (str(folder / "captions-short"), str(folder / "captions-long")))
    order = BatchOrder(len(pairs), 32, seed=0)
    model, optimizer = tiny(dtype=torch.float32)
    stepper = Stepper(model, optimizer, Schedule(0.01, 10), Objective(), seed=0, rank=rank, precision="fp32")
    part = slice(rank * 32 // world, (rank + 1) * 32 // world)
    losses = [stepper.step(pairs.batch(order.indices(step), 0, step, part), step).loss for step in range(4)]
    torch.save({"losses": losses, "weights": [p.detach() for p in model.parameters()]}, folder / f"w{world}r{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_train_like_one(paired_folders, world):
    runs = {}
    for size in (1, world):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        assert exit_codes([fork(worker, paired_folders, rank, size, port) for rank in range(size)]) == [0] * size
        runs[size] = [torch.load(paired_folders / f"w{size}r{rank}.pt", weights_only=True) for rank in range(size)]
    one = runs[1][0]
    for other in runs[world]:
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(other["weights"], one["weights"], strict=True))


def test_a_non_finite_step_changes_nothing():
    model, optimizer = tiny()
    stepper = Stepper(model, optimizer, Schedule(0.01, 10), Objective(), seed=0, precision="fp32")
    stepper.step(batch(), 0)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, json.dumps(str(stepper.state()))
    result = stepper.step(batch(bad=True), 1)
    assert not result.updated and not np.isfinite(result.grad_norm)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert json.dumps(str(stepper.state())).replace(str(optimizer.param_groups[0]["lr"]), "") != "" and state


def poisoned(folder, output):
    original = Stepper.step

    def step(self, batch, number):
        if number >= 6:
            batch.images[0] = np.inf
        return original(self, batch, number)

    Stepper.step = step
    try:
        train(folder, output)
    except NonFiniteError as error:
        raise SystemExit(error.exit_code) from error


def test_three_non_finite_steps_stop_the_run_with_state_and_keys(paired_folders, forked):
    output = paired_folders / "poisoned"
    assert forked(poisoned, paired_folders, output) == 8
    assert newest_checkpoint(output / "checkpoints")[2]["step"] == 6
    dumped = json.loads((output / "nonfinite-step-00000007.json").read_text())
    assert len(dumped["keys"]) == 32 and dumped["keys"][0].startswith("k0")


def test_warm_up_then_cosine():
    schedule = Schedule(lr=1.0, steps=100, warmup=0.1, min_lr=0.1)
    assert [schedule.at(s) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert schedule.at(55) == pytest.approx(0.55) and schedule.at(99) == pytest.approx(0.1, abs=1e-3)
    assert Schedule(1.0, 10, warmup=0).at(0) == 1.0


def test_scale_stays_between_1_and_100():
    model, optimizer = tiny(lr=1e3)
    stepper = Stepper(model, optimizer, Schedule(1e3, 10, warmup=0), Objective(), seed=0, precision="fp32")
    for step in range(3):
        stepper.step(batch(), step)
        assert 1 - 1e-6 <= float(model.logit_scale.exp()) <= 100 + 1e-3


def test_weight_decay_spares_norms_scale_and_bias():
    model, optimizer = tiny()
    free = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert free == {id(p) for p in model.parameters() if p.ndim < 2} and len(free) > 4
