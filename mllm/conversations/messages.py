"""Messages of a conversation: their parts, texts and images, what makes them valid, and where `<image>` marks a place.

Messages: {"role": system | user | assistant, "content": text or parts}; a part is {"type": "image"} or {"type": "text", "text": ...}.
An answer with "loss": False is not learned.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from align.common.reject_codes import Reject
from align.sources.gate import text_problem

Message = dict[str, Any]
IMAGE = "<image>"  # mark of an image's place in LLaVA's files


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
        check_content(message)
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


def from_question(messages: list[Message]) -> tuple[list[Message], int]:
    """Return the messages without the answers before the first question, and how many there were."""
    head = int(bool(messages) and messages[0]["role"] == "system")
    skipped = 0
    while head + skipped < len(messages) and messages[head + skipped]["role"] == "assistant":
        skipped += 1
    if head + skipped == len(messages):  # then there is no question at all
        return messages, 0
    return messages[:head] + messages[head + skipped :], skipped


def check_content(message: Message) -> None:
    """Raise Reject unless the role is known and the content is text, or parts of text and, in questions, images."""
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


def marks_all(messages: Sequence[Message], images: int) -> bool:
    """Return whether the questions have, as text, one `<image>` for each of the images."""
    return images > 0 and images == sum(
        text.count(IMAGE) for message in messages if message["role"] == "user" for text in texts_of([message])
    )


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
