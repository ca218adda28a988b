"""Which pairs are held out for validation: by image, so that no held-out image is trained on.

Shapes: `N` pairs, `F` width of the image features, `V` held-out images.
"""

from collections.abc import Iterable

import numpy as np

from align.common.errors import UsageError
from align.common.seeds import generator

BLOCK = 8192  # rows of features in memory


def content_ids(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Return a number (N,) int64 for each row of features (n, F) float16 in `blocks`: equal for equal rows."""
    found = list[np.ndarray]()
    factors: np.ndarray = np.zeros(0, dtype=np.uint64)
    for rows in blocks:
        words: np.ndarray = np.ascontiguousarray(np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4)))).view(np.uint64)
        if len(factors) != words.shape[1]:
            drawn: np.ndarray = generator(0, 31).integers(0, 1 << 63, size=(words.shape[1],))
            factors = (1 + 2 * drawn.astype(np.uint64)).astype(np.uint64)
        found.append((words * factors).sum(axis=1, dtype=np.uint64))
    return np.concatenate([np.zeros(0, dtype=np.uint64), *found]).view(np.int64)


def image_numbers(*identities: np.ndarray) -> np.ndarray:
    """Return the image of each pair (N,) int64, by first appearance. Pairs are of one image if an identity (N,) of both is equal."""
    labels = np.arange(len(identities[0]))
    inverse = [np.unique(one, return_inverse=True)[1] for one in identities]
    while True:
        before = labels
        for numbers in inverse:
            lowest = np.full(len(labels), len(labels))
            np.minimum.at(lowest, numbers, labels)
            labels = lowest[numbers]
        if np.array_equal(labels, before):
            return np.unique(labels, return_inverse=True)[1]


def drawn_images(images: np.ndarray, held_out: int, seed: int) -> np.ndarray:
    """Return (N,) bool: the pairs of `held_out` images that `seed` draws; `images` (N,) are their numbers. UsageError if too many."""
    count = int(images.max(initial=-1)) + 1
    if held_out >= count:
        equal = f" ({len(images):,} pairs, the features of equal images are equal)" if count < len(images) else ""
        raise UsageError(f"{held_out} images cannot be held out of {count} different ones{equal}; give a smaller --val-rows")
    return np.isin(images, generator(seed, 4).choice(count, held_out, replace=False))


def merged(images: np.ndarray, captions: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images (n, F), captions (T, D) and each caption's image (T,) with equal images as one: a copy is no wrong answer."""
    numbers = image_numbers(content_ids([images]))
    if len(numbers) == 0 or numbers[-1] == len(numbers) - 1:
        return images, captions, owners
    order = np.argsort(numbers[owners], kind="stable")
    return images[np.unique(numbers, return_index=True)[1]], captions[order], numbers[owners][order]


def near(rows: np.ndarray, others: np.ndarray, cosine: float) -> np.ndarray:
    """Return (n,) bool: which features (n, F) have at least this cosine with one of `others` (V, F)."""
    return (unit(rows) @ unit(others).T).max(axis=1, initial=-1.0) >= cosine


def unit(rows: np.ndarray) -> np.ndarray:
    """Return rows (n, F) as float32 of length 1; zeros stay."""
    wide = rows.astype(np.float32)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True).clip(1e-12)
