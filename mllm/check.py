"""Read every row and every image of conversation data before a GPU is spent.

    python mllm/check.py --data llava_v1_5_mix665k.json --image-root data --model runs/mine/mllm-init
    python mllm/check.py --data pretrain.json --model runs/mine/mllm-init --template plain --output runs/check-pretrain

Leaves in --output: problems.jsonl (a row that cannot be used, or an image, a line), check.json, lengths.png, and cache/, which
mllm/finetune.py takes over with --cache. Exit code 0 if all is well, 3 if there are problems.
"""

import json
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from align.common.commandline import run
from align.common.console import plain_console
from align.common.errors import DataError
from align.common.files import atomic_json, atomic_path
from align.common.reject_codes import REJECT_CODES, Reject, RejectedRow
from align.common.seeds import generator
from align.sources.gate import Limits, gate_image
from mllm.conversations.config import CheckConfig
from mllm.conversations.index import RowIndex, build_index, fill_rate, pack
from mllm.conversations.table import Conversations, open_conversations, reject_line
from mllm.conversations.tokens import Chat
from mllm.model.processing import SailLlavaProcessor
from mllm.model.saving import require_mllm

CHUNK = 64  # images a task
BAR = 50  # characters of the longest bar
EXAMPLES = 3  # rows named for each code


class Ticker:
    """Says how far a pass is: twice a second on a terminal, every 10 s in a log."""

    def __init__(self, console: Console, what: str) -> None:
        self.console, self.what = console, what
        self.begin = self.last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Print a line if it is time to."""
        now, live = time.monotonic(), self.console.is_terminal
        if now - self.last < (0.5 if live else 10):
            return
        self.last = now
        rate = done / max(1e-9, now - self.begin)
        line = f"{self.what} {done}/{total}, {rate:.0f}/s, {(total - done) / max(rate, 1e-9):.0f} s left"
        self.console.print(line, end="\r" if live else "\n")


class Images(Dataset):
    """Chunks of images to decode, given as (row number, item) pairs (n, 2); yields (place in the list, code, detail) of the bad."""

    def __init__(self, conversations: Conversations, pairs: np.ndarray, limits: Limits) -> None:
        self.conversations, self.pairs, self.limits = conversations, pairs, limits

    def __len__(self) -> int:
        return -(-len(self.pairs) // CHUNK)

    def __getitem__(self, chunk: int) -> list[tuple[int, str, str]]:
        bad = []
        for place in range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self.pairs))):
            number, item = map(int, self.pairs[place])
            try:
                gate_image(self.conversations.read_image(self.conversations.row(number).images[item]), self.limits)
            except Reject as reject:
                bad.append((place, reject.code, reject.detail))
        return bad


def image_problems(conversations: Conversations, limits: Limits, workers: int, ticker: Ticker) -> tuple[list[RejectedRow], int]:
    """Return a problem for each row and image that cannot be used, and how many different images there are; each is decoded once."""
    numbers, keys = array("q"), array("Q")  # numbers: row and item of each image, in turn
    for number in conversations.distinct()[0].tolist():
        for item, image in enumerate(conversations.row(number).images):
            numbers.extend((number, item))
            keys.append(xxhash.xxh3_64_intdigest(conversations.image_identity(image).encode()))
    if not keys:
        return [], 0
    pairs = np.array(numbers).reshape(-1, 2)
    _, first, which = np.unique(np.array(keys), return_index=True, return_inverse=True)
    order = np.argsort(first)  # as they come in the files
    dataset = Images(conversations, pairs[first[order]], limits)
    found: dict[int, tuple[str, str]] = {}
    for done, bad in enumerate(DataLoader(dataset, batch_size=None, num_workers=workers)):
        found |= {int(order[place]): (code, detail) for place, code, detail in bad}
        ticker(min(len(first), (done + 1) * CHUNK), len(first))
    problems = []
    for place in np.flatnonzero(np.isin(which, list(found))):
        row = conversations.row(int(pairs[place, 0]))
        code, detail = found[int(which[place])]
        problems.append(RejectedRow.of(Reject(code, detail), int(pairs[place, 0]), row.id, "image", row.source))
    return problems, len(first)


def row_problems(conversations: Conversations, index: RowIndex, chat: Chat) -> Iterator[RejectedRow]:
    """Yield the rows that could not be read, then those that the template or the maximum length rejects."""
    yield from conversations.rejects()
    for number in conversations.distinct()[0]:
        if index.status[number]:
            row = conversations.row(int(number))
            problem = chat.encode_many([row.messages], index.max_length)[0]
            assert isinstance(problem, Reject)
            yield RejectedRow.of(problem, int(number), row.id, "conversation", row.source)


def bins_of(lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return counts (at most 16) and edges of a histogram of lengths from 0 to the longest."""
    width = max(1, -(-int(max(lengths.max(initial=1), max_length / 16)) // 16))
    return np.histogram(lengths, bins=np.arange(0, lengths.max(initial=1) + width + 1, width))


def show_histogram(console: Console, counts: np.ndarray, edges: np.ndarray) -> None:
    """Print a bar a bin."""
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        console.print(f"{int(low):6d}-{int(high) - 1:<6d} {'#' * round(BAR * count / max(1, counts.max())):<{BAR}} {count}")


def draw_histogram(path: Path, counts: np.ndarray, edges: np.ndarray, max_length: int) -> None:
    """Write the histogram as a PNG."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.stairs(counts, edges, fill=True)
    axes.axvline(max_length, color="black", linestyle="--", linewidth=1)
    axes.set(xlabel=f"tokens of a row (dashed: maximum {max_length})", ylabel="rows")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def facts_of(index: RowIndex, images: int) -> dict[str, Any]:
    """Return what an epoch consists of, unpacked and packed."""
    lengths = index.lengths[index.good]
    packs = pack(lengths, index.max_length, generator(0))
    return {
        "rows": len(lengths),
        "tokens": int(lengths.sum()),
        "supervised_tokens": int(index.supervised.sum()),
        "images": int(index.images.sum()),
        "different_images": images,
        "shortened_rows": int((index.dropped > 0).sum()),
        "max_length": index.max_length,
        "packs": len(packs),
        "pack_fill": round(fill_rate(packs, lengths, index.max_length), 4),
    }


def main(config: CheckConfig) -> None:
    """Read, tokenize, decode; then show and write what was found."""
    console = plain_console()
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    require_mllm(Path(config.model))
    chat = Chat.of_processor(SailLlavaProcessor.from_pretrained(config.model), config.template)
    conversations = open_conversations(config.data, config.image_root, folder / "cache", report=console.print)
    index = build_index(
        conversations, chat, config.max_length, max_reject_fraction=1, workers=config.workers, progress=Ticker(console, "rows tokenized")
    )
    problems = list(row_problems(conversations, index, chat))
    limits = Limits(max_pixels=config.max_pixels)
    bad_images, images = image_problems(conversations, limits, config.workers, Ticker(console, "images decoded"))
    problems += bad_images
    with atomic_path(folder / "problems.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(reject_line(problem)) + "\n" for problem in problems), encoding="utf-8")
    facts = facts_of(index, images)
    codes = Counter(problem.code for problem in problems)
    atomic_json(folder / "check.json", {**facts, "problems": dict(codes.most_common())})
    console.print(
        f"an epoch: {facts['rows']} rows, {facts['tokens']} tokens of which {facts['supervised_tokens']} are learnt, "
        f"{facts['images']} images ({images} different); {facts['shortened_rows']} rows shortened to {config.max_length} tokens; "
        f"packed: {facts['packs']} packs, {facts['pack_fill']:.1%} full"
    )
    counts, edges = bins_of(index.lengths[index.good], config.max_length)
    show_histogram(console, counts, edges)
    draw_histogram(folder / "lengths.png", counts, edges, config.max_length)
    if not problems:
        console.print("no problems")
        return
    table = Table("code", "count", "for example", "meaning, and the first")
    for code, count in codes.most_common():
        examples = [problem for problem in problems if problem.code == code][:EXAMPLES]
        rows = "\n".join(f"{problem.source} (id {problem.key})" for problem in examples)
        table.add_row(code, str(count), rows, f"{REJECT_CODES[code]}\n{examples[0].detail}".strip())
    console.print(table)
    raise DataError(
        f"{len(problems)} problems, each in {folder / 'problems.jsonl'}; training skips such rows and learns nothing from such images"
    )


if __name__ == "__main__":
    run(main, CheckConfig, "check")
