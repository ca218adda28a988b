"""Described images: what a cell may say, what tokens come out, and that the model takes tokens for images."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from align.common.errors import UsageError
from align.common.files import hash64
from align.common.reject_codes import Reject
from mllm.conversations.batches import ConversationDataset, collate
from mllm.conversations.described import BACKGROUND, FILE, STRENGTH, DescribedImages, coverage, description, texts_in
from mllm.conversations.index import build_index
from mllm.conversations.rows import normalize
from mllm.conversations.tokens import IGNORED
from tests.support.short_conversations import PROCESSOR, chat, conversation
from tests.support.tiny_mllm import tiny_model

BOX = [0.0, 0.25, 0.5, 1.0]
WRONG = [
    {"text": ""}, {"text": " "}, {"text": 3}, {"text": "a\0"}, {"text": "a", "regions": []}, {"regions": []}, {"regions": "a"},
    {"regions": [{"text": "a"}]}, {"regions": [{"text": "a", "box": BOX, "score": 1}]}, {"regions": [{"text": "a", "box": [0, 0, 1]}]},
    {"regions": [{"text": "a", "box": [0.5, 0, 0.5, 1]}]}, {"regions": [{"text": "a", "box": [0, 0, 1.2, 1]}]},
    {"regions": [{"text": "a", "box": [0, 0, float("nan"), 1]}]}, {"regions": [{"text": "a", "box": BOX}] * 101},
]  # fmt: skip


def talk(image):
    return {**conversation(1, images=1), "image": image}


@pytest.mark.parametrize("cell", WRONG, ids=range(len(WRONG)))
def test_a_description_that_is_none_rejects_its_row(cell):
    with pytest.raises(Reject) as caught:
        normalize(talk(cell))
    assert caught.value.code == "image_description"


def test_a_text_is_about_the_whole_image():
    assert json.loads(description({"text": " a dog ", "regions": None})) == [["a dog", [0, 0, 1, 1]]]
    both = {"regions": [{"text": "a dog", "box": BOX}, {"text": "a cat", "box": [0, 0, 1, 1]}], "text": None}
    assert list(texts_in(description(both))) == ["a dog", "a cat"] and json.loads(description(both))[0][1] == BOX


@pytest.mark.parametrize("rows,columns", [(1, 1), (2, 3), (4, 4)])
def test_coverage_counts_pixels(rows, columns):
    random = np.random.default_rng(0)
    for _ in range(20):
        (left, right), (top, bottom) = (sorted(random.choice(121, 2, replace=False)) for _ in range(2))
        pixels = np.zeros((120, 120))
        pixels[top:bottom, left:right] = 1
        wanted = pixels.reshape(rows, 120 // rows, columns, 120 // columns).mean((1, 3)).ravel()
        found = coverage([left / 120, top / 120, right / 120, bottom / 120], rows, columns)
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.fixture
def space(tmp_path):
    """Vectors of three texts (width 5) and seven real pictures (2 x 2 tokens of width 8)."""
    random = torch.Generator().manual_seed(0)
    texts, vectors = ["a dog", "a cat", "a red car"], torch.randn(3, 5, generator=random).half()
    tokens, mean = torch.randn(7, 4, 8, generator=random).half(), torch.randn(8, generator=random)
    order = np.argsort(hash64(texts))
    keys = torch.from_numpy(hash64(texts)[order])
    save_file(
        {"keys": keys, "vectors": vectors[order].contiguous(), "tokens": tokens, "mean": mean, "grid": torch.tensor([2, 2])},
        tmp_path / FILE,
    )
    return DescribedImages(tmp_path), dict(zip(texts, vectors.float(), strict=True)), tokens.float(), mean


def test_tokens_are_a_weaker_picture_and_the_texts_where_their_boxes_are(space):
    images, vectors, pictures, mean = space
    described = description({"regions": [{"text": "a cat", "box": BOX}, {"text": "a red car", "box": [0.25, 0, 1, 1]}]})
    strengths, found = [], []
    for seed in range(200):
        tokens = images.tokens(described, seed)
        assert torch.equal(tokens, images.tokens(described, seed))
        raw = tokens[:, 5:]  # behind the head's columns there is only the picture
        [own] = [n for n, picture in enumerate(pictures) if torch.allclose(raw, (mean + BACKGROUND * (picture - mean))[:, 5:], atol=1e-5)]
        rest = (tokens - mean - BACKGROUND * (pictures[own] - mean))[:, :5]
        pattern = torch.zeros(4, 5)
        for cell, (cat, car) in enumerate([(0.5, 0.5), (0, 1), (1, 0.5), (0, 1)]):  # shares of the cells that the boxes cover
            pattern[cell] = cat**0.5 * vectors["a cat"] + car**0.5 * vectors["a red car"]
        strength = float((rest * pattern).sum() / (pattern * pattern).sum())
        torch.testing.assert_close(rest, strength * pattern, atol=1e-4, rtol=1e-4)
        strengths.append(strength)
        found.append(own)
    assert STRENGTH[0] - 1e-3 < min(strengths) < STRENGTH[0] + 0.1 and STRENGTH[1] - 0.1 < max(strengths) < STRENGTH[1] + 1e-3
    assert set(found) == set(range(7))
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(again.tokens(described, 3), images.tokens(described, 3))


def test_a_text_without_a_vector_is_refused_and_so_is_a_folder_without_any(space, tmp_path):
    for text in ("a tree", "A dog"):
        with pytest.raises(Reject, match=f"'{text}' has no vector"):
            space[0].tokens(description({"text": text}), 0)
    with pytest.raises(UsageError, match="mllm/upgrade.py --described"):
        DescribedImages(tmp_path / "other")


def test_described_and_real_images_come_in_the_order_of_their_places(make, space, tmp_path):
    cell = {"text": "a dog"}
    data = make([{**conversation(2, images=3), "image": ["1.png", cell, "2.png"]}, talk(cell), conversation(3, images=1)])
    assert data.any_described
    index = build_index(data, chat(), 200)
    dataset = ConversationDataset(data, index, chat(), PROCESSOR, described=space[0])
    batch = collate([dataset[2], dataset[[0, 1]]], 3, packed=False)
    assert batch["is_described"].tolist() == [False, False, True, False, True]
    pixels = [PROCESSOR.to_pixels(Image.open(tmp_path / f"{number}.png")) for number in (3, 1, 2)]
    assert torch.equal(batch["pixel_values"], torch.stack(pixels))
    described = description(cell)
    assert torch.equal(batch["described_features"], torch.stack([space[0].tokens(described, 0), space[0].tokens(described, 1)]))
    only = collate([dataset[1]], 3, packed=True)
    assert "pixel_values" not in only and only["is_described"].tolist() == [True]
    assert not make([conversation(3, images=1), conversation(2)]).any_described


def test_a_row_whose_text_has_no_vector_is_counted_and_loses_its_labels(make, space, tmp_path):
    data = make([talk({"text": "a tree"}), talk({"text": "a dog"})])
    dataset = ConversationDataset(data, build_index(data, chat(), 200), chat(), PROCESSOR, described=space[0], rejects=tmp_path / "r.jsonl")
    assert (dataset[0]["labels"] == IGNORED).all() and (dataset[1]["labels"] != IGNORED).any()
    assert dataset.rejected_images == 1 and json.loads((tmp_path / "r.jsonl").read_text())["code"] == "image_description"


@pytest.mark.parametrize("raw", [False, True], ids=["head", "both"])
@pytest.mark.parametrize("which", [[0, 1, 0], [1, 0, 1], [1, 1, 1]], ids=str)
def test_tokens_of_real_images_give_what_their_pixels_give(raw, which):
    model, processor = tiny_model(raw=raw)
    random = np.random.default_rng(0)
    photos = [Image.fromarray(random.integers(0, 255, (42, 42, 3), dtype=np.uint8)) for _ in which]
    batch = dict(
        processor(text=["<image> what is there? <image> a dog", "<image> a red car"], images=photos, padding=True, return_tensors="pt")
    )
    labels = batch["input_ids"].clone()
    pixels, flags = batch.pop("pixel_values"), torch.tensor(which, dtype=torch.bool)
    with torch.no_grad():
        features = model.model.get_patch_features(pixels)
        wanted = model(**batch, pixel_values=pixels)
        given = {"described_features": features[flags], "is_described": flags, "pixel_values": pixels[~flags] if not all(which) else None}
        torch.testing.assert_close(model(**batch, **given).logits, wanted.logits)
    model.train()
    loss = model(**batch, **given, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss, model(**batch, pixel_values=pixels, labels=labels).loss)
    assert all(parameter.grad is not None for parameter in model.model.multi_modal_projector.parameters())
