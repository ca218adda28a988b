"""Plan GPU hours, memory and disk of the large recipes from their settings and the models' shapes; nothing here was measured.

    python docs/planned.py

The tables go into docs/recipes.md and README.md (`make docs`). FLOPs count a multiplication and an addition as two. A forward pass
costs 2 FLOPs a parameter and token, a backward pass 2 more for the activations and 2 more for weights that are trained; gradient
checkpointing repeats the forward pass. Attention's own products (below 7% at these lengths), reading and start-up are left out.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PEAK = 312e12  # FLOP/s of an A100 in 16 bit
SHARE = 0.4  # of the peak that is assumed to be reached
PAIRS = {"sail_l_gte": 23.0e6, "sail_l_nv2": 23.0e6, "workshop": 12.9e6, "freeze_align": 20.0e6}  # as published
CAPTION_TOKENS = 130  # assumed: a raw caption of 30 and a long one of 100
ROWS = {"pretrain": 558_000, "instruct": 665_000}  # LLaVA-1.5's files
TEXT_TOKENS = {"pretrain": 25, "instruct": 300}  # assumed; `mllm/finetune.py --dry-run` counts those of your files


@dataclass(frozen=True)
class Plan:
    """What a recipe is planned to take: its row in the long table, and in README's short one A100 hours, GPUs and bytes a GPU."""

    row: str
    hours: float
    gpus: int
    memory: float


@dataclass(frozen=True)
class Shape:
    """A frozen model: parameters, width of its features, tokens of an image of 224 px."""

    parameters: float
    width: int
    tokens: int = 0


DINOV2_L = Shape(304e6, 1024, 257)
TEXT = {
    "Alibaba-NLP/gte-large-en-v1.5": Shape(434e6, 1024),
    "nvidia/NV-Embed-v2": Shape(7.85e9, 4096),
    "sentence-transformers/all-roberta-large-v1": Shape(355e6, 1024),
}
LLM = Shape(6.74e9, 4096)  # Vicuna-7B: 32 layers, vocabulary 32,000
LLM_LAYERS, VISUAL_TOKENS = 32, 256


def hours(flops: float) -> float:
    """Return A100 hours of that many FLOPs at the assumed share of the peak."""
    return flops / (PEAK * SHARE) / 3600


def gib(number: float) -> str:
    """Return bytes in GB (1e9) without decimals."""
    return f"{number / 1e9:,.0f} GB"


def recipe(path: str) -> dict[str, dict]:
    """Return the sections of a recipe."""
    return yaml.safe_load((ROOT / path).read_text())


def glu(width: int, expansion: int, aligned: int) -> tuple[int, int]:
    """Return parameters and hidden width of a glu head: W1 and W2 width -> hidden, W3 hidden -> aligned."""
    hidden = expansion * width
    return 2 * width * hidden + hidden * aligned, hidden


def stage_one(name: str) -> Plan:
    """Return the plan of a recipe that encodes first and trains glu heads on the stored features."""
    settings, pairs = recipe(f"align/recipes/{name}.yaml"), PAIRS[name]
    text, train = TEXT[settings["encode"]["text"]], settings["train"]
    slots, batch, aligned = len(train["captions"]), train["batch_size"], train["width"]
    images = 2 * DINOV2_L.parameters * DINOV2_L.tokens * pairs
    captions = 2 * text.parameters * CAPTION_TOKENS * pairs
    (vision_head, vision_hidden), (text_head, text_hidden) = (glu(w, train["expansion"], aligned) for w in (2048, text.width))
    heads = 6 * (vision_head + slots * text_head) * batch
    loss = slots * 3 * 2 * batch**2 * aligned  # three matrix products a caption slot: similarities, and both gradients
    steps = round(pairs / batch) * train["epochs"]
    disk = pairs * (2048 + slots * text.width) * 2
    weights = (vision_head + text_head) * 12  # fp32 weights, gradients and Lion's momentum
    kept = batch * (2048 + 4 * vision_hidden + slots * (text.width + 4 * text_hidden)) * 2
    training = steps * (heads + loss)
    row = (
        f"| `{name}` | {pairs / 1e6:.1f}M | {hours(images):.0f} | {hours(captions):.0f} | "
        f"{hours(training):.1f} | {gib(disk)} | {gib(weights + kept)} |"
    )
    return Plan(row, hours(images + captions + training), 1, weights + kept)


def online() -> Plan:
    """Return freeze-align's plan: both encoders run in every epoch, nothing is stored; memory on one of eight GPUs."""
    train, pairs = recipe("align/recipes/freeze_align.yaml")["train"], PAIRS["freeze_align"]
    text, tokens = TEXT[train["text"]], (train["image_size"] // 14) ** 2 + 1
    projector = 3 * 1024 * train["width"]  # A, W1 and W2 of 1024 -> 1024
    encode = 2 * (DINOV2_L.parameters * tokens + text.parameters * train["max_length"])
    heads = 6 * projector * (tokens + train["max_length"])
    weights = (DINOV2_L.parameters + text.parameters) * 4 + 11_553_793 * 16
    share = train["batch_size"] / 8
    kept = share * (tokens + train["max_length"]) * 1024 * 2 * 5  # the tokens, and four activations of the heads
    training = pairs * train["epochs"] * (encode + heads)
    row = f"| `freeze_align` | {pairs / 1e6:.1f}M | in training | in training | {hours(training):.0f} | none | {gib(weights + kept)} |"
    return Plan(row, hours(training), 8, weights + kept)


def stage_two(name: str) -> Plan:
    """Return the plan of a LLaVA recipe: hours of both stages, memory of the second with ZeRO over its GPUs and the longest rows."""
    settings = recipe(f"mllm/recipes/{name}.yaml")
    spent = []
    lora = settings["instruct"].get("lora_rank", 0)
    tuned = float(settings["instruct"].get("lr_vision", 0)) > 0
    for stage in ("pretrain", "instruct"):
        trained = stage == "instruct" and not lora
        repeat = 2 * settings[stage]["gradient_checkpointing"]
        language = (4 + 2 * trained + repeat) * LLM.parameters * (VISUAL_TOKENS + TEXT_TOKENS[stage])
        vision = (2 + (4 + repeat) * (stage == "instruct" and tuned)) * DINOV2_L.parameters * DINOV2_L.tokens
        spent.append(hours(ROWS[stage] * (language + vision)))
    instruct, gpus = settings["instruct"], 1 if lora else 8
    headless = settings["upgrade"]["sail_head"] == "none"
    head = 0 if headless else glu(2048, 8, 1024)[0]
    projector = (2048 if headless else 1024) * LLM.width + LLM.width**2
    adapters = lora * LLM_LAYERS * (4 * 2 * 4096 + 3 * (4096 + 11008))
    total = LLM.parameters + DINOV2_L.parameters + head + projector + adapters
    moving = adapters + head + projector if lora else total - (0 if tuned else DINOV2_L.parameters)
    shards = gpus if instruct["deepspeed"] == "zero3" else 1
    state = (2 * total + 14 * moving) / shards  # bf16 weights; bf16 gradients, fp32 master and AdamW's two moments of what is trained
    rows = 4 if lora else instruct["micro_batch_size"]
    kept = rows * instruct["max_length"] * (2 * LLM_LAYERS + 34) * LLM.width  # as mllm/loop/estimate.py counts activations
    row = f"| `{name}` | {gpus} | {spent[0]:.0f} | {spent[1]:.0f} | {sum(spent) / gpus:.1f} h | {gib(state)} + {gib(kept)} |"
    return Plan(row, sum(spent), gpus, state + kept)


def plans() -> dict[str, Plan]:
    """Return the plan of every large recipe by its path."""
    first = {name: stage_one(name) for name in ("sail_l_gte", "sail_l_nv2", "workshop")} | {"freeze_align": online()}
    names = ("llava_sail_l", "llava_sail_l_frozen", "llava_sail_l_lora", "llava_control_none", "llava_control_random")
    second = {name: stage_two(name) for name in names}
    return {f"align/recipes/{name}.yaml": plan for name, plan in first.items()} | {
        f"mllm/recipes/{name}.yaml": plan for name, plan in second.items()
    }


def tables() -> str:
    """Return both long tables in Markdown."""
    rows = {path: plan.row for path, plan in plans().items()}
    return "\n".join(
        [
            "| planned, stage one | pairs | A100 hours, images | captions | heads | features on disk | GPU memory, heads |",
            "|---|---|---|---|---|---|---|",
            *(row for path, row in rows.items() if path.startswith("align")),
            "",
            "| planned, stage two | GPUs | A100 hours, pretrain | instruct | wall time | GPU memory, weights and state + activations |",
            "|---|---|---|---|---|---|",
            *(row for path, row in rows.items() if path.startswith("mllm")),
        ]
    )


def short_table() -> str:
    """Return README's table in Markdown."""
    lines = ["| recipe | A100 hours, planned | GPUs | memory a GPU, planned |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| `{path}` | {plan.hours:.0f} | {plan.gpus} | {gib(plan.memory)} |" for path, plan in plans().items()])


if __name__ == "__main__":
    print(tables(), short_table(), sep="\n\n")
