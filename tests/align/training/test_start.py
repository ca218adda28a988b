"""The closed-form start of linear heads is regularized canonical correlation analysis, and retrieves before any step."""

import os
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist

from align.common.errors import UsageError
from align.model.dual_encoder import SailConfig, SailModel
from align.runtime.processes import same_on_all
from align.training.start import CAPTION_RIDGE, IMAGE_RIDGE, canonical_maps, start_from_correlations
from align.training.step import validate
from tests.support.forking import exit_codes, fork

CAPTIONS = 3  # per image


def planted(images, seed):
    """Images (N, 24) and captions (3 N, 16) that share five hidden facts an image, and the image number of each caption."""
    shared = np.random.default_rng(0)
    to_image, to_caption = shared.normal(size=(5, 24)), shared.normal(size=(5, 16))
    random = np.random.default_rng(seed)
    facts, owners = random.normal(size=(images, 5)), np.repeat(np.arange(images), CAPTIONS)
    x = facts @ to_image + 0.5 * random.normal(size=(images, 24))
    y = facts[owners] @ to_caption + 0.5 * random.normal(size=(len(owners), 16))
    return x.astype(np.float16), y.astype(np.float16), owners


class Pairs:
    def __init__(self, *everything):
        self.kept = everything

    def everything(self, limit):
        return self.kept


def model(width=16, head="linear"):
    return SailModel(SailConfig(vision_width=24, text_width=16, width=width, head=head)).initialize(0)


def test_maps_whiten_each_side_and_make_the_covariance_between_them_diagonal():
    """These three equations define regularized CCA: with ridges in the variances, outputs have covariance S, S and S^2."""
    x, y, owners = planted(200, seed=1)
    x64, y64 = torch.from_numpy(x).double(), torch.from_numpy(y).double()
    image_map, caption_map = (rows.numpy() for rows in canonical_maps(x64, y64, torch.from_numpy(owners)))
    means = np.stack([y[owners == n].astype(np.float64).mean(0) for n in range(200)])
    x_cov, y_cov = (np.cov(rows.astype(np.float64), rowvar=False, bias=True) for rows in (x, y))
    x_cov += IMAGE_RIDGE * np.trace(x_cov) / 24 * np.eye(24)
    y_cov += CAPTION_RIDGE * np.trace(y_cov) / 16 * np.eye(16)
    between = np.cov(x.astype(np.float64), means, rowvar=False, bias=True)[:24, 24:]
    strength = np.diag(image_map @ x_cov @ image_map.T)
    assert np.allclose(image_map @ x_cov @ image_map.T, np.diag(strength), atol=1e-9)
    assert np.allclose(caption_map @ y_cov @ caption_map.T, np.diag(strength), atol=1e-9)
    assert np.allclose(image_map @ between @ caption_map.T, np.diag(strength**2), atol=1e-9)
    assert (np.diff(strength) <= 1e-12).all() and strength[4] > 3 * strength[5], "five facts are shared, strongest first"


def test_heads_retrieve_unseen_images_before_any_step():
    started, random = model(), model()
    start_from_correlations(started, Pairs(*planted(100, seed=1)))
    new = planted(50, seed=2)
    ours, before = (validate(kind, *new, "fp32")["val_mean_recall"] for kind in (started, random))
    assert ours > 0.7 and before < 0.4
    for head, untouched in ((started.vision_head, random.vision_head), (started.text_head, random.text_head)):
        spreads = [float(kind.out.weight.detach().std()) for kind in (head, untouched)]
        assert spreads[0] == pytest.approx(spreads[1], rel=1e-5), "steps keep their relative size"


def test_rows_beyond_the_shared_width_are_refused():
    with pytest.raises(UsageError, match=r"--start cca .* at most 16 .* --width 17.* give --width 16 or less"):
        start_from_correlations(model(width=17), Pairs(*planted(30, seed=1)))


def worker(folder, rank, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    weights = [torch.full((3, 2), float(rank + 1)), torch.full((), float(rank + 5))]
    same_on_all(weights)
    torch.save(weights, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_all_processes_start_from_the_weights_of_the_first(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert exit_codes([fork(worker, tmp_path, rank, port) for rank in range(2)]) == [0, 0]
    for rank in range(2):
        matrix, scalar = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert matrix.eq(1).all() and scalar == 5
