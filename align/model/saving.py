"""Saving a SailModel to a folder that opens anywhere, and finding the model in the folder of a run."""

import shutil
from pathlib import Path

from safetensors.torch import save_file

from align.common.errors import UsageError
from align.common.files import read_object
from align.common.folders import commit_folder, replaced_folder
from align.encoders.loading import copy_encoder
from align.model.dual_encoder import TEXT_FOLDER, VISION_FOLDER, SailConfig, SailImageProcessor, SailModel


def model_folder(path: Path) -> Path:
    """Return the aligned model's folder at `path`: itself, or the `best` or `last` model of a run; UsageError if there is none."""
    for place in (path, path / "best", path / "last"):
        if (place / "config.json").is_file() and read_object(place / "config.json").get("model_type") == "sail":
            return place
    raise UsageError(f"{path} is neither an aligned model (config.json) nor a run with best/ or last/; make one with align/train.py")


def save_model(model: SailModel, folder: Path, tokenizer: Path | None = None, embed_encoders: bool = False) -> None:
    """Write model and processor to `folder` so that a crash leaves the old folder or the new one.

    `tokenizer` is a folder with the text encoder's tokenizer files, which are copied; `embed_encoders` copies the encoders
    themselves, so that the folder can be moved to a machine that has neither.
    """
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    with replaced_folder(folder, "model", size) as temporary:
        config = SailConfig.from_dict(model.config.to_dict())
        if tokenizer is not None and tokenizer.is_dir():
            shutil.copytree(tokenizer, temporary, dirs_exist_ok=True)
        if embed_encoders:
            for side, name in (("vision", VISION_FOLDER), ("text", TEXT_FOLDER)):
                reference = getattr(model.config, side)
                copy_encoder(reference["name"], temporary / name, reference.get("revision"))
                setattr(config, side, {**reference, "name": name, "revision": None})
        config.architectures, config.dtype = [type(model).__name__], "float32"
        config.save_pretrained(temporary)
        # what save_pretrained writes for one shard, without its imports of other frameworks
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, temporary / "model.safetensors", {"format": "pt"})
        if config.vision:
            SailImageProcessor(config.vision).save_pretrained(temporary)
        commit_folder(temporary, {})
