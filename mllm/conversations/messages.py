"""Turns a row of a file into checked messages and images, or raises Reject with the reason.

Messages: {"role": system | user | assistant, "content": text or parts}; a part is {"type": "image"} or {"type": "text", "text": ...}.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from align.common.reject_codes import Reject
from align.sources.gate import text_problem
from align.sources.safe_files import image_cell

Message = dict[str, Any]
IMAGE = "<image>"  # mark of an image's place in LLaVA's files
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
MAX_TEXT_CHARS = 2_000_000  # of one conversation


@dataclass(frozen=True)
class RawImage:
    """An image of a row: a path below the image root, or the bytes of an encoded file."""

    path: str | None
    data: bytes | None


def parts_of(message: Message) -> list[dict[str, Any]]:
    """Return a message's content as parts."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def count_images(messages: Sequence[Message]) -> int:
    """Return the number of image parts in the messages."""
    return sum(part["type"] == "image" for message in messages for part in parts_of(message))


def texts_of(messages: Sequence[Message]) -> Iterator[str]:
    """Yield every text of the messages."""
    for message in messages:
        yield from (part["text"] for part in parts_of(message) if part["type"] == "text")


def change_texts(message: Message, change: Callable[[str], str]) -> Message:
    """Return the message with every text replaced by `change(text)`."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": change(content)}
    return {**message, "content": [{**part, "text": change(part["text"])} if part["type"] == "text" else part for part in content]}


def check_messages(messages: Sequence[Message], answered: bool = True) -> None:
    """Raise Reject unless the messages are (system), then user and assistant in turn, ending with an answer (or a question)."""
    for message in messages:
        _check_content(message)
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    roles = [message["role"] for message in turns]
    if not turns or roles != [("user", "assistant")[number % 2] for number in range(len(roles))]:
        raise Reject("role_order", " ".join(roles)[:200] or "no turns")
    if (len(roles) % 2 == 0) != answered:
        raise Reject("role_order", f"the last message is by the {roles[-1]}")
    for message in turns:
        words = any(text.strip() for text in texts_of([message]))
        if message["role"] == "assistant" and not words:
            raise Reject("empty_answer")
        if message["role"] == "user" and not words and not count_images([message]):
            raise Reject("empty_question")


def _check_content(message: Message) -> None:
    if message.get("role") not in ("system", "user", "assistant"):
        raise Reject("role_unknown", repr(message.get("role"))[:100])
    content = message.get("content")
    for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if kind == "image":
            if message["role"] != "user":
                raise Reject("image_role", f"in a message by the {message['role']}")
        elif kind != "text" or not isinstance(text, str):
            raise Reject("content_type", repr(part)[:100])
        elif problem := text_problem(text):
            raise Reject("text_invalid", problem)


def normalize(row: dict[str, Any]) -> tuple[list[Message], list[RawImage]]:
    """Return the messages and images of a row. Raise Reject if it cannot be used.

    Turns are in `conversations` or `messages`, as {from, value} or {role, content}. Images are in `image` or `images`, or in the
    image parts. Without image parts, the text `<image>` marks their places (see `place_images`).
    """
    turns = row["conversations"] if row.get("conversations") is not None else row.get("messages")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise Reject("row_fields", f"it has {', '.join(map(str, row))}"[:200])
    given = [row[name] for name in ("image", "images") if row.get(name) is not None]
    images = [_raw_image(item) for value in given for item in (value if isinstance(value, list) else [value])]
    messages = [_message(turn) for turn in turns]
    if sum(len(text) for text in texts_of(messages)) > MAX_TEXT_CHARS:
        raise Reject("text_large", f"more than {MAX_TEXT_CHARS} characters")
    if count_images(messages):
        inside = [part["image"] for message in messages for part in parts_of(message) if part["type"] == "image"]
        own = [_raw_image(value) for value in inside if value is not None]
        if images and own:
            raise Reject("image_count", "images both in the row and in its messages")
        images = images or own
        messages = [_bare(message) for message in messages]
    else:
        messages = place_images(messages, len(images))
    if count_images(messages) != len(images):
        raise Reject("image_count", f"{count_images(messages)} image parts for {len(images)} images")
    check_messages(messages)
    return messages, images


def _message(turn: dict[str, Any]) -> Message:
    role, content = (turn["from"], turn.get("value")) if "from" in turn else (turn.get("role"), turn.get("content"))
    if not isinstance(role, str) or role not in ROLES:
        raise Reject("role_unknown", repr(role)[:100])
    message = {"role": ROLES[role], "content": [_part(part) for part in content] if isinstance(content, list) else content}
    _check_content(message)
    if isinstance(message["content"], list) and not count_images([message]):
        message["content"] = "".join(texts_of([message]))
    return message


def _part(part: Any) -> Any:
    """Return a content part with our field names. `_check_content` rejects what is unknown."""
    if not isinstance(part, dict):
        return part
    if part.get("type") in ("image", "image_url"):
        place = next((part[name] for name in ("image", "path", "url", "image_url") if part.get(name) is not None), None)
        return {"type": "image", "image": place.get("url") if isinstance(place, dict) and "url" in place else place}
    return {"type": part.get("type"), "text": part.get("text")}  # in parquet every part has the fields of all


def _bare(message: Message) -> Message:
    """Return the message with its image parts reduced to {"type": "image"}."""
    if isinstance(message["content"], str):
        return message
    return {**message, "content": [{"type": "image"} if part["type"] == "image" else part for part in message["content"]]}


def _raw_image(value: Any) -> RawImage:
    value = image_cell(value)
    if isinstance(value, bytes):
        if not value:
            raise Reject("image_missing")
        return RawImage(None, value)
    steps = value.replace("\\", "/").split("/")
    if text_problem(value) or steps[0] == "" or "://" in value or value.startswith("data:") or ".." in steps:
        raise Reject("unsafe_path", f"{value[:200]!r}; allowed are paths relative to the image root and below it")
    return RawImage(value, None)


def place_images(messages: list[Message], images: int) -> list[Message]:
    """Return the messages with `images` of the `<image>` marks in questions turned into image parts. Other marks stay text.

    Marks at the start or end of questions are used if they are as many as the images, else all marks in questions. As in LLaVA, a
    question's only image comes first and its words are stripped. Reject `image_count` if the marks do not match the images.
    """
    counts = []
    for edges in (True, False):
        places = [_marks(message["content"], edges) if message["role"] == "user" else [] for message in messages]
        counts.append(sum(map(len, places)))
        if counts[-1] == images:
            return list(map(_split, messages, places))
    raise Reject("image_count", f"{counts[0]} {IMAGE} at the edges of the questions and {counts[1]} in all, for {images} images")


def _marks(text: str, edges: bool) -> list[int]:
    """Return where marks stand. With `edges`, only those that have just white space and other marks before or after them."""
    places = [match.start() for match in re.finditer(IMAGE, text)]
    words = [bool(piece.strip()) for piece in text.split(IMAGE)]  # before, between and after the marks
    if not edges or not any(words):
        return places
    return places[: words.index(True)] + places[len(places) - words[::-1].index(True) :]


def _split(message: Message, places: list[int]) -> Message:
    if not places:
        return message
    text = message["content"]
    if len(places) == 1:
        words = (text[: places[0]] + text[places[0] + len(IMAGE) :]).strip()
        return {**message, "content": [{"type": "image"}, *([{"type": "text", "text": words}] if words else [])]}
    parts: list[dict[str, Any]] = []
    begin = 0
    for place in [*places, len(text)]:
        piece = text[begin:place] if parts else text[begin:place].lstrip()
        piece = piece.rstrip() if place == len(text) else piece
        if piece:
            parts.append({"type": "text", "text": piece})
        if place < len(text):
            parts.append({"type": "image"})
        begin = place + len(IMAGE)
    return {**message, "content": parts}
