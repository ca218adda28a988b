"""Samples to features: workers read and decode, the frozen encoders run, shards are committed.

Shapes: `B` images of a batch, `F` image feature width, `D` caption feature width, `N` rows of a shard. A batch never spans
two shards and its rows are a pure function of the plan, so a shard's bytes do not depend on who encodes it, or when.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from align.common.errors import DataError
from align.common.files import require_free
from align.common.locks import Lease
from align.common.preemption import stay
from align.common.reject_codes import Reject, RejectedRow, advice
from align.encoders.text import TextEncoder
from align.encoders.vision import VisionEncoder
from align.features.store import StoreHeader
from align.features.writer import StoreWriter
from align.runtime.console import Progress
from align.sources.content import content_digest
from align.sources.gate import GRAY_BITS, GrayCount, Limits, gate_image, split_captions
from align.sources.plan import Plan, Source, open_shard
from align.sources.row import ShardReader

SOME = "[]"  # behind a column's name: a caption of a sample was rejected, others of it are used
MIN_ROWS_FOR_SHARE = 1000  # rows seen before the share of rejects can stop a job in its middle


class Stopping(NamedTuple):
    """When rejects stop a job: above `fraction` of the samples, or at `in_a_row` samples one after the other."""

    fraction: float = 0.05
    in_a_row: int = 100


class ImageStore(NamedTuple):
    """A store of image features: it gets `columns` of the features of the plan's first `rows` samples."""

    writer: StoreWriter
    columns: slice
    rows: int


class _Task(NamedTuple):
    """Rows start..stop of a shard, and what is wanted of them."""

    shard: int
    start: int
    stop: int
    images: bool
    columns: tuple[str, ...]


@dataclass
class _Decoded:
    """A batch as the workers hand it over: pixels (B, 3, H, W) of the good images, captions by column as (key, texts)."""

    task: _Task
    pixels: Tensor | None
    keys: list[str]
    captions: dict[str, list[tuple[str, list[str]]]]
    rejects: list[RejectedRow]
    rows: list[int] = field(default_factory=list)  # of the shard, each the first of a sample
    gray_bits: list[int | None] = field(default_factory=list)  # of the images


@dataclass
class _Shard:
    """What has been gathered for the shard in hand: features (B, F) of each batch, the rest as in `_Decoded`."""

    features: list[np.ndarray] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    captions: dict[str, list[tuple[str, list[str]]]] = field(default_factory=dict)
    rejects: list[RejectedRow] = field(default_factory=list)


class _Batches(Dataset):
    """Decodes tasks; lives in DataLoader workers, which get tasks instead of row numbers."""

    def __init__(self, source: Source, plan: Plan, transform: Callable[..., Tensor] | None, limits: Limits) -> None:
        self.source, self.plan, self.transform, self.limits = source, plan, transform, limits
        self._opened: tuple[int, ShardReader] | None = None

    def __getitem__(self, task: _Task) -> _Decoded:
        if self._opened is None or self._opened[0] != task.shard:
            self._opened = (task.shard, open_shard(self.source, self.plan, task.shard))
        decoded, pixels = _Decoded(task, None, [], {column: [] for column in task.columns}, []), []
        for row in self._opened[1].rows(task.start, task.stop, images=task.images):
            decoded.rows.append(row.index)
            if row.reject is not None:
                decoded.rejects.append(RejectedRow.of(row.reject, row.index, row.key, "row"))
                continue
            if task.images:
                try:
                    assert self.transform is not None
                    image = gate_image(row.image, self.limits)
                    decoded.gray_bits.append(image.info.get(GRAY_BITS))
                    pixels.append(self.transform(image))
                    decoded.keys.append(row.key)
                except Reject as reject:
                    decoded.rejects.append(RejectedRow.of(reject, row.index, row.key, "image"))
            for column in task.columns:
                try:
                    texts, unusable = split_captions(row.cell(column), self.limits)
                except Reject as reject:
                    decoded.rejects.append(RejectedRow.of(reject, row.index, row.key, column))
                    continue
                decoded.captions[column].append((row.key, texts))
                decoded.rejects += [RejectedRow.of(reject, row.index, row.key, f"{column}{SOME}") for reject in unusable]
        if pixels:
            decoded.pixels = torch.stack(pixels)
        return decoded


class Extraction:
    """One job: a plan, the encoders and the stores they fill. `run` may be called by several processes at once."""

    def __init__(
        self,
        source: Source,
        plan: Plan,
        output: Path,
        *,
        vision: VisionEncoder | None = None,
        text: TextEncoder | None = None,
        columns: tuple[str, ...] = (),
        batch_size: int = 64,
        text_batch_size: int = 256,
        workers: int = 2,
        limits: Limits | None = None,
        stopping: Stopping | None = None,
    ) -> None:
        self.source, self.plan, self.output = source, plan, output
        self.vision, self.text, self.columns = vision, text, columns
        self.batch_size, self.text_batch_size, self.workers = batch_size, text_batch_size, workers
        self.limits, self.stopping = limits or Limits(gray_bits=source.gray_bits), stopping or Stopping()
        self.progress = Progress()
        self.gray = GrayCount()
        self.rows = self.samples = self.rejected = self._in_a_row = 0  # of this process
        self.image_stores: list[ImageStore] = []
        if vision is not None:
            self.image_stores.append(ImageStore(self._store("images", "image", vision, vision.feature_width), slice(None), plan.samples))
        self.caption_writers = {}
        for column in columns:
            assert text is not None
            self.caption_writers[column] = self._store(f"captions-{column}", "caption", text, text.width)

    def _store(self, name: str, kind: Literal["image", "caption"], encoder: VisionEncoder | TextEncoder, width: int) -> StoreWriter:
        loader, plan = encoder.spec.stored() if encoder.spec else {}, self.plan
        rows = plan.samples if kind == "image" else plan.rows
        header = StoreHeader(kind, encoder.fingerprint, loader, width, plan.digest, len(plan.shards), rows)
        return StoreWriter(self.output / name, header)

    @property
    def writers(self) -> list[StoreWriter]:
        """The stores of this job."""
        return [*(store.writer for store in self.image_stores), *self.caption_writers.values()]

    def pending(self) -> list[int]:
        """Return the shards that some store has not committed yet."""
        return [shard for shard in range(len(self.plan.shards)) if not all(writer.done(shard) for writer in self.writers)]

    def predicted_bytes(self) -> int:
        """Return the space that all stores together still need."""
        return sum(writer.predicted_bytes() for writer in self.writers)

    def fill(self, progress: Progress | None = None) -> pa.Table:
        """Encode what is missing, as the only process that writes here, and return all rejects in one table."""
        self.keep_content()
        if self.pending():
            require_free(self.output, self.predicted_bytes())
            with Lease(self.output) as lease:
                self.clean(lease)
                self.run(lease, progress)
        return self.finish()

    def keep_content(self) -> None:
        """Note in each store what its samples are. FingerprintError if one was begun with other samples under the same names."""
        digests: dict[tuple[str, ...], str] = {}
        stores: list[tuple[tuple[str, ...], StoreWriter]] = [((), store.writer) for store in self.image_stores]
        for columns, writer in stores + [((column,), writer) for column, writer in self.caption_writers.items()]:
            if columns not in digests:
                digests[columns] = content_digest(self.source, self.plan, not columns, columns)
            writer.keep_content(digests[columns])

    def clean(self, lease: Lease) -> None:
        """Remove what killed workers left half-written."""
        lease.remove_temporaries(self.output)
        for writer in self.writers:
            writer.clean(lease.living_writers)

    def _create(self) -> None:
        """Make the stores, those of captions with the text encoder's tokenizer, so that training needs no encoder."""
        for writer in self.writers:
            writer.create()
        if self.text is not None and self.caption_writers:
            with TemporaryDirectory() as folder:
                self.text.tokenizer.save_pretrained(folder)
                for path in sorted(Path(folder).rglob("*")):
                    for writer in self.caption_writers.values() if path.is_file() else ():
                        writer.keep(f"tokenizer/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def run(self, lease: Lease, progress: Progress | None = None) -> None:
        """Encode and commit every shard that no living worker of the job has claimed; `progress` is told of each batch."""
        self.progress = progress or self.progress
        self._create()
        loader = DataLoader(
            _Batches(self.source, self.plan, self.vision.transform if self.vision else None, self.limits),
            sampler=self._tasks(lease),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            worker_init_fn=stay,
        )
        shard, clock = _Shard(), time.monotonic()
        for decoded in loader:
            self.progress.add("waiting for decode", time.monotonic() - clock)
            with self.progress.spend("forward"):
                self._take(decoded, shard)
            if decoded.task.stop == self.plan.lengths[decoded.task.shard]:
                self._commit(decoded.task, shard)
                lease.release(decoded.task.shard)
                shard = _Shard()
            self._show()
            clock = time.monotonic()
        self._show(now=True)

    def _show(self, now: bool = False) -> None:
        self.progress(self.rows, note=f"{self.rejected} rejected", now=now)

    def finish(self) -> pa.Table:
        """Check that every shard is committed, write each store's `rejects.parquet` and return them all in one table.

        Of several stores of images, the rejects of the first are in it: an image that does not decode is rejected in all.
        """
        images = [store.writer.finish() for store in self.image_stores]
        rejects = pa.concat_tables([*images[:1], *(writer.finish() for writer in self.caption_writers.values())])
        whole = rejects.filter(pc.invert(pc.ends_with(rejects["column"], SOME)))
        samples = whole.group_by(["shard", "row"]).aggregate([]).num_rows  # a sample may be rejected in several stores
        fraction, allowed = samples / max(1, self.plan.samples), self.stopping.fraction
        if fraction > allowed:
            self._stop(f"{100 * fraction:.1f}% of the samples were rejected, {100 * allowed:.1f}% are allowed", rejects.to_pylist())
        return rejects

    def _tasks(self, lease: Lease) -> Iterator[_Task]:
        for shard, rows in enumerate(self.plan.lengths):
            images = not all(store.writer.done(shard) for store in self.image_stores)
            columns = tuple(column for column, writer in self.caption_writers.items() if not writer.done(shard))
            if not (images or columns) or not lease.claim(shard):
                continue
            step = self.batch_size if images else max(self.batch_size, 1024)
            edges = [0, *self.plan.sample_rows(shard)[step::step].tolist(), rows]  # every `step` samples
            for begin, end in pairwise(edges):
                yield _Task(shard, begin, end, images, columns)

    def _take(self, decoded: _Decoded, shard: _Shard) -> None:
        if decoded.pixels is not None and self.vision is not None:
            shard.features.append(self.vision(decoded.pixels).numpy(force=True))
            shard.keys += decoded.keys
        for column, captions in decoded.captions.items():
            shard.captions.setdefault(column, []).extend(captions)
        shard.rejects += decoded.rejects
        self.rows += decoded.task.stop - decoded.task.start
        self.samples += len(decoded.rows)
        for bits in decoded.gray_bits:
            self.gray.add(bits)
        rejected_rows = {reject.row for reject in decoded.rejects if not reject.column.endswith(SOME)}
        self.rejected += len(rejected_rows)
        for row in decoded.rows:
            self._in_a_row = self._in_a_row + 1 if row in rejected_rows else 0
            if self._in_a_row >= self.stopping.in_a_row:
                self._stop(f"{self._in_a_row} samples in a row were rejected", [asdict(reject) for reject in shard.rejects])
        if self.samples >= MIN_ROWS_FOR_SHARE and self.rejected > self.stopping.fraction * max(self.samples, self.plan.samples // 2):
            self._stop(f"{self.rejected} of {self.samples} samples were rejected", [asdict(reject) for reject in shard.rejects])

    def _commit(self, task: _Task, shard: _Shard) -> None:
        if task.images:
            assert self.vision is not None
            features = np.concatenate(shard.features or [np.empty((0, self.vision.feature_width), dtype=np.float32)])
            rejects = [reject for reject in shard.rejects if reject.column in ("row", "image")]
            for writer, columns, rows in self.image_stores:
                if not writer.done(task.shard):
                    keep = min(len(shard.keys), max(0, rows - sum(self.plan.counts[: task.shard])))
                    with self.progress.spend("write"):
                        writer.write(task.shard, features[:keep, columns], shard.keys[:keep], [0] * keep, rejects)
        for column in task.columns:
            assert self.text is not None
            flat = [(key, item, text) for key, texts in shard.captions[column] for item, text in enumerate(texts)]
            with self.progress.spend("forward"):
                features = self.text.encode([text for _, _, text in flat], self.text_batch_size).numpy(force=True)
            rejects = [reject for reject in shard.rejects if reject.column.removesuffix(SOME) in ("row", column)]
            keys, items, texts = [key for key, _, _ in flat], [item for _, item, _ in flat], [text for _, _, text in flat]
            with self.progress.spend("write"):
                self.caption_writers[column].write(task.shard, features, keys, items, rejects, texts)

    def _stop(self, why: str, rejects: list[dict[str, Any]]) -> None:
        codes = Counter(reject["code"] for reject in rejects).most_common(5)
        counts = ", ".join(f"{code} {count}" for code, count in codes)
        first = " First: {key!r} {column}: {code} ({detail}).".format(**rejects[0]) if rejects else ""
        mend = "Mend the data, or raise --max-reject-fraction / --max-rejects-in-a-row; committed shards are kept."
        raise DataError(f"{why} (codes: {counts}).{first} {advice(codes[0][0], mend) if codes else mend}")
