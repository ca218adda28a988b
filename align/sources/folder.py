"""Image folders: a sorted listing, and random access to files. A file's path without its suffix is its key."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from align.common.reject_codes import Reject
from align.sources.gate import gate_key
from align.sources.row import ALONE, IMAGE_ENDINGS, Row, ShardReader, text_captions
from align.sources.safe_files import MAX_ROW_BYTES, read_below
from align.sources.samples import ShardSamples

_ENDINGS = tuple(ending.encode() for ending in IMAGE_ENDINGS)  # names are bytes here


def list_images(folder: str) -> pa.ChunkedArray:
    """Return the sorted paths of the images below a folder, as bytes in one chunk. Hidden entries and linked folders are left out."""
    root = os.fsencode(folder)
    pending, batch, chunks = [b""], list[bytes](), list[pa.Array]()
    while pending:
        below = pending.pop()
        with os.scandir(os.path.join(root, below)) as entries:
            for entry in entries:
                path = os.path.join(below, entry.name)
                if entry.name.startswith(b"."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(path)
                elif entry.name.lower().endswith(_ENDINGS):
                    batch.append(path)
                    if len(batch) == 1 << 16:  # Python strings take five times the memory
                        chunks.append(pa.array(batch, pa.large_binary()))
                        batch = []
    names = pa.chunked_array([*chunks, pa.array(batch, pa.large_binary())]).combine_chunks()
    return pa.chunked_array([names.take(pc.sort_indices(names))])


class FolderReader(ShardReader):
    """Image files of a folder. Fields: `label`, the parent folder's name, and `txt`, from a .txt file next to the image."""

    def __init__(self, file: str, start: int, stop: int, image: str, names: Sequence[bytes], samples: ShardSamples = ALONE) -> None:
        """`file` is the folder; `names` are the paths below it of rows start to stop."""
        self._names = names
        super().__init__(file, start, stop, 0, image, "", file, samples)

    def _open(self) -> None:
        assert len(self._names) == len(self)

    def names(self, images: bool) -> Iterator[tuple[str | None, str | None]]:
        for name in self._names:
            yield os.path.splitext(os.fsdecode(name))[0], None

    def begin(self, index: int) -> int:
        return 0

    def _read(self, start: int, stop: int, images: bool) -> Iterator[Row]:
        for index in range(start, stop):
            path = os.fsdecode(self._names[index])
            stem = os.path.splitext(path)[0]
            key, fields = self._row_name(index), dict[str, Any]()
            if folder := os.path.dirname(path):
                fields["label"] = os.fsencode(os.path.basename(folder)).decode("utf-8", "replace")
            try:
                key = gate_key(stem)
                if os.path.lexists(os.path.join(self.root, f"{stem}.txt")):
                    fields["txt"] = text_captions(read_below(self.root, f"{stem}.txt", MAX_ROW_BYTES), whole=False)
            except Reject as reject:
                yield Row(index, key, None, fields, reject)
                continue
            yield Row(index, key, self._image_of(path) if images else None, fields)
