"""Tiny random CLIP, MetaCLIP 2 and SigLIP models, saved as Hugging Face folders."""

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = ["<pad>", "<unk>", "a", "photo", "of", "red", "blue", "green", "dog", "cat", "<s>", "</s>"]


TEXTS = ["a red dog", "a photo of a blue cat", "cat", "dog " * 40, "a red dog"]


VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


TEXT = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": len(WORDS),
    "max_position_embeddings": 12, "eos_token_id": 11, "bos_token_id": 10, "pad_token_id": 0,
}  # fmt: skip


def shake(model):
    """Make norms and biases non-trivial, so that one left out shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.3 if parameter.ndim < 2 else 0.1) * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save_hugging_face(folder, family):
    torch.manual_seed(0)
    if family == "clip":
        config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=20)
        model = transformers.CLIPModel(config)
    elif family == "metaclip_2":
        config = transformers.MetaClip2Config(text_config=TEXT, vision_config=VISION, projection_dim=20)
        model = transformers.MetaClip2Model(config)
    else:
        text = {**TEXT, "hidden_size": 32, "projection_size": 32}
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VISION))
    model = shake(model)
    model.save_pretrained(folder)
    transformers.BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=3, image_mean=[0.5, 0.4, 0.3],
        image_std=[0.2, 0.3, 0.4], do_convert_rgb=True,
    ).save_pretrained(folder)  # fmt: skip
    rules = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    rules.pre_tokenizer, rules.normalizer = pre_tokenizers.Whitespace(), normalizers.Lowercase()
    rules.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 10), ("</s>", 11)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=rules, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return model, transformers.AutoTokenizer.from_pretrained(folder)
