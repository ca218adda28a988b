"""Items and batches: images at their places, and what a bad one costs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from align.common.errors import DataError
from mllm.conversations.batches import ConversationDataset, collate
from mllm.conversations.index import build_index
from mllm.conversations.tokens import IGNORED
from tests.support.short_conversations import PROCESSOR, chat, conversation, varied


def test_items_and_batches(make, tmp_path):
    rows = [conversation(1, images=2), conversation(2), conversation(3, images=1), conversation(4, turns=3, images=1, words=9)]
    data = make(rows)
    index = build_index(data, chat(), 200)
    assert index.dropped[3] > 0
    dataset = ConversationDataset(data, index, chat(), PROCESSOR)
    one, several = dataset[0], dataset[[0, 1, 2]]
    assert [len(item["pixel_values"]) for item in (one, dataset[1], several)] == [2, 0, 3]
    expected = PROCESSOR.to_pixels(Image.open(tmp_path / "3.png"))
    assert torch.equal(several["pixel_values"][2], expected)
    lengths = index.lengths[:3].tolist()
    assert several["position_ids"].tolist() == [position for length in lengths for position in range(length)]
    assert torch.equal(several["input_ids"][: lengths[0]], one["input_ids"]) and several["labels"][lengths[0]] == IGNORED
    image = chat().tokenizer.convert_tokens_to_ids("<image>")
    batch = collate([dataset[1], one, dataset[2]], pad_id=3, packed=False)
    assert batch["pixel_values"].shape == (3, 3, 8, 8) and int((batch["input_ids"] == image).sum()) == 4 * 3
    assert batch["attention_mask"].sum(1).tolist() == [lengths[1], lengths[0], lengths[2]]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 3).all() and (
        batch["labels"][batch["attention_mask"] == 0] == IGNORED
    ).all()
    assert "pixel_values" not in collate([dataset[1]], 3, packed=True)


def test_a_bad_image_keeps_its_place_and_loses_its_labels(make, tmp_path):
    data = make([conversation(0, images=1), conversation(1, images=2), conversation(2)])
    index = build_index(data, chat(), 200)
    (tmp_path / "1.png").write_bytes(b"<html>not found</html>")
    dataset = ConversationDataset(data, index, chat(), PROCESSOR, rejects=tmp_path / "run" / "rejects.jsonl")
    item = dataset[[0, 1, 2]]
    lengths = index.lengths.tolist()
    bad = slice(lengths[0], lengths[0] + lengths[1])
    assert (item["labels"][bad] == IGNORED).all()
    assert (item["labels"][: lengths[0]] != IGNORED).any() and (item["labels"][bad.stop :] != IGNORED).any()
    assert len(item["pixel_values"]) == 3
    assert all(image.abs().max() < 0.01 for image in item["pixel_values"][1:]), "the mean color is about 0 after normalization"
    lines = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert [line["code"] for line in lines] == ["image_format"] * 2 and lines[0]["row"] == 1 and lines[0]["source"] == "rows.jsonl:1"
    assert dataset.rejected_images == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_images_stop_the_run(make, tmp_path, workers):
    data = make([conversation(5 * n + (n % 2), images=1) for n in range(60)])
    index = build_index(data, chat(), 200)
    (tmp_path / "1.png").unlink()
    dataset = ConversationDataset(data, index, chat(), PROCESSOR, rejects=tmp_path / "rejects.jsonl")
    seen = 0
    with pytest.raises(DataError, match=r"20 of the first \d+ images cannot be used, 5.0% are allowed"):
        for _ in DataLoader(dataset, batch_size=None, sampler=range(60), num_workers=workers):
            seen += 1
    assert 30 <= seen < 60 and len((tmp_path / "rejects.jsonl").read_text().splitlines()) >= 20
    tolerant = ConversationDataset(data, index, chat(), PROCESSOR, max_reject_fraction=0.6)
    assert len(list(DataLoader(tolerant, batch_size=None, num_workers=workers))) == 60 and tolerant.rejected_images == 30


def test_an_index_of_other_data_is_refused(make):
    data = make(varied(3))
    index = build_index(data, chat(), 200)
    with pytest.raises(DataError, match="when indexed"):
        ConversationDataset(data, index, chat(image_tokens=9, template="vicuna_v1"), PROCESSOR)[int(np.argmax(index.images))]
