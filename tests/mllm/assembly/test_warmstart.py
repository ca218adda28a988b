"""The closed-form start of the projector: images land near the words of their captions, and of texts that no image belongs to."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from align.common.errors import DataError, FingerprintError, UsageError
from align.encoders.spec import TextSpec
from align.encoders.text import load_text_encoder
from align.features.extract import Extraction
from align.model.dual_encoder import SailConfig, SailModel
from align.model.saving import save_model
from align.model.word_map import Choice, WordMap
from align.model.words import Words
from align.sources.plan import Source, plan
from mllm.assembly import warmstart
from mllm.assembly.places import PLACE_SHARE, PLACES, places_in_words, write_places
from mllm.assembly.texts import Batch, Texts, TextSide
from mllm.assembly.warmstart import SHARPNESS, captions, fit_projector, write_scores
from mllm.conversations.table import open_conversations
from mllm.model.towers import SailProjector
from tests.support.tiny_encoders import save_bert
from tests.support.tiny_mllm import tiny_model


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
        self.noise, self.fingerprint = torch.Generator().manual_seed(0), {}

    def embed(self, batch, kept):
        own = torch.stack([self.known[batch.texts[place].split()[-1]] for place in kept])
        return 2 * own + 5 + 0.01 * torch.randn(own.shape, generator=self.noise)


def see_in_place_of_a_run(monkeypatch, model, processor, folder, raw):
    """Let a Seer be the text side of every run; return it. Beside raw patches it knows the normalized means."""
    seer = Seer(model, processor, folder)
    if raw:
        seer.known = {name: torch.nn.functional.layer_norm(x, x.shape) for name, x in seer.known.items()}
    monkeypatch.setattr(warmstart, "TextSide", lambda sail, device: seer)
    return seer


@pytest.mark.parametrize("captioned", [0, 60])
@pytest.mark.parametrize("raw", [False, True], ids=["head", "both"])
def test_texts_without_images_put_images_near_their_words(colors, monkeypatch, raw, captioned):
    conversations = open_conversations([str(colors / "rows.json")], None, colors / "cache")
    model, processor = tiny_model(raw=raw)
    see_in_place_of_a_run(monkeypatch, model, processor, colors, raw)
    names = ("red", "green", "blue", "yellow")
    (colors / "texts.txt").write_text("".join(f"the photo is {names[n % 4]}\n\n" for n in range(400)), encoding="utf-8-sig")
    texts = Texts((str(colors / "texts.txt"),))
    given = {"conversations": conversations, "rows": captioned} if captioned else {}
    seen = []
    progress = lambda what: lambda done, total: seen.append((what, done, total))  # noqa: E731
    fit = fit_projector(model, processor, texts=texts, sail="run", images=str(colors), seed=1, progress=progress, **given)
    assert ("texts read", 400, 400) in seen and ("texts embedded", 400, 400) in seen
    assert (fit.texts, fit.unlabelled, fit.captioned) == (400, 119, captioned and captioned - 1)
    assert nearest(model, processor, colors, conversations) >= 34
    assert ("too few captions" in fit.summary()) == (not captioned) and "solved from 400 texts" in fit.weights()


@pytest.mark.parametrize("raw", [False, True], ids=["head", "both"])
def test_vectors_of_texts_lie_where_pictures_of_their_color_do(colors, monkeypatch, raw):
    model, processor = tiny_model(raw=raw)
    seer = see_in_place_of_a_run(monkeypatch, model, processor, colors, raw)
    names = ("red", "green", "blue", "yellow")
    (colors / "texts.txt").write_text("".join(f"the photo is {names[n % 4]}\n" for n in range(400)))
    fit = fit_projector(model, processor, texts=Texts((str(colors / "texts.txt"),)), sail="run", images=str(colors), seed=1)
    crossing, projector = fit.crossing, model.model.multi_modal_projector
    assert crossing.tokens.shape == (119, 9, sum(projector.widths))
    torch.testing.assert_close(crossing.tokens.mean((0, 1)), crossing.mean, atol=1e-4, rtol=1e-4)
    said = Batch([f"a {name}" for name in names], None, 1.0)
    vectors = crossing.mean[:24] + crossing.vectors(projector.normed(seer.embed(said, range(4)))).float()
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


def test_places_in_words():
    nine = places_in_words([(3, 3)])
    assert nine[0] == " in the top left," and nine[1] == " at the top," and nine[3] == " on the left," and nine[4] == " in the center,"
    assert places_in_words([(3, 3), (1, 2)]) == [*nine, " on the left,", " on the right,"]
    assert places_in_words([(4, 4)])[:4] == [nine[0], nine[1], nine[1], nine[2]] and set(places_in_words([(8, 8)])) == set(nine)
    with pytest.raises(UsageError, match="--grid 3 3"):
        places_in_words([(8, 9)])


def test_texts_are_read_from_lines_tables_and_tars(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\n \ntwö\n\xff\xfe broken".encode("latin-1").replace(b"tw\xf6", "twö".encode()))
    (tmp_path / "b.jsonl").write_text(
        '{"key": "1", "caption": ["three", "four"], "other": "x"}\n{"key": "2", "caption": ""}\n{"key": "3"}\n'
    )
    (tmp_path / "c.csv").write_text("key,caption\n1,five\n2,six\n")
    files = tuple(str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.csv"))
    assert [text for batch in Texts(files).batches() for text in batch.texts] == ["one", "twö", "three", "four", "five", "six"]
    assert [text for batch in Texts(files, most=4).batches() for text in batch.texts] == ["one", "twö", "three", "four"]
    assert [batch.texts for batch in Texts(files[1:2], ("other",)).batches()] == [["x"]]
    (tmp_path / "d.txt").write_text("seven\n")
    assert [batch.texts for batch in Texts((str(tmp_path / "*.txt"),)).batches()] == [["one", "twö", "seven"]]
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


def test_the_total_of_texts_is_known_from_the_bytes_that_were_read(tmp_path, monkeypatch):
    monkeypatch.setattr("mllm.assembly.texts.BATCH", 100)
    (tmp_path / "a.txt").write_text("".join(f"text {n:04d}\n" for n in range(600)))
    (tmp_path / "b.txt").write_text("".join(f"more {n:04d}\n" for n in range(400)))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"caption": f"row {n:04d}"}) + "\n" for n in range(300)))
    files = tuple(str(tmp_path / name) for name in ("a.txt", "b.txt", "c.jsonl"))
    seen = []
    words = Words(tiny_model()[1].tokenizer, 400)
    assert warmstart._counted(Texts(files[:2]), words, lambda done, total: seen.append((done, total))) == 1000
    assert seen == [(done, 1000) for done in range(100, 1001, 100)]
    shares = [batch.share for batch in Texts(files).batches()]
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) == 13
    assert [batch.share for batch in Texts(files, most=200).batches()] == [0.5, 1.0], "of so many that are used"


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A stage-one run, captions, and their store made by the run's own text encoder (short) and by one with a prompt (other)."""
    folder = tmp_path_factory.mktemp("encoded")
    save_bert(folder / "text")
    own = load_text_encoder(TextSpec(str(folder / "text" / "st")), "cpu")
    settings = SailConfig(text=own.spec.stored(), text_fingerprint=own.fingerprint, text_width=own.width, vision_width=8, width=24)
    save_model(SailModel(settings).initialize(5), folder / "run")
    rows = [{"id": n, "short": f"the photo is {['red', 'green'][n % 2]} {n % 9}", "long": f"a long text {n}"} for n in range(300)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(str(folder / "data.jsonl"))
    made = plan(source, 128)
    for name, prompt in (("features", ""), ("other", "p ")):
        made.keep(folder / name, "")
        text = load_text_encoder(TextSpec(str(folder / "text" / "st"), prompt=prompt), "cpu")
        Extraction(source, made, folder / name, text=text, columns=("short",), workers=0).fill()
    return folder


def test_the_features_of_a_caption_store_are_used_as_they_are(encoded, monkeypatch):
    store = str(encoded / "features/captions-short")
    side = TextSide(str(encoded / "run"), torch.device("cpu"))
    texts, read = Texts((store,)), Texts((str(encoded / "data.jsonl"),), ("short",))
    texts.require_encoder(side.fingerprint)
    said = [text for batch in texts.batches() for text in batch.texts]
    assert said == [text for batch in read.batches() for text in batch.texts] and len(said) == 300
    anew = torch.cat([side.embed(batch, range(len(batch.texts))) for batch in read.batches()])
    monkeypatch.setattr(type(side.model.text_encoder), "encode", None)
    kept = torch.cat([side.embed(batch, range(len(batch.texts))) for batch in texts.batches()])
    torch.testing.assert_close(kept, anew, rtol=1e-3, atol=1e-3)  # float16; other texts differ by 2e-2 and more
    some = list(Texts((store,), most=150).batches())
    assert [len(batch.texts) for batch in some] == [128, 22] and len(some[1].features) == 22 and some[1].share == 1


def test_a_caption_store_that_cannot_be_used_is_refused_with_the_reason(encoded, tmp_path):
    side = TextSide(str(encoded / "run"), torch.device("cpu"))
    with pytest.raises(FingerprintError, match="prompt: 'p ' there, '' asked for.*give --texts the data"):
        Texts((str(encoded / "other/captions-short"),)).require_encoder(side.fingerprint)
    shutil.copytree(encoded / "features", tmp_path / "features")
    copied = tmp_path / "features/captions-short"
    (tmp_path / "features/plan.parquet").rename(tmp_path / "gone")
    with pytest.raises(DataError, match="plan.parquet .* is not beside it"):
        list(Texts((str(copied),)).batches())
    (tmp_path / "gone").rename(tmp_path / "features/plan.parquet")
    lines = (encoded / "data.jsonl").read_text()
    try:
        (encoded / "data.jsonl").write_text(lines.replace("the photo is red 0", "the photo is RED 0"))
        with pytest.raises(DataError, match="lacks .* of 128 captions"):
            list(Texts((str(copied),)).batches())
    finally:
        (encoded / "data.jsonl").write_text(lines)
    copied.rename(tmp_path / "features/mine")
    with pytest.raises(UsageError, match="a caption store; give a folder captions-COLUMN"):
        list(Texts((str(tmp_path / "features/mine"),)).batches())
