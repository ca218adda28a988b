"""Putting a model together: an LLM (or what a LLaVA has of one), a vision encoder, a stage-one head, and a new projector.

Legend: `H` LLM width, `F` width given to the head, `E` head width, `N` visual tokens an image.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from align.common.errors import DamagedError, UsageError
from mllm.assembly.language import Language, prepare_tokenizer
from mllm.assembly.vision import AlignedEncoder, image_processor_of
from mllm.conversations.tokens import Chat
from mllm.model.modeling import SailLlavaConfig, SailLlavaForConditionalGeneration, SailProjector
from mllm.model.processing import SailLlavaProcessor


@dataclass(frozen=True)
class Component:
    """One line of the report: what became of a component of the given LLM or LLaVA, and where its weights are from."""

    name: str
    state: Literal["kept", "replaced", "new"]
    parameters: int
    weights: str


def assemble(
    language: Language,
    vision: AlignedEncoder,
    *,
    image_aspect_ratio: Literal["pad", "resize"] = "pad",
    grid: tuple[int, int] | None = None,
    template: str = "auto",
    seed: int = 0,
) -> tuple[SailLlavaForConditionalGeneration, SailLlavaProcessor, list[Component]]:
    """Return (model in eval mode, processor, report): the LLM's weights bit for bit, in the types they were stored in.

    `grid` (rows, columns) averages the patches; `template` is a field of UpgradeConfig; `seed` draws the projector. The given
    modules go into the model, not copies. UsageError for a grid that does not fit, or an LLM that LLaVA's class cannot hold.
    """
    rows, columns = vision.encoder.patch_grid
    if grid is not None and not (1 <= grid[0] <= rows and 1 <= grid[1] <= columns):
        raise UsageError(f"grid {grid[0]} x {grid[1]} does not fit: the encoder has {rows} x {columns} patches, which can only be averaged")
    vision.fields["sail_grid"] = list(grid) if grid is not None else None
    text, template_name = prepare_tokenizer(language, template)
    ids = torch.arange(1, 9)[None] % language.lm_head.weight.shape[0]
    with torch.no_grad():
        expected = language.whole.eval()(input_ids=ids).logits
    model = join(language, vision, seed)
    with torch.no_grad():
        found = model(input_ids=ids).logits
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise UsageError(
            f"{language.source} ({language.whole.config.model_type}) does more between its last layer and its logits than a linear map "
            "(soft-capping, scaling), which LLaVA's class does not know; use another LLM"
        )
    images = image_processor_of(vision.encoder.transform, vision.fields["sail_image_size"], image_aspect_ratio)
    processor = SailLlavaProcessor(
        images, language.tokenizer, chat_template=text, image_token=language.image_token, image_seq_length=model.config.image_tokens()
    )
    chat = Chat.of_processor(processor)
    _set_generation(model, language, chat.stop_ids)
    return model, processor, _report(model, language, vision, template_name, _stops(chat), seed)


def join(language: Language, vision: AlignedEncoder, seed: int) -> SailLlavaForConditionalGeneration:
    """Return the model made of the given modules, not copies, and of a projector drawn from `seed`; in eval mode."""
    text_config, backbone = language.base.config, vision.encoder.backbone.model
    text_config.tie_word_embeddings = language.tied
    vision_config: Any = backbone.config
    text_config.name_or_path = vision_config.name_or_path = ""  # folders of this machine
    if vision_config.model_type == "timm_wrapper" and hasattr(backbone.timm_model, "set_input_size"):
        # its position embeddings have the size that was set, which the config has to repeat
        vision_config.model_args = {**(vision_config.model_args or {}), "img_size": vision.fields["sail_image_size"]}
    config = SailLlavaConfig(
        vision_config=vision_config, text_config=text_config, image_token_index=language.image_id,
        vision_feature_select_strategy="full", vision_feature_layer=-1,
        tie_word_embeddings=language.tied, dtype=language.lm_head.weight.dtype, **vision.fields,
    )  # fmt: skip
    with torch.device("meta"):
        model = SailLlavaForConditionalGeneration(config)
    inner: Any = model.model
    # beside what no feature depends on: what the encoder's own class keeps fixed, such as MAE's position embeddings
    config.sail_unread = [name for name, parameter in inner.vision_tower.named_parameters() if not parameter.requires_grad]
    described = {name: tensor.shape for name, tensor in model.state_dict().items()}
    inner.vision_tower, inner.sail_head, inner.language_model = backbone, vision.head, language.base
    inner.multi_modal_projector = _projector(vision, text_config.hidden_size, seed)
    model.lm_head = language.lm_head
    if {name: tensor.shape for name, tensor in model.state_dict().items()} != described:
        raise UsageError(f"{vision.source} or {language.source} has other weights than its config describes; use a complete checkpoint")
    model.requires_grad_(True)
    inner.freeze_unread()
    return model.eval()


def _projector(vision: AlignedEncoder, out_width: int, seed: int) -> SailProjector:
    """Return LLaVA-1.5's projector with the initial weights that torch's linear layers have, a pure function of `seed`."""
    generator = torch.Generator().manual_seed(seed + 1)  # the head's own stream is `seed`
    with torch.random.fork_rng(devices=[]):  # torch layers fill themselves from the global generator
        raw_width = vision.fields["sail_feature_width"] if vision.fields["sail_raw"] else 0
        projector = SailProjector(vision.width, out_width, "gelu", bias=True, raw_width=raw_width)
    with torch.no_grad():
        for linear in (projector.linear_1, projector.linear_2):
            bound = 1 / math.sqrt(linear.in_features)
            linear.weight.uniform_(-bound, bound, generator=generator)
            linear.bias.uniform_(-bound, bound, generator=generator)
        if raw_width:
            projector.linear_raw.weight.uniform_(-1, 1, generator=generator).mul_(1 / math.sqrt(raw_width))
    return projector


def load_projector(model: SailLlavaForConditionalGeneration, path: Path) -> None:
    """Put the weights of a trained projector into `model`; UsageError if they are of another shape, DamagedError for other names."""
    projector: Any = model.model.multi_modal_projector
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        hint = "align/convert.py --projector makes one of mm_projector.bin"
        raise DamagedError(f"{path} is no safetensors file ({error}); {hint}") from error
    own = {name: tuple(tensor.shape) for name, tensor in projector.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if set(found) != set(own):
        raise DamagedError(f"{path} holds {', '.join(sorted(found))}; a projector has {', '.join(sorted(own))}")
    if found != own:
        raise UsageError(f"the projector in {path} has the shapes {found}, this encoder and LLM need {own}")
    projector.load_state_dict(weights)


def _set_generation(model: SailLlavaForConditionalGeneration, language: Language, stops: list[int]) -> None:
    """Take over the LLM's generation settings, and end answers also with what ends them in the template."""
    settings: Any = language.whole.generation_config
    known = settings.eos_token_id
    known = known if isinstance(known, list) else [] if known is None else [known]
    settings.eos_token_id = list(dict.fromkeys([*known, *stops]))
    settings.pad_token_id = language.tokenizer.pad_token_id
    if not settings.do_sample:  # such leftovers, as in Vicuna, cannot be saved
        settings.temperature = settings.top_p = settings.top_k = None
    model.generation_config = settings


def _stops(chat: Chat) -> bool:
    """Return whether the template ends answers with a token that generation stops at; Hugging Face's LLaVA templates do not."""
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a question"}]}
    labels = chat.encode([question, {"role": "assistant", "content": "an answer"}]).labels
    return [label for label in labels if label >= 0][-1] in chat.stop_ids


def _report(model: Any, language: Language, vision: AlignedEncoder, template: str, stops: bool, seed: int) -> list[Component]:
    inner, config = model.model, model.config
    swapped: Literal["replaced", "new"] = "replaced" if language.is_llava else "new"
    added = language.new_rows * config.text_config.hidden_size * (1 if language.tied else 2)
    output = 0 if language.tied else language.lm_head.weight.numel()
    report = [Component("language model", "kept", _count(inner.language_model) + output - added, language.source)]
    if added:
        report.append(Component("embedding rows", "new", added, f"mean of the others, for {', '.join(language.added)}"))
    report.append(Component("vision tower", swapped, _count(inner.vision_tower), f"{vision.source}, layer {config.sail_layer}"))
    if config.sail_head != "none":
        report.append(Component("alignment head", "new", _count(inner.sail_head), vision.head_weights))
    report.append(Component("projector", swapped, _count(inner.multi_modal_projector), f"random, seed {seed}"))
    state: Literal["kept", "replaced", "new"] = "kept" if template == "own" else "replaced" if language.template else "new"
    note = "" if stops else "; a model trained with it does not learn to end answers"
    report.append(Component("chat template", state, 0, ("its own" if state == "kept" else template) + note))
    return report


def report_table(report: list[Component]) -> Table:
    """Return what became of each component of the given model, with its number of parameters, as a table for the terminal."""
    table = Table(title="kept, replaced and new components", title_justify="left")
    for heading in ("component", "state", "parameters", "weights"):
        table.add_column(heading, justify="right" if heading == "parameters" else "left", overflow="fold")
    for line in report:
        table.add_row(line.name, line.state, f"{line.parameters:,}" if line.parameters else "", line.weights)
    table.add_section()
    table.add_row("in all", "", f"{sum(line.parameters for line in report):,}", "")
    return table


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
