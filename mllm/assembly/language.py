"""The language half of a new model: a causal LLM, or that of a LLaVA, with its tokenizer and chat template."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GgufConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from align.common.errors import DamagedError, UsageError
from align.common.reject_codes import Reject
from align.encoders.claims import within_weights
from align.encoders.loading import load_errors_named, recorded_id, require_complete, resolve_encoder
from mllm.conversations.templates import apply_template, control_tokens, resolve_template
from mllm.model.answer_ends import can_win

IMAGE_TOKEN = "<image>"
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
LLM_FILES = (
    "needed are config.json, model.safetensors and the tokenizer's files (weights only as .bin: a revision that has safetensors, "
    "on the hub often --revision refs/pr/N); GGUF weights: --gguf-file"
)

# Put before a template that knows only lists of parts, as in Hugging Face's LLaVA checkpoints: else plain texts would be dropped.
_TO_PARTS = """
{%- set listed = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}
{%- set listed.messages = listed.messages + [dict(message, content=parts)] -%}
{%- endfor -%}
{%- set messages = listed.messages %}
"""


@dataclass
class Language:
    """The language half. `whole` is the loaded model; its `base` and `lm_head` go into the new model unchanged."""

    whole: Any
    base: Any
    lm_head: nn.Linear
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    source: str
    is_llava: bool = False
    image_token: str = IMAGE_TOKEN
    added: tuple[str, ...] = ()  # tokens that its tokenizer did not have
    new_rows: int = 0  # added to the embeddings
    image_processor: Any = None  # of a LLaVA
    untrained: tuple[int, ...] = ()  # ids of the tokens of the template whose rows the LLM never trained

    @property
    def image_id(self) -> int:
        """Id of the image token."""
        return int(self.tokenizer.get_vocab()[self.image_token])

    @property
    def tied(self) -> bool:
        """Whether input and output embeddings share one matrix."""
        return self.lm_head.weight is self.base.get_input_embeddings().weight


def load_llm(name: str, gguf_file: str | None = None, revision: str | None = None) -> Language:
    """Return the causal LLM `name` with its tokenizer. GGUF weights are unpacked to float32. No remote code is run."""
    remote: dict[str, Any] = {"trust_remote_code": False, **({"revision": revision} if revision else {})}
    if gguf_file is None:
        source = resolve_encoder(name)
        weights: dict[str, Any] = {"dtype": "auto", "use_safetensors": True}
    else:
        source = str(Path(name).expanduser())
        if Path(source).is_dir() and not (Path(source) / gguf_file).is_file():
            raise UsageError(f"{name} has no file {gguf_file!r}; give the name of a .gguf file inside it")
        remote |= {"gguf_file": gguf_file}
        # packed weights would be slow, and could not be trained or saved
        weights = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    with load_errors_named(name, LLM_FILES), within_weights(name, source, revision, (gguf_file,) if gguf_file else ()):
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **remote, **weights)
        tokenizer = AutoTokenizer.from_pretrained(source, **remote)
    whole, info = loaded
    _require_exact(name, info)
    base, lm_head = whole.base_model, whole.get_output_embeddings()
    if type(whole.config) not in MODEL_MAPPING or type(base) is not MODEL_MAPPING[type(whole.config)]:
        raise UsageError(f"{name} is a {type(whole).__name__}, not a plain causal LLM; a LLaVA checkpoint is given as --llava")
    if not isinstance(lm_head, nn.Linear) or lm_head.bias is not None or not hasattr(base, "embed_tokens"):
        raise UsageError(f"{name}: {type(whole).__name__} has an output layer that LLaVA's class does not know; use another LLM")
    for attribute in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(whole.config, attribute):
            delattr(whole.config, attribute)
    return Language(whole, base, lm_head, tokenizer, _default(tokenizer.chat_template), recorded_id(name))


def load_llava(name: str, revision: str | None = None) -> Language:
    """Return the language half of a Hugging Face LLaVA (LlavaForConditionalGeneration), with the template of its processor."""
    source = resolve_encoder(name)
    remote: dict[str, Any] = {"trust_remote_code": False, **({"revision": revision} if revision else {})}
    with load_errors_named(name, LLM_FILES.replace("tokenizer", "processor")), within_weights(name, source, revision):
        config = AutoConfig.from_pretrained(source, **remote)
        if config.model_type != "llava":
            raise UsageError(f"{name} has model_type {config.model_type!r}; --llava takes a LlavaForConditionalGeneration ('llava')")
        loaded: Any = LlavaForConditionalGeneration.from_pretrained(
            source, dtype="auto", use_safetensors=True, output_loading_info=True, **remote
        )
        processor = AutoProcessor.from_pretrained(source, **remote)
    whole, info = loaded
    _require_exact(name, info)
    token, index = processor.image_token, whole.config.image_token_index
    if processor.tokenizer.convert_tokens_to_ids(token) != index:
        raise UsageError(f"{name}: the processor's {token!r} is not token {index} of the config; use a complete checkpoint")
    template = _default(processor.chat_template) or _default(processor.tokenizer.chat_template)
    base = whole.model.language_model
    return Language(
        whole, base, whole.lm_head, processor.tokenizer, template, recorded_id(name), is_llava=True, image_token=token,
        image_processor=processor.image_processor,
    )  # fmt: skip


def _default(template: Any) -> str | None:
    """Return the template named `default` if a checkpoint has several."""
    return template.get("default") if isinstance(template, dict) else template


def _require_exact(name: str, info: dict[str, Any]) -> None:
    """Raise DamagedError if a checkpoint lacks weights, or has weights that would not be loaded."""
    require_complete(name, info["missing_keys"], ())
    rest = [str(key) for part in ("unexpected_keys", "mismatched_keys") for key in info[part] if not str(key).endswith("inv_freq")]
    if rest:
        raise DamagedError(f"{name} has weights that its config does not describe, such as {sorted(rest)[0]}; use a complete checkpoint")


def prepare_tokenizer(language: Language, template: str) -> tuple[str, str]:
    """Add the special tokens that are needed, with embedding rows. Return the chat template's Jinja text and its name."""
    tokenizer = language.tokenizer
    name = template if template != "auto" else "own" if language.template else "vicuna_v1"
    if name == "own":
        tokenizer.chat_template = language.template
    wanted = [language.image_token, *(CHATML_TOKENS if name == "chatml" else ())]
    known = tokenizer.get_vocab()
    language.added = tuple(token for token in wanted if token not in known)
    special = set(tokenizer.all_special_tokens)
    tokens = [AddedToken(token, special=True, normalized=False) for token in wanted if token not in special]
    if tokens:
        tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # for batched generation; training pads by itself
    _grow(language, max(tokenizer.get_vocab().values()) + 1)
    text = resolve_template(tokenizer, name, language.image_token)
    language.untrained = _untrained(language, text)
    if not _shows_texts(tokenizer, text):
        text = _TO_PARTS + text
    tokenizer.chat_template = text
    return text, name


def _shows_texts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Return whether the template writes a plain text (or refuses it, as `plain` does without an image)."""
    try:
        return "a question" in apply_template(tokenizer, template, [{"role": "user", "content": "a question"}])[0]
    except Reject:
        return True


@torch.no_grad()
def _grow(language: Language, rows: int) -> None:
    """Grow the embeddings to at least `rows` rows.

    Each new row is the mean of the old ones; but for the image token's, which nothing reads, a tenth of their spread is added to it,
    drawn by a fixed seed, so that new tokens are not the same to the model.
    """
    before = language.lm_head.weight.shape[0]
    if rows <= before:
        return
    language.new_rows = rows - before
    language.whole.resize_token_embeddings(rows, mean_resizing=False)
    language.lm_head = language.whole.get_output_embeddings()
    weights: list[Tensor] = [language.base.get_input_embeddings().weight, *([] if language.tied else [language.lm_head.weight])]
    for weight in weights:
        old = weight[:before].float()
        noise = torch.randn(rows - before, old.shape[1], generator=torch.Generator().manual_seed(before))
        noise[[number == language.image_id for number in range(before, rows)]] = 0
        weight[before:] = (old.mean(0) + 0.1 * old.std(0) * noise).to(weight.dtype)


def _untrained(language: Language, template: str) -> tuple[int, ...]:
    """Return the ids of tokens of the template that are new to the LLM, or whose output rows show that it never trained them."""
    controls = control_tokens(language.tokenizer, template, language.image_token)
    rows = language.lm_head.weight
    return tuple(
        token
        for text, token in sorted(controls.items(), key=lambda item: item[1])
        if text != language.image_token
        and (text in template or token == language.tokenizer.eos_token_id)
        and (text in language.added or not can_win(rows, token))
    )
