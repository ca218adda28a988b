"""What a model is asked is the beginning of what it learned, token by token; templates see one date and stay within limits."""

import datetime
import time
from unittest.mock import patch

import pytest

from align.common.errors import UsageError
from align.common.limits import bounded
from align.common.reject_codes import Reject
from mllm.conversations import templates
from mllm.conversations.rows import normalize
from mllm.conversations.tokens import Chat
from tests.support import tiny_mllm
from tests.support.short_conversations import chat, conversation

BODY = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
SPACED = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
OTHER = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}assistant:{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    "{% else %}user:{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


WHITE = ["a\n\nb", "a\n\n\nb", "a\n\n\n b", "a  b"] * 200


def made(template, chatml=True):
    with patch.object(tiny_mllm, "TEXTS", [*tiny_mllm.TEXTS, *WHITE]):  # a tokenizer that merges white space
        tokenizer = tiny_mllm.tiny_tokenizer(chatml=chatml)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    return Chat(tokenizer, template, image_tokens=4)


def talk(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def outcome(one, messages):
    found = one.encode_many([messages], seams=True)[0]
    return found.code if isinstance(found, Reject) else "good"


def composes(one, messages):
    """Return whether each prompt's ids begin the row's, computed by tokenizing whole texts."""
    row = one.encode(messages).input_ids
    prompts = [one.prompt_ids(messages[:n]) for n, message in enumerate(messages) if message["role"] == "assistant"]
    return all(row[: len(prompt)] == prompt for prompt in prompts)


ANSWERS = ["a dog", " a dog", "\na dog", "\n\n a dog", "  a dog", "\ta dog", "!", "é", "🐕 dog", "1", "a\n", "dog " * 9]
QUESTIONS = ["what?", "what? ", "what?\n", " what?\n\n", "a"]


@pytest.mark.parametrize("template", ["vicuna_v1", "brief", "chatml", BODY, SPACED])
def test_a_row_is_taken_only_if_its_prompts_begin_it(template):
    one = made(template)
    found = {}
    for question in QUESTIONS:
        for first in ANSWERS:
            for second in ("no", "\nno"):
                messages = talk(question, first, question, second)
                wanted = "good" if composes(one, messages) else "prompt_seam"
                assert outcome(one, messages) == wanted, messages
                found[wanted] = found.get(wanted, 0) + 1
    assert found["good"] > 10 and ("prompt_seam" in found or template in ("vicuna_v1", "brief")), found


def test_rows_that_spell_special_tokens_compose_alike():
    for template in ("vicuna_v1", BODY):
        one = made(template)
        for text in ("is </s> a token?", "<image> <s>", "a</s>"):
            assert composes(one, talk(text, "yes </s>", text, "no")) and outcome(one, talk(text, "yes </s>", text, "no")) == "good"


@pytest.mark.parametrize("template", [OTHER, MARKED])
def test_a_template_that_asks_otherwise_than_it_teaches_is_found(template):
    if template == OTHER:
        with pytest.raises(UsageError, match="chat template"):
            made(template)
        return
    one = made(template)
    assert outcome(one, talk("what?", "a dog")) == "prompt_seam"


def test_answers_that_are_not_learned_need_no_seam():
    messages = talk("what?", "\n\n a dog", "what?", "a cat")
    messages[1]["loss"] = False
    one = made(BODY)
    assert outcome(one, messages) == "good" if composes(one, messages) else "prompt_seam"


def test_the_index_counts_broken_seams(make):
    from mllm.conversations.index import build_index

    rows = [conversation(n) for n in range(4)]
    rows[1]["conversations"][1]["value"] = "\n\na dog"
    index = build_index(make(rows), made("chatml"), 500, max_reject_fraction=1)
    assert index.codes == {"prompt_seam": 1} and len(index.good) == 3


DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') }}{{ strftime_now(\"%A\") }}\n" + BODY
LLAMA = "{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = 'x' %}{% endif %}{% endif %}{{ date_string }}\n" + BODY  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("template", [DATED, LLAMA])
def test_a_template_that_reads_the_clock_sees_one_date_everywhere(template, monkeypatch):
    one = made(template)
    text = one.prompt(talk("what?"))
    assert "26 Jul 2024" in text and ("Friday" in text) == (template is DATED)

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    again = made(template)
    assert again.prompt(talk("what?")) == text and again.fingerprint == one.fingerprint
    assert outcome(again, talk("what?", "a dog")) == "good"
    stock = one.tokenizer.apply_chat_template(talk("what?"), chat_template=one.template, tokenize=False, add_generation_prompt=True)
    assert stock == text, "the exported template is pinned, too"
    assert templates.pin_clock(one.template) == one.template


@pytest.mark.parametrize(("template", "message"), [
    ("{{ strftime_now('%d' + messages[0]['content']) }}" + BODY, "computed format"),
    ("{% set f = '%d' %}{{ strftime_now(f) }}" + BODY, "computed format"),
    ("{{ ['a', 'b'] | random }}" + BODY, "at random"),
    ("{{ lipsum(1) }}" + BODY, "at random"),
])  # fmt: skip
def test_what_cannot_be_pinned_is_refused(template, message):
    with pytest.raises(UsageError, match=message):
        made(template)


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}",
    "grows": "{% set n = namespace(t='a') %}{% for a in range(99) %}{% set n.t = n.t + n.t %}{% endfor %}",
    "repeats": "{{ 'a' * 99999999999 }}",
    "pads": "{{ '%999999999999d' % 1 }}",
    "writes": "{% for a in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "divides": "{{ 1 // 0 }}",
    "nests": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "recurses": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_takes_too_much_is_refused(name, monkeypatch):
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.3)
    monkeypatch.setattr(templates, "MAX_BYTES", 64 << 20)
    with pytest.raises(UsageError, match="chat template cannot be used"):
        made(ENDLESS[name] + BODY)


def test_limits_end_with_their_block():
    with pytest.raises(TimeoutError, match="computes for more than"), bounded(0.1, 1 << 30):
        while True:
            pass
    with pytest.raises(MemoryError), bounded(9, 1 << 28):
        bytes(1 << 33)
    assert len(bytes(1 << 28)) == 1 << 28
    time.sleep(0.2)


ALWAYS = "{% for m in messages %}{{ 'ROLE' + m['role'] + '\\n' + m['content'] + 'END' }}{% endfor %}"


@pytest.mark.parametrize("behind", ["{{ 'ROLEassistant\\n' }}", "{{ 'ROLEassistant\\n' if add_generation_prompt else '</s>' }}"])
def test_what_a_template_always_writes_behind_the_last_answer_belongs_to_no_answer(behind):
    """The beginning of a next answer (many Llama-3 templates), or the end of the text (Phi-3's)."""
    chat = made((ALWAYS + behind).replace("ROLE", "<|im_start|>").replace("END", "<|im_end|>"))
    talk = normalize(conversation(1, turns=2)).messages
    [encoded] = chat.encode_many([talk], seams=True)
    said = chat.tokenizer.decode([label for label in encoded.labels if label >= 0])
    answers = [message["content"] for message in talk if message["role"] == "assistant"]
    assert said.replace("<|im_start|>assistant\n", "") == "".join(f"{answer}<|im_end|>" for answer in answers)
    assert chat.tokenizer.convert_tokens_to_ids("<|im_end|>") in chat.stop_ids


def test_a_template_that_always_asks_without_an_end_token_is_told_so():
    with pytest.raises(UsageError, match="add_generation_prompt"):
        made((ALWAYS + "{{ 'ROLEassistant\\n' }}").replace("ROLE", "[").replace("END", "]"))


def test_good_rows_stay_good():
    rows = [normalize(conversation(n, turns=1 + n % 3, images=n % 2))[0] for n in range(20)]
    assert all(not isinstance(found, Reject) for found in chat().encode_many(rows, seams=True))
