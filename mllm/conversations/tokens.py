"""Conversations to token ids and labels: where the images go and which tokens are learned.

The chat template itself says what is learned, by character offsets. Questions and answers are data: `<image>` or `</s>` in them
become ordinary text, never the special token.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from align.common.errors import UsageError
from align.common.files import hash_bytes
from align.common.reject_codes import Reject
from mllm.conversations.answers import added_spans, learned_spans
from mllm.conversations.messages import Message, change_texts, check_messages, count_images, texts_of
from mllm.conversations.seams import Seam, Tokens, broken_seams
from mllm.conversations.templates import TEMPLATES, apply_template, control_tokens, marks_answers, prefix_ids, resolve_template

IGNORED = -100  # the label of a token that is not learned
_CUTS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # noncharacters, which are rare in texts
_PROBE: list[Message] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "first question"}]},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "second question"},
    {"role": "assistant", "content": "second answer"},
]


@dataclass(frozen=True)
class Encoded:
    """A conversation as model input: T token ids with every image expanded, and T labels (IGNORED where nothing is learned)."""

    input_ids: list[int]
    labels: list[int]
    images: int  # number of images kept, counted from the first
    dropped_turns: int  # turns dropped from the end because of the maximum length


@dataclass(frozen=True)
class _Rendered:
    """A conversation as template text, cut into pieces that are encoded one by one. Spans count characters, with a cut as one."""

    pieces: list[str]
    spans: list[tuple[int, int]]  # what is learned
    images: int
    controls: int  # special tokens that the template wrote


class Chat:
    """Encodes conversations with one tokenizer and one chat template (see `resolve_template`). An image takes `image_tokens` tokens.

    `places` are texts that are written after the visual tokens of an image, one each; without them it is visual tokens alone.

    UsageError if the tokenizer is not a fast one, lacks `image_token` or the token that ends an answer, or if the template does not
    tell which tokens are answers.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, image_token: str = "<image>", image_tokens: int = 1,
        places: Sequence[str] = (),
    ) -> None:  # fmt: skip
        if not tokenizer.is_fast:
            name = type(tokenizer).__name__
            raise UsageError(f"{name} gives no character offsets, which labels need; use a tokenizer with tokenizer.json")
        if image_tokens < 1:
            raise UsageError(f"{image_tokens} tokens an image; at least 1 is needed")
        if places and len(places) != image_tokens:
            raise UsageError(f"{len(places)} places for {image_tokens} tokens an image; give one each")
        if image_token not in tokenizer.added_tokens_encoder:
            raise UsageError(f"the tokenizer has no token {image_token!r}; mllm/upgrade.py adds it")
        self.tokenizer, self.image_token, self.image_tokens = tokenizer, image_token, image_tokens
        self._shown = "".join(image_token + place for place in places) or image_token  # an image in a text
        self._repeats = 1 if places else image_tokens  # visual tokens that an image token in a text stands for
        self.template = resolve_template(tokenizer, template, image_token)
        self._controls = control_tokens(tokenizer, self.template, image_token)
        self._is_control = np.zeros(max(len(tokenizer), 1 + max(self._controls.values())), dtype=bool)  # by token id
        self._is_control[list(self._controls.values())] = True
        longest_first = sorted((text for text in self._controls if len(text) > 1), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)))
        self._image_id = self._controls[image_token]
        self._prefix = prefix_ids(tokenizer)
        self.stop_ids = self._probe()

    @classmethod
    def of_processor(cls, processor: Any, template: str | None = None) -> "Chat":
        """Return the chat of a SailLlavaProcessor, with the processor's template if none is given."""
        image = processor.image_token, processor.image_seq_length, processor.image_places or ()
        return cls(processor.tokenizer, template or processor.chat_template, *image)

    @cached_property
    def fingerprint(self) -> str:
        """The xxh3-128 of all that decides ids and labels: tokenizer, template, what an image becomes."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        facts = {name: value for name, value in backend.items() if name not in ("truncation", "padding")}
        specials = {name: str(value) for name, value in self.tokenizer.special_tokens_map.items()}
        image = [self.image_token, self.image_tokens, *([self._shown] if self._shown != self.image_token else [])]
        return hash_bytes(json.dumps([facts, specials, self.template, *image, self._prefix]).encode())

    def encode(self, messages: Sequence[Message], max_length: int | None = None) -> Encoded:
        """Return ids and labels. Above `max_length`, drop whole turns and their images from the end. Reject if it cannot be used."""
        encoded = self.encode_many([messages], max_length)[0]
        if isinstance(encoded, Reject):
            raise encoded
        return encoded

    def encode_many(
        self, conversations: Sequence[Sequence[Message]], max_length: int | None = None, seams: bool = False
    ) -> list[Encoded | Reject]:
        """Return what `encode` returns or raises for each conversation. Faster, because the tokenizer takes all at once.

        With `seams` a row also has to begin, token by token, with the prompt of each answer that it teaches (Reject `prompt_seam`).
        """
        rendered = [self._render_or_error(messages) for messages in conversations]
        tokens = self._tokenize([one.pieces[0] if isinstance(one, _Rendered) else "" for one in rendered])
        broken = self._broken_seams(conversations, rendered, tokens) if seams else {}
        results: list[Encoded | Reject] = []
        for number, (messages, one) in enumerate(zip(conversations, rendered, strict=True)):
            try:
                if isinstance(one, Reject):
                    raise one
                encoded = self._label(one, tokens[number])
                if number in broken:
                    raise broken[number]
                if max_length is not None and len(encoded.input_ids) > max_length:
                    encoded = self._shorten(messages, len(encoded.input_ids), max_length)
                results.append(encoded)
            except Reject as error:
                results.append(error)
        return results

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text that a model continues. Each image is one `image_token`, which a processor expands."""
        check_messages(messages, answered=False)
        return "".join(self._render(messages, answered=False).pieces).replace(self._shown, self.image_token)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids that a model continues, with images expanded. Reject if the last message is not a question."""
        check_messages(messages, answered=False)
        rendered = self._render(messages, answered=False)
        return self._assemble(rendered, self._tokenize(rendered.pieces[:1])[0])[0].tolist()

    def _probe(self) -> list[int]:
        """Test the template on a small conversation. Return the ids that end an answer."""
        attempts = [(probe, self._render_or_error(probe)) for probe in (_PROBE, _PROBE[:2])]  # some templates take one turn only
        found = next(((probe, one) for probe, one in attempts if isinstance(one, _Rendered)), None)
        if found is None:
            hint = "" if self.tokenizer.eos_token else " The tokenizer has no end token (eos_token)."
            raise UsageError(f"the chat template cannot be used ({attempts[0][1]}).{hint} Known good: {', '.join(TEMPLATES)}")
        probe, rendered = found
        answers = [message["content"] for message in probe[1::2]]
        said = [rendered.pieces[0][start:stop].lstrip() for start, stop in rendered.spans]
        if len(said) != len(answers) or not all(map(str.startswith, said, answers)):
            raise UsageError(
                f"the chat template does not tell which tokens are answers: of {answers} it marks {said}. Use one of "
                f"{', '.join(TEMPLATES)}, or put {{% generation %}} and {{% endgeneration %}} around the answers"
            )
        end = said[-1].removeprefix(answers[-1]).strip()
        if end and end not in self._controls and self._always_asks(probe):
            raise UsageError(
                f"the chat template writes {end!r} after every answer, also where no answer is asked for: put the beginning of the next "
                "answer into {% if add_generation_prompt %}...{% endif %}, or use one of " + ", ".join(TEMPLATES)
            )
        if end and end not in self._controls:
            raise UsageError(
                f"the chat template ends answers with {end!r}, which is no special token of this tokenizer: a model would not "
                "learn to stop. Add the token or use vicuna_v1"
            )
        stops = (self.tokenizer.eos_token_id, self._controls.get(end))
        return list(dict.fromkeys(index for index in stops if index is not None))

    def _always_asks(self, messages: Sequence[Message]) -> bool:
        """Return whether the template begins the next answer though none is asked for."""
        texts = [apply_template(self.tokenizer, self.template, messages, ask=ask)[0] for ask in (False, True)]
        return texts[0] == texts[1] and not texts[0].rstrip().endswith(str(messages[-1]["content"]))

    def _broken_seams(
        self, conversations: Sequence[Sequence[Message]], rendered: Sequence[_Rendered | Reject], tokens: Sequence[Tokens]
    ) -> dict[int, Reject]:
        """Return the Reject of each row that does not begin with the prompt of an answer that it teaches."""
        seams, broken = list[Seam](), dict[int, Reject]()
        for row, (messages, one) in enumerate(zip(conversations, rendered, strict=True)):
            for turn, message in enumerate(messages if isinstance(one, _Rendered) else ()):
                if message["role"] != "assistant" or not message.get("loss", True):
                    continue
                try:
                    asked = self._render(messages[:turn], answered=False).pieces
                except Reject as reject:
                    broken[row] = reject
                    break
                place, own = len(asked) - 1, one.pieces  # type: ignore[union-attr]
                if asked[:-1] != own[:place]:
                    asked, place = ["".join(asked)], 0
                before = "\n" if place else ""  # so that no tokenizer adds a space, as in `_continue`
                text = before + own[place]
                seams.append(Seam(row, before + asked[-1], text, self._tokenize([text])[0] if place else tokens[row]))
        return broken_seams(seams, self._control, self._tokenize) | broken

    def _render_or_error(self, messages: Sequence[Message]) -> _Rendered | Reject:
        try:
            check_messages(messages)
            return self._render(messages)
        except Reject as error:
            return error

    def _render(self, messages: Sequence[Message], answered: bool = True) -> _Rendered:
        """Return checked messages as template text. Special tokens spelled in the messages are cut in two."""
        texts = list(texts_of(messages))
        cut = None
        if any(map(self._control.search, texts)):
            cut = next((mark for mark in _CUTS if not any(mark in text for text in texts)), None)
            if cut is None:
                raise Reject("special_text", "and it has all noncharacters from U+FDD0 to U+FDEF, too")
            messages = [change_texts(message, partial(self._cut_controls, cut)) for message in messages]
        text, spans = apply_template(self.tokenizer, self.template, messages, ask=not answered)
        if answered and not marks_answers(self.template):
            spans = added_spans(partial(apply_template, self.tokenizer, self.template), messages, text, self._control)
        if answered and any("loss" in message for message in messages):
            spans = learned_spans(messages, spans)
        images, shown = count_images(messages), text.count(self.image_token)
        if shown != images:
            raise Reject("template", f"it shows {shown} of {images} images")
        text, spans = self._with_places(text, spans)
        return _Rendered(text.split(cut) if cut else [text], spans, images, len(self._control.findall(text)))

    def _with_places(self, text: str, spans: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
        """Return a text with the places of visual tokens, and its spans, none of which contains an image."""
        if self._shown == self.image_token:
            return text, spans
        longer = len(self._shown) - len(self.image_token)
        moves = [longer * text.count(self.image_token, 0, start) for start, _ in spans]
        moved = [(start + move, end + move) for (start, end), move in zip(spans, moves, strict=True)]
        return text.replace(self.image_token, self._shown), moved

    def _cut_controls(self, cut: str, text: str) -> str:
        while self._control.search(text):  # again, as the rest may spell another one
            text = self._control.sub(lambda match: match[0][0] + cut + match[0][1:], text)
        return text

    def _tokenize(self, texts: list[str]) -> list[Tokens]:
        if not texts:
            return []
        batch = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
        pairs = zip(batch["input_ids"], batch["offset_mapping"], strict=True)
        return [(np.array(ids, dtype=np.int64), np.array(offsets, dtype=np.int64).reshape(-1, 2)) for ids, offsets in pairs]

    def _continue(self, piece: str) -> Tokens:
        """Tokenize the text after a cut. A line break is put before it, so that no tokenizer adds a space."""
        ids, offsets = self._tokenize(["\n" + piece])[0]
        if ((offsets[:, 0] < 1) & (offsets[:, 1] > 1)).any():  # one token spans the break and text
            return self._tokenize([piece])[0]
        kept = offsets[:, 1] > 1
        return ids[kept], offsets[kept] - 1

    def _assemble(self, rendered: _Rendered, first: Tokens) -> tuple[np.ndarray, np.ndarray]:
        """Return ids (T,) with images expanded, and whether each is learned (T,). `first` are the tokens of the first piece."""
        chunks, begin = [first], len(rendered.pieces[0]) + 1
        for piece in rendered.pieces[1:]:
            ids, offsets = self._continue(piece)
            chunks.append((ids, offsets + begin))
            begin += len(piece) + 1
        tokens = np.concatenate([ids for ids, _ in chunks])
        start, stop = np.concatenate([offsets for _, offsets in chunks]).T
        shown = rendered.images * self.image_tokens // self._repeats
        if (tokens == self._image_id).sum() != shown or self._is_control[tokens].sum() != rendered.controls:
            raise Reject("special_text")
        learned = np.zeros(len(tokens), dtype=bool)
        for first_char, end in rendered.spans:  # tokens that overlap the span, or have no characters and stand in it
            learned |= (start < end) & ((stop > first_char) | ((start == stop) & (start >= first_char)))
        counts = np.where(tokens == self._image_id, self._repeats, 1)
        bos = self.tokenizer.bos_token
        prefix = [] if bos and rendered.pieces[0].startswith(bos) else self._prefix
        learned = np.pad(np.repeat(learned, counts), (len(prefix), 0))
        return np.concatenate([np.array(prefix, dtype=np.int64), np.repeat(tokens, counts)]), learned

    def _label(self, rendered: _Rendered, first: Tokens) -> Encoded:
        tokens, learned = self._assemble(rendered, first)
        learned[:1] = False  # nothing predicts the first token, and in a pack another conversation is before it
        if not learned.any():
            raise Reject("no_supervised_tokens")
        return Encoded(tokens.tolist(), np.where(learned, tokens, IGNORED).tolist(), rendered.images, 0)

    def _shorten(self, messages: Sequence[Message], length: int, max_length: int) -> Encoded:
        """Return the conversation with as many whole turns as fit, found by bisection. Reject `too_long` if not even one fits."""
        head = int(messages[0]["role"] == "system")
        turns = (len(messages) - head) // 2
        best, low, high = None, 1, turns - 1
        while low <= high:
            kept = (low + high) // 2
            try:
                encoded = self.encode(messages[: head + 2 * kept])
            except Reject as reject:
                if reject.code != "no_supervised_tokens":  # what is learned may come later
                    raise
                low = kept + 1
                continue
            if len(encoded.input_ids) <= max_length:
                best, low = replace(encoded, dropped_turns=turns - kept), kept + 1
            else:
                high = kept - 1
        if best is None:
            raise Reject("too_long", f"{length} tokens in {turns} turns, and not even the first that is learned fits into {max_length}")
        return best
