"""Chat with a multimodal LLM about an image in the terminal.

    python mllm/chat_cli.py --model runs/mine/instruct/model --image photo.jpg --prompt "What is on the table?"
    python mllm/chat_cli.py --model runs/mine/instruct/model --image photo.jpg
    python mllm/chat_cli.py --model runs/mine/instruct/model --temperature 0.7 --device cuda

Without --prompt it is a conversation: /image PATH shows another image and starts anew, /new starts anew, /quit or Ctrl-D ends.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.common.errors import DataError, KitError, UsageError
from align.runtime.commandline import run, set_up
from mllm.model.config import ChatConfig

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console

    from mllm.model.answering import ChatSession

COMMANDS = "/image PATH, /new, /quit"


def read_image(path: str) -> "Image.Image":
    """Return the image at `path` as RGB. UsageError if the file cannot be read, DataError if the gate rejects it."""
    from align.common.reject_codes import Reject
    from align.sources.gate import Limits, gate_image

    try:
        content = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the image {path} ({error.strerror}); give the path of a file") from error
    try:
        return gate_image(content, Limits())
    except Reject as reject:
        raise DataError(f"{path} is no usable image ({reject})") from reject


def questions(console: "Console") -> Iterator[str]:
    """Yield the lines that the user types, without empty ones, until the input ends."""
    while True:
        try:
            line = console.input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            return
        if line.strip():
            yield line.strip()


def converse(session: "ChatSession", console: "Console", lines: Iterator[str], streamer: Any) -> None:
    """Answer line after line. Print the error if one fails, and go on."""
    for line in lines:
        command, _, rest = line.partition(" ")
        try:
            if command in ("/quit", "/exit"):
                return
            if command == "/image":
                session.image = read_image(rest.strip())
                session.restart()
                console.print(f"looking at {rest.strip()}")
            elif command == "/new":
                session.restart()
                console.print("a new conversation")
            elif command.startswith("/"):
                raise UsageError(f"unknown command {command}; there are {COMMANDS}")
            else:
                session.ask(line, streamer)
        except KitError as error:
            console.print(f"error: {error}")


def main(config: ChatConfig) -> None:
    """Load the model, then answer one question or hold a conversation."""
    import torch
    from transformers import TextStreamer

    from align.common.hardware import choose_device, resolve_precision
    from mllm.model.answering import Answerer, ChatSession, Decoding
    from mllm.model.saving import load_mllm

    console = set_up()
    torch.manual_seed(config.seed)
    image = read_image(config.image) if config.image else None
    decoding = Decoding(config.max_new_tokens, config.temperature)
    device = choose_device(config.device)
    dtype = torch.bfloat16 if resolve_precision(config.precision, device) == "bf16" else torch.float32
    model, processor = load_mllm(config.model, dtype=dtype, device=device)
    session = ChatSession(Answerer(model, processor), decoding, image)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    if config.prompt is not None:
        session.ask(config.prompt, streamer)
        return
    if sys.stdin.isatty():
        console.print(f"{COMMANDS}; everything else is a question")
    converse(session, console, questions(console), streamer)


if __name__ == "__main__":
    run(main, ChatConfig, "chat")
