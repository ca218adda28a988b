"""A projector that speaks in words: solved in closed form from texts alone, from captioned images, or from both.

Which words a caption has is regressed on the mean of its image's visual tokens (`align.model.word_map`); with a trained head, the
aligned embeddings of texts that no image belongs to join the same equations. The projector then mixes, for every visual token, the
LLM's input embeddings of those words by a softmax over their scores. One pass over the images through encoder and head. A choice of
this kit, not of the papers (docs/decisions.md; literature: AlignVLM 2502.01341, CapDec 2211.00575, LiMBeR 2209.15162). Shapes: `N`
visual tokens, `D` width given to the projector (`E` of the head, `F` raw), `V` words.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any

import torch
from torch import Tensor

from align.common.errors import DataError, UsageError
from align.common.reject_codes import Reject
from align.model.word_map import Choice, Fitting, Moments, WordMap
from align.model.words import Words
from align.sources.gate import Limits, gate_image
from align.sources.plan import Source, open_shard, plan
from mllm.assembly.described import Crossing
from mllm.assembly.places import write_places
from mllm.assembly.texts import Texts, TextSide, require_texts
from mllm.conversations.messages import texts_of
from mllm.conversations.table import Conversations
from mllm.model.modeling import SailLlavaForConditionalGeneration
from mllm.model.processing import SailLlavaProcessor
from mllm.model.towers import SailProjector, token_grid

BATCH = 32  # images a forward pass
MIN_IMAGES = 50  # captioned ones without texts, unlabelled ones without captions
MIN_TEXTS = 200
MOST_UNLABELLED = 1_000
TOKEN_SAMPLE = 4_096  # visual tokens that show how far they spread
SHARPNESS = 2.5  # standard deviation of the logits of all words over visual tokens: how sure the softmax is
Progress = Callable[[str], Callable[[int, int], None]]


def silent(what: str) -> Callable[[int, int], None]:
    """Return a progress function that shows nothing."""
    return lambda done, total: None


@dataclass(frozen=True)
class Fit:
    """How well it went: images and texts used, images left out, words chosen, what was chosen, and how many images it was judged by."""

    captioned: int
    unlabelled: int
    rejected: int
    texts: int
    words: int
    choice: Choice
    crossing: Crossing | None  # the way from texts to images, where there are texts

    def weights(self) -> str:
        """Return where the projector's weights are from, in a few words."""
        sources = [f"{self.texts:,} texts" if self.texts else "", f"{self.captioned:,} captioned images" if self.captioned else ""]
        return f"{self.words:,} words, solved from " + " and ".join(filter(None, sources))

    def summary(self) -> str:
        """Return the fit as sentences."""
        beside = f", with {self.unlabelled:,} images without captions" if self.unlabelled else ""
        ridges = f"ridge {' and '.join(map(str, self.choice.ridges))}"
        said = f"projector of {self.weights()}{beside} ({self.rejected} images unusable)"
        if self.choice.ranks is None:
            return f"{said}; too few captions to judge it, {ridges} by default"
        if self.texts:
            ridges += f", all texts together count as {self.choice.text_weight:g} captioned images"
        judged = f"{self.choice.found:.0%} of {len(self.choice.ranks)} held-out images are nearest to their own"
        return f"{said}; chosen on held-out captions: {ridges}; {judged}"


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
    most_words: int = 4_096,
    sail: str | None = None,
    images: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Fit:
    """Replace projector `number` by one of words; return the fit. `progress(what)` gives a function of (done, total).

    `conversations`: the first `rows` rows with one image, their answers are the captions. `texts` are aligned by the text side of the
    stage-one run `sail`. `images` are image data without captions (a folder, files, a pattern) that show where images lie. DataError if
    fewer than MIN_IMAGES images or MIN_TEXTS texts can be used, UsageError if the projector has no biases.
    """
    embeddings: Any = model.get_input_embeddings()
    table = embeddings.weight.detach()
    words = Words(processor.tokenizer, len(table))
    used, ids = captions(conversations, words, rows, progress("captions read")) if conversations is not None else ([], [])
    words.count(ids)
    count, side = 0, None
    if texts is not None:
        side = TextSide(str(sail), model.device)
        texts.require_encoder(side.fingerprint)
        count = _counted(texts, words, progress("texts read"))
        require_texts(count, texts.files, MIN_TEXTS)
    words.choose(most_words)
    fields: Any = model.config.by_projector(model.config.towers)[number][0]
    projector = _projector_of_words(model, number, fields, table[words.chosen.to(table.device)])
    captioned = _features(model, number, _captioned(conversations, used, processor), len(used), progress("images"))
    unlabelled = _features(model, number, _unlabelled(images, processor), MOST_UNLABELLED, progress("unlabelled images"))
    _require_images(captioned, unlabelled, len(used), texts)
    with torch.no_grad():
        moments = None
        if texts is not None and side is not None:
            moments = _text_moments(projector, texts, count, side, words, progress("texts embedded"))
        fitting = Fitting(
            widths=projector.widths,
            images=captioned.means,
            said=words.presence([ids[place] for place in captioned.places]),
            shares=words.shares,
            unlabelled=unlabelled.means,
            texts=moments,
            seed=seed,
            progress=progress("settings tried"),
        )
        solved = fitting.solve()
        tokens = torch.cat([captioned.tokens, unlabelled.tokens])[:TOKEN_SAMPLE]
        write_scores(projector, solved, tokens)
        write_places(projector, token_grid(fields), words, table, tokens)
    return Fit(
        captioned=len(captioned.places), unlabelled=len(unlabelled.places), rejected=len(used) - len(captioned.places),
        texts=moments.count if moments else 0, words=len(words.chosen), choice=solved.choice,
        crossing=Crossing.between(moments, torch.cat([captioned.means, unlabelled.means]), tokens, token_grid(fields)) if moments else None,
    )  # fmt: skip


def _projector_of_words(model: Any, number: int, fields: Any, embeddings: Tensor) -> SailProjector:
    """Put a projector whose second layer holds `embeddings` (V, H) in the place of projector `number`; return it."""
    old = model.model.projectors[number]
    if old.linear_1.bias is None:
        raise UsageError("a solved projector needs biases (multimodal_projector_bias in the config)")
    fields.sail_words, fields.sail_positions = len(embeddings), True
    new = SailProjector(old.widths, embeddings.shape[1], "gelu", bias=True, words=len(embeddings), positions=prod(token_grid(fields)))
    new = new.to(old.linear_1.weight)
    with torch.no_grad():
        new.linear_2.weight.copy_(embeddings.T)
        new.linear_2.bias.zero_()
    model.model.places[number].multi_modal_projector = new
    return new


def captions(
    conversations: Conversations, words: Words, rows: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[int], list[Tensor]]:
    """Return the numbers of the first `rows` rows with exactly one image, not a described one, and the token ids of their answers."""
    used, found = [], []
    for number in range(len(conversations)):
        row = conversations[number]
        said = " ".join(texts_of([message for message in row.messages if message["role"] == "assistant"]))
        [ids] = words.ids([said])
        if len(row.images) == 1 and row.images[0].described is None and len(ids):
            used.append(number)
            found.append(ids)
        progress(len(used), min(rows, len(conversations)))
        if len(used) == rows:
            break
    return used, found


def write_scores(projector: SailProjector, solved: WordMap, tokens: Tensor) -> None:
    """Write the map into the first layers, scaled so that the logits of `tokens` (t, D) have the standard deviation SHARPNESS."""
    scale = SHARPNESS / float(solved(list(tokens.double().split(projector.widths, 1))).std())
    first, *further = (scale * weight.T for weight in solved.weights)
    projector.linear_1.weight.copy_(first)
    if further:
        projector.linear_raw.weight.copy_(torch.cat(further, dim=1))
    still = solved([torch.zeros_like(mean) for mean in solved.means])  # the scores of an image of zeros
    projector.linear_1.bias.copy_(scale * still)


def _counted(texts: Texts, words: Words, progress: Callable[[int, int], None]) -> int:
    """Count the words of all texts; return how many texts there are. The total shown is that of the share of bytes read so far."""
    done = 0
    for batch in texts.batches():
        words.count([ids for ids in words.ids(batch.texts) if len(ids)])
        done += len(batch.texts)
        progress(done, max(done, round(done / max(batch.share, 1e-9))))
    return done


def _text_moments(projector: Any, texts: Texts, count: int, side: TextSide, words: Words, progress: Callable[[int, int], None]) -> Moments:
    """Return the sums over all `count` texts of their aligned embeddings, as the projector is given them, and of their words."""
    moments = Moments(projector.widths[0], len(words.chosen), projector.linear_1.weight.device)
    for batch in texts.batches():
        ids = words.ids(batch.texts)
        kept = [number for number, one in enumerate(ids) if len(one)]
        aligned = projector.normed(side.embed(batch, kept))
        moments.add(aligned, words.presence([ids[number] for number in kept]))
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
