"""Chat templates in Jinja: ours, the tokenizer's own, and how one is applied.

`{% generation %}` and `{% endgeneration %}` enclose what a model learns. Contents are texts or lists of parts,
{"type": "image"} and {"type": "text", "text": ...}.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from align.common.errors import UsageError
from align.common.limits import bounded
from align.common.reject_codes import Reject
from mllm.conversations.messages import Message

# A line break follows an image unless white space is there anyway: "<image>\nWhat is this?", as in LLaVA.
_CONTENT = """
{%- macro content_of(message) -%}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>' -}}
{%- if not loop.last and not (loop.nextitem['type'] == 'text' and loop.nextitem['text'][:1] in [' ', '\\n']) -%}{{- '\\n' -}}{%- endif -%}
{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
# The question's words are left out; the caption follows the image directly.
_PLAIN = """
{%- for message in messages -%}
{%- if message['role'] == 'user' and loop.first -%}
{%- set content = content_of(message) -%}
{%- if '<image>' not in content -%}{{- raise_exception('the template plain needs an image in the question') -}}{%- endif -%}
{{- '<image>' * (content.split('<image>') | length - 1) -}}
{%- elif message['role'] == 'assistant' and loop.index == 2 -%}
{%- generation -%}{{- content_of(message) + '\\n' -}}{%- endgeneration -%}
{%- else -%}{{- raise_exception('the template plain takes one image and one caption, nothing else') -}}
{%- endif -%}
{%- endfor -%}
"""
_VICUNA = """
{%- if messages[0]['role'] == 'system' -%}{{- content_of(messages[0]) + ' ' -}}
{%- else -%}
{{- "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, " -}}
{{- "and polite answers to the user's questions. " -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{- 'USER: ' + content_of(message) + ' ' -}}
{%- elif message['role'] == 'assistant' -%}
{{- 'ASSISTANT:' -}}{%- generation -%}{{- ' ' + content_of(message) + eos_token -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
_CHATML = """
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- content_of(message) + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}{{- content_of(message) + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
# One line per question and answer, no role names: few tokens. The space before an answer is part of it, and no question ends with
# white space: else prompt and training row would be tokenized differently there.
_BRIEF = """
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- ' ' + content_of(message) + eos_token -}}{%- endgeneration -%}{{- '\\n' -}}
{%- elif message['role'] == 'system' -%}{{- content_of(message) + '\\n' -}}
{%- else -%}{{- content_of(message).rstrip() -}}
{%- endif -%}
{%- endfor -%}
"""
TEMPLATES = {"plain": _CONTENT + _PLAIN, "vicuna_v1": _CONTENT + _VICUNA, "chatml": _CONTENT + _CHATML, "brief": _CONTENT + _BRIEF}

# Put before a template that knows only texts: makes every content a text. Jinja drops the line break after the last tag.
_FLATTEN = f"""{_CONTENT}
{{%- set flat = namespace(messages=[]) -%}}
{{%- for message in messages -%}}
{{%- set flat.messages = flat.messages + [dict(message, content=content_of(message))] -%}}
{{%- endfor -%}}
{{%- set messages = flat.messages %}}
"""
# Put before a template that has no place for the system's text, or a place that moves with each further question: it begins the first
# question. Mistral's template has it in the last one, so that no earlier answer would be asked for as it was learned.
_SYSTEM_FIRST = """
{%- if messages | length > 1 and messages[0]['role'] == 'system' -%}
{%- set words, asked = messages[0]['content'], messages[1]['content'] -%}
{%- set words = words if words is string else words | map(attribute='text') | join -%}
{%- set lead = words + '\\n\\n' if words | trim else '' -%}
{%- set asked = lead + asked if asked is string else [{'type': 'text', 'text': lead}] + asked if lead else asked -%}
{%- set messages = [dict(messages[1], content=asked)] + messages[2:] -%}
{%- endif %}
"""
PINNED = datetime(2024, 7, 26)  # the date that templates see which ask for today's; a day that Llama 3's templates fall back on
MAX_SECONDS, MAX_BYTES, MAX_CHARS = 5.0, 1 << 29, 20_000_000  # of a template for one conversation
_PINNED_MARK = "{%- macro strftime_now(format) -%}"
_CLOCK = re.compile(r"""strftime_now\s*\(\s*(["'])(.*?)\1\s*\)""")
_RANDOM = re.compile(r"\|\s*random\b|\blipsum\s*\(")
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE: list[Message] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a question"}]}]
_SYSTEM: Message = {"role": "system", "content": "a system text"}
_TURNS: list[Message] = [*_PROBE, {"role": "assistant", "content": "an answer"}]
_TURNS += [{"role": "user", "content": "another question"}, {"role": "assistant", "content": "another answer"}]


def resolve_template(tokenizer: PreTrainedTokenizerBase, template: str, image_token: str = "<image>") -> str:
    """Return the Jinja text of a template: a name of TEMPLATES, "own" (the tokenizer's), a .jinja file, or Jinja itself.

    Dates are pinned (see `pin_clock`). A template that knows only texts gets a prologue that turns image parts into `image_token`, one
    that cannot place a system text gets one that puts it into the first question. So the same string serves training and a Hugging Face
    processor. UsageError for an unknown name or a tokenizer without a template.
    """
    if template in TEMPLATES:
        return TEMPLATES[template].replace("<image>", image_token)
    if template == "own":
        if not isinstance(tokenizer.chat_template, str):
            raise UsageError("the tokenizer has no chat template of its own; use vicuna_v1, chatml, brief or plain")
        template = tokenizer.chat_template
    elif template.endswith(".jinja") and Path(template).is_file():
        template = Path(template).read_text(encoding="utf-8")
    elif "{%" not in template and "{{" not in template:
        raise UsageError(f"chat template {template!r} is unknown; allowed: {', '.join(TEMPLATES)}, own, or a .jinja file that exists")
    template = pin_clock(template)
    flat = True
    with suppress(Reject):
        flat = apply_template(tokenizer, template, _PROBE)[0].count(image_token) != 1
    template = _FLATTEN.replace("<image>", image_token) + template if flat else template
    takes = any(_grows(tokenizer, template, _TURNS[:end]) for end in (4, 2))  # as it is, without a system text
    return _SYSTEM_FIRST + template if takes and not _places_system(tokenizer, template) else template


def puts_system_first(template: str) -> bool:
    """Return whether `resolve_template` made the system's text a part of the first question."""
    return _SYSTEM_FIRST in template


def _places_system(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Return whether a template has a place for a system text where earlier turns stay as they are, or would have none in questions."""
    end = 4 if _grows(tokenizer, template, _TURNS) else 2
    own = _grows(tokenizer, template, [_SYSTEM, *_TURNS[:end]])
    return own or not _grows(tokenizer, _SYSTEM_FIRST + template, [_SYSTEM, *_TURNS[:end]])


def _grows(tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message]) -> bool:
    """Return whether a template takes the messages, shows a system text among them, and begins with the prompt of each answer."""
    try:
        whole = apply_template(tokenizer, template, messages)[0]
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        prompts = [apply_template(tokenizer, template, messages[:number], ask=True)[0] for number in answers]
    except Reject:
        return False
    shown = all(message["content"] in whole for message in messages if message["role"] == "system")
    return shown and all(map(whole.startswith, prompts))


def marks_answers(template: str) -> bool:
    """Return whether a template marks what is learned."""
    return _MARKER.search(template) is not None


def apply_template(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Sequence[Message], ask: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a conversation and the character spans of what is learned (none unless the template marks them).

    `ask` adds the start of the model's next answer. Reject `template` if the template refuses the messages, or takes more than
    MAX_SECONDS, MAX_BYTES or MAX_CHARS.
    """
    marked = marks_answers(template)
    options: dict[str, Any] = {"return_assistant_tokens_mask": marked, "add_generation_prompt": ask, **tokenizer.special_tokens_map}
    try:
        with bounded(MAX_SECONDS, MAX_BYTES):
            rendered: Any = render_jinja_template([list(messages)], chat_template=template, **options)
    except Exception as error:
        raise Reject("template", f"{type(error).__name__}: {error}"[:300]) from error
    [text], spans = rendered
    if len(text) > MAX_CHARS:
        raise Reject("template", f"it writes {len(text)} characters")
    return text, spans[0] if marked else []


def pin_clock(template: str) -> str:
    """Return a template in which `strftime_now`, if it is used, always gives the date PINNED: training and answering see one date.

    UsageError if it is called in another way than with a format in quotes, or if the template draws at random.
    """
    if drawn := _RANDOM.search(template):
        raise UsageError(f"the chat template draws at random ({drawn[0].strip()!r}): prompts would not be what was trained; take it out")
    if "strftime_now" not in template or _PINNED_MARK in template:
        return template
    formats = sorted({match[2] for match in _CLOCK.finditer(template)})
    calls = len(re.findall(r"strftime_now\s*\(", template))
    if calls != len(_CLOCK.findall(template)) or not formats:
        raise UsageError("the chat template reads the clock with a computed format; write the date out, or give strftime_now a text")
    cases = [
        f"{{%- if format == {_quoted(one)} -%}}{{{{- {_quoted(PINNED.strftime(one))} -}}}}{{%- endif -%}}" for one in formats
    ]  # fmt: skip
    return f"{_PINNED_MARK}{''.join(cases)}{{%- endmacro %}}{template}"


def _quoted(text: str) -> str:
    return json.dumps(text)


def control_tokens(tokenizer: PreTrainedTokenizerBase, template: str, image_token: str) -> dict[str, int]:
    """Return text and id of the tokens that data must never become: special ones, and added ones that the template writes."""
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    return {
        token.content: index
        for index, token in added.items()
        if token.special or token.content == image_token or (token.content in template and not token.content.isspace())
    }


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer puts before every text: a begin token or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return next(full[:start] for start in range(len(full)) if full[start : start + len(bare)] == bare)
