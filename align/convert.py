"""Published SAIL weights and embeddings into this kit's formats, and heads back.

    python align/convert.py --heads sail_l.pt --vision facebook/dinov2-large --text sentence-transformers/all-roberta-large-v1 \\
        --output runs/sail-l
    python align/convert.py --heads vlhead.bin --base runs/sail-l --output runs/sail-l-tuned     # image head of a tuned LLaVA
    python align/convert.py --projector mm_projector.bin --output projector.safetensors
    python align/convert.py --model runs/mine --to-published heads.pt
    python align/convert.py --embeddings laion/part0 --kind image --encoder-name openai/clip-vit-large-patch14 --output features/x/images
    python align/convert.py --embeddings sail_text --kind caption --keys keys.txt --encoder-name gte-large --output features/x/captions

This is the only command that reads .pt and .bin files, and it reads nothing but tensors from them. --vision and --text are opened, so
that their fingerprints are known and other encoders are refused later; without them the model can only align features that are
already encoded. The encoder of imported embeddings cannot be checked: --encoder-name and --stated are taken as given.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from align.common.commandline import run
from align.common.console import plain_console
from align.common.errors import UsageError
from align.common.files import human_bytes, require_free
from align.common.hardware import resolve_precision, reuse_freed_memory, use_cores
from align.common.locks import Lease
from align.encoders.spec import TextSpec, VisionSpec
from align.encoders.text import load_text_encoder
from align.encoders.vision import load_vision_encoder
from align.features.imported import Embeddings, find_files, import_embeddings
from align.model.config import ConvertConfig
from align.model.dual_encoder import SailModel
from align.model.published_heads import heads_from, projector_from, read_weights, to_published, with_vision_head, write_weights
from align.model.saving import model_folder, save_model


def open_encoders(config: ConvertConfig, tokenizer: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return what SailConfig says of the named encoders, and the widths of their features; the tokenizer's files go to `tokenizer`."""
    precision = resolve_precision(config.precision, torch.device("cpu"))
    options: Any = {"precision": precision, "trust_remote_code": config.trust_remote_code}
    said: dict[str, Any] = {"precision": precision}
    widths = {}
    if config.vision:
        vision_spec = VisionSpec(config.vision, config.vision_revision, feature=config.feature, layer=config.layer, **options)
        vision = load_vision_encoder(vision_spec)
        said["vision"], said["vision_fingerprint"], widths["vision"] = vision_spec.stored(), vision.fingerprint, vision.feature_width
    if config.text:
        text_spec = TextSpec(config.text, config.text_revision, max_length=config.max_length, **options)
        text = load_text_encoder(text_spec)
        said["text"], said["text_fingerprint"], widths["text"] = text_spec.stored(), text.fingerprint, text.width
        text.tokenizer.save_pretrained(tokenizer)
    return said, widths


def convert_heads(config: ConvertConfig, console: Console) -> None:
    """Write the SailModel of a published checkpoint, after comparing its widths with those of the encoders."""
    assert config.heads is not None and config.output is not None
    place, output = Path(config.heads), Path(config.output)
    if output.exists():
        raise UsageError(f"{output} is there already; give another --output")
    weights = read_weights(place)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = Path(scratch) / "tokenizer"
        if config.base:
            tokenizer = model_folder(Path(config.base))  # with all else that lies there
            model = with_vision_head(SailModel.from_pretrained(tokenizer), weights, str(place))
            said = model.config.to_dict()
        else:
            heads_from(weights, str(place))  # what is wrong with the file is told before encoders are opened
            said, widths = open_encoders(config, tokenizer)
            model = heads_from(weights, str(place), **said)
            for side, found in widths.items():
                wanted = model.config.vision_width if side == "vision" else model.config.text_width
                if found != wanted:
                    given = f"--{side} {said[side]['name']} gives features of {found}, but the published head takes {wanted}"
                    raise UsageError(f"{given}; name the encoder that it was trained on, or another --feature")
        output.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, output, tokenizer, config.embed_encoders)
    settings = model.config
    console.print(
        f"{output}: glu heads {settings.vision_width} and {settings.text_width} -> {settings.width}, expansion {settings.expansion}, "
        f"t = {model.logit_scale.exp().item():.2f}"
    )
    for side in ("vision", "text"):
        if not said.get(side):
            console.print(f"no {side} encoder named: this model aligns {side} features that are already encoded")


def convert_embeddings(config: ConvertConfig, console: Console) -> None:
    """Write a feature store from a folder of published embeddings."""
    assert config.embeddings is not None and config.kind is not None and config.output is not None
    output = Path(config.output)
    embeddings = Embeddings(find_files(Path(config.embeddings), config.kind), config.key_column)
    stated = dict(given.partition("=")[::2] for given in config.stated)
    rows = sum(embeddings.lengths)
    output.mkdir(parents=True, exist_ok=True)
    require_free(output, rows * (2 * embeddings.width + 40))
    with Lease(output, "convert"):
        store = import_embeddings(
            embeddings, output, kind=config.kind, fingerprint={"encoder": config.encoder_name or "", "made": "imported", **stated},
            shard_rows=config.shard_rows, keys_file=Path(config.keys) if config.keys else None,
        )  # fmt: skip
    console.print(f"{output}: {len(store)} x {store.width} features ({rows - len(store)} rejected), {human_bytes(store.nbytes)}")


def main(config: ConvertConfig) -> None:
    """Do the one conversion that was asked for."""
    reuse_freed_memory()
    use_cores(1)
    disable_progress_bar()  # of transformers
    console = plain_console()
    if config.heads:
        convert_heads(config, console)
    elif config.embeddings:
        convert_embeddings(config, console)
    elif config.projector:
        assert config.output is not None
        weights = projector_from(read_weights(Path(config.projector)), config.projector)
        write_weights(Path(config.output), weights)
        console.print(f"{config.output}: a projector {weights['linear_1.weight'].shape[1]} -> {weights['linear_2.weight'].shape[0]}")
    else:
        assert config.model is not None and config.to_published is not None
        write_weights(Path(config.to_published), to_published(SailModel.from_pretrained(model_folder(Path(config.model)))))
        console.print(f"{config.to_published}: the heads of {config.model} in the published layout")


if __name__ == "__main__":
    run(main, ConvertConfig, "convert")
