"""Open-vocabulary segmentation of a task: label maps of all images, cached on disk, and metrics such as mIoU.

    <cache>/segmentation/<digest>/<first image>-<hash>.parquet    label maps of 32 images, as PNGs of class numbers

The digest covers images, model, prompts and protocol. A second run skips the encoder, an interrupted run resumes at the next shard.
A shard whose content does not match the hash in its name is made again.
Shapes: `N` images, `C` classes, `S` names, `E` aligned width, `H` and `W` pixels of an image.
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor

from align.common.errors import DamagedError, DataError
from align.common.files import hash_bytes, load_hashed, remove_temporaries, save_hashed
from align.common.intervals import kind_bootstrap, percentiles
from align.common.locks import Lease
from eval.measures.windows import Windows, segment
from eval.models.dual_encoder import DualEncoder
from eval.results.examples import drawn_numbers, save_jpeg
from eval.results.overlays import overlay, palette
from eval.results.records import Entry, file_name
from eval.tasks.masks import IGNORED, SegmentationData

SHARD_IMAGES = 32  # label maps per file
_NAMED = 0.01  # a class that is only predicted is in an example's legend if it covers this share of the pixels
METRICS = ("miou", "pixel_accuracy", "mean_class_accuracy")


@dataclass(frozen=True)
class LabelMaps:
    """A model's label maps of all images of a task, on disk."""

    folder: Path
    images: int

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the classes (H, W) of image 0, 1, ..."""
        for start in range(0, self.images, SHARD_IMAGES):
            yield from map(_decoded, self._shard(start))

    def __getitem__(self, number: int) -> np.ndarray:
        """Return the classes (H, W) of image `number`."""
        start = number - number % SHARD_IMAGES
        return _decoded(self._shard(start)[number - start])

    def _shard(self, start: int) -> list[bytes]:
        maps = _read_shard(self.folder, start)
        if maps is None:
            raise DamagedError(f"the label maps of image {start} and the next in {self.folder} are gone or damaged; run again")
        return maps


@dataclass(frozen=True)
class Prompted:
    """A model and its embeddings of a task's names: `weights` (S, E), L2-normalized, made from the `sentences` of each name."""

    model: DualEncoder
    fingerprint: Mapping[str, Any]
    weights: Tensor
    sentences: Sequence[Sequence[str]]


def label_maps(
    data: SegmentationData,
    prompted: Sequence[Prompted],
    cache: Path,
    *,
    windows: Windows,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[LabelMaps]:
    """Return each model's label maps of all images. Maps that `cache` lacks are computed.

    Images are read once. Models that share an encoder share its forward pass. `report(done, total)` is called after each image.
    """
    folders = [cache / "segmentation" / maps_digest(data, one.fingerprint, one.sentences, windows) for one in prompted]
    total = len(data.keys)
    starts = range(0, total, SHARD_IMAGES)
    missing = {start: [n for n, folder in enumerate(folders) if _read_shard(folder, start) is None] for start in starts}
    done = sum(min(SHARD_IMAGES, total - start) for start in starts if not missing[start])
    with ExitStack() as leases:
        for folder in sorted({folders[n] for lacking in missing.values() for n in lacking}):
            folder.mkdir(parents=True, exist_ok=True)
            leases.enter_context(Lease(folder))
            remove_temporaries(folder)
        for start, lacking in missing.items():
            made: dict[Path, list[bytes]] = {folders[n]: [] for n in lacking}
            for number in range(start, min(start + SHARD_IMAGES, total)) if lacking else ():
                image = data.image(number)
                for alike in _sharing([(folders[n], prompted[n]) for n in lacking]):
                    models, weights = [one.model for _, one in alike], [one.weights for _, one in alike]
                    for (folder, _), classes in zip(alike, segment(models, image, weights, data.owner, windows), strict=True):
                        made[folder].append(_encoded(classes))
                done += 1
                report(done, total)
            for folder, maps in made.items():
                _write_shard(folder, start, maps)
    return [LabelMaps(folder, total) for folder in folders]


def _sharing(prompted: Sequence[tuple[Path, Prompted]]) -> list[list[tuple[Path, Prompted]]]:
    """Return the models, each folder once, in groups that share a frozen encoder and a device."""
    groups: dict[str, dict[Path, Prompted]] = {}
    for folder, one in prompted:
        encoder = json.dumps([one.model.patch_fingerprint, str(one.model.device)], sort_keys=True, default=str)
        groups.setdefault(encoder, {})[folder] = one
    return [list(group.items()) for group in groups.values()]


def maps_digest(data: SegmentationData, fingerprint: Mapping[str, Any], sentences: Sequence[Sequence[str]], windows: Windows) -> str:
    """Return 32 hex digits that identify label maps: images, model (without folder names), prompts and protocol."""
    model = {name: value for name, value in fingerprint.items() if name.split()[-1] != "encoder"}
    decides = [data.images_digest, model, [list(of_name) for of_name in sentences], data.owner.tolist(), asdict(windows)]
    return hash_bytes(json.dumps(decides, sort_keys=True).encode())


@dataclass(frozen=True)
class SegmentationAnswers:
    """Pixel counts, int64: `confusion` (C, C), rows true and columns predicted; `tp`, `fp`, `fn` (N, C) per image."""

    confusion: np.ndarray
    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Return (C, C) int64 pixel counts by true (row) and predicted (column) class, without pixels that are IGNORED in `truth`."""
    counted = truth != IGNORED
    cells = truth[counted].astype(np.int64) * classes + predicted[counted]
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def segmentation_answers(data: SegmentationData, maps: LabelMaps) -> SegmentationAnswers:
    """Return the pixel counts of a model's label maps; DataError if a map has the wrong size or if no pixel counts."""
    classes = len(data.class_names)
    total = np.zeros((classes, classes), dtype=np.int64)
    tp, fp, fn = (np.zeros((len(data.keys), classes), dtype=np.int64) for _ in range(3))
    for number, predicted in enumerate(maps):
        truth = data.truth(number)
        if truth.shape != predicted.shape:
            raise DataError(f"the label map of {data.keys[number]!r} has another size than its image had; run again")
        confusion = confusion_matrix(truth, predicted, classes)
        total += confusion
        tp[number] = confusion.diagonal()
        fp[number] = confusion.sum(axis=0) - tp[number]
        fn[number] = confusion.sum(axis=1) - tp[number]
    if not total.any():
        raise DataError(f"task {data.task.id!r}: no pixel of its label maps counts; check its `ignore` and its classes")
    return SegmentationAnswers(total, tp, fp, fn)


def majority_answers(answers: SegmentationAnswers) -> SegmentationAnswers:
    """Return the counts if every pixel got the most frequent class of these images: what counting alone can reach."""
    pixels = answers.tp + answers.fn  # (N, C) of each true class
    total = pixels.sum(axis=0)
    named = np.arange(len(total)) == total.argmax()  # (C,), true for the class that every pixel gets
    wrong = (pixels.sum(axis=1, keepdims=True) - pixels) * named
    return SegmentationAnswers(np.outer(total, named), pixels * named, wrong, pixels * ~named)


def class_iou(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> np.ndarray:
    """Return (..., C) float64 IoU, tp / (tp + fp + fn), from counts (..., C); NaN for a class that is neither true nor predicted."""
    return _ratio(tp, tp + fp + fn)


def segmentation_metrics(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> dict[str, np.ndarray]:
    """Return each of METRICS as (...) float64, from counts (..., C) summed over the images."""
    return {
        "miou": _mean(class_iou(tp, fp, fn)),  # over the classes that are true or predicted
        "pixel_accuracy": _ratio(tp.sum(axis=-1), (tp + fn).sum(axis=-1)),
        "mean_class_accuracy": _mean(_ratio(tp, tp + fn)),  # over the classes that are true
    }


def segmentation_entries(
    answers: SegmentationAnswers, task: str, model: str, generator: np.random.Generator, confidence: float, resamples: int = 1000
) -> list[Entry]:
    """Return METRICS with percentile bootstrap intervals over images, because the pixels of one image are not independent."""
    counts = (answers.tp, answers.fp, answers.fn)
    values = segmentation_metrics(*(count.sum(axis=0) for count in counts))
    n = len(answers.tp)

    def statistics(times: np.ndarray) -> np.ndarray:  # (r, N) -> (r, metrics)
        return np.stack(list(segmentation_metrics(*(times @ count for count in counts)).values()), axis=1)

    drawn = kind_bootstrap(statistics, np.ones(n), generator, resamples)  # every image is a kind of its own
    intervals = {metric: percentiles(column, confidence) for metric, column in zip(METRICS, drawn.T, strict=True)}
    return [Entry(task, metric, float(values[metric]), *interval, n, model) for metric, interval in intervals.items()]


def segmentation_table(answers: SegmentationAnswers, keys: Sequence[str]) -> pa.Table:
    """Return one row per image: key, pixels that count, right pixels, and tp, fp, fn (lists of C counts)."""
    lists = {name: pa.array(list(getattr(answers, name)), pa.list_(pa.int64())) for name in ("tp", "fp", "fn")}
    pixels, right = (answers.tp + answers.fn).sum(axis=1), answers.tp.sum(axis=1)
    return pa.table({"key": pa.array(keys, pa.string()), "pixels": pixels, "right": right, **lists})


def segmentation_examples(
    folder: Path, data: SegmentationData, maps: Mapping[str, LabelMaps], count: int, generator: np.random.Generator
) -> dict[str, Any]:
    """Return `count` random images with each model's pixel accuracy, and write overlays to `folder`/examples (paths start there)."""
    colors, place = palette(len(data.class_names)), file_name(data.task.id)
    items = []
    for number in drawn_numbers(len(data.keys), count, generator):
        image, truth = data.image(number), data.truth(number)
        ignored = truth == IGNORED
        counts = np.bincount(truth[~ignored], minlength=len(colors))
        named = np.zeros(len(colors), dtype=bool)
        true_path = f"{place}/{number}--truth.jpg"
        save_jpeg(folder / "examples" / true_path, overlay(image, truth, colors, ignored))
        said = {}
        for model, predictions in maps.items():
            predicted = predictions[number]
            path = f"{place}/{number}--{file_name(model)}.jpg"
            save_jpeg(folder / "examples" / path, overlay(image, predicted, colors, ignored))
            right = confusion_matrix(truth, predicted, len(colors)).trace()
            accuracy = round(float(right / counts.sum()), 4) if counts.any() else None
            said[model] = {"overlay": path, "pixel_accuracy": accuracy}
            named |= np.bincount(predicted[~ignored], minlength=len(colors)) >= max(1, _NAMED * truth.size)
        # classes of the image, most pixels first, then those that are only predicted
        legend = [*np.flatnonzero(counts)[np.argsort(-counts[counts > 0], kind="stable")], *np.flatnonzero(named & (counts == 0))]
        classes = [{"name": data.class_names[n], "color": "#{:02x}{:02x}{:02x}".format(*colors[n])} for n in legend]
        items.append({"image": number, "key": data.keys[number], "classes": classes, "truth": true_path, "answers": said})
    return {"items": items}


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis without NaN values; NaN if no other value is left."""
    there = np.isfinite(values)
    return _ratio(np.where(there, values, 0).sum(axis=-1), there.sum(axis=-1))


def _encoded(classes: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(classes).save(buffer, format="PNG")
    return buffer.getvalue()


def _decoded(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded), formats=("PNG",)))


def _write_shard(folder: Path, start: int, maps: list[bytes]) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"map": pa.array(maps, pa.binary())}), buffer, compression="none")
    save_hashed(folder / f"{start:06d}", ".parquet", buffer.getvalue())


def _read_shard(folder: Path, start: int) -> list[bytes] | None:
    """Return a shard's encoded maps, or None if it is missing or does not match the hash in its name."""
    data = load_hashed(folder / f"{start:06d}", ".parquet")
    return None if data is None else pq.read_table(pa.BufferReader(data))["map"].to_pylist()
