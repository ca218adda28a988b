"""Tiny random models made in code, for tests of stage two: encoders, LLMs with a tokenizer, stage-one runs, a whole SailLlava.

Every builder writes a folder and returns it as a Path. Weights follow fixed seeds; norms and biases are shaken, so that a norm
left out or applied twice shows.
"""

import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
)

from align.encoders.spec import VisionSpec
from align.encoders.vision import load_vision_encoder
from align.model.dual_encoder import SailConfig, SailModel
from align.model.saving import save_model
from mllm.model.modeling import SailLlavaConfig, SailLlavaForConditionalGeneration
from mllm.model.processing import SailLlavaImageProcessor, SailLlavaProcessor
from tests.support.tiny_encoders import CASES, VIT, save, save_timm, shake

SIZE = 42  # pixels of a side; patches of 14 pixels make a grid of 3 x 3
WORDS = [
    "a", "the", "is", "are", "there", "what", "where", "how", "many", "image", "photo", "answer", "question", "yes", "no",
    "left", "right", "of", "above", "below", "red", "green", "blue", "dog", "cat", "car", "tree", "one", "two", "three", "four",
    "five", "system", "user", "assistant", "describe", "Describe", "What", "USER", "ASSISTANT", "A", "B", "hello", "world",
    "and", "on", "in",
]  # fmt: skip
TEXTS = [" ".join(random.Random(n).choices(WORDS, k=12)) + random.Random(n).choice(".?!:\n") for n in range(200)]
LLMS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mixtral": MixtralConfig, "qwen2_moe": Qwen2MoeConfig}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
VISION = ("dinov2", "dinov2_with_registers", "resnet", "timm_cnn")


def tiny_tokenizer(bos: bool = True, chatml: bool = False, template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer (any text round-trips) of 400 tokens: <unk>, <s>, </s>, <pad>, then bytes and merges.

    `bos` puts <s> before every text, as Llama's does; `chatml` adds <|im_start|> and <|im_end|> as special tokens, the latter as
    the end-of-sequence token. There is no chat template unless given.
    """
    specials = ["<unk>", "<s>", "</s>", "<pad>"] + (["<|im_start|>", "<|im_end|>"] if chatml else [])
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>" if chatml else "</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=2048,
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_llm(folder: Path, kind: str = "llama", tie: bool = False, rows: int | None = None, **tokenizer: object) -> Path:
    """Return a folder with a random 2-layer LLM of width 32 (`llama` or `qwen2`) and its tokenizer.

    `rows` of the embedding may exceed the tokenizer's length, as Qwen's do; other arguments go to `tiny_tokenizer`.
    """
    tokens = tiny_tokenizer(**tokenizer)  # type: ignore[arg-type]
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "vocab_size": rows or len(tokens),
        "tie_word_embeddings": tie,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
        "initializer_range": 0.2,
    }
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**shape)) if kind == "llama" else Qwen2ForCausalLM(Qwen2Config(**shape))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.generation_config.eos_token_id = tokens.eos_token_id
    model.generation_config.pad_token_id = tokens.pad_token_id
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def tiny_llava(folder: Path, template: str | None = None, **fields: Any) -> Path:
    """Return a folder with a stock LLaVA checkpoint: CLIP tower, llama in bf16, and a processor with the chat template.

    `fields` are LlavaConfig's; the tower is read as by default, at layer -2 without its CLS token.
    """
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    text = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=448,
        bos_token_id=1, eos_token_id=2, pad_token_id=3, max_position_embeddings=512,
    )  # fmt: skip
    index = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VIT), text_config=text, image_token_index=index, image_seq_length=9, **fields)
    torch.manual_seed(0)
    shake(LlavaForConditionalGeneration(config)).to(torch.bfloat16).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    strategy = {"patch_size": 14, "vision_feature_select_strategy": "default"}
    LlavaProcessor(images, tokenizer, chat_template=template, **strategy).save_pretrained(folder)
    return folder


def tiny_vision(folder: Path, kind: str = "dinov2") -> Path:
    """Return a folder with a random encoder and its image processor: a key of `test_encoders.CASES`, or `timm_cnn`."""
    if kind == "timm_cnn":
        return Path(save_timm(folder, "test_efficientnet", {}))
    assert kind in CASES, f"{kind}: choose one of {', '.join(CASES)} or timm_cnn"
    return Path(save(folder, kind))


def tiny_sail(folder: Path, vision: Path, head: str = "glu", width: int = 24, **loader: object) -> Path:
    """Return a stage-one model folder (no text encoder behind it) whose image head reads `vision`; weights are not trained.

    `loader` are fields of VisionSpec: layer, feature, image_size.
    """
    encoder = load_vision_encoder(VisionSpec(str(vision), **loader))  # type: ignore[arg-type]
    settings = SailConfig(
        vision={"name": str(vision), **loader},
        vision_fingerprint=encoder.fingerprint,
        vision_width=encoder.feature_width,
        text_width=8,
        width=encoder.feature_width if head == "sharelock" else width,
        head=head,
        expansion=2 if head in ("glu", "mlp") else None,
    )
    model = SailModel(settings).initialize(5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.vision_head.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    save_model(model, folder)
    return folder


def tiny_tower(kind: str, size: int) -> dict[str, Any]:
    """Return the fields of SailLlavaConfig about an encoder for images of `size` pixels a side: `dinov2` or `resnet`."""
    model_class, arguments, _ = CASES[kind]
    cnn = kind == "resnet"
    return {
        "vision_config": getattr(transformers, model_class).config_class(**arguments),
        "sail_feature": "patch" if cnn else "cls_patch",
        "sail_feature_width": 20 if cnn else 64,
        "sail_layer": 4 if cnn else 3,
        "sail_image_size": [size, size],
        "sail_patch_grid": [2, 2] if cnn else [size // 14, size // 14],
        "sail_unread": [] if cnn else ["embeddings.mask_token"],
        "sail_fingerprint": {},
    }


def tiny_model(
    kind: str = "dinov2",
    llm: str = "llama",
    tie: bool = False,
    chatml: bool = False,
    grid: list[int] | None = None,
    seed: int = 0,
    raw: bool = False,
    join: str | None = None,
) -> tuple[SailLlavaForConditionalGeneration, SailLlavaProcessor]:
    """Return a SailLlava in memory (float32, eval mode) and its processor, without any folder or assembly.

    Vision `dinov2` (CLS and patches, 3 x 3 grid) or `resnet` (2 x 2 grid), a random glu head, 9 or 4 visual tokens, or those of
    `grid`; with `raw` the projector sees raw patches, too. `join` (channel, sequence) puts a resnet of 2 x 2 patches of 56 pixels
    without a head beside the encoder. <image> is the last token of the vocabulary. The processor has no chat template: set one.
    """
    tokenizer = tiny_tokenizer(chatml=chatml)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "vocab_size": len(tokenizer), "tie_word_embeddings": tie, "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    second = tiny_tower("resnet", SIZE + 14)
    second |= {"vision_config": second["vision_config"].to_dict(), "sail_grid": (grid or [3, 3]) if join == "channel" else None}
    config = SailLlavaConfig(
        text_config=LLMS[llm](**text, **(MOE if llm in ("mixtral", "qwen2_moe") else {})),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        sail_head="random",
        sail_head_expansion=2,
        sail_raw=raw,
        sail_width=24,
        sail_grid=grid,
        sail_beside=[second] if join else None,
        sail_join=join or "channel",
        **tiny_tower(kind, SIZE),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SailLlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    beside = {"size": {"height": SIZE + 14, "width": SIZE + 14}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    images = SailLlavaImageProcessor(
        {"height": SIZE, "width": SIZE}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], resample=3,
        beside=[beside] if join else None,
    )  # fmt: skip
    return model, SailLlavaProcessor(images, tokenizer, image_seq_length=config.image_seq_length)
