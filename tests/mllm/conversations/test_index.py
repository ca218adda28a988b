"""Index, packs, batches: lengths as one by one, packed losses equal to single ones, plans that depend on seed and epoch only."""

import json
import pickle
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from align.common.errors import DataError, UsageError
from mllm.conversations import index as module
from mllm.conversations.batches import ConversationDataset, collate
from mllm.conversations.index import build_index
from mllm.conversations.packing import EpochPlan, fill_rate, length_grouped, pack
from mllm.conversations.table import Conversations, open_conversations
from mllm.conversations.tokens import IGNORED, Chat
from mllm.model.processing import SailLlavaImageProcessor
from tests.support.tiny_mllm import tiny_tokenizer

PROCESSOR = SailLlavaImageProcessor({"height": 8, "width": 8}, image_mean=(0.5, 0.25, 0.75), image_std=(0.5, 0.5, 0.5))


@lru_cache
def chat(image_tokens=4, template="vicuna_v1"):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    return Chat(tokenizer, template, image_tokens=image_tokens)


def conversation(number, turns=1, images=0, words=3):
    marks = "<image>\n" * images
    said = []
    for turn in range(turns):
        said += [{"from": "human", "value": (marks if turn == 0 else "") + "what is there? " + "red " * words}]
        said += [{"from": "gpt", "value": f"a dog {number}" + " and a cat" * words}]
    return {"id": number, **({"image": [f"{number % 5}.png"] * images} if images else {}), "conversations": said}


@pytest.fixture
def make(tmp_path):
    """Write rows and pictures 0.png to 4.png; return the opened conversations."""
    for number in range(5):
        Image.new("RGB", (8, 8), (50 * number, 9, 200)).save(tmp_path / f"{number}.png")

    def build(rows, spec="", seed=0):
        (tmp_path / "rows.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return open_conversations([f"{tmp_path}/rows.jsonl{spec}"], cache=tmp_path / "cache", seed=seed)

    return build


def varied(count, seed=0):
    random = np.random.default_rng(seed)
    return [conversation(n, *map(int, (random.integers(1, 4), random.integers(0, 3), random.integers(0, 9)))) for n in range(count)]


def test_the_index_holds_what_encoding_gives(make, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 7)
    data, calls = make(varied(40), ":1.5"), []
    index = build_index(data, chat(), 200, progress=lambda done, total: calls.append((done, total)))
    for number in range(len(data)):
        encoded = chat().encode(data[number].messages, 200)
        learned = sum(label != IGNORED for label in encoded.labels)
        found = [int(array[number]) for array in (index.lengths, index.supervised, index.images, index.dropped, index.status)]
        assert found == [len(encoded.input_ids), learned, encoded.images, encoded.dropped_turns, 0]
    assert calls[-1] == (40, 40) and len(calls) == 6, "repeated rows are tokenized once"
    assert (
        (index.dropped > 0).any()
        and len(index.good) == 60
        and f"{len(data)} conversations with {index.images.sum()} images" in index.summary()
    )


def test_the_index_is_cached_for_the_same_inputs_only(make, monkeypatch, tmp_path):
    measured = []
    original = module._measure
    monkeypatch.setattr(module, "_measure", lambda *args: measured.append(1) or original(*args))
    data = make(varied(10))
    first = build_index(data, chat(), 200)
    assert (build_index(data, chat(), 200).lengths == first.lengths).all() and len(measured) == 1
    other = [
        build_index(data, chat(), 199),
        build_index(data, chat(image_tokens=5), 200),
        build_index(make(varied(10), seed=1, spec=":0.9"), chat(), 200),
    ]
    assert len(measured) == 4 and len({first.fingerprint, *(index.fingerprint for index in other)}) == 4
    for cached in (tmp_path / "cache").glob("index-*.npz"):
        cached.write_bytes(cached.read_bytes()[:-9] + b"\0" * 9)
    assert (build_index(data, chat(), 200).lengths == first.lengths).all() and len(measured) == 5
    build_index(data, chat(), 200, cache=tmp_path / "other")
    assert len(measured) == 6 and list((tmp_path / "other").glob("index-*.npz"))


def test_rejects_are_counted_and_stop_a_run_above_the_share(make):
    rows = [*varied(17), conversation(17, words=400), '{"id": "x"', conversation(19, images=60)]
    data = make(rows)
    index = build_index(data, chat(), 260, max_reject_fraction=0.2)
    assert index.codes == {"too_long": 2, "row_syntax": 1} and len(index.good) == 17
    assert set(index.status[17:]) == {module.STATUS.index("too_long")} and index.lengths[17:].sum() == 0
    assert "too_long 2, row_syntax 1" in index.summary()
    with pytest.raises(
        DataError, match=r"15.0% of the conversations are rejected, 10.0% .*too_long 2.*rows.jsonl:17 \(id '17'\): too_long: \d+ tokens"
    ):
        build_index(data, chat(), 260, max_reject_fraction=0.1)
    only_unread = make([*varied(3), "[]"])
    with pytest.raises(DataError, match=r"25.0% .*rows.jsonl:3 .*row_type"):
        build_index(only_unread, chat(), 2000)
    with pytest.raises(DataError, match="100.0%"):
        build_index(make(varied(3)), chat(), 5, max_reject_fraction=0.999)
    assert len(build_index(make(varied(3)), chat(), 5, max_reject_fraction=1).good) == 0


def test_workers_index_the_same(make):
    data = make(varied(600))
    one, two = (build_index(data, chat(), 150, cache=data.folder / str(workers), workers=workers) for workers in (0, 2))
    assert all((getattr(one, name) == getattr(two, name)).all() for name in module._ARRAYS)


# packing


def brute_best_fit(lengths, size):
    """Best fit decreasing by looking at every pack each time; returns the sorted fills."""
    free = []
    for length in sorted(lengths, reverse=True):
        fitting = [place for place, space in enumerate(free) if space >= length]
        if fitting:
            free[min(fitting, key=lambda place: free[place])] -= length
        else:
            free.append(size - length)
    return sorted(free)


@pytest.mark.parametrize("size, count", [(1, 5), (16, 300), (100, 400), (2048, 500)])
def test_packs_are_best_fit_decreasing_and_never_split(size, count):
    random = np.random.default_rng(size)
    lengths = random.integers(1, size + 1, count)
    packs = pack(lengths, size, np.random.default_rng(0))
    assert sorted(position for positions in packs for position in positions) == list(range(count))
    fills = [int(lengths[positions].sum()) for positions in packs]
    assert max(fills) <= size
    assert sorted(size - fill for fill in fills) == brute_best_fit(lengths.tolist(), size)
    assert fill_rate(packs, lengths, size) == pytest.approx(lengths.sum() / (size * len(packs)))
    other = pack(lengths, size, np.random.default_rng(1))
    assert len(other) == len(packs) and other != packs and pack(lengths, size, np.random.default_rng(0)) == packs


def test_packs_of_realistic_lengths_are_nearly_full():
    random = np.random.default_rng(0)
    lengths = np.minimum(2048, 280 + random.lognormal(5, 0.8, 20_000).astype(int))  # 256 visual tokens in each row
    lengths[::16] = random.integers(30, 200, len(lengths[::16]))  # some without an image
    assert fill_rate(pack(lengths, 2048, random), lengths, 2048) > 0.97
    assert pack([], 10, random) == [] and fill_rate([], [], 10) == 0
    for bad in ([11], [0, 3]):
        with pytest.raises(UsageError, match="a pack takes those of 1 to 10"):
            pack(bad, 10, random)


def language_model(kind):
    shape = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 401, "initializer_range": 0.3, "use_cache": False,
    }  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape)) if kind == "llama" else Qwen2ForCausalLM(Qwen2Config(**shape))
    return model.double().eval()


def token_losses(model, batch):
    """Sum of the cross entropies of learned tokens, and their number."""
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask") if name in batch}
    logits = model(**inputs).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses[batch["labels"][:, 1:].flatten() != IGNORED]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_packed_equals_one_by_one_forward_and_backward(make, kind):
    data = make(varied(12))
    index = build_index(data, chat(), 600)
    dataset = ConversationDataset(data, index, chat(), PROCESSOR)
    model = language_model(kind)
    packs = pack(index.lengths, 600, np.random.default_rng(0))
    assert any(len(positions) > 2 for positions in packs) and len(packs) > 1

    def run(batches):
        model.zero_grad()
        losses = [token_losses(model, batch) for batch in batches]
        torch.cat(losses).sum().backward()
        return torch.cat(losses), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    order = [row for positions in packs for row in positions]
    single, single_gradient = run([dataset.collate([dataset[row]], packed=False) for row in order])
    together = dataset.collate([dataset[positions] for positions in packs], packed=True)
    assert "attention_mask" not in together
    packed, packed_gradient = run([together])
    assert (packed - single).abs().max() < 1e-6 and (packed_gradient - single_gradient).abs().max() < 1e-6
    padded, padded_gradient = run([dataset.collate([dataset[row] for row in order], packed=False)])
    assert (padded - single).abs().max() < 1e-6 and (padded_gradient - single_gradient).abs().max() < 1e-6
    sloppy = {**together, "position_ids": torch.arange(together["input_ids"].shape[1]).expand_as(together["input_ids"])}
    leaked, _ = run([sloppy])
    assert (leaked - single).abs().max() > 1e-3, "without restarting positions rows see each other: the test would notice"


# batches


def test_batches_are_of_one_kind_and_sorted_inside():
    random = np.random.default_rng(0)
    lengths, multimodal = random.integers(5, 500, 203), random.random(203) < 0.7
    batches = length_grouped(lengths, multimodal, 8, np.random.default_rng(1))
    assert batches.shape == (25, 8) and len(np.unique(batches)) == 200, "each row at most once, the rest is less than a batch"
    kinds = multimodal[batches].mean(axis=1)
    assert ((kinds != 0) & (kinds != 1)).sum() <= 2 and 0 in kinds and 1 in kinds
    assert (np.diff(lengths[batches], axis=1) <= 0).all()
    means = lengths[batches].mean(axis=1)
    assert means.std() < 3 * lengths.std() / np.sqrt(8), "which rows share a batch does not depend on their length"


@pytest.mark.parametrize("packing", [False, True])
def test_a_plan_is_a_pure_function_of_seed_and_epoch(make, packing):
    rows = [*varied(60), conversation(60, words=400)]
    index = build_index(make(rows), chat(), 200)
    plan = EpochPlan(index, 4, packing, seed=3)
    epochs = [plan.batches(epoch) for epoch in range(3)]
    assert [EpochPlan(index, 4, packing, seed=3).batches(epoch) for epoch in (2, 0)] == [epochs[2], epochs[0]]
    assert epochs[0] != epochs[1] and EpochPlan(index, 4, packing, seed=4).batches(0) != epochs[0]
    for batches in epochs:
        assert {len(batch) for batch in batches} == {4} and len(batches) == len(epochs[0])
        used = [row for batch in batches for item in batch for row in (item if packing else [item])]
        assert len(used) == len(set(used)) and set(used) <= set(index.good.tolist()) and 60 not in used
        if packing:
            assert max(int(index.lengths[item].sum()) for batch in batches for item in batch) <= 200
        else:
            assert len(used) == 60
    json.dumps(epochs[0])
    with pytest.raises(UsageError, match="larger than the data: 60 conversations"):
        EpochPlan(index, 61, packing)


def test_planning_reads_no_image(make, monkeypatch):
    def refuse(*_):
        raise AssertionError("an image was read")

    monkeypatch.setattr(Conversations, "read_image", refuse)
    monkeypatch.setattr("mllm.conversations.batches.gate_image", refuse)
    index = build_index(make(varied(30)), chat(), 200)
    assert EpochPlan(index, 4).batches(0) and EpochPlan(index, 4, packing=True).batches(0)


# the dataset


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


def test_chats_go_to_other_processes(make):
    again = pickle.loads(pickle.dumps(chat()))
    messages = make(varied(1))[0].messages
    assert again.encode(messages) == chat().encode(messages) and again.fingerprint == chat().fingerprint
