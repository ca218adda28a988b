"""Published embeddings, imported into a feature store by key, one piece of one file at a time.

    clip_retrieval   img_emb/img_emb_0.npy, text_emb/text_emb_0.npy (n, D) and metadata/metadata_0.parquet, whose rows have the keys
    tensors          0.pt, 1.pt, ...: each a tensor (n, D), or a dict with "embeddings" (n, D) and "keys" (n)

What made them cannot be checked: the fingerprint is what the user states. Legend: `n` rows of a file, `D` width.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from align.common.errors import DamagedError, DataError
from align.common.files import hash_bytes, hash_file
from align.common.reject_codes import Reject, RejectedRow
from align.common.tensor_files import read_tensor_file
from align.features.store import FeatureStore, StoreHeader
from align.features.writer import StoreWriter

Kind = Literal["image", "caption"]
_PREFIX = {"image": "img_emb", "caption": "text_emb"}


class EmbeddingsFile(NamedTuple):
    """A file of embeddings and, in clip-retrieval's layout, the parquet with its keys."""

    path: Path
    metadata: Path | None = None


class Piece(NamedTuple):
    """Rows start..stop of a file: what makes one shard of the store."""

    file: int
    start: int
    stop: int


def find_files(folder: Path, kind: Kind) -> list[EmbeddingsFile]:
    """Return the files of embeddings of images or captions in `folder`, in order; DataError if there are none or one is missing."""
    prefix = _PREFIX[kind]
    if (folder / prefix).is_dir():
        numbered = {path.stem.removeprefix(f"{prefix}_"): path for path in (folder / prefix).glob(f"{prefix}_*.npy")}
        files = {name: EmbeddingsFile(path, folder / "metadata" / f"metadata_{name}.parquet") for name, path in numbered.items()}
        lost = [str(file.metadata) for file in files.values() if file.metadata and not file.metadata.is_file()]
        if lost:
            raise DataError(f"{lost[0]} is not there: it has the keys of the embeddings of the same number")
    else:
        files = {path.stem: EmbeddingsFile(path) for path in folder.glob("*.pt")}
    if not files or not all(name.isdigit() for name in files):
        raise DataError(f"{folder} has neither {prefix}/{prefix}_0.npy with metadata/metadata_0.parquet nor 0.pt, 1.pt, ...")
    ordered = sorted(files, key=int)
    lost_numbers = sorted(set(range(int(ordered[-1]) + 1)) - {int(name) for name in ordered} - {0})  # some count from 1
    if lost_numbers:
        raise DataError(f"{folder} has the files {ordered[0]} to {ordered[-1]}, but not number {lost_numbers[0]}; fetch it, too")
    return [files[name] for name in ordered]


class Embeddings:
    """The rows of a list of files; one file is open at a time."""

    def __init__(self, files: list[EmbeddingsFile], key_column: str) -> None:
        """Look at every file's header; DataError if width, rows or key column are not as they should, DamagedError if one does not read."""
        self.files, self.key_column = files, key_column
        self._open: tuple[int, np.ndarray | Tensor, list[Any] | None] | None = None
        shapes = [tuple(self._rows(number).shape) for number in range(len(files))]
        for file, shape in zip(files, shapes, strict=True):
            if len(shape) != 2 or shape[1] != shapes[0][1]:
                raise DataError(f"{file.path} has the shape {shape}; expected (rows, {shapes[0][-1]}) as in the first file")
        self.lengths, self.width = [shape[0] for shape in shapes], shapes[0][1]
        for file, rows in zip(files, self.lengths, strict=True):
            if file.metadata is not None:
                self._check_metadata(file.metadata, rows)

    def pieces(self, rows: int) -> list[Piece]:
        """Return the pieces of at most `rows` rows that files are imported in."""
        return [Piece(at, start, min(start + rows, n)) for at, n in enumerate(self.lengths) for start in range(0, n, rows)]

    def features(self, piece: Piece) -> np.ndarray:
        """Return the features (n, D) float32 of a piece."""
        rows = self._rows(piece.file)[piece.start : piece.stop]
        return rows.float().numpy() if isinstance(rows, Tensor) else np.asarray(rows, dtype=np.float32)

    def keys(self, piece: Piece) -> list[Any] | None:
        """Return the keys (n) of a piece, or None if the files have none."""
        rows = self._rows(piece.file)
        assert self._open is not None
        file, keys = self.files[piece.file], self._open[2]
        if keys is None and file.metadata is not None:
            keys = pq.read_table(file.metadata, columns=[self.key_column])[self.key_column].to_pylist()
            self._open = (piece.file, rows, keys)
        return None if keys is None else keys[piece.start : piece.stop]

    def _rows(self, number: int) -> np.ndarray | Tensor:
        if self._open is None or self._open[0] != number:
            self._open = None  # let go of the last file before the next is read
            self._open = (number, *_read(self.files[number].path))
        return self._open[1]

    def _check_metadata(self, path: Path, rows: int) -> None:
        try:
            header = pq.read_metadata(path)
        except (OSError, pa.ArrowException) as error:
            raise DamagedError(f"{path} cannot be read ({error}); fetch it again") from error
        names = header.schema.to_arrow_schema().names
        if self.key_column not in names:
            raise DataError(f"{path} has no column {self.key_column!r}; it has {', '.join(names)}: give one of them as --key-column")
        if header.num_rows != rows:
            raise DataError(f"{path} has {header.num_rows} rows for {rows} embeddings; they have to be of one run")


def _read(path: Path) -> tuple[np.ndarray | Tensor, list[Any] | None]:
    """Return the embeddings (n, D), of .npy files as a memory map, and the keys if the file has them."""
    if path.suffix == ".npy":
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False), None
        except (OSError, ValueError, EOFError) as error:
            raise DamagedError(f"{path} is not a plain .npy file ({error}); fetch it again") from error
    content = read_tensor_file(path)
    rows, keys = (content.get("embeddings"), content.get("keys")) if isinstance(content, dict) else (content, None)
    if not isinstance(rows, Tensor) or not (keys is None or (isinstance(keys, list) and len(keys) == len(rows))):
        raise DataError(f'{path}: expected a tensor (rows, width), or a dict with "embeddings" (rows, width) and "keys", a list of as many')
    return rows, keys


def import_embeddings(
    embeddings: Embeddings, output: Path, *, kind: Kind, fingerprint: dict[str, str], shard_rows: int, keys_file: Path | None = None
) -> FeatureStore:
    """Write the embeddings to a feature store in `output` and return it; shards that are committed already are not made again.

    Keys come from the files or, one a line for all files in order, from `keys_file`; DataError if there are none, or too few or too
    many. Captions with the same key right after each other are items 0, 1, ... of it. Rows without a key are rejected.
    """
    pieces = embeddings.pieces(shard_rows)
    total = sum(embeddings.lengths)
    if keys_file is not None and (count := sum(1 for _ in _lines(keys_file))) != total:
        raise DataError(f"{keys_file} has {count} keys for {total} embeddings; they have to be of one run")
    lines = _lines(keys_file) if keys_file else None
    if lines is None and embeddings.files[0].metadata is None and embeddings.keys(pieces[0]) is None:
        raise DataError(f"{embeddings.files[0].path} has no keys, and features are paired by key: give --keys FILE with one a line")
    sizes = [(file.path.name, file.path.stat().st_size, rows) for file, rows in zip(embeddings.files, embeddings.lengths, strict=True)]
    digest = hash_bytes(repr((sizes, shard_rows, hash_file(keys_file) if keys_file else embeddings.key_column)).encode())
    writer = StoreWriter(output, StoreHeader(kind, fingerprint, {}, embeddings.width, digest, len(pieces), total))
    writer.clean()
    last, item = "", -1
    for shard, piece in enumerate(pieces):
        found = embeddings.keys(piece) if lines is None else list(islice(lines, piece.stop - piece.start))
        if found is None:
            raise DataError(f"{embeddings.files[piece.file].path} has no keys, unlike the files before it; give --keys FILE instead")
        keys = ["" if key is None else str(key) for key in found]
        items = []
        for key in keys:
            item = item + 1 if key == last and kind == "caption" else 0
            last = key
            items.append(item)
        if not writer.done(shard):
            kept = [row for row, key in enumerate(keys) if key]
            rejects = [RejectedRow.of(Reject("key_missing"), row, "", "key") for row, key in enumerate(keys) if not key]
            writer.write(shard, embeddings.features(piece)[kept], [keys[row] for row in kept], [items[row] for row in kept], rejects)
    writer.finish()
    return FeatureStore(output)


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file without their ends."""
    try:
        with open(path, encoding="utf-8") as file:
            yield from (line.rstrip("\r\n") for line in file)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text ({error}); give a UTF-8 file with one key a line") from error
