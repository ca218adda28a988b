"""Answers of a SailLlava, in batches: conversations in, text or log-probabilities out.

`Chat` encodes the prompts exactly as in training; they are padded on the left. `Decoding` decides how text is generated, not the
LLM's own generation config. Legend: `B` conversations, `T` tokens of the longest, `V` vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria

from align.common.errors import DataError, UsageError
from mllm.conversations.messages import Message, count_images
from mllm.conversations.tokens import IGNORED, Chat
from mllm.model.answer_ends import end_ids
from mllm.model.modeling import SailLlavaForConditionalGeneration
from mllm.model.processing import SailLlavaProcessor


@dataclass(frozen=True)
class Decoding:
    """How an answer is chosen: greedily at temperature 0, otherwise sampled."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    num_beams: int = 1
    repetition_penalty: float = 1.0
    until: tuple[str, ...] = ()  # the answer ends before the first of these strings

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.num_beams < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens} and num_beams {self.num_beams}; both start at 1")
        if self.temperature < 0 or self.top_k < 0 or self.repetition_penalty <= 0 or not 0 <= self.top_p <= 1:
            raise UsageError(f"{self}: temperature and top_k must not be negative, repetition_penalty above 0, top_p within 0..1")


@dataclass(frozen=True)
class Conversation:
    """Messages that end with a question, and one image for each image part, in order."""

    messages: list[Message]
    images: list[Image.Image]

    def __post_init__(self) -> None:
        places = count_images(self.messages)
        if places != len(self.images):
            raise UsageError(f"a conversation has {places} image parts and {len(self.images)} images; give one for each")


class Answerer:
    """Generates and scores answers with one model in eval mode. `Decoding` replaces the model's generation config."""

    def __init__(self, model: SailLlavaForConditionalGeneration, processor: SailLlavaProcessor, chat: Chat | None = None) -> None:
        self.model, self.processor = model.eval(), processor
        self.chat = chat or Chat.of_processor(processor)
        pad = processor.tokenizer.pad_token_id
        self.stop_ids: list[int] = list(dict.fromkeys([*self.chat.stop_ids, *end_ids(model.generation_config)]))
        self.pad_id: int = pad if pad is not None else self.stop_ids[0]
        self.context: int = model.config.text_config.max_position_embeddings
        self._stoppers: dict[tuple[str, ...], StoppingCriteriaList] = {}
        model.generation_config = GenerationConfig(eos_token_id=self.stop_ids, pad_token_id=self.pad_id)

    @torch.inference_mode()
    def generate(self, conversations: Sequence[Conversation], decoding: Decoding, streamer: Any = None) -> list[str]:
        """Return one answer for each conversation, cut at its end token and before the first string of `until`.

        An answer also ends at the model's last position. DataError if a question leaves no room for an answer. A `streamer`
        (transformers') gets the tokens of a single conversation as they are generated.
        """
        prompts = [self.chat.prompt_ids(one.messages) for one in conversations]
        longest = max(map(len, prompts))
        if longest >= self.context:
            raise DataError(f"the question has {longest} tokens, the model reads {self.context}; shorten it or give fewer images")
        rooms = [min(decoding.max_new_tokens, self.context - len(prompt)) for prompt in prompts]
        if decoding.num_beams > 1 and any(len(one.images) != 1 for one in conversations):
            raise UsageError("beam search needs exactly one image in every conversation; use num_beams 1")
        sampling: dict[str, Any] = {"do_sample": decoding.temperature > 0}
        if decoding.temperature > 0:  # top_p 0 means not set
            sampling |= {"temperature": decoding.temperature, "top_k": decoding.top_k, "top_p": decoding.top_p or 1.0}
        stops, ends = self._until(decoding.until)
        if stops and tuple(stops) not in self._stoppers:  # made once: slow, as it reads the whole vocabulary
            self._stoppers[tuple(stops)] = StoppingCriteriaList([StopStringCriteria(self.processor.tokenizer, stops)])
        inputs = self._inputs(conversations, prompts)
        output = self.model.generate(
            **inputs, **sampling, max_new_tokens=max(rooms), num_beams=decoding.num_beams, streamer=streamer,
            repetition_penalty=decoding.repetition_penalty, eos_token_id=[*self.stop_ids, *ends],
            stopping_criteria=self._stoppers.get(tuple(stops)),
        )  # fmt: skip
        written = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._text(ids[:room], {*self.stop_ids, *ends}, stops) for ids, room in zip(written, rooms, strict=True)]

    @torch.inference_mode()
    def score(self, conversations: Sequence[Conversation], answers: Sequence[str]) -> list[tuple[float, bool]]:
        """Return, for each conversation, the log-probability of its answer (at most 0) and whether greedy decoding would write it.

        The answer is tokenized as in training, with the template's white space around it. Its end token does not count.
        """
        rows, learned = [], []
        for one, answer in zip(conversations, answers, strict=True):
            encoded = self.chat.encode([*one.messages, {"role": "assistant", "content": answer.strip()}])
            last = len(encoded.labels)
            while encoded.labels[last - 1] == IGNORED or encoded.labels[last - 1] in self.stop_ids:
                last -= 1
            first = last
            while encoded.labels[first - 1] != IGNORED:
                first -= 1
            if last > self.context:
                raise DataError(f"question and answer have {last} tokens, the model reads {self.context}; shorten the question")
            rows.append(encoded.input_ids[:last])
            learned.append(last - first)
        longest = max(learned)
        inputs = self._inputs(conversations, rows)
        places = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)  # generate computes them itself
        logits = self.model(**inputs, position_ids=places, logits_to_keep=longest + 1, use_cache=False).logits  # (B, longest + 1, V)
        scores = []
        for row, ids, count in zip(logits, rows, learned, strict=True):
            own = torch.tensor(ids[-count:], device=row.device)
            log_probs = row[-count - 1 : -1].float().log_softmax(dim=-1)  # (count, V): position t predicts t + 1
            total = log_probs.gather(1, own[:, None]).double().sum()
            scores.append((float(total), bool((log_probs.argmax(dim=-1) == own).all())))
        return scores

    def _inputs(self, conversations: Sequence[Conversation], rows: Sequence[list[int]]) -> dict[str, Tensor]:
        """Return input_ids and attention_mask (B, T), padded on the left, and pixel_values if there are images."""
        longest, device = max(map(len, rows)), self.model.device
        ids = torch.tensor([[self.pad_id] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        inputs = {"input_ids": ids, "attention_mask": mask}
        images = [image for one in conversations for image in one.images]
        if images:
            inputs["pixel_values"] = self.processor.image_processor(images, return_tensors="pt")["pixel_values"].to(device)
        return inputs

    def _until(self, until: Sequence[str]) -> tuple[list[str], list[int]]:
        """Return the strings in `until`, and the ids of those that are special tokens, which never appear as text."""
        special = {token.content: number for number, token in self.processor.tokenizer.added_tokens_decoder.items() if token.special}
        return [text for text in until if text and text not in special], [special[text] for text in until if text in special]

    def _text(self, ids: list[int], ends: set[int], stops: Sequence[str]) -> str:
        end = next((place for place, number in enumerate(ids) if number in ends), len(ids))
        text = self.processor.tokenizer.decode(ids[:end], skip_special_tokens=True)
        cuts = [place for stop in stops if (place := text.find(stop)) >= 0]
        return text[: min(cuts, default=len(text))].strip()


class ChatSession:
    """An ongoing conversation: the messages so far, and the image that the first question shows."""

    def __init__(self, answerer: Answerer, decoding: Decoding, image: Image.Image | None) -> None:
        self.answerer, self.decoding, self.image = answerer, decoding, image
        self.said: list[Message] = []

    def restart(self) -> None:
        """Forget the messages but keep the image."""
        self.said = []

    def ask(self, question: str, streamer: Any = None) -> str:
        """Return the answer to the next question. A question that fails is not kept."""
        shown = [self.image] if self.image is not None else []
        parts: Any = [*({"type": "image"} for _ in shown if not self.said), {"type": "text", "text": question}]
        asked = [*self.said, {"role": "user", "content": parts}]
        [answer] = self.answerer.generate([Conversation(asked, shown)], self.decoding, streamer)
        self.said = [*asked, {"role": "assistant", "content": answer}] if answer else self.said  # no template takes an empty answer
        return answer
