"""Alignment heads: small networks that map frozen features into the space shared by images and texts (SAIL, arXiv 2412.04616).

Shapes: `F` feature width given to a head, `E` aligned width, `w` expansion factor. Every head computes `a(x) = G(LayerNorm(x))`
on the last axis: pooled features (B, F) and dense features (B, P, F) pass through the same weights.
The output (..., E) is not normalized: the caller divides by its L2 norm.

Token heads (freeze-align) read rows (B, T D): all `T` tokens of width `D` of an image or caption, as encoders with feature="tokens"
give them. Pooling is exact and three times cheaper than the formula: A and W2 are linear, so they act on the mean over tokens.
"""

import inspect
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from align.common.errors import UsageError

HeadKind = Literal["linear", "mlp", "glu", "sharelock", "identity", "token"]
GLU_BOUND = 1e3  # keeps the product of the two branches finite in fp16


class LinearHead(nn.Module):
    """Returns `Linear(F, E)(LayerNorm(x))`: SAIL's linear head, and the one of alignment probing."""

    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(in_width, eps=1e-5)
        self.out = nn.Linear(in_width, out_width)

    def forward(self, features: Tensor) -> Tensor:
        return self.out(self.norm(features))


class MlpHead(nn.Module):
    """Returns `Linear(wF, E)(GELU(Linear(F, wF)(LayerNorm(x))))` with the exact (erf) GELU: SAIL's MLP head."""

    def __init__(self, in_width: int, out_width: int, expansion: int = 4):
        super().__init__()
        self.norm = nn.LayerNorm(in_width, eps=1e-5)
        self.up = nn.Linear(in_width, expansion * in_width)
        self.out = nn.Linear(expansion * in_width, out_width)

    def forward(self, features: Tensor) -> Tensor:
        return self.out(functional.gelu(self.up(self.norm(features))))


class GluHead(nn.Module):
    """Returns `W3(ReLU6(W1 x + b1) * clamp(W2 x + b2)) + b3` on the normalized x: SAIL's gated head (arXiv 2412.04616).

    The formula clamps both branches to +-1e3; one clamp is written, since ReLU6 of a clamped value equals ReLU6 of the value.
    """

    def __init__(self, in_width: int, out_width: int, expansion: int = 8):
        super().__init__()
        self.norm = nn.LayerNorm(in_width, eps=1e-5)
        self.gate = nn.Linear(in_width, expansion * in_width)  # W1
        self.value = nn.Linear(in_width, expansion * in_width)  # W2
        self.out = nn.Linear(expansion * in_width, out_width)  # W3

    def forward(self, features: Tensor) -> Tensor:
        normed = self.norm(features)
        gate = functional.relu6(self.gate(normed))  # (..., wF)
        return self.out(gate * self.value(normed).clamp(-GLU_BOUND, GLU_BOUND))


class SharelockHead(nn.Module):
    """Returns a 4-layer MLP with BatchNorm, ReLU and dropout: ShareLock's text side, whose vision side is `identity`.

    BatchNorm statistics are those of the process's own rows, so with this head several processes do not equal one.
    """

    def __init__(self, in_width: int, out_width: int, hidden: int = 4096, dropout: float = 0.2):
        super().__init__()
        self.norm = nn.LayerNorm(in_width, eps=1e-5)
        layers: list[nn.Module] = []
        for width in (in_width, hidden, hidden):
            layers += [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(hidden, out_width)

    def forward(self, features: Tensor) -> Tensor:
        rows = self.norm(features).reshape(-1, features.shape[-1])  # BatchNorm1d wants (N, F)
        return self.out(self.layers(rows)).unflatten(0, features.shape[:-1])


class IdentityHead(nn.Module):
    """Returns its input: the vision side of `sharelock`, without parameters. F must equal E."""

    def __init__(self, in_width: int, out_width: int):
        super().__init__()
        if in_width != out_width:
            raise UsageError(
                f"head 'identity' keeps the width, but was asked to map {in_width} to {out_width}: "
                f"set the aligned width to {in_width} or choose another head"
            )

    def forward(self, features: Tensor) -> Tensor:
        return features


class TokenHead(nn.Module):
    """Returns `A x + W2 GELU(W1 x)` of x = Dropout(LayerNorm(token)), token by token: freeze-align's TP (arXiv 2409.19425).

    A, W1 and W2 have biases and the hidden width is E: at 1024 -> 1024 they and the LayerNorm make the published 3,150,848 parameters.
    """

    def __init__(self, in_width: int, out_width: int, dropout: float = 0.1):
        super().__init__()
        self.norm = nn.LayerNorm(in_width, eps=1e-5)
        self.drop = nn.Dropout(dropout)
        self.linear = nn.Linear(in_width, out_width)  # A
        self.up = nn.Linear(in_width, out_width)  # W1
        self.out = nn.Linear(out_width, out_width)  # W2

    def forward(self, features: Tensor) -> Tensor:
        """Return (..., E) for tokens (..., D)."""
        normed = self.drop(self.norm(features))
        return self.linear(normed) + self.out(functional.gelu(self.up(normed)))

    def pooled(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted mean (B, E) over tokens (B, T, D) of `forward`; `weights` (B, T) sum to 1 in every row."""
        normed = self.drop(self.norm(tokens))
        hidden = functional.gelu(self.up(normed))
        return self.linear(_mean(normed, weights)) + self.out(_mean(hidden, weights))


def _mean(tokens: Tensor, weights: Tensor) -> Tensor:
    return torch.bmm(weights[:, None].to(tokens.dtype), tokens)[:, 0]  # (B, 1, T) x (B, T, D)


class ImageTokenHead(nn.Module):
    """Returns `mean_i TP_local(p_i) + TP_cls(cls)` (freeze-align, arXiv 2409.19425); without a CLS token there is no TP_cls."""

    def __init__(self, token_width: int, out_width: int, has_cls: bool, dropout: float | None = None):
        super().__init__()
        self.token_width, self.width = token_width, out_width
        self.local = _token_head(token_width, out_width, dropout)
        self.cls = _token_head(token_width, out_width, dropout) if has_cls else None

    def _split(self, rows: Tensor) -> tuple[Tensor | None, Tensor]:
        tokens = rows.unflatten(-1, (-1, self.token_width))
        return (None, tokens) if self.cls is None else (tokens[:, 0], tokens[:, 1:])

    def forward(self, rows: Tensor) -> Tensor:
        """Return (B, E) for rows (B, T D): CLS, if there is one, then the patches."""
        cls, patches = self._split(rows)
        local = self.local.pooled(patches, patches.new_full(patches.shape[:2], 1 / patches.shape[1]))
        return local if self.cls is None else local + self.cls(cls)

    def dense(self, rows: Tensor) -> Tensor:
        """Return `TP_local(p_i) + TP_cls(cls)` (B, P, E) for rows (B, T D): its mean over patches is `forward`."""
        cls, patches = self._split(rows)
        local = self.local(patches)
        return local if self.cls is None else local + self.cls(cls)[:, None]


class TextTokenHead(nn.Module):
    """Returns `LayerNorm(p + Dropout(W2 GELU(p)))` of `p = W1 masked_mean_j TP_text(t_j)` (freeze-align, arXiv 2409.19425)."""

    def __init__(self, token_width: int, out_width: int, dropout: float | None = None):
        super().__init__()
        self.token_width, self.width = token_width, out_width
        self.tokens = _token_head(token_width, out_width, dropout)
        with torch.random.fork_rng(devices=[]):
            self.up = nn.Linear(out_width, out_width)  # W1
            self.out = nn.Linear(out_width, out_width)  # W2
        self.drop = nn.Dropout(self.tokens.drop.p)
        self.norm = nn.LayerNorm(out_width, eps=1e-5)

    def forward(self, rows: Tensor) -> Tensor:
        """Return (B, E) for rows (B, T D); a token of zeros only is padding."""
        tokens = rows.unflatten(-1, (-1, self.token_width))
        mask = tokens.ne(0).any(-1)  # (B, T)
        mask, tokens = mask[:, mask.any(0)], tokens[:, mask.any(0)]  # no work on what is padding in every caption
        weights = mask.to(tokens.dtype) / mask.sum(1, keepdim=True).clamp(min=1)
        projected = self.up(self.tokens.pooled(tokens, weights))
        return self.norm(projected + self.drop(self.out(functional.gelu(projected))))


HEADS: dict[str, type[nn.Module]] = {
    "linear": LinearHead,
    "mlp": MlpHead,
    "glu": GluHead,
    "sharelock": SharelockHead,
    "identity": IdentityHead,
    "token": TokenHead,
}


def build_head(
    kind: HeadKind,
    in_width: int,
    out_width: int,
    *,
    expansion: int | None = None,
    hidden: int | None = None,
    dropout: float | None = None,
) -> nn.Module:
    """Return the head `kind` mapping (..., in_width) to (..., out_width), float32; `initialize` then sets its weights.

    `expansion` is w of `mlp` (default 4) and `glu` (default 8; the workshop paper's is 4). `sharelock` has `hidden` (default 4096) and
    `dropout` (default 0.2), `token` has `dropout` (default 0.1). The global random state is left as it was.
    UsageError for an unknown kind, a width below 1 or an option that the kind does not have.
    """
    if kind not in HEADS:
        raise UsageError(f"unknown head {kind!r}: choose one of {', '.join(HEADS)}")
    options = {"expansion": expansion, "hidden": hidden, "dropout": dropout}
    given = {name: value for name, value in options.items() if value is not None}
    allowed = [name for name in options if name in inspect.signature(HEADS[kind]).parameters]
    for name in given:
        if name not in allowed:
            raise UsageError(f"head {kind!r} has no option {name!r} (it has: {', '.join(allowed) or 'none'}): leave it out")
    for name, value in {"in_width": in_width, "out_width": out_width, **given}.items():
        if name == "dropout" and not 0 <= value < 1:
            raise UsageError(f"head {kind!r}: dropout is {value}, expected at least 0 and below 1")
        if name != "dropout" and value < 1:
            raise UsageError(f"head {kind!r}: {name} is {value}, expected a whole number of at least 1")
    with torch.random.fork_rng(devices=[]):  # torch layers fill themselves from the global generator
        return HEADS[kind](in_width, out_width, **given)


def _token_head(in_width: int, out_width: int, dropout: float | None) -> TokenHead:
    head = build_head("token", in_width, out_width, dropout=dropout)
    assert isinstance(head, TokenHead)
    return head


@torch.no_grad()
def initialize(head: nn.Module, generator: torch.Generator) -> None:
    """Set Xavier-uniform weights and zero biases in every linear layer of `head`, in place, drawing from `generator` only.

    Norm layers keep the scale 1 and shift 0 that they are built with. `generator` lives on the head's device, normally the CPU.
    """
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
