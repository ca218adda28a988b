"""A projector that starts near the words: solved in closed form from texts alone, from captioned images, or from both.

The mean of an image's projected tokens is regressed onto the mean LLM input embedding of its caption's words (`mllm.assembly.solve`);
with a trained head, the aligned embeddings of texts that no image belongs to join the same equations. The mean passes through a linear
layer, so a map for the mean is one for the tokens. The map is written into the projector's two layers in the straight part of GELU;
training bends it where that helps. One pass over the images through encoder and head. A choice of this kit, not of the papers
(docs/decisions.md; literature: CapDec 2211.00575, LiMBeR 2209.15162). Shapes: `N` visual tokens, `D` width given to the projector
(`E` of the head, `F` raw), `H` LLM width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from align.common.errors import DataError, UsageError
from align.common.reject_codes import Reject
from align.sources.gate import Limits, gate_image
from align.sources.plan import Source, open_shard, plan
from mllm.assembly.solve import Fitting, LinearMap, Moments
from mllm.assembly.texts import Texts, TextSide, Words, require_texts
from mllm.conversations.messages import texts_of
from mllm.conversations.table import Conversations
from mllm.model.modeling import SailLlavaForConditionalGeneration
from mllm.model.processing import SailLlavaProcessor

BATCH = 32  # images a forward pass
MIN_IMAGES = 50  # captioned ones without texts, unlabelled ones without captions
MIN_TEXTS = 200
MOST_UNLABELLED = 2_000
TOKEN_SAMPLE = 4_096  # visual tokens that show how far they spread
BEND, SPREAD = 3.0, 0.5  # hidden units are BEND + SPREAD times a unit of variance 1: GELU is nearly straight there
Progress = Callable[[str], Callable[[int, int], None]]


def silent(what: str) -> Callable[[int, int], None]:
    """Return a progress function that shows nothing."""
    return lambda done, total: None


@dataclass(frozen=True)
class Fit:
    """How well it went: images and texts used, images left out, what was chosen, and how many of `judged` held-out images are found."""

    captioned: int
    unlabelled: int
    rejected: int
    texts: int
    text_weight: float
    ridges: tuple[float, ...]
    judged: int
    found: float

    def weights(self) -> str:
        """Return where the projector's weights are from, in a few words."""
        sources = [f"{self.texts:,} texts" if self.texts else "", f"{self.captioned:,} captioned images" if self.captioned else ""]
        return "solved from " + " and ".join(filter(None, sources))

    def summary(self) -> str:
        """Return the fit as sentences."""
        beside = f", with {self.unlabelled:,} images without captions" if self.unlabelled else ""
        said = f"projector {self.weights()}{beside} ({self.rejected} images unusable)"
        if not self.judged:
            return f"{said}; too few captions to judge it, ridge {' and '.join(map(str, self.ridges))} by default"
        chosen = f"ridge {' and '.join(map(str, self.ridges))}"
        if self.texts:
            chosen += f", all texts together count as {self.text_weight:g} captioned images"
        return f"{said}; chosen on held-out captions: {chosen}; {self.found:.0%} of {self.judged} held-out images are nearest to their own"


@dataclass
class _Images:
    """Features of images: the mean over the tokens of each (n, D), and a sample of single tokens (t, D)."""

    means: Tensor
    tokens: Tensor
    places: list[int]  # of those that could be read


def fit_projector(
    model: SailLlavaForConditionalGeneration,
    processor: SailLlavaProcessor,
    *,
    number: int = 0,
    conversations: Conversations | None = None,
    rows: int = 0,
    texts: Texts | None = None,
    sail: str | None = None,
    images: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Fit:
    """Set the weights of projector `number`; return the fit. `progress(what)` gives a function of (done, total).

    `conversations`: the first `rows` rows with one image, their answers are the captions. `texts` are aligned by the text side of the
    stage-one run `sail`. `images` are image data without captions (a folder, files, a pattern) that show where images lie. DataError if
    fewer than MIN_IMAGES images or MIN_TEXTS texts can be used, UsageError if the projector has no biases.
    """
    projector: Any = model.model.projectors[number]
    if projector.linear_1.bias is None or projector.linear_2.bias is None:
        raise UsageError("a solved projector needs biases (multimodal_projector_bias in the config)")
    table: Any = model.get_input_embeddings()
    words = Words(processor.tokenizer, table.weight)
    used, ids = captions(conversations, words, rows) if conversations is not None else ([], [])
    words.count(ids)
    count = 0
    if texts is not None:
        count = _counted(texts, words, progress("texts read"))
        require_texts(count, texts.files, MIN_TEXTS)
    rarity = words.rarity()
    captioned = _features(model, number, _captioned(conversations, used, processor), len(used), progress("images"))
    unlabelled = _features(model, number, _unlabelled(images, processor), MOST_UNLABELLED, progress("unlabelled images"))
    _require_images(captioned, unlabelled, len(used), texts)
    with torch.no_grad():
        moments = None
        if texts is not None:
            side = TextSide(str(sail), model.device)
            moments = _text_moments(projector, texts, count, side, words, rarity, progress("texts"))
        fitting = Fitting(
            widths=projector.widths,
            images=captioned.means,
            targets=words.targets([ids[place] for place in captioned.places], rarity).cpu(),
            unlabelled=unlabelled.means,
            texts=moments,
            seed=seed,
            progress=progress("settings tried"),
        )
        solved = fitting.solve()
        write_map(projector, solved, torch.cat([captioned.tokens, unlabelled.tokens])[:TOKEN_SAMPLE])
    choice, judged = solved.choice, len(captioned.places) if solved.choice.rank else 0
    rejected = len(used) - len(captioned.places)
    return Fit(
        len(captioned.places), len(unlabelled.places), rejected, moments.count if moments else 0, choice.text_weight, choice.ridges,
        judged, choice.found,
    )  # fmt: skip


def captions(conversations: Conversations, words: Words, rows: int) -> tuple[list[int], list[Tensor]]:
    """Return the numbers of the first `rows` rows with exactly one image, and the token ids of what is answered there."""
    used, found = [], []
    for number in range(len(conversations)):
        row = conversations[number]
        said = " ".join(texts_of([message for message in row.messages if message["role"] == "assistant"]))
        [ids] = words.ids([said])
        if len(row.images) == 1 and len(ids):
            used.append(number)
            found.append(ids)
        if len(used) == rows:
            break
    return used, found


def write_map(projector: Any, solved: LinearMap, tokens: Tensor) -> None:
    """Write a linear map into the projector: hidden units are the principal directions of what it gives for `tokens` (t, D)."""
    blocks = [block.double() for block in tokens.split(projector.widths, 1)]
    predicted = solved(blocks)  # (t, H)
    mean = predicted.mean(0)
    values, directions = torch.linalg.eigh(torch.cov((predicted - mean).T))
    scale = values.clamp(min=0).sqrt()
    scale = scale.clamp(min=float(scale.max()) * 1e-3 + 1e-9)
    inward = SPREAD * directions / scale  # (H, K): from words to hidden units
    height = functional.gelu(torch.tensor(BEND, dtype=torch.float64))
    slope = 0.5 * (1 + torch.erf(torch.tensor(BEND / 2**0.5))) + BEND * torch.exp(torch.tensor(-(BEND**2) / 2)) / (2 * torch.pi) ** 0.5
    outward = (directions * scale / (SPREAD * slope)).T  # (K, H)
    still = solved([torch.zeros_like(block[:1]) for block in blocks])[0]
    projector.linear_1.weight.copy_((solved.weights[0] @ inward).T)
    projector.linear_1.bias.copy_(BEND + (still - mean) @ inward)
    if len(blocks) > 1:
        projector.linear_raw.weight.copy_((torch.cat(solved.weights[1:]) @ inward).T)
    projector.linear_2.weight.copy_(outward.T)
    projector.linear_2.bias.copy_(mean - height * outward.sum(0))


def _counted(texts: Texts, words: Words, progress: Callable[[int, int], None]) -> int:
    """Count the words of all texts; return how many texts there are."""
    done = 0
    for batch in texts.batches():
        words.count([ids for ids in words.ids(batch) if len(ids)])
        done += len(batch)
        progress(done, max(done + 1, texts.most))
    return done


def _text_moments(
    projector: Any, texts: Texts, count: int, side: TextSide, words: Words, rarity: Tensor, progress: Callable[[int, int], None]
) -> Moments:
    """Return the sums over all `count` texts of their aligned embeddings, as the projector is given them, and of their words."""
    moments = Moments(projector.widths[0], words.table.shape[1], words.table.device)
    for batch in texts.batches():
        ids = words.ids(batch)
        kept = [number for number, one in enumerate(ids) if len(one)]
        aligned = projector.normed(side.embed([batch[number] for number in kept]))
        moments.add(aligned, words.targets([ids[number] for number in kept], rarity))
        progress(moments.count, max(count, moments.count))
    return moments.cpu()


def _captioned(conversations: Conversations | None, used: list[int], processor: SailLlavaProcessor) -> Iterator[Tensor | None]:
    """Yield the pixels (3, H, W) of each row's image, None where it cannot be read."""
    for number in used:
        assert conversations is not None
        try:
            yield processor.image_processor.to_pixels(gate_image(conversations.read_image(conversations[number].images[0]), Limits()))
        except Reject:
            yield None


def _unlabelled(data: str | None, processor: SailLlavaProcessor) -> Iterator[Tensor | None]:
    """Yield the pixels of the first MOST_UNLABELLED images of `data`, None where one cannot be read."""
    if data is None:
        return
    source = Source(data, key_prefix="file")  # keys pair nothing here
    found = plan(source, rows_per_shard=1_000)
    rows = (row for shard in range(len(found.shards)) for row in open_shard(source, found, shard).rows())
    for row in islice(rows, MOST_UNLABELLED):
        try:
            yield processor.image_processor.to_pixels(gate_image(row.reject or row.image, Limits()))
        except Reject:
            yield None


@torch.no_grad()
def _features(model: Any, number: int, pixels: Iterator[Tensor | None], total: int, progress: Callable[[int, int], None]) -> _Images:
    """Return the features of images as the first layers of projector `number` are given them, BATCH images a forward pass."""
    projector, device = model.model.projectors[number], model.device
    means, tokens, places, kept, start = [], [], [], 0, 0
    while batch := list(islice(pixels, BATCH)):
        read = [place for place, image in enumerate(batch) if image is not None]
        if read:
            images = torch.stack([batch[place] for place in read])  # type: ignore[misc]
            features = model.model.get_patch_features(images.to(device), number)
            given = torch.cat(projector.blocks(features), dim=-1).float().cpu()  # (B, N, D)
            means.append(given.mean(1))
            places += [start + place for place in read]
            if kept < TOKEN_SAMPLE:
                tokens.append(given.flatten(0, 1)[: TOKEN_SAMPLE - kept])
                kept += len(tokens[-1])
        start += len(batch)
        progress(start, max(total, start))
    width = sum(projector.widths)
    return _Images(torch.cat(means) if means else torch.zeros(0, width), torch.cat(tokens) if tokens else torch.zeros(0, width), places)


def _require_images(captioned: _Images, unlabelled: _Images, used: int, texts: Texts | None) -> None:
    """Raise DataError if there are too few images to fit to, or to tell where images lie."""
    if used and len(captioned.places) < min(used, MIN_IMAGES) // 2:
        raise DataError(
            f"only {len(captioned.places)} of {used} images can be read; check the data with mllm/check.py, and --image-root"
        )  # fmt: skip
    if texts is None and len(captioned.places) < MIN_IMAGES:
        raise DataError(
            f"{len(captioned.places)} captioned images can be used, at least {MIN_IMAGES} are needed to solve the projector without --texts"
        )
    if len(captioned.places) + len(unlabelled.places) < MIN_IMAGES:
        raise DataError(
            f"{len(captioned.places)} captioned images and {len(unlabelled.places)} others can be used; at least {MIN_IMAGES} are "
            "needed to tell where images lie: give --images DATA, images without captions"
        )
