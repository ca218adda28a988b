"""Zero-shot classification: class weights from sentences, scores, and the answer for every image.

Shapes: `N` images, `C` classes, `S` sentences, `E` aligned width. Embeddings are L2-normalized float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from align.common.errors import UsageError
from align.common.intervals import wilson_interval
from eval.results.examples import drawn_numbers, ranked
from eval.results.metrics import accuracy_at, label_ranks, majority_rates, mean_per_class, mean_per_class_interval
from eval.results.records import Entry

TOP = 5  # classes kept for each image


@dataclass(frozen=True)
class ClassificationAnswers:
    """A model's answers for N images. Ranks count from 1."""

    ranks: np.ndarray  # (N,) of the right class
    top: np.ndarray  # (N, min(5, C)) class numbers, best first
    top_scores: np.ndarray  # their cosines
    confidence: np.ndarray  # (N,) float32 probability of the best class; NaN without a scale


def class_weights(sentence_embeddings: Tensor, sentences_per_class: Sequence[int]) -> Tensor:
    """Return (C, E) class weights: the L2-normalized mean of each class's sentences (S, E). `sentences_per_class` (C,) adds up to S."""
    counts = torch.as_tensor(sentences_per_class)
    if len(sentence_embeddings) != int(counts.sum()) or bool((counts < 1).any()):
        raise UsageError(f"{len(sentence_embeddings)} sentences for classes of {counts.tolist()}; every class needs at least one")
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)  # (S,)
    total = torch.zeros(len(counts), sentence_embeddings.shape[1]).index_add_(0, owner, sentence_embeddings.float())
    return torch.nn.functional.normalize(total / counts[:, None], dim=-1)


@torch.no_grad()
def zero_shot_classification(
    images: Tensor, weights: Tensor, labels: Tensor, chunk: int = 4096, scale: float = float("nan")
) -> ClassificationAnswers:
    """Return the answers for `images` (N, E), class `weights` (C, E), both L2-normalized, and `labels` (N,) int64.

    Ties count against the model. Confidence is the softmax over classes of `scale` (the model's t) times the cosine. A bias would cancel.
    """
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(weights):
        raise UsageError(f"labels run from {int(labels.min())} to {int(labels.max())}, but classes from 0 to {len(weights) - 1}")
    parts = []
    for start in range(0, max(1, len(images)), chunk):
        scores = (images[start : start + chunk] @ weights.T).numpy()  # (chunk, C)
        top = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
        below = scores.astype(np.float64) - scores.max(axis=1, keepdims=True)  # so that exp cannot overflow
        confidence = (1 / np.exp(scale * below).sum(axis=1)).astype(np.float32)
        ranks = label_ranks(scores, labels[start : start + chunk].numpy())
        parts.append((ranks, top, np.take_along_axis(scores, top, axis=1), confidence))
    return ClassificationAnswers(*map(np.concatenate, zip(*parts, strict=True)))


def classification_entries(
    answers: ClassificationAnswers,
    labels: np.ndarray,
    classes: int,
    task: str,
    model: str,
    generator: np.random.Generator,
    confidence: float,
) -> list[Entry]:
    """Return acc@1, acc@5 (with at least 5 classes) and mean_per_class, with Wilson and bootstrap intervals."""
    n = len(labels)
    rates = {k: accuracy_at(answers.ranks, k, classes) for k in _ks(classes)}
    entries = [Entry(task, f"acc@{k}", rate, *wilson_interval(round(rate * n), n, confidence), n, model) for k, rate in rates.items()]
    correct = answers.ranks == 1
    interval = mean_per_class_interval(correct, labels, classes, generator, confidence)
    return [*entries, Entry(task, "mean_per_class", mean_per_class(correct, labels, classes), *interval, n, model)]


def _ks(classes: int) -> tuple[int, ...]:
    return (1, 5) if classes >= 5 else (1,)


def majority_entries(labels: np.ndarray, classes: int, task: str, model: str, confidence: float) -> list[Entry]:
    """Return the scores of always naming the most frequent classes of these labels: what counting alone can reach."""
    n = len(labels)
    rates = majority_rates(labels, classes, _ks(classes))
    entries = [Entry(task, f"acc@{k}", rate, *wilson_interval(round(rate * n), n, confidence), n, model) for k, rate in rates.items()]
    share = 1 / len(np.unique(labels))  # right on one of the classes that occur, wrong on all others
    return [*entries, Entry(task, "mean_per_class", share, share, share, n, model)]


def classification_chance(n: int, classes: int, task: str, model: str) -> list[Entry]:
    """Return the expected scores of a random order of classes. They are exact, so each interval is a point."""
    values = {f"acc@{k}": k / classes for k in _ks(classes)} | {"mean_per_class": 1 / classes}
    return [Entry(task, metric, value, value, value, n, model) for metric, value in values.items()]


def classification_table(answers: ClassificationAnswers, keys: Sequence[str], labels: np.ndarray, class_names: Sequence[str]) -> pa.Table:
    """Return one row per image: key, label, prediction, rank of the label, cosine, confidence (NaN if unknown), best classes."""
    names = pa.array(class_names, pa.string())

    def named(numbers: np.ndarray) -> pa.DictionaryArray:
        return pa.DictionaryArray.from_arrays(pa.array(numbers, pa.int32()), names)

    predicted = answers.top[:, 0]
    return pa.table(
        {
            "key": pa.array(keys, pa.string()),
            "label": pa.array(labels, pa.int32()),
            "label_name": named(labels),
            "predicted": pa.array(predicted, pa.int32()),
            "predicted_name": named(predicted),
            "rank": pa.array(answers.ranks, pa.int32()),
            "score": pa.array(answers.top_scores[:, 0], pa.float32()),
            "confidence": pa.array(answers.confidence, pa.float32()),
            "top": pa.array(list(answers.top.astype(np.int32)), pa.list_(pa.int32())),
            "top_scores": pa.array(list(answers.top_scores), pa.list_(pa.float32())),
        }
    )


def classification_examples(
    answers: Mapping[str, ClassificationAnswers], labels: np.ndarray, class_names: Sequence[str], count: int, generator: np.random.Generator
) -> dict[str, Any]:
    """Return `count` random images with every model's best classes. `answers` maps model names to answers."""
    items = []
    for image in drawn_numbers(len(labels), count, generator):
        label, said = int(labels[image]), {}
        for name, given in answers.items():
            top, scores = given.top[image], given.top_scores[image]
            said[name] = {"rank": int(given.ranks[image]), "top": ranked("class", [class_names[n] for n in top], scores, top == label)}
        items.append({"image": image, "label": class_names[label], "answers": said})
    return {"items": items}
