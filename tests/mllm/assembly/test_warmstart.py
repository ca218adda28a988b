"""The closed-form start of the projector: images land near the words of their captions, and of texts that no image belongs to."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from align.common.errors import DataError, UsageError
from mllm.assembly import warmstart
from mllm.assembly.solve import Choice, WordMap
from mllm.assembly.texts import Texts, Words
from mllm.assembly.warmstart import PLACE_SHARE, PLACES, SHARPNESS, captions, fit_projector, write_places, write_scores
from mllm.conversations.table import open_conversations
from mllm.model.towers import SailProjector
from tests.support.tiny_mllm import tiny_model


def test_words_are_the_most_frequent_tokens_that_some_texts_lack():
    words = Words(tiny_model()[1].tokenizer, 6)
    texts = [torch.tensor([1, 2, 4]), torch.tensor([1, 3]), torch.tensor([1, 2, 5])]
    words.count(texts)
    words.choose(2)
    assert words.chosen.tolist() == [2, 3] and words.shares.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert words.presence(texts).tolist() == [[True, False], [False, True], [True, False]]
    words.choose(100)
    assert words.chosen.tolist() == [2, 3, 4, 5], "token 1 is in every text, token 0 in none"


def test_texts_of_the_same_words_are_refused():
    words = Words(tiny_model()[1].tokenizer, 6)
    words.count([torch.tensor([1, 2])] * 3)
    with pytest.raises(DataError, match="all use the same words"):
        words.choose(10)


@pytest.fixture
def colors(tmp_path):
    """120 pictures of one of four colors whose captions name it, one of them cut short."""
    names = {"red": (230, 20, 20), "green": (20, 200, 40), "blue": (30, 40, 220), "yellow": (240, 220, 30)}
    random, rows = np.random.default_rng(0), []
    for n in range(120):
        name = list(names)[n % 4]
        pixels = np.clip(np.array(names[name]) + random.normal(0, 12, (42, 42, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
        said = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"the photo is {name}"}]
        rows.append({"id": f"row{n}", "image": f"{n}.png", "conversations": said})
    (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:200])
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path


def nearest(model, processor, colors, conversations):
    """Return of how many of 39 pictures the mean visual token is nearest to the embedding of the word for their own color."""
    table = model.get_input_embeddings().weight.detach()
    words = Words(processor.tokenizer, len(table))
    names = words.ids(["red", "green", "blue", "yellow"])
    targets = torch.stack([table[ids].mean(0) for ids in names])
    pictures = [n for n in range(40) if n != 5]
    pixels = torch.stack([processor.image_processor.to_pixels(Image.open(colors / f"{n}.png").convert("RGB")) for n in pictures])
    with torch.no_grad():
        tokens = torch.stack(model.model.get_image_features(pixels).pooler_output).mean(1)
    found = torch.cdist(tokens - tokens.mean(0), targets - targets.mean(0)).argmin(1)
    return sum(int(choice) == n % 4 for choice, n in zip(found, pictures, strict=True))


@pytest.mark.parametrize("raw", [False, True], ids=["head", "both"])
def test_images_land_near_the_words_of_their_captions(colors, raw):
    conversations = open_conversations([str(colors / "rows.json")], None, colors / "cache")
    model, processor = tiny_model(raw=raw)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert nearest(model, processor, colors, conversations) < 30
    seen = []

    def progress(what):
        return lambda done, total: seen.append((what, done, total))

    fit = fit_projector(model, processor, conversations=conversations, rows=120, seed=1, progress=progress)
    assert (fit.captioned, fit.rejected, len(fit.choice.ranks), fit.texts) == (119, 1, 119, 0) and ("images", 120, 120) in seen
    assert len(fit.choice.ridges) == 1 + raw and fit.choice.found > 0.9 and "119 captioned images (1 images unusable)" in fit.summary()
    now = model.state_dict()
    changed = {n for n, value in now.items() if n not in before or value.shape != before[n].shape or not torch.equal(value, before[n])}
    assert len(changed) == 5 + raw and all(name.startswith("model.multi_modal_projector.") for name in changed)
    assert nearest(model, processor, colors, conversations) >= 36
    again, _ = tiny_model(raw=raw)
    fit_projector(again, processor, conversations=conversations, rows=120, seed=1)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("join", ["channel", "sequence"])
@pytest.mark.parametrize("raw", [False, True], ids=["head", "both"])
def test_every_projector_of_two_encoders_is_solved(colors, join, raw):
    conversations = open_conversations([str(colors / "rows.json")], None, colors / "cache")
    model, processor = tiny_model(raw=raw, join=join)
    for number in range(len(model.model.projectors)):
        fit = fit_projector(model, processor, number=number, conversations=conversations, rows=120, seed=1)
        assert fit.choice.found > 0.9 and len(fit.choice.ridges) == len(model.model.projectors[number].widths)
    projectors = model.model.projectors
    assert all(projector.words == fit.words and len(projector.positions) for projector in projectors)
    assert [len(projector.widths) for projector in projectors] == ([2 + raw] if join == "channel" else [1 + raw, 1])
    assert nearest(model, processor, colors, conversations) >= 36


class Seer:
    """A text side that knows where the head sees each color; its texts lie elsewhere and wider, as captions do in an aligned space."""

    def __init__(self, model, processor, folder):
        names = ("red", "green", "blue", "yellow")
        pixels = torch.stack([processor.image_processor.to_pixels(Image.open(folder / f"{n}.png").convert("RGB")) for n in range(4)])
        with torch.no_grad():
            self.known = dict(zip(names, model.model.get_patch_features(pixels).mean(1)[:, :24], strict=True))
        self.noise = torch.Generator().manual_seed(0)

    def embed(self, texts):
        own = torch.stack([self.known[text.split()[-1]] for text in texts])
        return 2 * own + 5 + 0.01 * torch.randn(own.shape, generator=self.noise)


@pytest.mark.parametrize("captioned", [0, 60])
@pytest.mark.parametrize("raw", [False, True], ids=["head", "both"])
def test_texts_without_images_put_images_near_their_words(colors, monkeypatch, raw, captioned):
    conversations = open_conversations([str(colors / "rows.json")], None, colors / "cache")
    model, processor = tiny_model(raw=raw)
    seer = Seer(model, processor, colors)
    if raw:
        monkeypatch.setattr(seer, "known", {name: torch.nn.functional.layer_norm(x, x.shape) for name, x in seer.known.items()})
    monkeypatch.setattr(warmstart, "TextSide", lambda sail, device: seer)
    names = ("red", "green", "blue", "yellow")
    (colors / "texts.txt").write_text("".join(f"the photo is {names[n % 4]}\n\n" for n in range(400)), encoding="utf-8-sig")
    texts = Texts((str(colors / "texts.txt"),))
    given = {"conversations": conversations, "rows": captioned} if captioned else {}
    fit = fit_projector(model, processor, texts=texts, sail="run", images=str(colors), seed=1, **given)
    assert (fit.texts, fit.unlabelled, fit.captioned) == (400, 119, captioned and captioned - 1)
    assert nearest(model, processor, colors, conversations) >= 34
    assert ("too few captions" in fit.summary()) == (not captioned) and "solved from 400 texts" in fit.weights()


@pytest.mark.parametrize("raw", [False, True], ids=["head", "both"])
def test_vectors_of_texts_lie_where_pictures_of_their_color_do(colors, monkeypatch, raw):
    model, processor = tiny_model(raw=raw)
    seer = Seer(model, processor, colors)
    if raw:
        monkeypatch.setattr(seer, "known", {name: torch.nn.functional.layer_norm(x, x.shape) for name, x in seer.known.items()})
    monkeypatch.setattr(warmstart, "TextSide", lambda sail, device: seer)
    names = ("red", "green", "blue", "yellow")
    (colors / "texts.txt").write_text("".join(f"the photo is {names[n % 4]}\n" for n in range(400)))
    fit = fit_projector(model, processor, texts=Texts((str(colors / "texts.txt"),)), sail="run", images=str(colors), seed=1)
    crossing, projector = fit.crossing, model.model.multi_modal_projector
    assert crossing.tokens.shape == (119, 9, sum(projector.widths))
    torch.testing.assert_close(crossing.tokens.mean((0, 1)), crossing.mean, atol=1e-4, rtol=1e-4)
    vectors = crossing.mean[:24] + crossing.vectors(projector.normed(seer.embed([f"a {name}" for name in names]))).float()
    pictures = torch.stack([processor.image_processor.to_pixels(Image.open(colors / f"{n}.png").convert("RGB")) for n in (8, 9, 10, 11)])
    with torch.no_grad():
        seen = torch.cat(projector.blocks(model.model.get_patch_features(pictures)), -1).mean(1)[:, :24]
    distances = torch.cdist(vectors, seen)
    assert distances.argmin(1).tolist() == [0, 1, 2, 3]
    assert distances.diagonal().mean() < 0.3 * distances.mean()


def test_described_images_are_no_captioned_ones(colors):
    rows = json.loads((colors / "rows.json").read_text())
    (colors / "rows.json").write_text(json.dumps([{**row, "image": {"text": "red"}} if n % 2 else row for n, row in enumerate(rows)]))
    conversations = open_conversations([str(colors / "rows.json")], None, colors / "cache2")
    model, processor = tiny_model()
    assert captions(conversations, Words(processor.tokenizer, len(model.get_input_embeddings().weight)), 200)[0] == list(range(0, 120, 2))


@pytest.mark.parametrize("raw", [False, True], ids=["head", "both"])
def test_visual_tokens_are_mixtures_of_embeddings_by_the_scores_that_were_solved(colors, raw):
    model, processor = tiny_model(raw=raw)
    conversations = open_conversations([str(colors / "rows.json")], None, colors / "cache")
    fit = fit_projector(model, processor, conversations=conversations, rows=120)
    projector, table = model.model.multi_modal_projector, model.get_input_embeddings().weight
    assert projector.words == model.config.sail_words == fit.words
    generator = torch.Generator().manual_seed(0)
    means = [torch.randn(size, generator=generator).double() for size in projector.widths]
    weights = [torch.randn(size, fit.words, generator=generator).double() for size in projector.widths]
    tokens = torch.cat(projector.blocks(torch.randn(300, sum(projector.widths), generator=generator)), 1)
    solved = WordMap(means, weights, Choice(0, (1.0,) * len(means)))
    with torch.no_grad():
        write_scores(projector, solved, tokens)
        wanted = sum(
            (block.double() - mean) @ weight for block, mean, weight in zip(tokens.split(projector.widths, 1), means, weights, strict=True)
        )
        wanted = SHARPNESS * wanted / wanted.std()
        torch.testing.assert_close(projector.scores(tokens).double(), wanted, atol=1e-4, rtol=1e-4)
        words = Words(processor.tokenizer, len(table))
        words.count(captions(conversations, words, 120)[1])
        words.choose(4096)
        mixed = wanted.softmax(1).float() @ table[words.chosen]
        count = len(projector.positions)
        torch.testing.assert_close(projector(tokens[:count]) - projector.positions, mixed[:count], atol=1e-4, rtol=1e-4)


def test_tokens_are_told_their_place_in_words():
    model, processor = tiny_model()
    table = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    words = Words(processor.tokenizer, len(table))
    ids = dict(zip(sum(PLACES, ()), words.ids(sum(PLACES, ())), strict=True))
    monkey = {name: torch.tensor([10 + number]) for number, name in enumerate(ids)}
    words.ids = lambda names: [monkey[name] for name in names]
    projector = SailProjector([6], 32, "gelu", bias=True, words=4, positions=12)
    tokens = torch.randn(50, 6)
    with torch.no_grad():
        write_places(projector, (4, 3), words, table, tokens)
        found = projector.positions.unflatten(0, (4, 3))
        assert projector.positions.mean(0).abs().max() < 1e-5
        length = projector.linear_2(projector.act(projector.scores(tokens))).norm(dim=1).mean()
        assert found.norm(dim=2).mean() == pytest.approx(PLACE_SHARE * float(length), rel=1e-4)
        down, right = (table[monkey[end][0]] - table[monkey[start][0]] for start, end in (("top", "bottom"), ("left", "right")))
        cosine = torch.nn.functional.cosine_similarity
        assert cosine(found[3, 1] - found[0, 1], down, dim=0) > 0.999 and cosine(found[1, 2] - found[1, 0], right, dim=0) > 0.999


def test_texts_are_read_from_lines_tables_and_tars(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\n \ntwö\n\xff\xfe broken".encode("latin-1").replace(b"tw\xf6", "twö".encode()))
    (tmp_path / "b.jsonl").write_text(
        '{"key": "1", "caption": ["three", "four"], "other": "x"}\n{"key": "2", "caption": ""}\n{"key": "3"}\n'
    )
    (tmp_path / "c.csv").write_text("key,caption\n1,five\n2,six\n")
    files = tuple(str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.csv"))
    assert [text for batch in Texts(files).batches() for text in batch] == ["one", "twö", "three", "four", "five", "six"]
    assert [text for batch in Texts(files, most=4).batches() for text in batch] == ["one", "twö", "three", "four"]
    assert list(Texts(files[1:2], ("other",)).batches()) == [["x"]]
    (tmp_path / "d.txt").write_text("seven\n")
    assert list(Texts((str(tmp_path / "*.txt"),)).batches()) == [["one", "twö", "seven"]]
    with pytest.raises(DataError, match="no column 'text'; it has"):
        list(Texts(files[2:], ("text",)).batches())
    with pytest.raises(UsageError, match="no such file"):
        list(Texts(("nowhere.txt",)).batches())


def test_too_little_is_refused(colors, monkeypatch):
    conversations = open_conversations([str(colors / "rows.json")], None, colors / "cache")
    model, processor = tiny_model()
    with pytest.raises(DataError, match="at least 50 are needed to solve the projector without --texts"):
        fit_projector(model, processor, conversations=conversations, rows=20, seed=1)
    monkeypatch.setattr(warmstart, "TextSide", lambda sail, device: Seer(model, processor, colors))
    (colors / "texts.txt").write_text("the photo is red\n" * 300)
    with pytest.raises(DataError, match="give --images DATA"):
        fit_projector(model, processor, texts=Texts((str(colors / "texts.txt"),)), sail="run", conversations=conversations, rows=20, seed=1)
    with pytest.raises(DataError, match="150 usable texts, at least 200"):
        fit_projector(model, processor, texts=Texts((str(colors / "texts.txt"),), most=150), sail="run", images=str(colors), seed=1)
