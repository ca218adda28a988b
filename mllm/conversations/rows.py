"""Turns a row of a file into checked messages and images. Every key is read, known to be mere description, or a reason to reject the row.

A key that is empty (null, "", [], {}, NaN) is as good as absent.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from align.common.reject_codes import Reject
from align.sources.gate import text_problem
from align.sources.safe_files import image_cell
from mllm.conversations.described import description, is_description
from mllm.conversations.messages import (
    Message,
    check_content,
    check_messages,
    count_images,
    from_question,
    marks_all,
    parts_of,
    place_images,
    texts_of,
)

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
MAX_TEXT_CHARS = 2_000_000  # of one conversation
TURN_KEYS, IMAGE_KEYS, SYSTEM_KEYS = ("conversations", "messages", "texts"), ("image", "images"), ("system", "system_prompt")
TURNS_SAID = "turns are in conversations (a list of {from, value}), messages ({role, content}) or texts ({user, assistant})"
LEARNED_KEYS = ("loss", "weight", "train")  # of an answer: whether it is learned
# Keys that describe a row and change nothing of what it teaches. Any other key is read or rejects the row.
_DESCRIPTION = """
id idx index key uid uuid hash md5 sha256 __key__ __url__ source source_file sources data_source dataset dataset_name origin url
license split image_source text_source category categories subset domain topic type task task_type task_name tag tags lang
language meta metadata model model_name generator created created_at date timestamp score scores quality rating length lengths
num_tokens num_turns width height widths heights width_list height_list image_width image_height image_size image_sizes
original_width original_height resolution aspect_ratio file_name filename image_name formatting_ratings relevance_ratings
visual_dependency_ratings image_correspondence_ratings formatting_min relevance_min visual_dependency_min image_correspondence_min
comment comments note notes
"""
DESCRIPTION = frozenset(_DESCRIPTION.split())
_NO_IMAGE = ("", "none", "null", "nan", "na", "n/a")


@dataclass(frozen=True)
class RawImage:
    """An image of a row: a path below the image root, the bytes of an encoded file, or a description (mllm.conversations.described)."""

    path: str | None
    data: bytes | None
    described: str | None = None


class Normalized(NamedTuple):
    """A row as conversation; `skipped` turns at its beginning were answers to no question."""

    messages: list[Message]
    images: list[RawImage]
    skipped: int


def is_read(name: str) -> bool:
    """Return whether `normalize` looks at a key, because it is no mere description."""
    return name not in DESCRIPTION and not name.endswith(("_id", "_ids"))


def normalize(row: Mapping[str, Any], ignored: Collection[str] = ()) -> Normalized:
    """Return the messages and images of a row. Raise Reject if it cannot be used, or has a key that may change what it means.

    Turns are in `conversations` or `messages`, as {from, value} or {role, content}, or in `texts` as {user, assistant}. Images are in
    `image` or `images`, or in the image parts. Without image parts, the text `<image>` marks their places (see `place_images`); those
    of `texts` come first unless it does. `system` or `system_prompt` is the system's text. A turn with loss or train false, or weight 0,
    is not learned. Answers before the first question are skipped, as in LLaVA. Keys in `ignored` are not read.
    """
    row = _known(row, (*TURN_KEYS, *IMAGE_KEYS, *SYSTEM_KEYS), ignored, "")
    named = [name for name in TURN_KEYS if name in row]
    if len(named) != 1:
        found = f"several of {', '.join(named)}" if named else f"it has {', '.join(map(str, row))}"
        raise Reject("row_fields", f"{found[:200]}; {TURNS_SAID}")
    turns = _turns(named[0], row[named[0]])
    images = [image for name in IMAGE_KEYS for image in _images(row.get(name))]
    messages = list(_pairs(turns, ignored)) if named == ["texts"] else [_message(turn, ignored) for turn in turns]
    messages = _with_system(messages, [row[name] for name in SYSTEM_KEYS if name in row])
    messages, skipped = from_question(messages)
    if sum(len(text) for text in texts_of(messages)) > MAX_TEXT_CHARS:
        raise Reject("text_large", f"more than {MAX_TEXT_CHARS} characters")
    if count_images(messages):
        inside = [part["image"] for message in messages for part in parts_of(message) if part["type"] == "image"]
        own = [image for value in inside for image in _images(value)]
        if images and own:
            raise Reject("image_count", "images both in the row and in its messages")
        images = images or own
        messages = [_bare(message) for message in messages]
    elif named == ["texts"] and not marks_all(messages, len(images)):
        shown: list[dict[str, Any]] = [{"type": "image"} for _ in images]
        first = next(number for number, message in enumerate(messages) if message["role"] == "user")
        messages[first] = {**messages[first], "content": [*shown, *parts_of(messages[first])]} if images else messages[first]
    else:
        messages = place_images(messages, len(images))
    if count_images(messages) != len(images):
        raise Reject("image_count", f"{count_images(messages)} image parts for {len(images)} images")
    check_messages(messages)
    return Normalized(messages, images, skipped)


def _turns(name: str, value: Any) -> list[dict[str, Any]]:
    """Return the turns of a cell: a list of objects, or an object of lists, as `datasets` writes a sequence of objects."""
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) != 1:
            raise Reject("row_fields", f"the lists in {name} are not of one length")
        value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        kinds = sorted({type(turn).__name__ for turn in value}) if isinstance(value, list) else []
        found = f"{name} is a {type(value).__name__}{' of ' + ', '.join(kinds) if kinds else ''}"
        raise Reject("row_fields", f"{found[:200]}; {TURNS_SAID}{'; parse the text as JSON first' if isinstance(value, str) else ''}")
    return value


def _known(values: Mapping[str, Any], known: Collection[str], ignored: Collection[str], where: str) -> dict[str, Any]:
    """Return what holds something and is not `ignored`. Raise Reject `row_key` for a key not in `known` that is no mere description."""
    kept = {name: value for name, value in values.items() if name not in ignored and not _empty(value)}
    for name, value in kept.items():
        if name not in known and is_read(str(name)):
            advice = f"if nothing is lost without it, take it out, or give check and finetune --ignore-keys {name}"
            raise Reject("row_key", f"{where}{name}: {str(value)[:80]!r}; {advice}")
    return kept


def _empty(value: Any) -> bool:
    """Return whether a value says that there is nothing."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str | bytes | list | dict) and not value)


def _images(value: Any) -> Iterator[RawImage]:
    """Yield the images in a cell: a path, bytes, a struct of both, or a list of these; nothing for any spelling of "no image"."""
    items = value if isinstance(value, list) else [value]
    if not all(map(_no_image, items)):
        yield from map(_raw_image, items)


def _no_image(value: Any) -> bool:
    if isinstance(value, dict) and value.keys() <= {"bytes", "path", "url"}:
        return all(map(_no_image, value.values()))
    return value is False or _empty(value) or (isinstance(value, str) and value.strip().lower() in _NO_IMAGE)


def _with_system(messages: list[Message], given: list[Any]) -> list[Message]:
    """Return the messages with the row's own system text before them."""
    texts: list[Any] = [message["content"] for message in messages[:1] if message["role"] == "system"]
    if not given or texts == given:
        return messages
    if len(given) + len(texts) > 1:
        raise Reject("row_key", f"{len(given) + len(texts)} system texts in one row")
    system = {"role": "system", "content": given[0]}
    check_content(system)
    return [system, *messages]


def _pairs(turns: list[dict[str, Any]], ignored: Collection[str]) -> Iterator[Message]:
    """Yield the messages of question-answer pairs {user, assistant}, the layout of The Cauldron."""
    for turn in turns:
        turn = _known(turn, ("user", "assistant", *LEARNED_KEYS), ignored, "in a turn, ")
        yield _message({"role": "user", "content": turn.get("user", "")}, ignored)
        yield _message({"role": "assistant", "content": turn.get("assistant", "")} | {k: turn.get(k) for k in LEARNED_KEYS}, ignored)


def _message(turn: dict[str, Any], ignored: Collection[str]) -> Message:
    names = ("from", "value") if not _empty(turn.get("from")) else ("role", "content")
    role, content = (turn.get(name) for name in names)
    if not isinstance(role, str) or role not in ROLES:
        raise Reject("role_unknown", repr(role)[:100])
    turn = _known(turn, (*names, *LEARNED_KEYS), ignored, "in a turn, ")
    parts = [_part(part, ignored) for part in content] if isinstance(content, list) else content
    message = {"role": ROLES[role], "content": parts}
    check_content(message)
    if isinstance(parts, list) and not count_images([message]):
        message["content"] = "".join(texts_of([message]))
    learned = _is_learned(turn, ROLES[role])
    return message if learned else {**message, "loss": False}


def _is_learned(turn: dict[str, Any], role: str) -> bool:
    """Return whether an answer is learned. Reject a weight that is neither 0 nor 1, and a question that is to be learned."""
    given = {name: turn[name] for name in LEARNED_KEYS if turn.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1) or (value and role != "assistant"):
            raise Reject("row_key", f"in a turn by the {role}, {name}: {value!r}; answers are learned (1, true) or not (0, false)"[:200])
    if len(set(given.values())) > 1:
        raise Reject("row_key", f"in a turn, {given}: one says that it is learned, another that it is not"[:200])
    return role != "assistant" or all(given.values())


def _part(part: Any, ignored: Collection[str]) -> Any:
    """Return a content part with our field names. `check_content` rejects what is unknown."""
    if not isinstance(part, dict):
        return part
    if part.get("type") in ("image", "image_url"):
        names = ("image", "path", "url", "image_url")
        part = _known(part, (*names, "type", "detail"), ignored, "in an image, ")  # in parquet every part has the fields of all
        place = next((part[name] for name in names if not _no_image(part.get(name))), None)
        return {"type": "image", "image": place.get("url") if isinstance(place, dict) and "url" in place else place}
    if part.get("type") == "text":
        _known(part, ("type", "text", "cache_control"), ignored, "in a text, ")
    return {"type": part.get("type"), "text": part.get("text")}


def _bare(message: Message) -> Message:
    """Return the message with its image parts reduced to {"type": "image"}."""
    if isinstance(message["content"], str):
        return message
    return {**message, "content": [{"type": "image"} if part["type"] == "image" else part for part in message["content"]]}


def _raw_image(value: Any) -> RawImage:
    if is_description(value):
        return RawImage(None, None, description(value))
    value = image_cell(None if _no_image(value) else value)
    if isinstance(value, bytes):
        return RawImage(None, value)
    steps = value.replace("\\", "/").split("/")
    if text_problem(value) or value.startswith(("\\", "data:")) or "://" in value or ".." in steps:
        raise Reject("unsafe_path", f"{value[:200]!r}; allowed are paths below the image root")
    return RawImage(value, None)
