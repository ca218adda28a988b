"""One step is exact: accumulation is one big batch, several processes are one, a non-finite step changes nothing."""

import json
import os
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist

from align.model.dual_encoder import SailConfig, SailModel
from align.training.pairs import BatchOrder, PairBatch, open_pairs
from align.training.step import Objective, Schedule, Stepper, build_optimizer
from tests.support.forking import exit_codes, fork


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


def one_step(accumulate=1, **options):
    model, optimizer = tiny()
    stepper = Stepper(
        model, optimizer, Schedule(0.01, 10, warmup=0.5), Objective(tile=7, **options), seed=0, accumulate=accumulate, precision="fp32"
    )
    result = stepper.step(batch(), 0)
    return result, [p.grad.clone() for p in model.parameters()]


def test_feature_dropout_that_is_off_changes_no_bit_and_is_drawn_by_seed_and_step():
    result, gradients = one_step()
    off, same = one_step(feature_dropout=0)
    assert off == result and all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))
    first, again = one_step(feature_dropout=0.3), one_step(feature_dropout=0.3)
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))  # a pure function of (state, seed, step)
    assert not any(torch.allclose(a, b, rtol=0.1) for a, b in zip(first[1], gradients, strict=True) if b.ndim == 2)


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
