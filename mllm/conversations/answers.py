"""Where the answers stand in a conversation's text, as character spans, under a template without marks; and which of them are learned."""

import os
import re
from collections.abc import Callable, Sequence

from align.common.reject_codes import Reject
from mllm.conversations.messages import Message, texts_of

Spans = list[tuple[int, int]]
Apply = Callable[..., tuple[str, Spans]]  # messages, ask: the text of a template
_ANEW = (
    "it writes earlier turns anew as the conversation grows, so answers cannot be located; put {% generation %} and {% endgeneration %} "
    "around the answers, or give --template vicuna_v1, chatml or brief"
)


def added_spans(apply: Apply, messages: Sequence[Message], text: str, control: re.Pattern[str]) -> Spans:
    """Return the spans of the answers in `text`: what each adds to the prompt before it, up to the `control` token that ends it.

    Reject `template` if a prompt is not the beginning of what comes after it.
    """
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = apply(messages[:number], ask=True)[0], apply(messages[: number + 1])[0]
        said = _ended(os.path.commonprefix([after, text])[len(before) :], "".join(texts_of([message])).strip(), control)
        if not text.startswith(before) or not after.startswith(before) or (said is None and not text.startswith(after)):
            raise Reject("template", _ANEW)
        if said is None:
            said = after[len(before) :]
            ends = [match.end() for match in control.finditer(said)]
            if ends and not said[ends[-1] :].strip():  # the model need not learn the line break after the end token
                said = said[: ends[-1]]
        spans.append((len(before), len(before) + len(said)))
    return spans


def _ended(said: str, answer: str, control: re.Pattern[str]) -> str | None:
    """Return `said` up to the control token that follows `answer` in it directly, None if none does.

    What a template writes behind it belongs to no answer: the end of the whole text, or the beginning of a next answer.
    """
    begin = said.find(answer)
    end = begin + len(answer)
    end += len(said[end:]) - len(said[end:].lstrip())
    found = control.match(said, end) if begin >= 0 else None
    return said[: found.end()] if found else None


def learned_spans(messages: Sequence[Message], spans: Spans) -> Spans:
    """Return the spans of the answers that are learned, of the spans of all."""
    answers = [message for message in messages if message["role"] == "assistant"]
    if len(answers) != len(spans):
        raise Reject("template", f"it marks {len(spans)} of {len(answers)} answers, of which some are not to be learned")
    return [span for span, message in zip(spans, answers, strict=True) if message.get("loss", True)]
