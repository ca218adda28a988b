"""Conversation and question files of stage two: rows as LLaVA's JSON holds them, and test questions as parquet.

The same rows give the same bytes.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def conversation_row(key: str, image: str, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return LLaVA's row of a picture: the (human, gpt) turns in order, `<image>` before the first.

    `image` is the path of the picture relative to the image root. An empty first question leaves `<image>` alone.
    """
    said = []
    for number, (question, answer) in enumerate(turns):
        marked = f"<image>\n{question}".rstrip() if number == 0 else question
        said += [{"from": "human", "value": marked}, {"from": "gpt", "value": answer}]
    return {"id": key, "image": image, "conversations": said}


def write_conversations(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as a JSON array, or as JSON lines if `path` ends with .jsonl; one row a line either way."""
    lines = [json.dumps(row) for row in rows]
    text = "".join(f"{line}\n" for line in lines) if path.suffix == ".jsonl" else "[\n" + ",\n".join(lines) + "\n]\n"
    path.write_text(text)


def question_row(key: str, image: tuple[str, bytes], question: str, answer: str | list[str], kind: str) -> dict[str, Any]:
    """Return one row of a question table; `image` is the picture's file name and content, `kind` groups questions.

    The kit's own kinds are exists, relation, what, where, count and caption. Several right answers make a list.
    """
    return {"id": key, "image": {"bytes": image[1], "path": image[0]}, "question": question, "answer": answer, "kind": kind}


def write_questions(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of `question_row` as parquet; a picture asked about several times in a row takes its space once.

    The answers of one file are all texts or all lists.
    """
    several = bool(rows) and isinstance(rows[0]["answer"], list)
    columns = {
        "id": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "question": pa.string(),
        "answer": pa.list_(pa.string()) if several else pa.string(),
        "kind": pa.string(),
    }
    pq.write_table(pa.Table.from_pylist(list(rows), schema=pa.schema(columns)), path, compression="zstd", row_group_size=500)
