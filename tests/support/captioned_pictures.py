"""The same captioned pictures in every layout that a source may have, and what is read of them."""

import csv
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from align.common.reject_codes import Reject
from align.sources.plan import open_shard, plan


def picture(number):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 7 % 256, number * 31 % 256, 99)).save(buffer, "PNG")
    return buffer.getvalue()


ROWS = 23


KEYS = [f"{number:05d}" for number in range(ROWS)]


CAPTIONS = [f'a "quoted" picture, number {number}\nof many 🐕' for number in range(ROWS)]


def add(tar, name, data=b"", kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    tar.addfile(info, io.BytesIO(data))


def write_images(folder):
    (folder / "images").mkdir(parents=True)
    for number, key in enumerate(KEYS):
        (folder / "images" / f"{key}.png").write_bytes(picture(number))


def write_tar(folder, tar_format=tarfile.PAX_FORMAT):
    with tarfile.open(folder / "a.tar", "w", format=tar_format) as tar:
        for number, key in enumerate(KEYS):
            add(tar, f"{key}.png", picture(number))
            add(tar, f"{key}.json", json.dumps({"text": CAPTIONS[number]}).encode())


def write_parquet(folder, image):
    cells = {
        "bytes": [picture(number) for number in range(ROWS)],
        "struct": [{"bytes": picture(number), "path": None} for number in range(ROWS)],
        "path": [f"images/{key}.png" for key in KEYS],
        "struct of path": [{"bytes": None, "path": f"images/{key}.png"} for key in KEYS],
    }[image]
    pq.write_table(pa.table({"key": KEYS, "image": cells, "text": CAPTIONS}), folder / "a.parquet", row_group_size=5)


def write_arrow(folder, stream=True):
    cells = [{"bytes": picture(number), "path": None} for number in range(ROWS)]
    table = pa.table({"key": KEYS, "image": cells, "text": CAPTIONS})
    with pa.OSFile(str(folder / "a.arrow"), "wb") as file, (pa.ipc.new_stream if stream else pa.ipc.new_file)(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)


def write_jsonl(folder, mark=b"", end="\n", last="\n"):
    lines = [json.dumps({"key": key, "image": f"images/{key}.png", "text": text}) for key, text in zip(KEYS, CAPTIONS, strict=True)]
    (folder / "a.jsonl").write_bytes(mark + (end.join(lines) + last).encode())


def write_csv(folder, name="a.csv", mark=b"", end="\r\n"):
    buffer = io.StringIO()
    rows = [("key", "image", "text"), *((key, f"images/{key}.png", text) for key, text in zip(KEYS, CAPTIONS, strict=True))]
    csv.writer(buffer, lineterminator=end).writerows(rows)
    (folder / name).write_bytes(mark + buffer.getvalue().encode())


LAYOUTS = {
    "pax tar": ("webdataset", write_tar),
    "GNU tar": ("webdataset", lambda folder: write_tar(folder, tarfile.GNU_FORMAT)),
    "ustar": ("webdataset", lambda folder: write_tar(folder, tarfile.USTAR_FORMAT)),
    "parquet, bytes": ("parquet", lambda folder: write_parquet(folder, "bytes")),
    "parquet, struct": ("parquet", lambda folder: write_parquet(folder, "struct")),
    "parquet, path": ("parquet", lambda folder: write_parquet(folder, "path")),
    "parquet, struct of path": ("parquet", lambda folder: write_parquet(folder, "struct of path")),
    "Arrow stream": ("arrow", write_arrow),
    "Arrow file": ("arrow", lambda folder: write_arrow(folder, stream=False)),
    "JSONL": ("jsonl", write_jsonl),
    "JSONL, BOM, CRLF, no last newline": ("jsonl", lambda folder: write_jsonl(folder, b"\xef\xbb\xbf", "\r\n", "")),
    "CSV, CRLF": ("csv", write_csv),
    "CSV, BOM, LF": ("csv", lambda folder: write_csv(folder, mark=b"\xef\xbb\xbf", end="\n")),
}


def readers_of(source, rows_per_shard=10):
    made = plan(source, rows_per_shard)
    return [open_shard(source, made, shard) for shard in range(made.shards.num_rows)]


def all_rows(source, rows_per_shard=10, images=True):
    return [row for reader in readers_of(source, rows_per_shard) for row in reader.rows(images=images)]


def codes(rows):
    """Return what is wrong with each row or its image, None where nothing is."""
    problems = [row.reject or row.image for row in rows]
    return [problem.code if isinstance(problem, Reject) else None for problem in problems]
