"""What mllm/check.py can be told. Every field is a flag; checked when it is made."""

from dataclasses import dataclass

from align.common.checks import check_least


@dataclass(frozen=True)
class CheckConfig:
    """Read every row and image of conversation data before a GPU is spent; exit code 3 if anything is wrong."""

    data: tuple[str, ...]
    """Conversation files (LLaVA JSON or JSONL, messages JSONL, parquet), each as PATH or PATH:WEIGHT."""
    model: str = "runs/mllm-init"
    """Model folder (mllm/upgrade.py's output) whose tokenizer, template and image size are used."""
    image_root: str | None = None
    """Folder that relative image paths start from. None: the folder of each file."""
    output: str = "runs/check"
    """Folder for problems.jsonl, the length histogram and the index."""
    template: str | None = None
    """Chat template instead of the model's: plain, vicuna_v1, chatml, brief, own (the tokenizer's) or a .jinja file."""
    max_length: int = 2048
    """Tokens a row may have, visual tokens included."""
    workers: int = 2
    """Processes that tokenize rows and decode images; 0: this one does."""
    max_pixels: int = 64_000_000
    """Largest image accepted, in pixels."""

    def __post_init__(self) -> None:
        check_least(self, max_length=2, workers=0)
