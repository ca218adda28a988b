"""The tokens that end answers, and whether a model can ever write them: a frozen output row inside the others' hull never wins.

Legend: `V` vocabulary, `H` width.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from align.common.errors import DamagedError, UsageError
from align.common.files import read_object
from align.common.reject_codes import Reject
from mllm.conversations.messages import Message
from mllm.conversations.tokens import Chat

NEVER_ENDS = (
    "the chat template ends answers with no token that stops generation, so a model trained with it talks on: give --template vicuna_v1, "
    "chatml or brief, or a .jinja file of your own with {{ eos_token }} behind each answer"
)
ROWS = 3  # conversations whose ends are looked at
_TRIES = 500
_MARGIN = 1e-3  # of the cosine between a hidden state and two output rows; less is rounding
OUTPUT = ("lm_head.weight", "model.language_model.embed_tokens.weight")  # the second where they are one matrix


def end_ids(settings: Any) -> list[int]:
    """Return the ids of the tokens that end an answer by generation settings, which may hold one, several or None."""
    ends = settings.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def answer_ends(chat: Chat, conversations: Iterable[Sequence[Message]], rows: int = ROWS) -> list[int]:
    """Return the ids of the tokens that end the answers of the first `rows` usable conversations: none if nothing ends them."""
    found: list[int] = []
    for messages in conversations:
        encoded = chat.encode_many([messages])[0]
        if isinstance(encoded, Reject):
            continue
        pairs = zip(encoded.labels, [*encoded.labels[1:], -1], strict=True)
        found += [label for label, after in pairs if label >= 0 > after and label in chat.stop_ids]
        rows -= 1
        if not rows:
            break
    return list(dict.fromkeys(found))


def output_rows(folder: Path) -> Tensor:
    """Return the output matrix (V, H) of a model folder, read alone; DamagedError if no file holds it."""
    files = sorted(folder.glob("*.safetensors"))
    for name in OUTPUT:
        for file in files:
            with safe_open(file, framework="pt") as opened:
                if name in opened.keys():  # noqa: SIM118 - it is no dictionary
                    return opened.get_tensor(name)
    raise DamagedError(f"{folder} has no output matrix ({' or '.join(OUTPUT)}); use a complete model folder")


@torch.no_grad()
def can_win(rows: Tensor, token: int) -> bool:
    """Return whether some hidden state gives `token` the largest logit under the output matrix `rows` (V, H).

    None does for a row that equals another one or is a mean of others. A state is searched by the perceptron's rule, from the direction
    in which the row differs from the mean.
    """
    matrix = rows.float()
    matrix = matrix / matrix.norm(dim=1).mean().clamp(min=1e-30)
    own = matrix[token]
    state = own - matrix.mean(0)
    for _ in range(_TRIES):
        state = state / state.norm().clamp(min=1e-30)
        logits = matrix @ state  # (V,)
        mine, logits[token] = logits[token].clone(), -torch.inf
        best, rival = logits.max(0)
        if mine - best > _MARGIN:
            return True
        state = state + 0.5 * (own - matrix[rival])
    return False


def require_ends(chat: Chat, ends: Sequence[int], folder: Path, trained: Sequence[int] | None) -> str:
    """Return a sentence on the tokens that end answers. `trained` are those whose rows are trained, None: all.

    UsageError if a row is frozen and can never give the largest logit: answers would not stop.
    """
    if not ends:
        return NEVER_ENDS
    frozen = [] if trained is None else [token for token in ends if token not in trained]
    rows = output_rows(folder) if frozen else torch.empty(0)
    lost = [token for token in frozen if not can_win(rows, token)]
    names = {token: repr(chat.tokenizer.convert_ids_to_tokens(token)) for token in ends}
    if lost:
        raise UsageError(
            f"answers end with {', '.join(names[token] for token in lost)}, which this LLM was never trained on: its output row "
            "stays frozen and can never win, so answers would not stop. Make the model again with mllm/upgrade.py --template (LoRA then "
            "trains the row), train the whole LLM (--lr-llm without --lora-rank), or choose a --template whose end token the LLM knows"
        )
    how = {token: "frozen, and it can win" if token in frozen else "trained" for token in ends}
    return "answers end with " + ", ".join(f"{names[token]} (its output row is {how[token]})" for token in ends)


def ends_under_lora(chat: Chat, ends: Sequence[int], folder: Path) -> str:
    """Return the sentence of `require_ends` for LoRA on the model in `folder`, or that it would be refused."""
    try:
        return require_ends(chat, ends, folder, read_object(folder / "config.json").get("sail_untrained_tokens") or ())
    except UsageError as refused:
        return f"with LoRA or a frozen LLM, training would be refused: {refused}"
    except DamagedError:
        return "whether the tokens that end answers can win is not known: the folder has no weights"
