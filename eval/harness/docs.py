"""Functions that the YAML tasks in `tasks/` call: rows in; images, questions and scores out.

A row ("doc") is a dict. lmms-eval logs what `score_*` returns for each answer, and `eval.harness.output` reads it again.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from align.common.errors import DataError
from align.common.reject_codes import Reject
from align.sources.gate import Limits, gate_image
from eval.measures.generation import cider, matches, pope_yes_or_no, rouge_l, yes_no_scores, yes_or_no

Doc = Mapping[str, Any]


def encoded_images(rows: Dataset) -> Dataset:
    """Return the rows with the column `image` left encoded (bytes or path): the gate decodes it, and lmms-eval does not log it."""
    if "image" not in rows.column_names:
        raise DataError(f"the rows have no column 'image', only {', '.join(rows.column_names)}")
    return rows.cast_column("image", ImageFeature(decode=False))


def _only(kind: str) -> Callable[[Dataset], Dataset]:
    def of_kind(rows: Dataset) -> Dataset:
        kinds = rows["kind"]
        kept = [number for number, found in enumerate(kinds) if found == kind]
        if not kept:
            raise DataError(f"no row is of the kind {kind!r}; there are {', '.join(sorted(set(kinds)))}")
        return encoded_images(rows.select(kept))

    return of_kind


only_what, only_where, only_count = (_only(kind) for kind in ("what", "where", "count"))


def images(doc: Doc, settings: Mapping[str, Any] | None = None) -> list[Image.Image]:
    """Return a row's images as RGB: pictures, bytes, or paths below the task's `image_root`. DataError if the gate rejects one."""
    found = doc["images"] if "images" in doc else doc.get("image")
    listed = found if isinstance(found, Sequence) and not isinstance(found, str | bytes) else [found]
    root = Path(str((settings or {}).get("image_root", ".")))
    return [_image(one, root, doc) for one in listed if one is not None]


def _image(value: Any, root: Path, doc: Doc) -> Image.Image:
    if isinstance(value, Image.Image):
        return value.convert("RGB")
    where = f"image of row {doc.get('id', doc.get('question_id', '?'))!r}"
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        if "://" in value or PurePosixPath(value).is_absolute() or ".." in PurePosixPath(value).parts:
            raise DataError(f"{where} is {value!r}; expected a path below image_root ({root}), without '..'")
        try:
            value = (root / value).read_bytes()
        except OSError as error:
            raise DataError(f"{where}: cannot read {root / value} ({error.strerror}); is image_root right?") from error
    try:
        return gate_image(value, Limits())
    except Reject as reject:
        raise DataError(f"{where} cannot be used ({reject}); take the row out and run again") from reject


def question(doc: Doc, settings: Mapping[str, Any] | None = None) -> str:
    """Return the question between `pre_prompt` and `post_prompt` of the task's `lmms_eval_specific_kwargs`."""
    settings = settings or {}
    return f"{settings.get('pre_prompt', '')}{doc['question'].strip()}{settings.get('post_prompt', '')}"


def question_with_ocr(doc: Doc, settings: Mapping[str, Any] | None = None) -> str:
    """Return TextVQA's question as LLaVA-1.5 asked it: followed by the reference OCR tokens."""
    settings = settings or {}
    return f"{doc['question'].strip()}\nReference OCR token: {', '.join(doc['ocr_tokens'])}{settings.get('post_prompt', '')}"


def options(doc: Doc, settings: Mapping[str, Any] | None = None) -> str:
    """Return a multiple-choice question (MMBench, SEED) as LLaVA-1.5 asked it: hint, question and lettered options, one per line."""
    hint = doc.get("hint")
    lines = [hint] if isinstance(hint, str) and hint not in ("", "nan") else []
    lines.append(doc["question"].strip())
    for letter in "ABCDE":
        option = doc.get(letter, doc.get(f"choice_{letter.lower()}"))
        if isinstance(option, str) and option not in ("", "nan"):
            lines.append(f"{letter}. {option}")
    return "\n".join(lines) + (settings or {}).get("post_prompt", "")


def score_yes_no(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """Return accuracy (also for the row's kind), and [said, true] for precision, recall, f1 and yes_ratio."""
    return _yes_no(yes_or_no(results[0]), doc, [], f"accuracy_{doc['kind']}")


def score_pope(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """Return POPE's metrics with POPE's own reading of answers. All but accuracy are means over its three categories."""
    return _yes_no(pope_yes_or_no(results[0]), doc, [doc["category"]], None)


def _yes_no(said: str, doc: Doc, group: list[str], also: str | None) -> dict[str, Any]:
    true = doc["answer"].strip().lower()
    accuracy = {name: float(said == true) for name in ("accuracy", also) if name}
    return {**accuracy, **{name: [said, true, *group] for name in ("precision", "recall", "f1", "yes_ratio")}}


def score_exact(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """Return exact_match with the row's `answer` (one or a list) after normalization. Places are compared as places."""
    return {"exact_match": float(matches(results[0], doc["answer"], str(doc.get("kind", ""))))}


def score_letter(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """Return exact_match of the option's letter: the first character of the answer."""
    return {"exact_match": float(results[0].strip()[:1].upper() == doc["answer"].strip().upper())}


def score_caption(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """Return rouge_l and, for cider, [answer, references]; the row's `answer` is one caption or a list."""
    true = [doc["answer"]] if isinstance(doc["answer"], str) else list(doc["answer"])
    return {"rouge_l": rouge_l(results[0], true), "cider": [results[0], true]}


def mean_cider(values: Sequence[Any]) -> float:
    """Return the mean CIDEr-D of a set of captions."""
    return float(cider(values).mean())


def _aggregate(name: str) -> Callable[[Sequence[Any]], float]:
    def of_all(values: Sequence[Any]) -> float:
        return yes_no_scores(values)[name]

    of_all.__name__ = of_all.__qualname__ = name
    return of_all


precision, recall, f1, yes_ratio = (_aggregate(name) for name in ("precision", "recall", "f1", "yes_ratio"))


def seed_images(rows: Dataset) -> Dataset:
    """Return SEED-Bench's rows about images; the others are about videos."""
    return rows.select([number for number, kind in enumerate(rows["data_type"]) if kind == "image"])


def mmbench_accuracy(values: Sequence[Any], args: Any = None) -> float:
    """Return MMBench's accuracy as a fraction, from lmms-eval's offline judge: all circular variants of a question must be right."""
    from lmms_eval.tasks.mmbench.en_utils import mmbench_aggregate_dev_results_static

    return float(mmbench_aggregate_dev_results_static(values, args)) / 100


def mmbench_results(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """Return the answer with the data that MMBench's judge needs about its question."""
    from lmms_eval.tasks.mmbench.en_utils import mmbench_process_results

    return {"accuracy": mmbench_process_results(doc, results)["gpt_eval_score"]}
