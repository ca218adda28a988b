"""What an alignment is worth to an MLLM, in captioned images: where two curves cross, both in closed form and without any LLM.

A projector has to say which words are in an image (`align.model.word_map`). With an alignment it is solved from texts alone, which
reach images through the aligned space. Without one it is fitted to n captioned images. Both name the words of held-out images; the
score is the mean reciprocal rank of an image's own caption among those of all held-out images. The answer is the n at which the second
reaches the first. Before stage one, the aligned space is the closed-form start of `align.training.start`.
Shapes: `N` images, `F` image feature width, `T` captions, `D` caption feature width, `E` aligned width, `V` words, `n` held-out images,
`C` numbers of captioned images, `R` resamples.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

from align.assessment.candidates import Candidate
from align.assessment.probing import CaptionedFeatures
from align.assessment.scores import Score
from align.common.files import read_object
from align.common.intervals import percentiles
from align.common.seeds import generator
from align.features.store import FeatureStore
from align.model.dual_encoder import SailModel
from align.model.word_map import Fitting, Moments, reciprocal_ranks
from align.model.words import Words
from align.runtime.console import Progress
from align.runtime.recipes_yaml import load_yaml
from align.training.pairs import open_pairs
from align.training.start import canonical_maps

COUNTS = (50, 100, 200, 500, 1_000, 2_000, 5_000)  # captioned images; and all there are, at most MOST
MOST = 10_000  # captioned images: memory is 24 bytes x MOST x F
DRAWS = 2  # of the captioned images, for every number but all
WORDS = 2_048
LEAST_TEST = 50  # held-out images for an answer
ROWS = 4_096  # captions read into the products at a time

Maps = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
Rows = tuple[np.ndarray, np.ndarray]  # image numbers to fit to, and held out


@dataclass(frozen=True)
class Worth:
    """What the alignment of a candidate is worth, in closed form or by the stage-one run `run`.

    The score is that of `compared`; None if too few held-out images are surely not of the run's training data.
    """

    candidate: Candidate
    run: str
    score: Score | None

    def sentence(self) -> str:
        """Return it in words."""
        by = f"by {self.run}" if self.run else "in closed form"
        opening = f"Worth to an MLLM: {self.candidate.name}, aligned {by}, is worth "
        if self.score is None:
            return f"{opening}what cannot be told here: the held-out images are of the run's training data, or its stores are gone."
        found = self.score.details
        counts = sorted(map(int, found["curve"]))

        def said(number: float | None) -> str:
            if number is None:
                return f"more than {counts[-1]:,}"
            return f"less than {counts[0]:,}" if number == 0 else f"{float(f'{number:.2g}'):,.0f}"

        low, high = said(found["low"]), said(found["high"])
        interval = "" if low == high else f" (95% interval {low} to {high})"
        return (
            f"{opening}{said(found['worth'])} captioned images{interval}. With texts alone, held-out images find their own caption at "
            f"{self.score.value:.3f} (mean reciprocal rank among {self.score.n}); without an alignment, {counts[-1]:,} captioned images "
            f"reach {found['curve'][str(counts[-1])]:.3f}."
        )


@dataclass(frozen=True)
class Named:
    """Images with their captions and the words of these: presence (T, V) bool, shares of the captions to fit to (V)."""

    pairs: CaptionedFeatures
    presence: Tensor
    shares: Tensor
    drawn: np.ndarray  # (N,) one caption of each image

    @staticmethod
    def of(pairs: CaptionedFeatures, texts: Sequence[str], tokenizer: Path, training: np.ndarray, seed: int) -> "Named":
        """Return the words of all captions `texts` (T), chosen from those of the images `training`, as a text encoder's tokenizer cuts."""
        loaded: Any = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True, trust_remote_code=False)
        words = Words(loaded, len(loaded))
        ids = [one for start in range(0, len(texts), ROWS) for one in words.ids(texts[start : start + ROWS])]
        words.count([ids[place] for place in np.flatnonzero(np.isin(pairs.owners, training))])
        words.choose(WORDS)
        first = np.searchsorted(pairs.owners, np.arange(len(pairs.images)))
        count = np.searchsorted(pairs.owners, np.arange(len(pairs.images)), side="right") - first
        drawn = first + (generator(seed, 12).random(len(first)) * count).astype(np.int64)
        return Named(pairs, words.presence(ids), words.shares, drawn)

    def judged(self, test: np.ndarray) -> Tensor:
        """Return one caption of each held-out image, its words standardized and of length 1 (n, V)."""
        scale = (self.shares * (1 - self.shares)).sqrt()
        return functional.normalize(((self.presence[self.drawn[test]].double() - self.shares) / scale).float(), dim=1)


def closed_form_maps(pairs: CaptionedFeatures, training: np.ndarray) -> Maps:
    """Return maps of image features (., F) and caption features (., D) into one space (., E): CCA of the pairs of `training`."""
    some = pairs.only(training)
    images, captions = (normed(torch.from_numpy(rows)) for rows in (some.images, some.captions))
    maps = canonical_maps(images, captions, torch.from_numpy(some.owners))
    image, caption = (matrix.to(torch.float32).T for matrix in maps)
    return (lambda rows: (normed(rows) - images.mean(0)) @ image), (lambda rows: (normed(rows) - captions.mean(0)) @ caption)


def trained_maps(run: Path) -> Maps:
    """Return the heads of a stage-one run as maps."""
    model = SailModel.from_pretrained(run / "best").eval()
    return (lambda rows: model.vision_head(rows.float())), (lambda rows: model.text_head(rows.float()))


def fingerprints_of(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fingerprints of the image and the caption features that a stage-one run was trained on."""
    stored = read_object(run / "best" / "config.json")
    return stored["vision_fingerprint"], stored["text_fingerprint"]


def keys_seen_by(run: Path) -> set[str] | None:
    """Return the keys of the images that a stage-one run was trained on, without its own held-out ones; None if its stores are gone."""
    config = load_yaml(run / "config.yaml")["train"]
    captions = [store for slot in config["captions"] for store in slot.split("+")]
    if not config["images"] or not all((Path(store) / "store.json").exists() for store in (*config["images"], *captions)):
        return None
    if not config["val_rows"] or config["keys"] or len(config["images"]) > 1:  # who was held out is not worth finding out
        return {key for store in config["images"] for key in FeatureStore(store).keys.to_pylist()}
    pairs = open_pairs(config["images"], config["captions"])
    pairs.split(config["val_rows"], config["seed"])
    return set(pairs.keys(np.arange(len(pairs))))


def normed(rows: Tensor) -> Tensor:
    """Return rows (..., W) after a LayerNorm, float32: what heads and projectors do first."""
    return functional.layer_norm(rows.float(), rows.shape[-1:])


@torch.no_grad()
def texts_alone(named: Named, maps: Maps, rows: Rows) -> np.ndarray:
    """Return the reciprocal ranks (n,) of held-out images that are named through the aligned space, with no caption of any image."""
    (training, test), (image, caption), pairs = rows, maps, named.pairs
    chosen = torch.from_numpy(np.flatnonzero(np.isin(pairs.owners, training)))
    moments: Moments | None = None
    for some in chosen.split(ROWS):
        aligned = normed(caption(torch.from_numpy(pairs.captions[some])))
        moments = moments or Moments(aligned.shape[1], len(named.shares))
        moments.add(aligned, named.presence[some])
    seen = normed(image(torch.from_numpy(pairs.images[training[:MOST]])))
    nothing = Fitting([seen.shape[1]], seen[:0], named.presence[:0], named.shares, unlabelled=seen, texts=moments)
    found = nothing.solve()([normed(image(torch.from_numpy(pairs.images[test])))])
    return reciprocal_ranks(found, named.judged(test), torch.arange(len(test))).numpy()


@torch.no_grad()
def captioned(named: Named, training: np.ndarray, test: np.ndarray, seed: int, progress: Callable[[int, int], None]) -> np.ndarray:
    """Return the reciprocal ranks (n,) of held-out images named by their raw features, fitted to one caption of each `training` image."""
    images = normed(torch.from_numpy(named.pairs.images[training]))
    said = named.presence[named.drawn[training]]
    solved = Fitting([images.shape[1]], images, said, named.shares, seed=seed, progress=progress).solve()
    found = solved([normed(torch.from_numpy(named.pairs.images[test]))])
    return reciprocal_ranks(found, named.judged(test), torch.arange(len(test))).numpy()


def captioned_curve(named: Named, rows: Rows, seed: int, progress: Progress) -> dict[int, list[np.ndarray]]:
    """Return, by the number of captioned images, the reciprocal ranks (n,) of each draw. `progress` counts the fits."""
    training, test = rows
    fits = plan_of(len(training))
    curve: dict[int, list[np.ndarray]] = {}
    for number, (count, draw) in enumerate(fits):
        chosen = generator(seed, 11, draw).permutation(training)[:count]

        def told(step: int, steps: int, number: int = number, count: int = count) -> None:
            progress(number, note=f"{count} captioned images, setting {step} of {steps}")

        told(0, 1)
        curve.setdefault(count, []).append(captioned(named, chosen, test, seed, told))
    progress(len(fits))
    return curve


def plan_of(images: int) -> list[tuple[int, int]]:
    """Return the fits of a curve over so many images, as (captioned images, number of the draw)."""
    most = min(images, MOST)
    return [(count, draw) for count in COUNTS if count < most for draw in range(DRAWS)] + [(most, 0)]


def crossing(aligned: np.ndarray, curve: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Return (R,) the number of captioned images at which curves (R, C) first reach the scores (R,), interpolated in its logarithm.

    0: the first number reaches it already. Infinity: none does.
    """
    reached = curve >= aligned[:, None]
    at = reached.argmax(1)
    before, now = np.maximum(at - 1, 0), np.arange(len(at))
    gain = np.maximum(curve[now, at] - curve[now, before], 1e-12)
    share = np.clip((aligned - curve[now, before]) / gain, 0, 1)
    numbers = np.log(np.asarray(counts, dtype=float))
    found = np.exp(numbers[before] + share * (numbers[at] - numbers[before]))
    return np.where(~reached.any(1), np.inf, np.where(at == 0, 0.0, found))


def measured(named: Named, maps: Maps, rows: Rows, weights: np.ndarray, seed: int, progress: Progress) -> Score:
    """Return the score of texts alone, with the worth in its details (see `compared`); `progress` is told of each fit of `plan_of`."""
    began = time.perf_counter()
    progress(0, note="texts alone")
    aligned = texts_alone(named, maps, rows)
    curve = captioned_curve(named, rows, seed, progress)
    score = compared(aligned, curve, weights)
    return replace(score, seconds=time.perf_counter() - began, details={**score.details, "pairs": len(rows[0])})


def compared(aligned: np.ndarray, curve: dict[int, list[np.ndarray]], weights: np.ndarray) -> Score:
    """Return the score of texts alone; its details have `worth`, `low` and `high` in captioned images (None: more than all), and `curve`.

    `aligned` (n,) and every draw (n,) are reciprocal ranks; `weights` (R, n) resample the held-out images. Each resample takes one draw.
    """
    counts = sorted(curve)
    means = np.array([np.mean([draw.mean() for draw in curve[count]]) for count in counts])
    resampled = weights.astype(np.float64)
    turns = np.arange(len(resampled))
    drawn = np.stack([np.stack([resampled @ draw for draw in curve[count]], 1)[turns, turns % len(curve[count])] for count in counts], 1)
    [value] = crossing(aligned.mean()[None], means[None], counts)
    ends = np.sort(crossing(resampled @ aligned, drawn, counts))
    low, high = (ends[round(share * (len(ends) - 1))] for share in (0.025, 0.975))  # no interpolation between numbers and infinity
    named = {name: None if math.isinf(end) else float(end) for name, end in (("worth", value), ("low", low), ("high", high))}
    shown = {str(count): float(mean) for count, mean in zip(counts, means, strict=True)}
    return Score(float(aligned.mean()), *percentiles(resampled @ aligned), len(aligned), 0.0, {**named, "curve": shown})
