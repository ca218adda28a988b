"""A micro-batch with a count of what it holds, for the meters."""

from collections.abc import Callable, Sequence
from typing import Any

from mllm.conversations.tokens import IGNORED
from mllm.loop.flops import StepCost


class Collate:
    """Makes a batch of items and adds `counts`: its tokens, slots (tokens and padding), supervised tokens, images and FLOPs."""

    def __init__(self, collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]], cost: StepCost) -> None:
        self.collate, self.cost = collate, cost

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(items)
        lengths: list[int] = []  # of rows, those of a pack one by one
        for item in items:
            starts = (item["position_ids"] == 0).nonzero().flatten().tolist()
            lengths += [stop - start for start, stop in zip(starts, [*starts[1:], len(item["position_ids"])], strict=True)]
        images = sum(len(item["pixel_values"]) for item in items)
        supervised = int((batch["labels"][:, 1:] != IGNORED).sum())  # the first token of a sequence is never predicted
        batch["counts"] = {
            "tokens": float(sum(lengths)), "slots": float(batch["labels"].numel()), "supervised": float(supervised),
            "images": float(images), "flops": self.cost.flops(lengths, supervised, images),
        }  # fmt: skip
        return batch
