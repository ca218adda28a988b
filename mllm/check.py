"""Check every row and every image of conversation data before training.

    python mllm/check.py --data llava_v1_5_mix665k.json --image-root data --model runs/mine/mllm-init
    python mllm/check.py --data pretrain.json --model runs/mine/mllm-init --template plain --output runs/check-pretrain

Writes to --output: problems.jsonl (one line per unusable row or image), check.json, lengths.png, and cache/, which mllm/finetune.py
reuses with --cache. Exit code 0 if all is well, 3 if there are problems.
"""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.common.errors import DataError
from align.common.reject_codes import REJECT_CODES, RejectedRow
from align.runtime.commandline import run
from mllm.conversations.config import CheckConfig

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

BAR = 50  # characters in the longest bar
EXAMPLES = 3  # rows shown for each code


def main(config: CheckConfig) -> None:
    """Read, tokenize and decode everything; then print and write the findings."""
    from align.common.files import atomic_bytes, atomic_json, atomic_path
    from align.runtime.console import Progress, plain_console
    from align.sources.gate import Limits
    from mllm.conversations.checking import bins_of, conversation_problems, draw_histogram, epoch_facts, image_problems
    from mllm.conversations.index import build_index
    from mllm.conversations.table import open_conversations, reject_line
    from mllm.conversations.tokens import Chat
    from mllm.model.answer_ends import ROWS, answer_ends, ends_under_lora
    from mllm.model.saving import fitting_length, load_processor, require_mllm

    console = plain_console()
    folder, model = Path(config.output), require_mllm(Path(config.model))
    folder.mkdir(parents=True, exist_ok=True)
    chat = Chat.of_processor(load_processor(model), config.template)
    conversations = open_conversations(config.data, config.image_root, folder / "cache", report=console.print, ignored=config.ignore_keys)
    shown = Progress(console, "conversations tokenized")
    length = fitting_length(model, config.max_length, console.print)
    index = build_index(conversations, chat, length, max_reject_fraction=1, workers=config.workers, progress=shown)
    problems = list(conversation_problems(conversations, index, chat))
    limits = Limits(max_pixels=config.max_pixels)
    bad_images, images = image_problems(conversations, limits, config.workers, Progress(console, "images decoded"))
    problems += bad_images
    with atomic_path(folder / "problems.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(reject_line(problem)) + "\n" for problem in problems), encoding="utf-8")
    facts = {**epoch_facts(index, images), "began_with_an_answer": conversations.skipped}
    atomic_json(folder / "check.json", {**facts, "problems": dict(Counter(problem.code for problem in problems).most_common())})
    counts, edges = bins_of(index.lengths[index.good], length)
    show_epoch(console, facts, counts, edges)
    for remark in conversations.remarks:
        console.print(remark)
    ends = answer_ends(chat, (conversations[int(row)].messages for row in index.good[:ROWS]))
    console.print(ends_under_lora(chat, ends, model))
    atomic_bytes(folder / "lengths.png", draw_histogram(counts, edges, length))
    if not problems:
        console.print("no problems")
        return
    show_problems(console, problems)
    raise DataError(
        f"{len(problems)} problems, each in {folder / 'problems.jsonl'}; training skips such rows and learns nothing from such images"
    )


def show_epoch(console: "Console", facts: dict[str, Any], counts: "np.ndarray", edges: "np.ndarray") -> None:
    """Print what an epoch contains, and a bar for each bin of lengths."""
    console.print(
        f"an epoch: {facts['rows']} conversations, {facts['tokens']} tokens of which {facts['supervised_tokens']} are learned, "
        f"{facts['images']} images ({facts['different_images']} different); {facts['shortened_rows']} conversations shortened to "
        f"{facts['max_length']} tokens; packed: {facts['packs']} packs, {facts['pack_fill']:.1%} full"
    )
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        console.print(f"{int(low):6d}-{int(high) - 1:<6d} {'#' * round(BAR * count / max(1, counts.max())):<{BAR}} {count}")


def show_problems(console: "Console", problems: list[RejectedRow]) -> None:
    """Print the problem codes, most frequent first, with their meaning and example rows."""
    from rich.table import Table

    table = Table("code", "count", "for example", "meaning, and the first")
    for code, count in Counter(problem.code for problem in problems).most_common():
        examples = [problem for problem in problems if problem.code == code][:EXAMPLES]
        places = "\n".join(f"{problem.source} (id {problem.key})" for problem in examples)
        table.add_row(code, str(count), places, f"{REJECT_CODES[code]}\n{examples[0].detail}".strip())
    console.print(table)


if __name__ == "__main__":
    run(main, CheckConfig, "check")
