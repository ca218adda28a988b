"""The adapter through which lmms-eval asks a SailLlava: requests in, text or log-probabilities out.

    lmms-eval --model sail_llava --model_args pretrained=runs/mine/mllm --tasks gqa,pope --batch_size 16 --output_path out --log_samples

An error ends the run, so a failure never leaves an empty answer. With a launcher, each process answers its share.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from align.common.errors import UsageError
from align.common.files import expand_home
from align.common.hardware import resolve_precision
from eval.results.examples import drawn_questions, save_thumbnail
from mllm.conversations.tokens import Chat
from mllm.model.answering import Answerer, Conversation, Decoding
from mllm.model.saving import load_mllm

DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16}
# settings of other models and of lmms-eval itself, which are ignored
NOT_OURS = ("image_aspect_ratio", "visual_cot", "max_agentic_steps", "skip_special_tokens", "seed")
PLACEHOLDER = "<image>"
MOST_ROUNDS = 64


class LogLikelihood(tuple, GenerationResult):
    """(log-probability, is_greedy) that reaches a task as numbers, with the sign that the task expects.

    lmms-eval 0.7.3 turns a plain tuple into text; only the `text` of a GenerationResult passes unchanged. Its multiple_choice tasks take
    the smallest number as the best choice, so they get the negative log-probability.
    """

    text: Any
    token_counts = None

    def __new__(cls, log_prob: float, greedy: bool, negated: bool) -> "LogLikelihood":
        """Return the pair. `negated` flips the sign that the task sees."""
        self = super().__new__(cls, (log_prob, greedy))
        self.text = (-log_prob if negated else log_prob, greedy)
        return self

    def __init__(self, log_prob: float, greedy: bool, negated: bool) -> None:
        pass


class SailLlava(lmms):
    """A model folder of mllm/upgrade.py or mllm/finetune.py as an lmms-eval model; UsageError for unknown model_args.

    `dtype`: auto, fp32, bf16 or float16. `device`: auto, cpu, cuda, ... `max_new_tokens`: for tasks that set none. `template`: another
    chat template. `thumbnails`: a folder for small pictures of each task's `examples`, which `seed` draws.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        batch_size: int | str = 1,
        device: str = "auto",
        max_new_tokens: int = 1024,
        template: str | None = None,
        attn_implementation: str | None = None,
        thumbnails: str | None = None,
        examples: int = 0,
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        super().__init__()
        unknown.pop("max_batch_size", None)  # lmms-eval's own flag, for models that search for a batch size
        if unknown:
            raise UsageError(
                f"unknown model_args {', '.join(unknown)}; known: pretrained, dtype, batch_size, device, max_new_tokens, template"
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UsageError(f"batch_size is {batch_size!r}; give a whole number from 1")
        if dtype != "auto" and dtype not in DTYPES:
            raise UsageError(f"dtype is {dtype!r}; allowed: auto, {', '.join(DTYPES)}")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device if device == "auto" or self._world_size > 1 else torch.device(device)
        self.batch_size, self.max_new_tokens = int(batch_size), int(max_new_tokens)
        precision = DTYPES[dtype if dtype != "auto" else resolve_precision("auto", self.device)]
        options = {"attn_implementation": attn_implementation} if attn_implementation else {}
        model, processor = load_mllm(Path(expand_home(str(pretrained))), dtype=precision, device=self.device, **options)
        self.answerer = Answerer(model, processor, Chat.of_processor(processor, template))
        self.thumbnails = Path(thumbnails) if thumbnails and examples else None
        self.examples, self.seed = examples, seed
        self.drawn: set[tuple[str, int]] = set()

    def clean(self) -> None:
        """Free the model once all answers exist. lmms-eval calls this before it scores."""
        del self.answerer
        super().clean()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the answer to each request, in order. Requests share a batch only if their generation settings are equal."""
        self._draw(requests)
        answers: list[str] = [""] * len(requests)
        decodings = [decoding(request.args[1], self.max_new_tokens) for request in requests]
        for numbers in self._batches([request.args[0] for request in requests], decodings):
            batch = [conversation(requests[number].args[0], self._visuals(requests[number])) for number in numbers]
            for number, text in zip(numbers, self.answerer.generate(batch, decodings[numbers[0]]), strict=True):
                answers[number] = text
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return (log-probability of the continuation, whether greedy decoding writes it) for each request, in order."""
        self._draw(requests)
        scores: list[Any] = [None] * len(requests)
        texts = [self._continuation(request) for request in requests]
        for numbers in self._batches([request.args[0] for request in requests], [None] * len(requests)):
            batch = [conversation(requests[number].args[0], self._visuals(requests[number])) for number in numbers]
            found = self.answerer.score(batch, [texts[number] for number in numbers])
            for number, (log_prob, greedy) in zip(numbers, found, strict=True):
                choice = len(requests[number].args) > 2 and not callable(requests[number].args[1])  # one of several: multiple_choice
                scores[number] = LogLikelihood(log_prob, greedy, negated=choice)
        return scores

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Return each request's answers of all rounds. The task decides what a round asks and with which images."""
        self._draw(requests)
        conversations = [_Rounds(request, self._visuals(request), self._doc(request)) for request in requests]
        decodings = [decoding(request.args[1], self.max_new_tokens) for request in requests]
        for _ in range(MOST_ROUNDS):
            unfinished = [number for number, one in enumerate(conversations) if not one.ended]
            if not unfinished:
                return [one.answers for one in conversations]
            texts, settings = [conversations[number].text for number in unfinished], [decodings[number] for number in unfinished]
            for places in self._batches(texts, settings):
                numbers = [unfinished[place] for place in places]
                batch = [conversation(conversations[number].text, conversations[number].visuals) for number in numbers]
                for number, text in zip(numbers, self.answerer.generate(batch, decodings[numbers[0]]), strict=True):
                    conversations[number].go_on(text)
        raise UsageError(f"a task asked for more than {MOST_ROUNDS} rounds; it never says that it is done")

    def _batches(self, texts: Sequence[str], settings: Sequence[Any]) -> Any:
        """Yield lists of request numbers with equal settings, the longest first, so that memory runs out at once or never."""
        groups: dict[Any, list[int]] = {}
        for number, setting in enumerate(settings):
            groups.setdefault(setting, []).append(number)
        ordered = [sorted(numbers, key=lambda number: -len(texts[number])) for numbers in groups.values()]
        batches = [one[start : start + self.batch_size] for one in ordered for start in range(0, len(one), self.batch_size)]
        with tqdm(total=len(texts), desc="answers", disable=self.rank != 0) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch))

    def _doc(self, request: Instance) -> Any:
        doc_id, task, split = request.args[-3:]
        return self.task_dict[task][split][doc_id]

    def _visuals(self, request: Instance) -> list[Any]:
        if len(request.args) < 3 or request.args[2] is None:
            return []
        visuals = request.args[2](self._doc(request)) or []
        doc_id, task = request.args[-3:-1]
        if self.thumbnails and (task, doc_id) in self.drawn and visuals and isinstance(visuals[0], Image.Image):
            save_thumbnail(self.thumbnails, task, doc_id, visuals[0])
            self.drawn.discard((task, doc_id))
        return visuals

    def _draw(self, requests: Sequence[Instance]) -> None:
        if self.thumbnails is None:
            return
        numbers: dict[str, set[int]] = {}
        for request in requests:
            if len(request.args) > 2:
                numbers.setdefault(request.args[-2], set()).add(request.args[-3])
        for task, known in numbers.items():
            self.drawn |= {(task, number) for number in drawn_questions(task, known, self.examples, self.seed)}

    def _continuation(self, request: Instance) -> str:
        wanted = request.args[1]
        return str(wanted(self._doc(request)) if callable(wanted) else wanted)


class _Rounds:
    """A request of several rounds: the next question, and the answers so far."""

    def __init__(self, request: Instance, visuals: list[Any], doc: Any) -> None:
        self.text: str = request.args[0]
        self.visuals, self.doc = visuals, doc
        self.ask: Callable[..., Any] = request.args[3]
        self.answers: list[str] = []
        self.info: Any = None
        self.round, self.ended = 0, False

    def go_on(self, answer: str) -> None:
        """Record the answer to this round and ask the task for the next question."""
        self.round += 1
        given = [*self.answers, answer]
        visuals, text, self.ended, answers, self.info = self.ask(
            self.doc, previous_output=given, round_idx=self.round, previous_round_info=self.info
        )
        self.answers = given if answers is None else list(answers)
        self.text, self.visuals = text or "", visuals or []


def conversation(text: str, visuals: Sequence[Any]) -> Conversation:
    """Return one question about images. Images come first, unless `text` has exactly one `<image>` placeholder for each."""
    for visual in visuals:
        if not isinstance(visual, Image.Image):
            raise UsageError(f"the task gives a {type(visual).__name__} to look at; sail_llava reads images only, no video and no audio")
    pieces = text.split(PLACEHOLDER)
    if visuals and len(pieces) == len(visuals) + 1:
        parts: list[dict[str, Any]] = [{"type": "text", "text": pieces[0]}]
        for piece in pieces[1:]:
            parts += [{"type": "image"}, {"type": "text", "text": piece}]
        parts = [part for part in parts if part.get("text") != ""]
    else:
        parts = [*({"type": "image"} for _ in visuals), {"type": "text", "text": text}]
    return Conversation([{"role": "user", "content": parts}], list(visuals))


def decoding(settings: dict[str, Any], max_new_tokens: int) -> Decoding:
    """Return a task's generation_kwargs as a Decoding; UsageError for an unknown setting, because ignoring it would change results."""
    rest = {name: value for name, value in settings.items() if name not in NOT_OURS}
    until = rest.pop("until", None) or []
    also = rest.pop("stop_sequences", None) or []
    ends = [end for given in (until, also) for end in ([given] if isinstance(given, str) else given)]
    sample, temperature = rest.pop("do_sample", None), rest.pop("temperature", None)
    if temperature is None:
        temperature = 1 if sample else 0
    temperature = 0.0 if sample is False else float(temperature)
    numbers = {name: rest.pop(name, None) for name in ("top_p", "top_k", "num_beams", "repetition_penalty")}
    limit = int(rest.pop("max_new_tokens", max_new_tokens))
    if rest:
        known = "max_new_tokens, until, do_sample, temperature, top_p, top_k, num_beams, repetition_penalty"
        raise UsageError(f"generation_kwargs {json.dumps(rest, default=str)} are unknown to sail_llava; known: {known}")
    if temperature == 0:  # then these have no effect and must not split batches
        numbers |= {"top_p": None, "top_k": None}
    given = {name: value for name, value in numbers.items() if value is not None}
    return Decoding(limit, temperature, until=tuple(ends), **given)
