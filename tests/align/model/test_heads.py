"""Alignment heads: formulas against numpy, parameter counts of the paper, initial weights, shapes and stability."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from align.common.errors import UsageError
from align.model.heads import HEADS, ImageTokenHead, TextTokenHead, build_head, initialize

SMALL = {  # kind: options that keep it small
    "linear": {},
    "mlp": {"expansion": 2},
    "glu": {"expansion": 3},
    "sharelock": {"hidden": 7},
    "identity": {},
    "token": {},
}


def small_head(kind, in_width=6, out_width=5, seed=0):
    """A head in evaluation mode whose every parameter and buffer, norms included, is random."""
    head = build_head(kind, in_width, in_width if kind == "identity" else out_width, **SMALL[kind])
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in head.state_dict().items():
        if tensor.is_floating_point():
            tensor.normal_(generator=generator)
            if "running_var" in name:
                tensor.abs_().add_(0.5)
    return head.eval()


def weights(head):
    return {name: tensor.double().numpy() for name, tensor in head.state_dict().items()}


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(x, w):
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * w["norm.weight"] + w["norm.bias"]


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def linear_formula(x, w):
    return linear(layer_norm(x, w), w, "out")


def mlp_formula(x, w):
    return linear(gelu(linear(layer_norm(x, w), w, "up")), w, "out")


def glu_formula(x, w):
    normed = layer_norm(x, w)
    gate = np.clip(np.clip(linear(normed, w, "gate"), -1e3, 1e3), 0, 6)
    return linear(gate * np.clip(linear(normed, w, "value"), -1e3, 1e3), w, "out")


def sharelock_formula(x, w):
    hidden = layer_norm(x, w)
    for first in (0, 4, 8):  # linear, batch norm, ReLU, dropout
        hidden = linear(hidden, w, f"layers.{first}")
        norm = f"layers.{first + 1}"
        hidden = (hidden - w[f"{norm}.running_mean"]) / np.sqrt(w[f"{norm}.running_var"] + 1e-5)
        hidden = np.maximum(hidden * w[f"{norm}.weight"] + w[f"{norm}.bias"], 0)
    return linear(hidden, w, "out")


def token_formula(x, w):
    normed = layer_norm(x, w)
    return linear(normed, w, "linear") + linear(gelu(linear(normed, w, "up")), w, "out")


FORMULAS = {
    "linear": linear_formula,
    "mlp": mlp_formula,
    "glu": glu_formula,
    "sharelock": sharelock_formula,
    "identity": lambda x, w: x,
    "token": token_formula,
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_compute_the_formulas_of_the_method(kind):
    head = small_head(kind)
    features = np.random.default_rng(1).normal(3, 5, (9, 6))
    ours = head.double()(torch.from_numpy(features)).detach().numpy()
    assert np.allclose(ours, FORMULAS[kind](features, weights(head)), rtol=1e-9, atol=1e-9)


def test_both_glu_branches_are_bounded():
    head = small_head("glu").double()
    with torch.no_grad():
        head.out.weight.fill_(1)
        head.out.bias.zero_()
        head.gate.bias.fill_(1e6)
        head.value.bias.fill_(-1e6)
    output = head(torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(output, torch.full((4, 5), -18 * 6 * 1e3, dtype=torch.float64))  # 18 = expansion 3 x width 6


def count(head):
    norms = sum(p.numel() for module in head.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters())
    return sum(p.numel() for p in head.parameters()), norms


@pytest.mark.parametrize(
    ("kind", "options", "text_width", "published", "exact", "norms"),
    [
        ("linear", {}, 1024, "3.15M", 3_153_920, 6_144),
        ("mlp", {}, 1024, "33.57M", 33_574_912, 6_144),
        ("glu", {"expansion": 4}, 1024, "54.55M", 54_558_720, 6_144),
        ("glu", {}, 1024, "109.10M", 109_109_248, 6_144),
        ("glu", {}, 4096, "385.98M", 385_988_608, 12_288),
    ],
)
def test_parameter_counts_are_the_published_ones(kind, options, text_width, published, exact, norms):
    with torch.device("meta"):
        towers = [build_head(kind, width, 1024, **options) for width in (2048, text_width)]
    total, in_norms = (sum(numbers) for numbers in zip(*map(count, towers), strict=True))
    assert (total, in_norms) == (exact, norms)
    assert f"{(total - in_norms) / 1e6:.2f}M" == published  # the paper leaves the LayerNorms out


def test_token_heads_have_the_published_number_of_parameters():
    with torch.device("meta"):
        token = build_head("token", 1024, 1024)
        image, text = ImageTokenHead(1024, 1024, has_cls=True), TextTokenHead(1024, 1024)
    square, bias, norm = 1024 * 1024, 1024, 2 * 1024
    assert count(token)[0] == 3 * (square + bias) + norm == 3_150_848  # A, W1, W2 with biases, LayerNorm
    assert count(image)[0] == 2 * 3_150_848  # TP_local and TP_cls
    assert count(text)[0] == 3_150_848 + 2 * (square + bias) + norm  # TP_text, W1 and W2 of the projection, LayerNorm
    temperature = 1
    assert count(image)[0] + count(text)[0] + temperature == 11_553_793


def random_weights(head, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for tensor in head.state_dict().values():
        tensor.normal_(generator=generator)
    return head.double().eval()


def part(w, name):
    return {key.removeprefix(f"{name}."): value for key, value in w.items() if key.startswith(f"{name}.")}


@pytest.mark.parametrize("has_cls", [True, False])
def test_image_token_head_is_the_mean_of_the_patches_plus_cls(has_cls):
    head = random_weights(ImageTokenHead(6, 5, has_cls))
    tokens = np.random.default_rng(1).normal(2, 3, (4, 8, 6))  # (B, T, D)
    w = weights(head)
    for row, ours in zip(tokens, head(torch.from_numpy(tokens).flatten(1)).detach().numpy(), strict=True):
        patches = row[1:] if has_cls else row
        expected = sum(token_formula(patch, part(w, "local")) for patch in patches) / len(patches)
        expected = expected + (token_formula(row[0], part(w, "cls")) if has_cls else 0)
        np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-10)
    dense = head.dense(torch.from_numpy(tokens).flatten(1))
    assert dense.shape == (4, 8 - has_cls, 5)
    torch.testing.assert_close(dense.mean(1), head(torch.from_numpy(tokens).flatten(1)))  # for any number of patches


def test_text_token_head_is_the_formula_and_ignores_padding():
    head = random_weights(TextTokenHead(6, 5))
    random, w = np.random.default_rng(2), weights(head)
    texts = [random.normal(1, 2, (length, 6)) for length in (3, 7, 1)]
    rows = np.zeros((3, 9, 6))
    for number, tokens in enumerate(texts):
        rows[number, : len(tokens)] = tokens
    ours = head(torch.from_numpy(rows).flatten(1)).detach().numpy()
    for tokens, found in zip(texts, ours, strict=True):
        mean = sum(token_formula(token, part(w, "tokens")) for token in tokens) / len(tokens)
        p = linear(mean, w, "up")
        np.testing.assert_allclose(found, layer_norm(p + linear(gelu(p), w, "out"), w), rtol=1e-10, atol=1e-10)
    alone = head(torch.from_numpy(texts[1]).flatten()[None])
    np.testing.assert_allclose(alone[0].detach().numpy(), ours[1], rtol=1e-12, atol=1e-12)


def test_a_and_w2_commute_with_the_mean_in_training_too():
    head = random_weights(build_head("token", 6, 5, dropout=0.4)).train()
    tokens = torch.randn(3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    shares = torch.rand(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    shares /= shares.sum(1, keepdim=True)
    torch.manual_seed(9)
    cheap = head.pooled(tokens, shares)
    torch.manual_seed(9)  # the same dropout masks
    torch.testing.assert_close(cheap, (head(tokens) * shares[..., None]).sum(1), rtol=1e-9, atol=1e-9)
    torch.manual_seed(10)
    assert not torch.allclose(cheap, head.pooled(tokens, shares))


def test_sharelock_has_four_linear_layers_of_hidden_4096_and_dropout():
    with torch.device("meta"):
        head = build_head("sharelock", 1024, 768)
    shapes = [tuple(module.weight.shape) for module in head.modules() if isinstance(module, nn.Linear)]
    assert shapes == [(4096, 1024), (4096, 4096), (4096, 4096), (768, 4096)]
    assert [module.p for module in head.modules() if isinstance(module, nn.Dropout)] == [0.2] * 3


@pytest.mark.parametrize("kind", ["linear", "mlp", "glu", "sharelock", "token"])
def test_initial_weights_are_xavier_uniform_with_zero_biases(kind):
    head = build_head(kind, 256, 128)
    initialize(head, torch.Generator().manual_seed(0))
    for module in head.modules():
        if isinstance(module, nn.Linear):
            bound = math.sqrt(6 / sum(module.weight.shape))
            assert 0.99 * bound < module.weight.abs().max().item() <= bound
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
            assert abs(module.weight.mean().item()) < 0.02 * bound
            assert not module.bias.any()
        if isinstance(module, nn.LayerNorm | nn.BatchNorm1d):
            assert torch.equal(module.weight, torch.ones_like(module.weight)) and not module.bias.any()


def test_initial_weights_depend_on_the_generator_only():
    heads = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 3)):
        torch.manual_seed(global_seed)
        heads.append(build_head("glu", 12, 8))
        initialize(heads[-1], torch.Generator().manual_seed(seed))
    first, same, other = (head.state_dict() for head in heads)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["gate.weight"], other["gate.weight"])
    assert not torch.equal(first["gate.weight"], first["value.weight"])


def test_building_and_initializing_leave_the_global_random_state():
    before = torch.get_rng_state()
    initialize(build_head("sharelock", 8, 8, hidden=16), torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", HEADS)
def test_dense_features_pass_like_pooled_ones(kind):
    head = small_head(kind)
    patches = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))  # (B, P, F)
    dense = head(patches)
    assert dense.shape[:2] == (2, 3)
    assert torch.allclose(dense[1, 2], head(patches[1, 2:3])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "mlp", "glu"])
@pytest.mark.parametrize("magnitude", [1e-2, 1.0, 1e4])
def test_bf16_autocast_stays_close_to_fp32(kind, magnitude):
    head = build_head(kind, 64, 32)
    generator = torch.Generator().manual_seed(0)
    initialize(head, generator)
    features = magnitude * torch.randn(50, 64, generator=generator)
    exact = head(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = head(features)
    rounded.float().square().sum().backward()
    assert (rounded - exact).norm() < 0.02 * exact.norm()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("gated", 4, 4), {}, "unknown head 'gated'.*linear, mlp, glu, sharelock, identity, token"),
        (("token", 4, 4), {"dropout": -0.1}, "dropout is -0.1"),
        (("linear", 4, 4), {"expansion": 2}, "'linear' has no option 'expansion'.*none"),
        (("glu", 4, 4), {"dropout": 0.1}, "'glu' has no option 'dropout'.*expansion"),
        (("sharelock", 4, 4), {"dropout": 1.0}, "dropout is 1.0"),
        (("glu", 4, 4), {"expansion": 0}, "expansion is 0"),
        (("linear", 0, 4), {}, "in_width is 0"),
        (("identity", 4, 5), {}, "map 4 to 5"),
    ],
)
def test_wrong_heads_are_refused(arguments, options, message):
    with pytest.raises(UsageError, match=message):
        build_head(*arguments, **options)
