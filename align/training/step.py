"""Training of the heads: schedule, one exact step, validation, and the state that a checkpoint holds.

Shapes: `B` global batch, `b` this process's share of it, `F` image feature width, `D` caption feature width, `E` aligned width. A
step depends only on (state, seed, step number), so a killed run resumes to the same weights.
"""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from lion_pytorch import Lion
from torch import Tensor, nn
from torch.nn import functional

from align.common.errors import DamagedError
from align.common.seeds import generator
from align.model.dual_encoder import SailModel
from align.model.losses import LossStats, info_nce_loss, logit_stats, sigmoid_loss
from align.model.ranking import best_ranks, recalls
from align.runtime.processes import average_gradients
from align.training.pairs import PairBatch

MAX_LOG_SCALE = math.log(100)
CHUNK_VALUES = 1 << 24  # feature values embedded at once in validation


@dataclass(frozen=True)
class Objective:
    """The loss, how it is computed (see `align.model.losses`), and the share of feature values dropped before the heads."""

    loss: str = "sigmoid"
    reduction: str = "mean"
    tile: int = 4096
    feature_dropout: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then cosine from `lr` to `min_lr` over `steps`."""

    lr: float
    steps: int
    warmup: float = 0.1
    min_lr: float = 0.0

    def at(self, step: int) -> float:
        """Return the learning rate of step number `step` (from 0)."""
        rising = round(self.warmup * self.steps)
        if step < rising:
            return self.lr * (step + 1) / rising
        share = (step - rising) / max(1, self.steps - rising)
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1 + math.cos(math.pi * share))


def build_optimizer(model: SailModel, kind: str, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
    """Return Lion or AdamW for `model`. Weight decay acts only on matrices, never on scale, bias or norms."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer: Any = {"lion": Lion, "adamw": torch.optim.AdamW}[kind]
    return optimizer([group for group in groups if group["params"]], lr=lr, betas=betas)


@dataclass(frozen=True)
class StepResult:
    """Result of one step: loss and mean logits of the whole batch, gradient norm, and whether the weights were updated."""

    loss: float
    positive_logit: float
    negative_logit: float
    grad_norm: float
    updated: bool


@dataclass(eq=False)
class Stepper:
    """Runs training steps of `model` on this process's share of each global batch."""

    model: SailModel
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    objective: Objective
    _: KW_ONLY
    seed: int
    rank: int = 0
    accumulate: int = 1
    precision: str = "bf16"
    max_grad_norm: float | None = None
    log_scale_range: tuple[float, float] = (0.0, MAX_LOG_SCALE)

    def step(self, batch: PairBatch, step: int) -> StepResult:
        """Run step number `step` (from 0) on this process's part of the batch. Skip the update if loss or gradient is not finite."""
        device = self.model.device
        images = torch.as_tensor(batch.images, device=device)  # (b, F); on the device already with encoders in the loop
        captions = [torch.as_tensor(c, device=device) for c in batch.captions]  # (b, D) each
        ids = {
            "image_ids": None if batch.image_ids is None else torch.as_tensor(batch.image_ids, device=device),
            "caption_ids": None if batch.caption_ids is None else [torch.as_tensor(c, device=device) for c in batch.caption_ids],
        }
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.at(step)
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        if self.accumulate == 1:
            loss, stats = self._loss(self._embed(images, captions, step, 0), ids)
            loss.backward()
        else:
            loss, stats = self._accumulate(images, captions, ids, step)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in parameters:  # InfoNCE gives the bias no gradient
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        average_gradients(parameters)
        clip = math.inf if self.max_grad_norm is None else self.max_grad_norm
        norm = float(nn.utils.clip_grad_norm_(parameters, clip))
        value = float(loss.detach())
        finite = math.isfinite(value) and math.isfinite(norm)
        if finite:
            self.optimizer.step()
            with torch.no_grad():
                self.model.logit_scale.clamp_(*self.log_scale_range)
        return StepResult(value, stats.positive_mean_logit, stats.negative_mean_logit, norm, finite)

    def _embed(self, images: Tensor, captions: list[Tensor], step: int, piece: int) -> list[Tensor]:
        """Return [x, y_1, ..., y_K], each (b, E), L2-normalized. Dropout depends only on (seed, step, rank, piece)."""
        torch.manual_seed(int(generator(self.seed, 3, step, self.rank, piece).integers(1 << 62)))
        if self.objective.feature_dropout:
            images, *captions = [functional.dropout(rows.float(), self.objective.feature_dropout) for rows in (images, *captions)]
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return [self.model.project_image(images), *(self.model.project_text(caption) for caption in captions)]

    def _loss(self, embeddings: list[Tensor], ids: dict[str, Any]) -> tuple[Tensor, LossStats]:
        images, captions = embeddings[0], embeddings[1:]
        bias = self.model.logit_bias if self.objective.loss == "sigmoid" else None
        stats = logit_stats(images, captions, self.model.logit_scale, bias, **ids)
        options = ids | {"tile": self.objective.tile, "matmul_dtype": torch.bfloat16 if self.precision == "bf16" else None}
        if bias is None:
            return info_nce_loss(images, captions, self.model.logit_scale, **options), stats
        options["reduction"] = self.objective.reduction
        return sigmoid_loss(images, captions, self.model.logit_scale, bias, **options), stats

    def _accumulate(self, images: Tensor, captions: list[Tensor], ids: dict[str, Any], step: int) -> tuple[Tensor, LossStats]:
        """Compute the gradient of the whole batch with the activations of only one piece in memory.

        A contrastive loss does not split into pieces, but its gradient on the embeddings does. So embed all pieces without a graph,
        compute that gradient, then embed each piece again and backpropagate its part.
        """
        pieces = np.array_split(np.arange(len(images)), self.accumulate)
        rows = [slice(int(piece[0]), int(piece[-1]) + 1) for piece in pieces if len(piece)]
        with torch.no_grad():
            parts = [self._embed(images[r], [c[r] for c in captions], step, n) for n, r in enumerate(rows)]
        leaves = [torch.cat(side).requires_grad_() for side in zip(*parts, strict=True)]
        loss, stats = self._loss(leaves, ids)
        loss.backward()
        for number, r in enumerate(rows):
            embeddings = self._embed(images[r], [c[r] for c in captions], step, number)
            trained = [(e, leaf.grad[r]) for e, leaf in zip(embeddings, leaves, strict=True) if e.requires_grad and leaf.grad is not None]
            torch.autograd.backward([e for e, _ in trained], [g for _, g in trained])
        return loss, stats

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and JSON values from which `load_state` resumes exactly."""
        tensors = {f"model.{name}": tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
        saved = self.optimizer.state_dict()
        for number, entries in saved["state"].items():
            tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value).cpu() for name, value in entries.items()}
        return tensors, {"param_groups": saved["param_groups"]}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restore a state. DamagedError if it belongs to another model or optimizer."""
        weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
        entries: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, entry = name.split(".", 2)
                entries.setdefault(int(number), {})[entry] = tensor
        try:
            self.model.load_state_dict(weights)
            self.optimizer.load_state_dict({"state": entries, "param_groups": values["param_groups"]})
        except (RuntimeError, ValueError, KeyError) as error:
            raise DamagedError(f"the checkpoint is not of this model: {error}") from error


@torch.no_grad()
def validate(model: SailModel, images: np.ndarray, captions: np.ndarray, owners: np.ndarray, precision: str) -> dict[str, float]:
    """Return recalls `val_i2t_r1` ... `val_t2i_r10` and their mean, of images (n, F) and captions (T, D) of images `owners` (T,)."""
    model.eval()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
        x = _in_chunks(model.project_image, images, model.device)
        y = _in_chunks(model.project_text, captions, model.device)
    image_ids, caption_ids = torch.arange(len(x), device=x.device), torch.from_numpy(owners).to(x.device)
    ranks = {"i2t": best_ranks(x, y, image_ids, caption_ids), "t2i": best_ranks(y, x, caption_ids, image_ids)}
    values = {f"val_{way}_r{k}": value for way, found in ranks.items() for k, value in recalls(found).items()}
    return {**values, "val_mean_recall": sum(values.values()) / len(values)}


def _in_chunks(embed: Any, features: np.ndarray, device: torch.device) -> Tensor:
    chunk = max(1, min(4096, CHUNK_VALUES // features.shape[1]))  # a row may hold all tokens of an image
    return torch.cat([embed(torch.from_numpy(features[at : at + chunk]).to(device)) for at in range(0, len(features), chunk)])
