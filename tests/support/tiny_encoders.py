"""Tiny random encoders of every family, saved as Hugging Face folders, and what the stock model gives for each."""

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BitImageProcessor

SIZE, PATCH, GRID = 42, 14, 3


VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": SIZE,
    "patch_size": PATCH,
}


TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}


STAGES = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 2, 1]}


TIMM_SIZE = {"input_size": (3, SIZE, SIZE), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic", "crop_pct": 0.9}


def tokens_of(map_):
    return map_.flatten(2).transpose(1, 2)


def cls_first(skip):
    def expected(model, pixels):
        hidden = model(pixels).last_hidden_state
        return hidden[:, 0], hidden[:, skip:]

    return expected


def no_cls(model, pixels):
    return None, model(pixels).last_hidden_state


def mae(model, pixels):
    """Run the stock model with nothing masked but patches shuffled at random, and put them back in order."""
    model.config.mask_ratio = 0.0
    output = model(pixels)
    cls, shuffled = output.last_hidden_state[:, 0], output.last_hidden_state[:, 1:]
    return cls, torch.stack([row[order] for row, order in zip(shuffled, output.ids_restore, strict=True)])


def clip(model, pixels):
    vision = model.vision_model if hasattr(model, "vision_model") else model
    hidden = vision.post_layernorm(vision(pixels).last_hidden_state)
    return hidden[:, 0], hidden[:, 1:]


def vision_tower(model, pixels):
    return no_cls(model.vision_model, pixels)


def timm_tokens(prefix, has_cls):
    def expected(model, pixels):
        hidden = model.timm_model.forward_features(pixels)
        return hidden[:, 0] if has_cls else None, hidden[:, prefix:]

    return expected


# model class, config arguments, what the stock model gives
CASES = {
    "dinov2": ("Dinov2Model", VIT, cls_first(1)),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", {**VIT, "num_register_tokens": 3}, cls_first(4)),
    "dinov3_vit": ("DINOv3ViTModel", {**VIT, "num_register_tokens": 4}, cls_first(5)),
    "dinov3_convnext": ("DINOv3ConvNextModel", STAGES, lambda model, pixels: (None, model(pixels).last_hidden_state[:, 1:])),
    "vit": ("ViTModel", VIT, cls_first(1)),
    "vit_mae": ("ViTMAEModel", {**VIT, "mask_ratio": 0.75}, mae),
    "ijepa": ("IJepaModel", VIT, no_cls),
    "aimv2_vision_model": ("Aimv2VisionModel", VIT, no_cls),
    "aimv2": ("Aimv2Model", {"vision_config": {**VIT, "is_native": True}, "text_config": TEXT}, vision_tower),
    "clip_vision_model": ("CLIPVisionModel", VIT, clip),
    "clip": ("CLIPModel", {"vision_config": VIT, "text_config": TEXT}, clip),
    "siglip_vision_model": ("SiglipVisionModel", VIT, no_cls),
    "siglip": ("SiglipModel", {"vision_config": VIT, "text_config": TEXT}, vision_tower),
    "convnextv2": (
        "ConvNextV2Model",
        STAGES,
        lambda model, pixels: (None, model.layernorm(tokens_of(model(pixels).last_hidden_state))),
    ),
    "resnet": (
        "ResNetModel",
        {**STAGES, "embedding_size": 8, "layer_type": "basic"},
        lambda model, pixels: (None, tokens_of(model(pixels).last_hidden_state)),
    ),
}


TIMM_VIT = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": 32, "depth": 3, "num_heads": 4}


TIMM_CASES = {
    "vit with cls and registers": ("vit_small_patch14_reg4_dinov2", TIMM_VIT, timm_tokens(5, True)),
    "vit with registers, no cls": (
        "vit_small_patch16_224",
        {**TIMM_VIT, "class_token": False, "reg_tokens": 2, "global_pool": "avg"},
        timm_tokens(2, False),
    ),
    "distilled deit": ("deit_tiny_distilled_patch16_224", TIMM_VIT, timm_tokens(2, True)),
    "efficientnet": ("test_efficientnet", {}, lambda model, pixels: (None, tokens_of(model.timm_model.forward_features(pixels)))),
    "resnet": ("test_resnet", {}, lambda model, pixels: (None, tokens_of(model.timm_model.forward_features(pixels)))),
    "channels-last swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 56, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)},
        lambda model, pixels: (None, model.timm_model.forward_features(pixels).flatten(1, 2)),
    ),
}


VITS = [name for name, (_, arguments, _) in CASES.items() if arguments is not STAGES and "embedding_size" not in arguments]


def shake(model):
    """Make norms, biases and scales non-trivial, so that a norm left out or applied twice shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save(folder, model_type, **config):
    torch.manual_seed(0)
    model_class, arguments, _ = CASES[model_type]
    model_class = getattr(transformers, model_class)
    shake(model_class(model_class.config_class(**{**arguments, **config}))).save_pretrained(folder)
    processor = BitImageProcessor(
        size={"shortest_edge": 48},
        crop_size={"height": SIZE, "width": SIZE},
        resample=3,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        do_convert_rgb=True,
    )
    processor.save_pretrained(folder)
    return str(folder)


def save_timm(folder, architecture, arguments):
    torch.manual_seed(0)
    size = arguments.get("img_size", SIZE)
    pretrained = {**TIMM_SIZE, "input_size": (3, size, size)}
    config = transformers.TimmWrapperConfig(architecture=architecture, model_args=arguments, pretrained_cfg=pretrained, num_labels=2)
    shake(transformers.TimmWrapperModel(config)).save_pretrained(folder)
    return str(folder)


def pixels_of(encoder, count=2):
    sample = encoder.transform(Image.new("RGB", (60, 50)))
    return torch.randn((count, *sample.shape), generator=torch.Generator().manual_seed(2))


def close(actual, expected, tolerance=1e-5):
    if expected is None:
        assert actual is None
    else:
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *("a", "photo", "of", "dog", "cat", "on", "left", "red", "big", "small", "blue", "the", "and", "car", "tree", "##s"),
]


def save_bert(folder, pooling="mean", normalize=True, dense=False, **tokenizer):
    """Save a tiny sentence-transformers folder with a closing Normalize, as all-MiniLM has."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=24
    )
    plain = folder / "plain"
    shake(transformers.BertModel(config)).save_pretrained(plain)
    (plain / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(vocab=str(plain / "vocab.txt"), model_max_length=16, **tokenizer).save_pretrained(plain)
    modules = [Transformer(str(plain)), Pooling(32, pooling)]
    modules += [Dense(32, 20)] if dense else []
    modules += [Normalize()] if normalize else []
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "st"))
    return str(folder / "st"), str(plain)


def change_weight(folder, name):
    """Move one number of a weight of a saved model."""
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def without_weight(folder, name="encoder.layer.1.mlp.fc1.weight"):
    """Take a weight out of a saved model."""
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
