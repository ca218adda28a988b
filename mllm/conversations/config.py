"""Settings of mllm/check.py. Every field is a flag; values are checked when the object is created."""

from dataclasses import dataclass

from align.common.checks import check_least


@dataclass(frozen=True)
class CheckConfig:
    """Check every row and image of conversation data before training. Exit code 3 if there are problems."""

    data: tuple[str, ...]
    """Conversation files (LLaVA JSON or JSONL, messages JSONL, parquet), each as PATH or PATH:WEIGHT."""
    model: str = "runs/mllm-init"
    """Model folder (mllm/upgrade.py's output), or run folder, whose tokenizer, template, context and image size are used."""
    image_root: str | None = None
    """Base folder of relative image paths. None: the folder of each file."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of a row that are not read. Any other key that is neither known nor a mere description, such as source, rejects its row."""
    output: str = "runs/check"
    """Folder for problems.jsonl, the length histogram and the index."""
    template: str | None = None
    """Chat template instead of the model's: plain, vicuna_v1, chatml, brief, own (the tokenizer's) or a .jinja file."""
    max_length: int = 2048
    """Maximum tokens of a row, visual tokens included."""
    workers: int = 2
    """Processes that tokenize rows and decode images. 0: the main process does it."""
    max_pixels: int = 64_000_000
    """Largest image accepted, in pixels."""

    def __post_init__(self) -> None:
        check_least(self, max_length=2, workers=0)
