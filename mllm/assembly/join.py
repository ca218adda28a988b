"""Putting a model together: an LLM (or what a LLaVA has of one), one or two vision encoders, stage-one heads, and new projectors.

Legend: `H` LLM width, `F` width given to the head, `E` head width, `N` visual tokens an image.
"""

import math
from collections.abc import Sequence
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
from mllm.assembly.places import places_in_words
from mllm.assembly.vision import AlignedEncoder, image_processor_of
from mllm.conversations.templates import puts_system_first
from mllm.conversations.tokens import Chat
from mllm.model.answer_ends import end_ids
from mllm.model.modeling import SailLlavaConfig, SailLlavaForConditionalGeneration
from mllm.model.processing import SailLlavaImageProcessor, SailLlavaProcessor
from mllm.model.saving import context_length
from mllm.model.towers import SailProjector

PROJECTORS = ("projector", "second projector")


@dataclass(frozen=True)
class Component:
    """One line of the report: what became of a component of the given LLM or LLaVA, and where its weights are from."""

    name: str
    state: Literal["kept", "replaced", "new"]
    parameters: int
    weights: str


def assemble(
    language: Language,
    vision: Sequence[AlignedEncoder],
    *,
    how: Literal["channel", "sequence"] = "channel",
    image_aspect_ratio: Literal["pad", "resize"] = "pad",
    grid: tuple[int, int] | None = None,
    place_words: bool = False,
    template: str = "auto",
    seed: int = 0,
) -> tuple[SailLlavaForConditionalGeneration, SailLlavaProcessor, list[Component]]:
    """Return (model in eval mode, processor, report): the LLM's weights bit for bit, in the types they were stored in.

    `how` two encoders join, `grid`, `place_words` and `template` are fields of UpgradeConfig; `seed` draws the projectors. The given
    modules go into the model, not copies. UsageError for a grid that does not fit, or an LLM that LLaVA's class cannot hold.
    """
    _set_grids(vision, grid, how)
    text, template_name = prepare_tokenizer(language, template)
    ids = torch.arange(1, 9)[None] % language.lm_head.weight.shape[0]
    with torch.no_grad():
        expected = language.whole.eval()(input_ids=ids).logits
    model = join(language, vision, how, seed)
    with torch.no_grad():
        found = model(input_ids=ids).logits
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise UsageError(
            f"{language.source} ({language.whole.config.model_type}) does more between its last layer and its logits than a linear map "
            "(soft-capping, scaling), which LLaVA's class does not know; use another LLM"
        )
    beside: list[SailLlavaImageProcessor] = []
    for one in reversed(vision):
        images = image_processor_of(one.encoder.transform, one.fields["sail_image_size"], image_aspect_ratio, beside)
        beside = [images, *beside]
    most, taken = context_length(model.config.text_config), model.config.image_tokens()
    if most is not None and taken >= most:
        raise UsageError(
            f"an image becomes {taken} visual tokens, and {language.source} was made for {most} in all: give --grid ROWS COLUMNS, which "
            "averages patches to fewer tokens, or another LLM"
        )
    processor = SailLlavaProcessor(
        images, language.tokenizer, chat_template=text, image_token=language.image_token, image_seq_length=model.config.image_tokens(),
        image_places=places_in_words(model.config.grids()) if place_words else None,
    )  # fmt: skip
    chat = Chat.of_processor(processor)
    _set_generation(model, language, chat.stop_ids)
    return model, processor, _report(model, language, vision, template_name, ends_answers(chat), seed)


def _set_grids(vision: Sequence[AlignedEncoder], grid: tuple[int, int] | None, how: str) -> None:
    """Decide the grid of each encoder's visual tokens: `grid`, else its own, or by channel the first one's."""
    rows, columns = zip(*(one.encoder.patch_grid for one in vision), strict=True)
    most = (max(rows), max(columns)) if how == "channel" else (min(rows), min(columns))
    if grid is not None and not (1 <= grid[0] <= most[0] and 1 <= grid[1] <= most[1]):
        raise UsageError(f"grid {grid[0]} x {grid[1]} does not fit: there are {most[0]} x {most[1]} patches, which can only be averaged")
    if grid is None and len(vision) > 1 and how == "channel":
        grid = (rows[0], columns[0])
    for one in vision:
        one.fields["sail_grid"] = list(grid) if grid is not None else None


def join(language: Language, vision: Sequence[AlignedEncoder], how: str, seed: int) -> SailLlavaForConditionalGeneration:
    """Return the model made of the given modules, not copies, and of projectors drawn from `seed`; in eval mode."""
    text_config = language.base.config
    text_config.tie_word_embeddings = language.tied
    text_config.name_or_path = ""  # a folder of this machine
    first, *beside = ({"vision_config": _vision_config(one), **one.fields} for one in vision)
    for fields in beside:
        fields["vision_config"] = fields["vision_config"].to_dict()
    config = SailLlavaConfig(
        text_config=text_config, image_token_index=language.image_id,
        vision_feature_select_strategy="full", vision_feature_layer=-1, sail_beside=beside or None, sail_join=how,
        tie_word_embeddings=language.tied, dtype=language.lm_head.weight.dtype,
        sail_untrained_tokens=list(language.untrained), **first,
    )  # fmt: skip
    with torch.device("meta"):
        model = SailLlavaForConditionalGeneration(config)
    inner: Any = model.model
    for tower in inner.towers:
        # beside what no feature depends on: what the encoder's own class keeps fixed, such as MAE's position embeddings
        named = tower.place.vision_tower.named_parameters()
        tower.fields.sail_unread = [name for name, parameter in named if not parameter.requires_grad]
    described = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for place, one in zip(inner.places, vision, strict=True):
        place.vision_tower, place.sail_head = one.encoder.backbone.model, one.head
    for number, (place, group) in enumerate(zip(inner.places, config.by_projector(vision), strict=False)):
        place.multi_modal_projector = _projector(group, text_config.hidden_size, seed + number)
    inner.language_model, model.lm_head = language.base, language.lm_head
    if {name: tensor.shape for name, tensor in model.state_dict().items()} != described:
        sources = " or ".join([*(one.source for one in vision), language.source])
        raise UsageError(f"{sources} has other weights than its config describes; use a complete checkpoint")
    model.requires_grad_(True)
    inner.freeze_unread()
    return model.eval()


def _vision_config(vision: AlignedEncoder) -> Any:
    """Return the encoder's config, without what is only true on this machine."""
    model = vision.encoder.backbone.model
    config: Any = model.config
    config.name_or_path = ""
    if config.model_type == "timm_wrapper" and hasattr(model.timm_model, "set_input_size"):
        # its position embeddings have the size that was set, which the config has to repeat
        config.model_args = {**(config.model_args or {}), "img_size": vision.fields["sail_image_size"]}
    return config


def _projector(group: Sequence[AlignedEncoder], out_width: int, seed: int) -> SailProjector:
    """Return the projector of the encoders that share it: the one that a kept tower had, if it is alone, or LLaVA-1.5's.

    A new one has the initial weights that torch's linear layers have, a pure function of `seed`.
    """
    if len(group) == 1 and group[0].kept_projector is not None:
        return group[0].kept_projector
    generator = torch.Generator().manual_seed(seed + 1)  # the head's own stream is `seed`
    with torch.random.fork_rng(devices=[]):  # torch layers fill themselves from the global generator
        projector = SailProjector([width for one in group for width in one.widths], out_width, "gelu", bias=True)
    with torch.no_grad():
        for linear in (projector.linear_1, projector.linear_2):
            bound = 1 / math.sqrt(linear.in_features)
            linear.weight.uniform_(-bound, bound, generator=generator)
            linear.bias.uniform_(-bound, bound, generator=generator)
        if len(projector.widths) > 1:
            further = projector.linear_raw
            further.weight.uniform_(-1, 1, generator=generator).mul_(1 / math.sqrt(further.in_features))
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
    settings.eos_token_id = list(dict.fromkeys([*end_ids(settings), *stops]))
    settings.pad_token_id = language.tokenizer.pad_token_id
    if not settings.do_sample:  # such leftovers, as in Vicuna, cannot be saved
        settings.temperature = settings.top_p = settings.top_k = None
    model.generation_config = settings


def ends_answers(chat: Chat) -> bool:
    """Return whether the template ends answers with a token that generation stops at; Hugging Face's LLaVA templates do not."""
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a question"}]}
    labels = chat.encode([question, {"role": "assistant", "content": "an answer"}]).labels
    return [label for label in labels if label >= 0][-1] in chat.stop_ids


def _report(model: Any, language: Language, vision: Sequence[AlignedEncoder], template: str, stops: bool, seed: int) -> list[Component]:
    """Return what became of each component. Of two vision towers, a LLaVA's own is the second, and kept."""
    inner, config = model.model, model.config
    swapped: Literal["replaced", "new"] = "replaced" if language.is_llava else "new"
    added = language.new_rows * config.text_config.hidden_size * (1 if language.tied else 2)
    output = 0 if language.tied else language.lm_head.weight.numel()
    report = [Component("language model", "kept", parameter_count(inner.language_model) + output - added, language.source)]
    if added:
        report.append(Component("embedding rows", "new", added, f"around the mean of the others, for {', '.join(language.added)}"))
    keeps = any(one.kept_projector for one in vision)
    for number, (tower, one) in enumerate(zip(inner.towers, vision, strict=True)):
        state: Literal["kept", "replaced", "new"] = "kept" if one.kept_projector else "new" if number or keeps else swapped
        ordinal = "second " if number else ""
        weights = f"{one.source}, layer {tower.fields.sail_layer}"
        report.append(Component(f"{ordinal}vision tower", state, parameter_count(tower.place.vision_tower), weights))
        if tower.fields.sail_head != "none":
            report.append(Component(f"{ordinal}alignment head", "new", parameter_count(tower.place.sail_head), one.head_weights))
    for number, (name, projector) in enumerate(zip(PROJECTORS, inner.projectors, strict=False)):
        kept = any(projector is one.kept_projector for one in vision)
        state = "kept" if kept else "new" if number or (keeps and len(inner.projectors) > 1) else swapped
        report.append(Component(name, state, parameter_count(projector), language.source if kept else f"random, seed {seed}"))
    state = "kept" if template == "own" else "replaced" if language.template else "new"
    note = "" if stops else "; a model trained with it does not learn to end answers"
    note += "; a system text begins the first question" if puts_system_first(str(language.tokenizer.chat_template)) else ""
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


def parameter_count(module: nn.Module) -> int:
    """Return how many parameters a module has."""
    return sum(parameter.numel() for parameter in module.parameters())
