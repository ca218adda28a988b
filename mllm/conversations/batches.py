"""Conversations as tensors for training, and how they are collated into batches.

Legend: `B` items of a batch, `T` tokens. The images of a batch are in the order of their placeholders.
"""

import json
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from align.common.errors import DataError
from align.common.files import disk_full_named
from align.common.reject_codes import Reject, RejectedRow
from align.sources.gate import Limits, gate_image
from mllm.conversations.described import DescribedImages
from mllm.conversations.index import ConversationIndex
from mllm.conversations.table import Conversations, ImageRef, StoredConversation, reject_line
from mllm.conversations.tokens import IGNORED, Chat

MIN_REJECTS = 20  # unusable images before their share can stop a run


class ConversationDataset(Dataset):
    """Conversations, or packs of them, as tensors. DataLoader workers share one count of bad images.

    Described images become visual tokens by `described`; they have no pixels. An image that cannot be decoded is replaced by the mean
    color and listed in `rejects` (JSON lines), and its conversation loses all labels. DataError once at least MIN_REJECTS images and
    more than `max_reject_fraction` of all are bad.
    """

    def __init__(
        self, conversations: Conversations, index: ConversationIndex, chat: Chat, image_processor: Any, *,
        described: DescribedImages | None = None, max_pixels: int = 64_000_000, rejects: Path | None = None,
        max_reject_fraction: float = 0.05,
    ) -> None:  # fmt: skip
        """`image_processor` is a SailLlavaImageProcessor: `to_pixels`, `size` and `pad_color`."""
        self.conversations, self.index, self.chat, self.image_processor = conversations, index, chat, image_processor
        self.described = described  # needed if an image is described
        self.limits, self.rejects, self.max_reject_fraction = Limits(max_pixels=max_pixels), rejects, max_reject_fraction
        self._counts = multiprocessing.Array("q", 2)  # images seen, images rejected

    def __len__(self) -> int:
        return len(self.index.lengths)

    @property
    def rejected_images(self) -> int:
        """Number of unusable images so far, in this process and its workers."""
        return int(self._counts[1])

    def __getitem__(self, item: int | Sequence[int]) -> dict[str, Any]:
        """Return input_ids, labels, position_ids (T,) int64, pixel_values and is_described.

        pixel_values is a list of what the image processor gives, (3, H, W) or (3, W) of several encoders; of tokens (N, D) where
        is_described, a list of as many bools, says that the image is. A conversation starts at position 0.
        """
        numbers = [item] if isinstance(item, int | np.integer) else item
        ids, labels, images, described = zip(*(self._encode(int(number)) for number in numbers), strict=True)
        positions = torch.cat([torch.arange(len(each)) for each in ids])
        joined = {"input_ids": torch.cat(ids), "labels": torch.cat(labels), "position_ids": positions}
        return {**joined, "pixel_values": sum(images, []), "is_described": sum(described, [])}

    def collate(self, items: Sequence[dict[str, Any]], packed: bool) -> dict[str, Tensor]:
        """Return `collate(items)`, padded with the tokenizer's padding token, or its end token if it has none."""
        tokenizer = self.chat.tokenizer
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return collate(items, pad_id or 0, packed)

    def _encode(self, number: int) -> tuple[Tensor, Tensor, list[Tensor], list[bool]]:
        found = self.conversations[number]
        encoded = self.chat.encode_many([found.messages], self.index.max_length)[0]
        if isinstance(encoded, Reject) or len(encoded.input_ids) != self.index.lengths[number]:
            now = str(encoded) if isinstance(encoded, Reject) else f"{len(encoded.input_ids)} tokens"
            raise DataError(
                f"{found.source}: {now}, {self.index.lengths[number]} tokens when indexed; the index belongs to other data or another "
                "tokenizer. Remove the cache folder and run again"
            )
        images, described, learn = list[Tensor](), list[bool](), True
        for place in found.images[: encoded.images]:
            try:
                images.append(self._image(place, number))
                described.append(place.described is not None)
                self._count(0)
            except Reject as reject:
                size = self.image_processor.size
                blank = Image.new("RGB", (size["width"], size["height"]), self.image_processor.pad_color)
                images.append(self.image_processor.to_pixels(blank))
                described.append(False)
                learn = False
                self._write(number, found, reject)
                self._count(1)
        labels = torch.tensor(encoded.labels)
        return torch.tensor(encoded.input_ids), labels if learn else torch.full_like(labels, IGNORED), images, described

    def _image(self, place: ImageRef, number: int) -> Tensor:
        """Return an image's pixels, or the tokens (N, D) of a described one. Raise Reject if it cannot be used."""
        if place.described is None:
            return self.image_processor.to_pixels(gate_image(self.conversations.read_image(place), self.limits))
        assert self.described is not None
        return self.described.tokens(place.described, number)

    def _count(self, rejected: int) -> None:
        with self._counts.get_lock():
            self._counts[0] += 1
            self._counts[1] += rejected
            seen, bad = self._counts[:]
        if rejected and bad >= MIN_REJECTS and bad > self.max_reject_fraction * seen:
            raise DataError(
                f"{bad} of the first {seen} images cannot be used, {self.max_reject_fraction:.1%} are allowed"
                f"{f' (each in {self.rejects})' if self.rejects else ''}. Check the data with mllm/check.py, and --image-root"
            )

    def _write(self, number: int, conversation: StoredConversation, reject: Reject) -> None:
        if self.rejects is None:
            return
        line = {"row": number, **reject_line(RejectedRow.of(reject, number, conversation.id, "image", conversation.source))}
        self.rejects.parent.mkdir(parents=True, exist_ok=True)
        with disk_full_named(self.rejects), open(self.rejects, "ab", buffering=0) as file:
            file.write((json.dumps(line) + "\n").encode())  # in one write, so that lines of several workers do not mix


def collate(items: Sequence[dict[str, Any]], pad_id: int, packed: bool) -> dict[str, Tensor]:
    """Return a batch: input_ids, labels and position_ids (B, T), padded on the right, and pixel_values (images, 3, H, W) if any.

    If images are described, their tokens are in described_features (described, N, D), and is_described (all images,) says which they are.

    Only unpacked batches have an attention_mask (B, T). In packed ones position ids separate the conversations, and padding is
    numbered like one more conversation (exact with eager and SDPA attention; flash attention needs B = 1).
    """
    padding = {"input_ids": pad_id, "labels": IGNORED, "position_ids": 0}
    batch = {name: pad_sequence([item[name] for item in items], True, value) for name, value in padding.items()}
    lengths = torch.tensor([len(item["input_ids"]) for item in items])[:, None]
    columns = torch.arange(batch["input_ids"].shape[1])
    if packed:
        batch["position_ids"] = torch.where(columns < lengths, batch["position_ids"], columns - lengths)
    else:
        batch["attention_mask"] = (columns < lengths).long()
    images = [image for item in items for image in item["pixel_values"]]
    which = [described for item in items for described in item["is_described"]]
    if pixels := [image for image, described in zip(images, which, strict=True) if not described]:
        batch["pixel_values"] = torch.stack(pixels)
    if tokens := [image for image, described in zip(images, which, strict=True) if described]:
        batch["described_features"], batch["is_described"] = torch.stack(tokens), torch.tensor(which)
    return batch
