"""The closed-form start of the projector: equal to a textbook ridge regression, and images land near their captions' words."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from align.common.errors import DataError
from mllm.assembly.warmstart import _first_layer, _Solver, captions, fit_projector, rarity
from mllm.conversations.table import open_conversations
from tests.support.tiny_mllm import tiny_model


def test_the_solver_is_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    hidden, targets = (torch.randn(40, width, generator=generator, dtype=torch.float64) for width in (6, 3))
    solver = _Solver(6, 3)
    for unit, target in zip(hidden, targets, strict=True):
        solver.add(unit, target)
    matrix, offset = solver.solve(0.3)
    centered = hidden - hidden.mean(0)
    penalty = 0.3 * centered.pow(2).sum(0).mean()
    stacked = torch.cat([centered, penalty.sqrt() * torch.eye(6, dtype=torch.float64)])
    wanted = torch.cat([targets - targets.mean(0), torch.zeros(6, 3, dtype=torch.float64)])
    assert torch.allclose(matrix, torch.linalg.lstsq(stacked, wanted).solution, atol=1e-8)
    assert torch.allclose(hidden.mean(0) @ matrix + offset, targets.mean(0))


def test_rarity_of_words():
    found = rarity([torch.tensor([1, 2, 2]), torch.tensor([1, 3])], 5)
    assert found.tolist() == pytest.approx([0, 0, np.log(2), np.log(2), 0])


@pytest.fixture
def colors(tmp_path):
    """120 pictures of one of four colors whose captions name it, one of them cut short."""
    names = {"red": (230, 20, 20), "green": (20, 200, 40), "blue": (30, 40, 220), "yellow": (240, 220, 30)}
    random, rows = np.random.default_rng(0), []
    for n in range(120):
        name = list(names)[n % 4]
        pixels = np.clip(np.array(names[name]) + random.normal(0, 12, (42, 42, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
        said = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"the photo is {name}"}]
        rows.append({"id": f"row{n}", "image": f"{n}.png", "conversations": said})
    (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:200])
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path


def test_images_land_near_the_words_of_their_captions(colors):
    conversations = open_conversations([str(colors / "rows.json")], None, colors / "cache")
    model, processor = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    fit = fit_projector(model, processor, conversations, 120, seed=1, progress=lambda done, total: seen.append((done, total)))
    assert (fit.images, fit.rejected, fit.held_out) == (119, 1, 12) and seen[-1] == (120, 120)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("model.multi_modal_projector.") for name in changed)

    def nearest(model):
        """Return how many of 40 pictures' mean visual tokens are nearest to the mean of their own color's."""
        _, words = captions(conversations, processor, 40)
        table = model.get_input_embeddings().weight.detach()
        spread = rarity(words, len(table))
        targets = torch.stack([(table[ids] * spread[ids][:, None]).sum(0) / spread[ids].sum() for ids in words[:4]])
        pictures = [n for n in range(40) if n != 5]
        pixels = torch.stack([processor.image_processor.to_pixels(Image.open(colors / f"{n}.png").convert("RGB")) for n in pictures])
        with torch.no_grad():
            tokens = torch.stack(model.model.get_image_features(pixels).pooler_output).mean(1)
        found = torch.cdist(tokens, targets).argmin(1)
        return int(sum(int(choice) == n % 4 for choice, n in zip(found, pictures, strict=True)))

    assert nearest(model) >= 36 > nearest(tiny_model()[0])
    again, _ = tiny_model()
    fit_projector(again, processor, conversations, 120, seed=1)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_too_few_captions_are_refused(colors):
    conversations = open_conversations([str(colors / "rows.json")], None, colors / "cache")
    model, processor = tiny_model()
    with pytest.raises(DataError, match="at least 50"):
        fit_projector(model, processor, conversations, 20, seed=1)


def test_a_channel_that_was_silent_at_first_does_not_drown_the_others():
    features = torch.randn(20, 4, 8, generator=torch.Generator().manual_seed(0))
    features[..., 3] = 0.0

    class Projector(nn.Module):
        linear_1 = nn.Linear(8, 16)

    with torch.no_grad():
        _first_layer(Projector, features, seed=0)
        later = features.clone()
        later[..., 3] = 1.0  # as large as the others
        moved = (Projector.linear_1(later) - Projector.linear_1(features)).abs().max()
    assert moved < 10, "a channel without spread was divided by almost nothing"
