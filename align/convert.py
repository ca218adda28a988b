"""Convert published SAIL weights and embeddings to this kit's formats, and heads back.

    python align/convert.py --heads sail_l.pt --vision facebook/dinov2-large --text sentence-transformers/all-roberta-large-v1 \\
        --output runs/sail-l
    python align/convert.py --heads vlhead.bin --base runs/sail-l --output runs/sail-l-tuned     # image head of a tuned LLaVA
    python align/convert.py --projector mm_projector.bin --output projector.safetensors
    python align/convert.py --model runs/mine --to-published heads.pt
    python align/convert.py --embeddings laion/part0 --kind image --encoder-name openai/clip-vit-large-patch14 --output features/x/images
    python align/convert.py --embeddings sail_text --kind caption --keys keys.txt --encoder-name gte-large --output features/x/captions

Only this command reads .pt and .bin files, and only tensors from them. It opens --vision and --text to record their fingerprints, so
that other encoders are refused later. Without them the model aligns only features that are already encoded. The encoder of imported
embeddings cannot be checked: --encoder-name and --stated are trusted.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from align.common.errors import UsageError
from align.common.files import human_bytes, require_free
from align.common.hardware import resolve_precision
from align.common.locks import Lease
from align.model.config import ConvertConfig
from align.runtime.commandline import run, set_up

if TYPE_CHECKING:
    from rich.console import Console


def main(config: ConvertConfig) -> None:
    """Do the requested conversion."""
    console = set_up()
    if config.heads:
        convert_heads(config, console)
    elif config.embeddings:
        convert_embeddings(config, console)
    elif config.projector:
        convert_projector(config, console)
    else:
        write_published(config, console)


def convert_heads(config: ConvertConfig, console: "Console") -> None:
    """Write the SailModel of a published checkpoint, with the named encoders."""
    import torch

    from align.encoders.text import load_text_encoder
    from align.encoders.vision import load_vision_encoder
    from align.model.dual_encoder import SailModel
    from align.model.published_heads import heads_from, read_weights, with_vision_head
    from align.model.saving import model_folder, save_model

    assert config.heads is not None and config.output is not None
    place, output = Path(config.heads), Path(config.output)
    if output.exists():
        raise UsageError(f"{output} is there already; give another --output")
    weights = read_weights(place)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = Path(scratch) / "tokenizer"
        if config.base:
            tokenizer = model_folder(Path(config.base))  # the whole folder, with its other files
            model = with_vision_head(SailModel.from_pretrained(tokenizer), weights, str(place))
        else:
            heads_from(weights, str(place))  # fails on a bad file before encoders are opened
            precision = resolve_precision(config.precision, torch.device("cpu"))
            vision_spec, text_spec = config.encoders(precision)
            vision = load_vision_encoder(vision_spec) if vision_spec else None
            text = load_text_encoder(text_spec) if text_spec else None
            if text:
                text.tokenizer.save_pretrained(tokenizer)
            model = heads_from(weights, str(place), vision, text, precision)
        output.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, output, tokenizer, config.embed_encoders)
    made = model.config
    console.print(
        f"{output}: glu heads {made.vision_width} and {made.text_width} -> {made.width}, expansion {made.expansion}, "
        f"t = {model.logit_scale.exp().item():.2f}"
    )
    for side, encoder in (("vision", made.vision), ("text", made.text)):
        if not encoder:
            console.print(f"no {side} encoder named: this model aligns {side} features that are already encoded")


def convert_embeddings(config: ConvertConfig, console: "Console") -> None:
    """Write a feature store from a folder of published embeddings."""
    from align.features.imported import Embeddings, find_files, import_embeddings

    assert config.embeddings is not None and config.kind is not None and config.output is not None
    output = Path(config.output)
    embeddings = Embeddings(find_files(Path(config.embeddings), config.kind), config.key_column)
    stated = dict(given.partition("=")[::2] for given in config.stated)
    rows = sum(embeddings.lengths)
    output.mkdir(parents=True, exist_ok=True)
    require_free(output, rows * (2 * embeddings.width + 40))
    with Lease(output):
        store = import_embeddings(
            embeddings, output, kind=config.kind, fingerprint={"encoder": config.encoder_name or "", "made": "imported", **stated},
            shard_rows=config.shard_rows, keys_file=Path(config.keys) if config.keys else None,
        )  # fmt: skip
    console.print(f"{output}: {len(store)} x {store.width} features ({rows - len(store)} rejected), {human_bytes(store.nbytes)}")


def convert_projector(config: ConvertConfig, console: "Console") -> None:
    """Write LLaVA's projector with transformers' tensor names."""
    from align.common.tensor_files import write_tensor_file
    from align.model.published_heads import projector_from, read_weights

    assert config.projector is not None and config.output is not None
    weights = projector_from(read_weights(Path(config.projector)), config.projector)
    write_tensor_file(Path(config.output), weights)
    console.print(f"{config.output}: a projector {weights['linear_1.weight'].shape[1]} -> {weights['linear_2.weight'].shape[0]}")


def write_published(config: ConvertConfig, console: "Console") -> None:
    """Write the heads of a model in the published layout."""
    from align.common.tensor_files import write_tensor_file
    from align.model.dual_encoder import SailModel
    from align.model.published_heads import to_published
    from align.model.saving import model_folder

    assert config.model is not None and config.to_published is not None
    write_tensor_file(Path(config.to_published), to_published(SailModel.from_pretrained(model_folder(Path(config.model)))))
    console.print(f"{config.to_published}: the heads of {config.model} in the published layout")


if __name__ == "__main__":
    run(main, ConvertConfig, "convert")
