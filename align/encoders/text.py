"""Frozen text encoders by hub id, local folder or `embedded:` id, read by sentence-transformers with their own pooling.

Shapes: `B` batch, `T` tokens, `D` width. A closing `Normalize` is left out: features are never stored normalized.
"""

import json
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor, nn

from align.common.errors import UsageError
from align.encoders.loading import TEXT_FILES, autocast, hash_weights, opened, recorded_id, require_complete
from align.encoders.spec import TextSpec

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TEXT_UNUSED = ("pooler.",)  # BERT's pooler is not part of any sentence-transformers pooling


class TextEncoder(nn.Module):
    """A frozen text encoder: its own pooling, no normalization, always in eval mode, parameters without gradient.

    `prompt` is put before each text by `encode` and `encode_tokens`; `max_length` is in tokens, special tokens included; `layers`
    counts the blocks that run, 0 if they are not one list.
    With `feature` "tokens" nothing is pooled: an embedding is a row of all tokens (B, T D), zeros where there is none, for token heads.
    """

    model: Any  # a SentenceTransformer

    def __init__(self, model: "SentenceTransformer", spec: TextSpec) -> None:
        super().__init__()
        self.model, self.spec = model, spec
        self.id, self.prompt, self.precision, self.feature = spec.name, spec.prompt, spec.precision, spec.feature
        self.fingerprint: dict[str, Any] = {}
        self.max_length: int = self.model.max_seq_length
        self.layers, self.tokenizer = len(_blocks(model[0].auto_model) or ()), model.tokenizer
        self.requires_grad_(False).eval()
        blank = model.preprocess(["a"], prompt=spec.prompt)
        # a pooling that leaves the prompt out needs to know its length
        self._prompt = {key: blank[key] for key in ("prompt_length",) if key in blank}
        tokens = self.feature == "tokens"
        self.width = self.max_length * self.encode_tokens(["a"])[0].shape[2] if tokens else self.encode(["a"], batch_size=1).shape[1]

    def train(self, mode: bool = True) -> "TextEncoder":
        """Return self, left in eval mode: a frozen encoder has no training mode."""
        return super().train(False)

    def encode(self, texts: list[str], batch_size: int) -> Tensor:
        """Return embeddings (B, D), float32 on the CPU, not normalized, in the order of `texts`; batches are sorted by length.

        With `feature` "tokens" they are (B, T D), T being `max_length`.
        """
        if not texts:
            return torch.empty(0, self.width)
        if self.feature == "tokens":
            return self._encode_all_tokens(texts, batch_size)
        with autocast(self.model.device, self.precision):
            options = {"prompt": self.prompt, "convert_to_tensor": True, "show_progress_bar": False}
            embeddings = self.model.encode(texts, batch_size=batch_size, **options)
        return embeddings.to("cpu", torch.float32).clone()  # inference tensors cannot be trained on; their clone can

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return embeddings (B, D), with `feature` "tokens" (B, T D), float32, of token ids (B, T) from `tokenizer`, prompt included."""
        features = {"input_ids": input_ids, "attention_mask": attention_mask, **self._prompt}
        with autocast(self.model.device, self.precision):
            if self.feature == "tokens":
                output = self.model[0](features)
                return _token_rows(output["token_embeddings"].float(), output["attention_mask"])
            return self.model(features)["sentence_embedding"].float()

    def encode_tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Return token embeddings before pooling (B, T, D), float32, and their mask (B, T), bool, on the encoder's device."""
        features = self.model.preprocess(texts, prompt=self.prompt)
        moved = {key: value.to(self.model.device) if isinstance(value, Tensor) else value for key, value in features.items()}
        with autocast(self.model.device, self.precision):
            output = self.model[0](moved)
        return output["token_embeddings"].float(), output["attention_mask"].bool()

    @torch.no_grad()
    def _encode_all_tokens(self, texts: list[str], batch_size: int) -> Tensor:
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        rows = torch.zeros(len(texts), self.width)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            part = _token_rows(*self.encode_tokens([texts[number] for number in chosen])).cpu()
            rows[chosen, : part.shape[1]] = part
        return rows


def _token_rows(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return (B, T D): tokens (B, T, D) one after the other, zeros where `mask` (B, T) is 0."""
    return (tokens * mask[..., None]).flatten(1)


def load_text_encoder(spec: TextSpec | str, device: str | torch.device = "cpu") -> TextEncoder:
    """Return the frozen text encoder that `spec` describes; a name alone stands for its last layer, pooled, in float32.

    A sentence-transformers folder is read with its own modules, without a closing `Normalize`; a plain Hugging Face folder gets
    sentence-transformers' default, the masked mean (decoders: the last token). A default prompt of the model is not applied. A closing
    norm is applied to inner layers, too. Raises UsageError (unknown id, missing files or weights, max_length, layer), OfflineError,
    DamagedError.
    """
    spec = TextSpec(spec) if isinstance(spec, str) else spec
    model = _open(spec)
    blocks = len(_blocks(model[0].auto_model) or ())
    _stop_after(spec.name, model[0].auto_model, spec.layer)
    _limit_length(spec.name, model, spec.max_length)
    encoder = TextEncoder(model.to(device), spec)
    pooling = [{"type": type(module).__name__, **module.get_config_dict()} for module in list(model)[1:]]
    encoder.fingerprint = {
        "encoder": recorded_id(spec.name),
        "weights": hash_weights(model, tuple(f"0.model.{key}" for key in TEXT_UNUSED)),
        "preprocessing": f"tokenizer {hash_tokenizer(model.tokenizer)}",
        "pooling": "tokens" if spec.feature == "tokens" else json.dumps(pooling, default=str),
        "prompt": spec.prompt,
        "max_length": encoder.max_length,
        "truncation_side": model.tokenizer.truncation_side,
        "precision": spec.precision,
        "normalized": "no",
    }
    if encoder.layers < blocks:
        encoder.fingerprint["layer"] = spec.layer
    return encoder


def _open(spec: TextSpec) -> Any:
    """Return the complete SentenceTransformer of `spec` in float32 on the CPU, without a closing Normalize."""
    # imported here as it takes seconds, which vision users need not wait for
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer

    with opened(spec, TEXT_FILES) as (source, remote):
        kwargs: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True}
        model: Any = SentenceTransformer(source, device="cpu", model_kwargs=kwargs, **remote)
        if not isinstance(model[0], Transformer):
            raise UsageError(f"{spec.name}: its first module is {type(model[0]).__name__}; choose a text encoder that is a transformer")
        language_model = model[0].auto_model
        # sentence-transformers does not tell which weights were missing; loading without data does
        kwargs = {"config": language_model.config, "device_map": "meta", "use_safetensors": True, "output_loading_info": True}
        _, report = type(language_model).from_pretrained(language_model.name_or_path, **kwargs, **remote)
    require_complete(spec.name, report["missing_keys"], TEXT_UNUSED)
    _set_padding(model.tokenizer, len(language_model.get_input_embeddings().weight))
    if isinstance(model[-1], Normalize):
        del model[-1]
    return model


def _set_padding(tokenizer: Any, rows: int) -> None:
    """Give a tokenizer a padding token among the `rows` of the embedding, as decoders often have none. The mask hides it from features."""
    known = (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.convert_ids_to_tokens(0))
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = next(token for token in known if token and tokenizer.convert_tokens_to_ids(token) < rows)


def _blocks(language_model: Any) -> nn.ModuleList | None:
    """Return the list of the model's blocks; None if it is not clear which one that is."""
    count = getattr(language_model.config, "num_hidden_layers", None)
    found = [module for module in language_model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return found[0] if len(found) == 1 else None


def _stop_after(name: str, language_model: Any, layer: int) -> None:
    """Drop the blocks after number `layer`."""
    if layer == -1:
        return
    blocks = _blocks(language_model)
    if blocks is None:
        raise UsageError(f"{name}: its blocks are not one list, so its inner layers cannot be read; use layer -1")
    if not 1 <= layer <= len(blocks):
        raise UsageError(f"layer={layer}: {name} has blocks 1 to {len(blocks)}, and -1 for the last")
    del blocks[layer:]
    language_model.config.num_hidden_layers = layer


def _limit_length(name: str, model: "SentenceTransformer", max_length: int | None) -> None:
    """Set the longest input in tokens; one longer than the folder says is tried out, as position tables end somewhere."""
    own = model.max_seq_length
    if max_length is None:
        if own is None or own > 1 << 20:
            raise UsageError(f"{name} does not say how long a text may be; pass max_length")
        return
    if max_length < 1:
        raise UsageError(f"max_length={max_length} must be at least 1 token")
    model.max_seq_length = max_length
    if own is not None and max_length > own:
        try:
            model.encode(["a " * max_length])
        except (IndexError, RuntimeError) as error:
            raise UsageError(f"max_length={max_length} is more than {name} has positions for; {own} is sure to work") from error


def hash_tokenizer(tokenizer: Any) -> str:
    """Return the xxh3-128 of a tokenizer's rules, of a slow one its vocabulary."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        content = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}  # these follow the calls
    else:
        content = tokenizer.get_vocab()
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
