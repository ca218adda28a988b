"""Contrastive losses: against brute-force loops, in low precision, at the extremes, in memory, and over several processes."""

import datetime
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from align.common.errors import UsageError
from align.model.losses import info_nce_loss, logit_stats, sigmoid_loss
from align.runtime.processes import any_rank, average_gradients

IDS = torch.tensor([5, 3, 5, 1, 9, 3, 5, 8, 2, 7, 1, 6, 4])  # of images: repeats, not sorted
TEXTS = [torch.tensor([1, 2, 3, 4, 1, 2, 5, 6, 7, 6, 9, 6, -8]), torch.tensor([2, 2, 4, 4, 5, 6, 4, 8, 9, 10, 11, 12, 13])]
KINDS = ["diagonal", "image", "caption", "either"]  # what makes two rows positives of each other


def alike(positives, rows=slice(None), sets=2):
    """Return the losses' options for positives of a kind: image ids, caption ids of each of `sets` caption sets, both or none."""
    options = {}
    if positives in ("image", "either"):
        options["image_ids"] = IDS[rows]
    if positives in ("caption", "either"):
        options["caption_ids"] = [TEXTS[number % 2][rows] for number in range(sets)]
    return options


def unit_rows(generator, rows, width):
    return functional.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)


def batch(rows, width=5, sets=1, seed=0, t=4.0, b=-1.5, dtype=torch.float64):
    """Correlated unit rows: images, captions, log_scale, bias; all leaves that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    shared = unit_rows(generator, rows, width)
    towers = [functional.normalize(shared + 0.7 * unit_rows(generator, rows, width), dim=1) for _ in range(1 + sets)]
    scalars = [torch.tensor(math.log(t), dtype=torch.float64), torch.tensor(b, dtype=torch.float64)]
    images, *captions = [tower.to(dtype).requires_grad_() for tower in towers]
    log_scale, bias = [scalar.to(torch.promote_types(dtype, torch.float32)).requires_grad_() for scalar in scalars]
    return images, captions, log_scale, bias


def is_positive(i, j, number, image_ids=None, caption_ids=None):
    same_image = image_ids is not None and int(image_ids[i]) == int(image_ids[j])
    return i == j or same_image or (caption_ids is not None and int(caption_ids[number][i]) == int(caption_ids[number][j]))


def sigmoid_by_loops(images, captions, log_scale, bias, reduction, **ids):
    rows, total = len(images), 0.0
    for number, caption_set in enumerate(captions):
        for i in range(rows):
            for j in range(rows):
                sign = 1 if is_positive(i, j, number, **ids) else -1
                logit = log_scale.exp() * (images[i] * caption_set[j]).sum() + bias
                total = total - torch.log(1 / (1 + torch.exp(-sign * logit)))
    return total / len(captions) / (rows**2 if reduction == "mean" else rows)


def info_nce_by_loops(images, captions, log_scale, **ids):
    rows, total = len(images), 0.0
    for number, caption_set in enumerate(captions):
        for anchors, targets in ((images, caption_set), (caption_set, images)):
            for i in range(rows):
                weights = [torch.exp(log_scale.exp() * (anchors[i] * target).sum()) for target in targets]
                chosen = [j for j in range(rows) if is_positive(i, j, number, **ids)]
                total = total - sum(torch.log(weights[j] / sum(weights)) for j in chosen) / len(chosen)
    return total / (2 * rows * len(captions))


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs)


def assert_same(ours, expected, rtol=1e-10):
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.shape == theirs.shape
        assert (mine.double() - theirs).norm() <= rtol * theirs.norm() + 1e-300, (mine, theirs)


@pytest.mark.parametrize("tile", [1, 3, 4, 100])
@pytest.mark.parametrize("sets", [1, 2, 3])
@pytest.mark.parametrize("positives", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum_over_batch"])
def test_sigmoid_loss_and_gradients_equal_a_double_loop(tile, sets, positives, reduction):
    rows = 13 if sets == 1 else 6
    images, captions, log_scale, bias = batch(rows, sets=sets)
    inputs, ids = [images, log_scale, bias, *captions], alike(positives, slice(rows), sets)
    loops = sigmoid_by_loops(images, captions, log_scale, bias, reduction, **ids)
    ours = sigmoid_loss(images, captions, log_scale, bias, **ids, reduction=reduction, tile=tile)
    assert_same([ours, *gradients(ours, inputs)], [loops, *gradients(loops, inputs)])


@pytest.mark.parametrize("tile", [1, 3, 4, 100])
@pytest.mark.parametrize("sets", [1, 2, 3])
@pytest.mark.parametrize("positives", KINDS)
def test_info_nce_loss_and_gradients_equal_a_double_loop(tile, sets, positives):
    rows = 13 if sets == 1 else 6
    images, captions, log_scale, _ = batch(rows, sets=sets)
    inputs, ids = [images, log_scale, *captions], alike(positives, slice(rows), sets)
    loops = info_nce_by_loops(images, captions, log_scale, **ids)
    ours = info_nce_loss(images, captions, log_scale, **ids, tile=tile)
    assert_same([ours, *gradients(ours, inputs)], [loops, *gradients(loops, inputs)])


def test_a_hand_worked_sigmoid_loss():
    # Two orthogonal pairs, t = 2, b = -1: logits 1 on the diagonal and -1 off it, so every term is log(1 + e^-1).
    images, log_scale, bias = torch.eye(2), torch.tensor(2.0).log(), torch.tensor(-1.0)
    term = math.log(1 + math.exp(-1))
    assert sigmoid_loss(images, [images], log_scale, bias).item() == pytest.approx(term)
    assert sigmoid_loss(images, [images], log_scale, bias, reduction="sum_over_batch").item() == pytest.approx(2 * term)
    all_positive = sigmoid_loss(images, [images], log_scale, bias, image_ids=torch.tensor([7, 7]))
    assert all_positive.item() == pytest.approx((term + math.log(1 + math.e)) / 2)


def test_one_pair_alone_has_no_negatives():
    images, captions, log_scale, bias = batch(1)
    positive = (log_scale.exp() * (images * captions[0]).sum() + bias).item()
    assert sigmoid_loss(images, captions, log_scale, bias).item() == pytest.approx(math.log(1 + math.exp(-positive)))
    assert info_nce_loss(images, captions, log_scale).item() == 0
    stats = logit_stats(images, captions, log_scale, bias)
    assert stats.positive_mean_logit == pytest.approx(positive) and math.isnan(stats.negative_mean_logit)


@pytest.mark.parametrize("positives", KINDS)
def test_gradients_pass_finite_differences(positives):
    images, captions, log_scale, bias = batch(7, sets=2)
    options = {**alike(positives, slice(7)), "tile": 3}
    inputs = (images, log_scale, bias, *captions)
    assert torch.autograd.gradcheck(lambda x, s, b, *y: 3 * sigmoid_loss(x, y, s, b, **options), inputs)
    inputs = (images, log_scale, *captions)
    assert torch.autograd.gradcheck(lambda x, s, *y: 3 * info_nce_loss(x, y, s, **options), inputs)


def test_there_is_no_second_derivative():
    images, captions, log_scale, bias = batch(4)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(sigmoid_loss(images, captions, log_scale, bias), images, create_graph=True)


def with_dtype(inputs, dtype):
    """Fresh leaves of the same values: embeddings in `dtype`, scalars in float32 or wider."""
    images, captions, log_scale, bias = inputs
    scalar = torch.promote_types(dtype, torch.float32)
    images, *captions = [tensor.detach().to(dtype).clone().requires_grad_() for tensor in (images, *captions)]
    log_scale, bias = [tensor.detach().to(scalar).clone().requires_grad_() for tensor in (log_scale, bias)]
    return images, captions, log_scale, bias


def all_results(inputs, kind, **options):
    """[loss, gradient of images, captions, log_scale (and bias)]."""
    images, captions, log_scale, bias = inputs
    if kind == "sigmoid":
        loss, leaves = sigmoid_loss(images, captions, log_scale, bias, **options), [images, *captions, log_scale, bias]
    else:
        loss, leaves = info_nce_loss(images, captions, log_scale, **options), [images, *captions, log_scale]
    return [loss, *gradients(loss, leaves)]


def errors(inputs, kind, dtype, **options):
    """Relative errors [loss, images, captions, scalars] against float64 on the same rounded embeddings."""
    low = with_dtype(inputs, dtype)
    results = all_results(low, kind, **options)
    exact = all_results(with_dtype(low, torch.float64), kind)
    assert [result.dtype for result in results[1:3]] == [dtype, dtype]
    return [((ours.double() - theirs).norm() / theirs.norm()).item() for ours, theirs in zip(results, exact, strict=True)]


@pytest.mark.parametrize("kind", ["sigmoid", "info_nce"])
@pytest.mark.parametrize(("t", "b"), [(20.0, -10.0), (100.0, -30.0)])
def test_fp32_has_the_precision_of_its_logits(kind, t, b):
    assert max(errors(batch(300, width=64, t=t, b=b), kind, torch.float32, tile=128)) < t * 1e-7


@pytest.mark.parametrize("kind", ["sigmoid", "info_nce"])
@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"dtype": torch.float32, "matmul_dtype": torch.bfloat16}])
def test_bf16_matmuls_cost_little_precision(kind, options):
    loss, *rest = errors(batch(300, width=64, t=20, b=-10), kind, tile=128, **options)
    assert loss < 5e-4 and max(rest) < 2e-2
    loss, *rest = errors(batch(300, width=64, t=100, b=-30), kind, tile=128, **options)  # a logit of 50 is rounded by up to 0.1
    assert loss < 0.1 and max(rest) < 0.1


def test_bf16_at_the_start_of_training_has_a_loss_precise_to_5e_5():
    low = errors(batch(512, width=128, t=20, b=-10), "sigmoid", torch.bfloat16, tile=200)
    assert low[0] < 5e-5 and max(low) < 1e-2


def test_info_nce_is_precise_when_every_pair_is_found():
    images, captions, log_scale, bias = batch(50, width=64, t=60)
    inputs = (images, [images.detach().clone()], log_scale, bias)
    assert all_results(with_dtype(inputs, torch.float64), "info_nce")[0] < 1e-9
    assert max(errors(inputs, "info_nce", torch.float32)) < 1e-5


def test_autocast_does_not_change_the_loss():
    inputs = with_dtype(batch(40, width=16), torch.float32)
    plain = all_results(inputs, "sigmoid")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = all_results(inputs, "sigmoid")
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


def test_fp16_gradients_survive_when_the_loss_is_scaled():
    inputs = batch(1500, width=8, t=20, b=-30)  # gradients near 1e-6: in fp16 they would keep one or two digits
    images, captions, log_scale, bias = with_dtype(inputs, torch.float16)
    scaled = torch.autograd.grad(2.0**16 * sigmoid_loss(images, captions, log_scale, bias), images)[0]
    exact = all_results(with_dtype((images, captions, log_scale, bias), torch.float64), "sigmoid")[1]
    assert (scaled.double() / 2**16 - exact).norm() < 2e-3 * exact.norm()


@pytest.mark.parametrize("kind", ["sigmoid", "info_nce"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("b", [-10.0, 0.0, 10.0])
@pytest.mark.parametrize("side", [1, -1])
def test_extreme_logits_stay_finite_and_right(kind, dtype, b, side):
    images, captions, log_scale, bias = batch(20, width=4, t=100, b=b)
    inputs = (images, [side * images.detach()], log_scale, bias)  # every positive at +100 or -100
    low = with_dtype(inputs, dtype)
    results = all_results(low, kind, tile=8)
    assert all(result.isfinite().all() for result in results)
    exact = all_results(with_dtype(low, torch.float64), kind, tile=8)
    assert results[0].item() == pytest.approx(exact[0].item(), rel=1e-5 if dtype == torch.float32 else 0.2)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of any tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


@pytest.mark.parametrize("kind", ["sigmoid", "info_nce"])
@pytest.mark.parametrize("positives", KINDS)
def test_nothing_larger_than_the_embeddings_or_a_tile_is_allocated(kind, positives):
    rows, width, tile = 256, 4, 32  # B E = 1024 = tile^2, tile B = 8192, B^2 = 65536
    inputs = batch(rows, width=width, sets=2)
    with LargestTensor() as record:
        ids = {"image_ids": torch.arange(rows) // 3, "caption_ids": [torch.arange(rows) // 5, torch.arange(rows) % 50]}
        all_results(inputs, kind, tile=tile, **{name: ids[name] for name in alike(positives)})
    assert record.largest == tile**2


@pytest.mark.parametrize("positives", KINDS)
def test_logit_stats_are_the_means_over_pairs(positives):
    images, captions, log_scale, bias = batch(13, sets=2)
    logits = [(log_scale.exp() * images @ caption_set.T + bias).detach().numpy() for caption_set in captions]
    ids, numbers = alike(positives), range(13)
    masks = [np.array([[is_positive(i, j, number, **ids) for j in numbers] for i in numbers]) for number in (0, 1)]
    stats = logit_stats(images, captions, log_scale, bias, **ids)
    for value, negative in ((stats.positive_mean_logit, False), (stats.negative_mean_logit, True)):
        chosen = [matrix[mask != negative] for matrix, mask in zip(logits, masks, strict=True)]
        assert value == pytest.approx(np.concatenate(chosen).mean())


def test_wrong_arguments_are_refused():
    images, captions, log_scale, bias = batch(4)
    cases = [
        (lambda: sigmoid_loss(images, captions, log_scale, bias, reduction="sum"), "'sum'.*mean, sum_over_batch"),
        (lambda: sigmoid_loss(images, [], log_scale, bias), "captions must be a list"),
        (lambda: sigmoid_loss(images, captions[0], log_scale, bias), r"pass \[captions\]"),
        (lambda: sigmoid_loss(images, [captions[0][:3]], log_scale, bias), r"captions\[0\] has shape \(3, 5\)"),
        (lambda: sigmoid_loss(images[0], [captions[0][0]], log_scale, bias), r"expected floating-point \(N, E\)"),
        (lambda: sigmoid_loss(images, captions, log_scale, bias[None]), r"bias has shape \(1,\)"),
        (lambda: info_nce_loss(images, captions, log_scale[None]), r"log_scale has shape \(1,\)"),
        (lambda: info_nce_loss(images, captions, log_scale, image_ids=IDS), r"image_ids is .*expected whole numbers \(4,\)"),
        (lambda: info_nce_loss(images, captions, log_scale, caption_ids=[images[:, 0]]), r"caption_ids\[0\] is torch.float64"),
        (lambda: info_nce_loss(images, captions, log_scale, caption_ids=TEXTS), "2 caption_ids for 1 caption sets"),
        (lambda: info_nce_loss(images, captions, log_scale, tile=0), "tile is 0"),
        (lambda: info_nce_loss(images[:0], [captions[0][:0]], log_scale), "batch is empty"),
    ]
    for call, message in cases:
        with pytest.raises(UsageError, match=message):
            call()


class Towers(nn.Module):
    """Two linear heads with scale and bias, as the training loop wraps them in DistributedDataParallel."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.image = nn.Parameter(torch.randn(5, 3, generator=generator, dtype=torch.float64))
        self.text = nn.Parameter(torch.randn(5, 3, generator=generator, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.tensor(1.4, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))

    def forward(self, kind, images, captions, ids):
        images = functional.normalize(images @ self.image, dim=1)
        captions = [functional.normalize(caption_set @ self.text, dim=1) for caption_set in captions]
        options = {**ids, "tile": 3}
        if kind == "sigmoid":
            return sigmoid_loss(images, captions, self.log_scale, self.bias, **options)
        return info_nce_loss(images, captions, self.log_scale, **options) + 0 * self.bias


CASES = [(kind, positives) for kind in ("sigmoid", "info_nce") for positives in KINDS]
SPLITS = [[13], [7, 6], [4, 4, 0, 5], [0, 1]]  # rows of each process: uneven, one of them empty, one row in all


def take(inputs, rows):
    images, captions, log_scale, bias = inputs
    leaves = [tensor.detach()[rows].clone().requires_grad_() for tensor in (images, *captions)]
    scalars = [scalar.detach().clone().requires_grad_() for scalar in (log_scale, bias)]
    return leaves[0], leaves[1:], *scalars


def run_rank(rank, folder, split, threads):
    """One process: every case on its own rows, then training gradients of wrapped towers; results go to a file."""
    torch.set_num_threads(threads)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/init",
        rank=rank,
        world_size=len(split),
        timeout=datetime.timedelta(seconds=60),
    )
    start, total = sum(split[:rank]), sum(split)
    rows = slice(start, start + split[rank])
    found = {}
    for kind, positives in CASES:
        for dtype in (torch.float64, torch.bfloat16):
            mine = take(batch(total, sets=2, dtype=dtype), rows)
            found[kind, positives, dtype] = all_results(mine, kind, **alike(positives, rows), tile=3)
            found["stats", positives] = logit_stats(*mine, **alike(positives, rows))
    images, captions, _, _ = take(batch(total, sets=2), rows)
    for kind in ("sigmoid", "info_nce"):
        towers = DistributedDataParallel(Towers())
        towers(kind, images, captions, alike("either", rows)).backward()
        found["towers", kind] = [parameter.grad for parameter in towers.parameters()]
        plain = Towers()
        plain(kind, images, captions, alike("either", rows)).backward()
        average_gradients(list(plain.parameters()))
        found["averaged", kind] = [parameter.grad for parameter in plain.parameters()]
    found["any"] = [any_rank(rank == len(split) - 1, torch.device("cpu")), any_rank(False, torch.device("cpu"))]
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("split", SPLITS)
def test_any_number_of_processes_gives_the_loss_and_gradients_of_one(split, tmp_path):
    processes, total = len(split), sum(split)
    mp.start_processes(run_rank, (tmp_path, split, 1), nprocs=processes, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(processes)]
    for kind, positives in CASES:
        for dtype, rtol in ((torch.float64, 1e-10), (torch.bfloat16, 5e-3)):
            whole = batch(total, sets=2, dtype=dtype)
            loss, *single = all_results(whole, kind, **alike(positives, slice(total)), tile=3)
            results = [rank[kind, positives, dtype] for rank in ranks]
            assert_same([result[0] for result in results], [loss.detach().double()] * processes, rtol)
            for place in (1, 2, 3):  # images and both caption sets: each process has its rows, times the number of processes
                joined = torch.cat([result[place] for result in results]) / processes
                assert_same([joined], [single[place - 1].double()], rtol)
            for place in range(4, len(single) + 1):  # scalars: DistributedDataParallel averages them
                mean = torch.stack([result[place] for result in results]).mean(0)
                assert_same([mean], [single[place - 1].double()], rtol)
            stats = logit_stats(*batch(total, sets=2, dtype=torch.bfloat16), **alike(positives, slice(total)))
            assert all(rank["stats", positives] == pytest.approx(stats, rel=1e-5, nan_ok=True) for rank in ranks)
    images, captions, _, _ = batch(total, sets=2)
    for kind in ("sigmoid", "info_nce"):
        towers = Towers()
        towers(kind, images, captions, alike("either", slice(total))).backward()
        for rank in ranks:
            assert_same(rank["towers", kind], [parameter.grad for parameter in towers.parameters()])
            assert_same(rank["averaged", kind], [parameter.grad for parameter in towers.parameters()])
    assert all(rank["any"] == [True, False] for rank in ranks)
