"""What mllm/finetune.py can be told. Every field is a flag; checked when it is made."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from align.common.checks import check, check_least, check_share
from align.common.hardware import Precision


@dataclass(frozen=True)
class Lora:
    """Adapters on linear layers of the LLM (Hu et al., arXiv 2106.09685): those whose names end with one of `targets`, or all."""

    rank: int
    alpha: int
    dropout: float = 0.0
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class FinetuneConfig:
    """Train an assembled model: stage pretrain (projector on captions), then instruct (everything on conversations)."""

    REPLACES: ClassVar[dict[str, tuple[str, ...]]] = {"epochs": ("steps",), "steps": ("epochs",)}

    data: tuple[str, ...]
    """Conversation files (LLaVA JSON or JSONL, messages JSONL, parquet), each as PATH or PATH:WEIGHT."""
    stage: Literal["pretrain", "instruct"] = "instruct"
    """Decides what is trained and how fast unless the --lr flags say otherwise."""
    model: str = "runs/mllm-init"
    """Model folder to start from: mllm/upgrade.py's output, or the pretrain stage's run folder."""
    output: str = "runs/mllm"
    """Run folder: model/, checkpoints, metrics.jsonl, speed.jsonl, manifest.json, config.yaml."""
    described: str | None = None
    """Folder with described.safetensors, for rows whose image is described by texts (mllm/upgrade.py --described). None: --model."""
    image_root: str | None = None
    """Folder that relative image paths start from. None: the folder of each file."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of a row that are not read. Any other key that is neither known nor a mere description, such as source, rejects its row."""
    template: str | None = None
    """Chat template of this stage. None: plain in pretrain, the model's own in instruct."""
    max_length: int = 2048
    """Tokens a row (or a pack) may have, visual tokens included. At most the LLM's own context is used."""
    packing: bool = False
    """Put several rows into one sequence of --max-length; exact, rows do not see each other."""
    epochs: float = 1.0
    """Passes over the data."""
    steps: int | None = None
    """Optimizer steps instead of --epochs."""
    batch_size: int = 128
    """Rows (or packs) an optimizer step, over all processes."""
    micro_batch_size: int = 8
    """Rows (or packs) a forward pass of one process; the rest of the batch is accumulated."""
    lr_projector: float | None = None
    """Learning rate of the projector. None: 1e-3 in pretrain, 2e-5 in instruct. 0 freezes, here and below."""
    lr_raw: float | None = None
    """Learning rate of the projector's weights for all but its first input: raw patches (mllm/upgrade.py --features both), a second
    encoder joined by channel. None: --lr-projector's."""
    lr_head: float | None = None
    """Learning rate of the alignment head. None: 0 in pretrain, 2e-5 in instruct."""
    lr_llm: float | None = None
    """Learning rate of the LLM, or of its LoRA adapters. None: 0 in pretrain, 2e-5 in instruct (LoRA: 2e-4)."""
    lr_vision: float | None = None
    """Learning rate of the vision encoder. None: 0 in pretrain, 2e-5 in instruct (LoRA: 0)."""
    lora_rank: int = 0
    """Rank of LoRA adapters on linear layers of the LLM; 0: none."""
    lora_alpha: int | None = None
    """Scale of the adapters. None: twice the rank."""
    lora_dropout: float = 0.0
    """Dropout in front of the adapters."""
    lora_targets: tuple[str, ...] = ()
    """Layers that get adapters, by the last part of their names, such as q_proj k_proj v_proj o_proj. None given: every linear layer."""
    optimizer: Literal["adamw", "lion"] = "adamw"
    """AdamW or Lion."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Momentum factors of the optimizer."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """Learning-rate schedule after warm-up."""
    warmup: float = 0.03
    """Share of the steps with rising learning rate."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: not clipped."""
    precision: Precision = "auto"
    """bf16: autocast with float32 masters of what is trained. auto asks the hardware."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    deepspeed: str | None = None
    """zero2, zero3, zero3_offload or a JSON file. The launcher must be deepspeed, torchrun or accelerate."""
    workers: int = 2
    """Processes that read and decode images for each training process; 0: none."""
    cache: str | None = None
    """Folder of the data's index. None: OUTPUT/cache."""
    max_pixels: int = 64_000_000
    """Largest image accepted, in pixels."""
    max_reject_fraction: float = 0.05
    """Stop when a larger share of the rows is rejected."""
    max_nonfinite: int = 3
    """Stop after this many steps in a row with gradients that are not finite."""
    log_every: int = 10
    """Steps between log lines."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    report_to: tuple[Literal["trackio", "wandb"], ...] = ()
    """Trackers beside TensorBoard and JSON lines."""
    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s, for the utilization (MFU) in the log. None: known GPUs only."""
    seed: int = 0
    """Seed of the data order, adapters and dropout."""
    dry_run: bool = False
    """Read the data, show what is trained, estimate memory and time; train nothing."""

    def __post_init__(self) -> None:
        check_least(self, batch_size=1, micro_batch_size=1, max_length=2, steps=1, log_every=1, save_every=1, keep=1)
        check_share("max-reject-fraction", self.max_reject_fraction)
        check(self.epochs > 0, f"--epochs {self.epochs}", "must be above 0")
        given = f"--lora-rank {self.lora_rank} --stage {self.stage} --lr-vision {self.lr_vision}"
        check(not self.lora_rank or not self.lr_vision, given, "LoRA keeps the vision encoder frozen: leave --lr-vision out")
        check(not self.lora_rank or self.stage == "instruct", given, "LoRA belongs to --stage instruct; pretrain has a frozen LLM")
        check(any(self.learning_rates().values()), "every learning rate is 0", "nothing would be trained")

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rate of each parameter group, 0 for a frozen one.

        The defaults are LLaVA-1.5's (arXiv 2310.03744), with head and encoder tuned in the second stage as in SAIL (arXiv 2412.04616).
        """
        rate = 2e-5 if self.stage == "instruct" else 0.0
        stage = {"projector": rate or 1e-3, "head": rate, "llm": rate, "vision": rate}
        if self.lora_rank:
            stage |= {"llm": 2e-4, "vision": 0.0}
        given = {"projector": self.lr_projector, "head": self.lr_head, "llm": self.lr_llm, "vision": self.lr_vision}
        rates = {group: stage[group] if own is None else own for group, own in given.items()}
        return rates | {"raw": rates["projector"] if self.lr_raw is None else self.lr_raw}

    def lora(self) -> Lora | None:
        """Return the settings of the adapters, None without."""
        if not self.lora_rank:
            return None
        return Lora(self.lora_rank, self.lora_alpha or 2 * self.lora_rank, self.lora_dropout, self.lora_targets)
