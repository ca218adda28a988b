"""Settings of mllm/chat_cli.py. Every field is a flag."""

from dataclasses import dataclass

from align.common.hardware import Precision


@dataclass(frozen=True)
class ChatConfig:
    """Ask a model questions about an image in the terminal."""

    model: str
    """Model folder, or run folder with model/ (mllm/finetune.py's output)."""
    image: str | None = None
    """Image file the conversation is about. None: text only."""
    prompt: str | None = None
    """One question. None: an interactive conversation."""
    max_new_tokens: int = 256
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 picks the most likely token; above 0 samples."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda."""
    precision: Precision = "auto"
    """Arithmetic (auto: bf16 if the hardware has it)."""
    seed: int = 0
    """Seed of sampling."""
