"""Image-text retrieval in both directions: exact ranks in chunks, recall, and the answer to every query.

Shapes: `N` images, `M` captions, `E` aligned width, `K` answers kept. Every image has at least one caption. A query is a hit at k if
any right answer is among its first k. Embeddings are L2-normalized float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from align.common.intervals import bootstrap, median_of, percentiles
from align.model.ranking import ranks_and_top
from eval.results.examples import drawn_numbers, ranked
from eval.results.metrics import chance_recall, clustered_recall_interval, median_rank, recall_at
from eval.results.records import Entry

KS = (1, 5, 10)
TOP = 10  # answers kept for each query
MATRIX_SIDE = 8  # images and captions in the similarity matrix of the examples
SHOWN_ANSWERS = 5  # per example


@dataclass(frozen=True)
class RetrievalAnswers:
    """A model's answers in both directions. Ranks count from 1."""

    i2t_ranks: np.ndarray  # (N,) of the best right caption
    i2t_top: np.ndarray  # (N, K) caption numbers
    i2t_scores: np.ndarray  # (N, K) cosines
    t2i_ranks: np.ndarray  # (M,) of the right image
    t2i_top: np.ndarray  # (M, K) image numbers
    t2i_scores: np.ndarray  # (M, K) cosines
    caption_image: np.ndarray  # (M,) the image of each caption


def retrieve(images: Tensor, captions: Tensor, caption_image: Tensor, chunk: int = 1024) -> RetrievalAnswers:
    """Return the answers for `images` (N, E) and `captions` (M, E) of images `caption_image` (M,) int64; memory O(chunk max(N, M))."""
    image_ids = torch.arange(len(images))
    i2t, i2t_top, i2t_scores = (part.numpy() for part in ranks_and_top(images, captions, image_ids, caption_image, TOP, chunk))
    t2i, t2i_top, t2i_scores = (part.numpy() for part in ranks_and_top(captions, images, caption_image, image_ids, TOP, chunk))
    return RetrievalAnswers(i2t, i2t_top, i2t_scores, t2i, t2i_top, t2i_scores, caption_image.numpy())


def retrieval_entries(answers: RetrievalAnswers, task: str, model: str, generator: np.random.Generator, confidence: float) -> list[Entry]:
    """Return R@1/5/10 and the median rank in both directions. Intervals resample images: captions of one image are not independent."""
    entries = []
    images = np.arange(len(answers.i2t_ranks))
    for direction, ranks, clusters in (("i2t", answers.i2t_ranks, images), ("t2i", answers.t2i_ranks, answers.caption_image)):
        n = len(ranks)
        for k in KS:
            interval = clustered_recall_interval(ranks <= k, clusters, generator, confidence)
            entries.append(Entry(task, f"{direction}_r@{k}", recall_at(ranks, k), *interval, n, model))
        interval = percentiles(bootstrap(median_of(ranks), clusters, generator), confidence)
        entries.append(Entry(task, f"{direction}_median_rank", median_rank(ranks), *interval, n, model))
    return entries


def retrieval_chance(captions_per_image: np.ndarray, task: str, model: str) -> list[Entry]:
    """Return the expected recalls of a random order, for images with `captions_per_image` (N,) captions. Intervals are points."""
    images, captions = len(captions_per_image), int(captions_per_image.sum())
    directions = (("i2t", captions, captions_per_image, images), ("t2i", images, np.ones(1, dtype=np.int64), captions))
    values = [(f"{way}_r@{k}", chance_recall(targets, positives, k), n) for way, targets, positives, n in directions for k in KS]
    return [Entry(task, metric, value, value, value, n, model) for metric, value, n in values]


def retrieval_table(answers: RetrievalAnswers, keys: Sequence[str], caption_image: np.ndarray) -> pa.Table:
    """Return one row per query: direction, image key, caption number (-1 for i2t), rank, `top` numbers and cosines, in task order."""
    parts = (
        ("i2t", np.arange(len(keys)), np.full(len(keys), -1), answers.i2t_ranks, answers.i2t_top, answers.i2t_scores),
        ("t2i", caption_image, np.arange(len(caption_image)), answers.t2i_ranks, answers.t2i_top, answers.t2i_scores),
    )
    all_keys = pa.array(keys, pa.string())
    tables = [
        pa.table(
            {
                "direction": pa.repeat(direction, len(owners)),
                "key": all_keys.take(pa.array(owners)),
                "caption": pa.array(captions, pa.int32()),
                "rank": pa.array(ranks, pa.int32()),
                "top": pa.array(list(top.astype(np.int32)), pa.list_(pa.int32())),
                "top_scores": pa.array(list(scores), pa.list_(pa.float32())),
            }
        )
        for direction, owners, captions, ranks, top, scores in parts
    ]
    return pa.concat_tables(tables)


def retrieval_examples(
    answers: Mapping[str, RetrievalAnswers],
    embeddings: Mapping[str, tuple[Tensor, Tensor]],  # images (N, E) and captions (M, E) by model name
    captions: Sequence[str],
    caption_image: np.ndarray,
    count: int,
    generator: np.random.Generator,
) -> dict[str, Any]:
    """Return `count` random queries per direction with each model's answers, and a matrix of cosines. `caption_image` (M,) ascends."""
    images = int(caption_image.max()) + 1
    chosen = drawn_numbers(images, MATRIX_SIDE, generator) if count else []
    rows = np.searchsorted(caption_image, chosen)  # each image's first caption
    cosines = {name: c[rows] @ i[chosen].T for name, (i, c) in embeddings.items()}
    matrix = {
        "images": chosen,
        "captions": [captions[row] for row in rows],
        "scores": {name: values.double().numpy().round(4).tolist() for name, values in cosines.items()},
    }
    t2i, i2t = [], []
    for caption in drawn_numbers(len(captions), count, generator):
        own, said = int(caption_image[caption]), {}
        for name, given in answers.items():
            top, scores = given.t2i_top[caption, :SHOWN_ANSWERS], given.t2i_scores[caption, :SHOWN_ANSWERS]
            said[name] = {"rank": int(given.t2i_ranks[caption]), "top": ranked("image", top.tolist(), scores, top == own)}
        t2i.append({"caption": captions[caption], "image": own, "answers": said})
    for image in drawn_numbers(images, count, generator):
        mine, said = np.flatnonzero(caption_image == image), {}
        for name, given in answers.items():
            top, scores = given.i2t_top[image, :SHOWN_ANSWERS], given.i2t_scores[image, :SHOWN_ANSWERS]
            # its own caption with the highest cosine
            best = captions[mine[int((embeddings[name][1][mine] @ embeddings[name][0][image]).argmax())]]
            shown = ranked("caption", [captions[n] for n in top], scores, caption_image[top] == image)
            said[name] = {"rank": int(given.i2t_ranks[image]), "best": best, "top": shown}
        i2t.append({"image": image, "answers": said})
    return {"t2i": t2i, "i2t": i2t, "matrix": matrix}
