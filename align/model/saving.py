"""Saving a SailModel to a folder that opens anywhere, with copies of its encoders on request, and finding the model in a run's folder."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import save_file

from align.common.errors import DamagedError, UsageError
from align.common.files import read_object
from align.common.folders import commit_folder, replaced_folder
from align.encoders.loading import copy_encoder, require_copyable
from align.model.dual_encoder import TEXT_FOLDER, VISION_FOLDER, SailConfig, SailImageProcessor, SailModel

COPIES = {"vision": VISION_FOLDER, "text": TEXT_FOLDER}
_ROOT = Path(__file__).resolve().parents[2]
# what the process that opens copies runs; a FingerprintError says that a copy is not what the heads were trained on
_TRIAL = """
import sys
from PIL import Image
from align.model.dual_encoder import SailImageProcessor, SailModel
folder, trusted = sys.argv[1], sys.argv[2] == "True"
model = SailModel.from_pretrained(folder, trust_remote_code=trusted)
pixels = SailImageProcessor.from_pretrained(folder).preprocess(Image.new("RGB", (64, 64), "gray"))["pixel_values"]
found = model.vision_encoder.encode(pixels)[1].isfinite().all() and model.text_encoder.encode(["a photo"], 1).isfinite().all()
sys.exit(None if found else "features that are not finite")
"""


def model_folder(path: Path, first: str = "best") -> Path:
    """Return the aligned model's folder at `path`: itself, or the `first`, else the other model of a run; UsageError if there is none."""
    for place in (path, path / first, path / "best", path / "last"):
        if (place / "config.json").is_file() and read_object(place / "config.json").get("model_type") == "sail":
            return place
    raise UsageError(f"{path} is neither an aligned model (config.json) nor a run with best/ or last/; make one with align/train.py")


def save_model(model: SailModel, folder: Path, tokenizer: Path | None = None, embed_encoders: bool = False) -> None:
    """Write model and processor to `folder` so that a crash leaves the old folder or the new one.

    `tokenizer` is a folder with the text encoder's tokenizer files, which are copied; `embed_encoders` copies the encoders
    themselves, so that the folder can be moved to a machine that has neither. The copies are opened in a fresh process first
    (but not those with code of their own, unless the model trusts it): DamagedError if that fails. Other errors: `require_whole`.
    """
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    size += require_whole(model.config) if embed_encoders else 0
    with replaced_folder(folder, "model", size) as temporary:
        config = SailConfig.from_dict(model.config.to_dict())
        if tokenizer is not None and tokenizer.is_dir():
            shutil.copytree(tokenizer, temporary, dirs_exist_ok=True)
        if embed_encoders:
            for side, name in COPIES.items():
                reference = getattr(model.config, side)
                if reference["name"] != name:  # else the whole folder was copied
                    shutil.rmtree(temporary / name, ignore_errors=True)  # an older copy
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
        if embed_encoders:
            _open_elsewhere(temporary, model.trust_remote_code)


def require_whole(config: SailConfig) -> int:
    """Return the bytes of copies of a model's encoders. UsageError if it names none, or one cannot be copied (`require_copyable`)."""
    size = 0
    for side, name in COPIES.items():
        reference = getattr(config, side)
        if not reference:
            raise UsageError(f"this model names no {side} encoder, so none can be copied into its folder; leave --embed-encoders out")
        size += require_copyable(reference["name"], reference.get("revision")) if reference["name"] != name else 0
    return size


def package(source: Path, folder: Path, moved: Mapping[str, str | None], trust_remote_code: bool = False) -> None:
    """Write the model in `source` with copies of its encoders to `folder`, which may be `source`.

    `moved` says for "vision" and "text" where an encoder lies now, if not where the model says. Raises as `save_model`; FingerprintError
    if an encoder is not the one that the heads were trained on.
    """
    model = SailModel.from_pretrained(source, trust_remote_code=trust_remote_code)
    for side, name in moved.items():
        if name is not None:
            setattr(model.config, side, {**getattr(model.config, side), "name": name, "revision": None})
    require_whole(model.config)
    if any(moved.values()):
        _ = model.vision_encoder, model.text_encoder  # compares their fingerprints
    save_model(model, folder, source, embed_encoders=True)


def _open_elsewhere(folder: Path, trusted: bool) -> None:
    """Open the model and its encoders in a fresh process that sees no hub, no cache and no GPU. DamagedError if it fails."""
    with TemporaryDirectory() as scratch:
        own = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC"))
        }
        own |= {"HF_HUB_OFFLINE": "1", "HF_HOME": scratch, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(_ROOT)}
        command = [sys.executable, "-c", _TRIAL, str(folder.resolve()), str(trusted)]
        ran = subprocess.run(command, cwd=scratch, env=own, capture_output=True, text=True)
    if ran.returncode and (trusted or "trust-remote-code" not in ran.stderr):
        last = (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1]
        raise DamagedError(
            f"the copy of the encoders does not open in a process of its own ({last[:400]}): the encoder's folder needs something outside "
            "of it, or was changed; the model without copies is as it was"
        )
