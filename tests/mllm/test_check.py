"""The data doctor: what it counts is right, every problem is listed with its row, each image is decoded once, and the exit code says it."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from align.common.errors import DataError, UsageError
from align.runtime.commandline import run
from align.sources.gate import gate_image
from mllm import check
from mllm.conversations import checking
from mllm.conversations.config import CheckConfig
from mllm.conversations.templates import resolve_template
from mllm.conversations.tokens import IGNORED, Chat
from mllm.model.processing import SailLlavaImageProcessor, SailLlavaProcessor
from tests.support.tiny_mllm import tiny_tokenizer


def row(number, image=None, words="A dog.", question="What is it?"):
    said = [{"from": "human", "value": ("<image>\n" if image else "") + question}, {"from": "gpt", "value": words}]
    return {"id": f"r{number}", **({"image": image} if image else {}), "conversations": said}


@pytest.fixture
def setting(tmp_path):
    """A model folder as far as the check reads it, five pictures, and a function that makes the config for given rows."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    template = resolve_template(tokenizer, "vicuna_v1")
    processor = SailLlavaProcessor(
        SailLlavaImageProcessor({"height": 8, "width": 8}), tokenizer, image_seq_length=4, chat_template=template
    )
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "sail_llava"}')
    for number in range(5):
        Image.new("RGB", (8, 8), (50 * number, 0, 0)).save(tmp_path / f"{number}.png")

    def config(rows, **options):
        (tmp_path / "rows.jsonl").write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
        options = {"workers": 0, "max_length": 200, "output": str(tmp_path / "check"), **options}
        return CheckConfig(data=(f"{tmp_path}/rows.jsonl",), model=str(tmp_path / "model"), **options)

    return config


def test_good_data_is_measured(setting, tmp_path, capsys):
    rows = [row(n, f"{n % 5}.png" if n % 3 else None, "A dog. " * (n % 4 + 1)) for n in range(20)]
    config = setting(rows)
    check.main(config)
    chat = Chat.of_processor(SailLlavaProcessor.from_pretrained(config.model))
    encoded = [
        chat.encode([{"role": "user", "content": [{"type": "image"}] * bool(r.get("image")) + [{"type": "text", "text": "What is it?"}]},
                     {"role": "assistant", "content": r["conversations"][1]["value"]}])
        for r in rows
    ]  # fmt: skip
    facts = json.loads((tmp_path / "check" / "check.json").read_text())
    assert facts["rows"] == 20 and facts["images"] == 13 and facts["different_images"] == 5 and facts["problems"] == {}
    assert facts["tokens"] == sum(len(e.input_ids) for e in encoded)
    assert facts["supervised_tokens"] == sum(label != IGNORED for e in encoded for label in e.labels)
    assert 0.5 < facts["pack_fill"] <= 1 and facts["packs"] <= 20
    with Image.open(tmp_path / "check" / "lengths.png") as picture:
        assert picture.format == "PNG" and picture.width > 400
    assert (tmp_path / "check" / "problems.jsonl").read_text() == ""
    shown = capsys.readouterr().out
    assert "no problems" in shown and "#" * 10 in shown


def test_every_problem_is_listed_with_its_row(setting, tmp_path, capsys, monkeypatch):
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:-30])
    rows = [
        row(0, "0.png"), row(1, "1.png"), row(2, "gone.png"), "{broken", row(4, words=" "), row(5, words="dog " * 500), row(6, "1.png"),
        row(7, "0.png"), row(8), row(9, "../x.png"),
    ]  # fmt: skip
    decoded = []
    monkeypatch.setattr(checking, "gate_image", lambda data, limits: decoded.append(data) or gate_image(data, limits))
    monkeypatch.setattr(sys, "argv", ["check.py"])
    config = setting(rows)
    with pytest.raises(DataError, match="7 problems, each in .*problems.jsonl"):
        check.main(config)
    found = [json.loads(line) for line in (tmp_path / "check" / "problems.jsonl").read_text().splitlines()]
    assert {(line["source"], line["id"], line["code"]) for line in found} == {
        ("rows.jsonl:1", "r1", "image_damaged"), ("rows.jsonl:6", "r6", "image_damaged"), ("rows.jsonl:2", "r2", "file_missing"),
        ("rows.jsonl:3", "rows-000000003", "row_syntax"), ("rows.jsonl:4", "r4", "empty_answer"), ("rows.jsonl:5", "r5", "too_long"),
        ("rows.jsonl:9", "r9", "unsafe_path"),
    }  # fmt: skip
    assert len(decoded) == 2, "0.png and 1.png, once each"
    facts = json.loads((tmp_path / "check" / "check.json").read_text())
    assert facts["rows"] == 6 and facts["problems"]["image_damaged"] == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert "image_damaged" in shown and "rows.jsonl:1 (id r1)" in shown and "no file at that path" in shown


def test_the_exit_code_says_it(setting, monkeypatch):
    config = setting([row(0), row(1, "gone.png")])
    flags = ["--data", *config.data, "--model", config.model, "--output", config.output, "--max-length", "200", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", ["check.py", *flags])
    with pytest.raises(SystemExit) as caught:
        run(check.main, CheckConfig, "check")
    assert caught.value.code == 3


def test_workers_find_the_same(setting, tmp_path):
    rows = [row(n, f"{n % 5}.png") for n in range(300)] + [row(n, f"gone{n}.png") for n in range(70)]
    problems = []
    for workers in (0, 2):
        with pytest.raises(DataError, match="70 problems"):
            check.main(setting(rows, workers=workers, output=str(tmp_path / f"check{workers}")))
        problems.append((tmp_path / f"check{workers}" / "problems.jsonl").read_text())
    assert problems[0] == problems[1]


def test_another_template_and_what_is_not_a_model(setting, tmp_path):
    (tmp_path / "mine.jinja").write_text(resolve_template(tiny_tokenizer(), "plain"))
    for template in ("plain", str(tmp_path / "mine.jinja")):
        with pytest.raises(DataError, match="1 problems"):
            check.main(setting([row(0, "0.png"), row(1)], template=template))
        facts = json.loads((tmp_path / "check" / "check.json").read_text())
        assert facts["problems"] == {"template": 1} and facts["tokens"] < 20
    with pytest.raises(UsageError, match="unknown; allowed: plain"):
        check.main(setting([row(0)], template="none.jinja"))
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UsageError, match="expected 'sail_llava'"):
        check.main(setting([row(0)]))


def test_histograms_count_every_conversation():
    lengths = np.array([1, 1, 5, 100, 2048, 2047, 1024])
    counts, edges = checking.bins_of(lengths, 2048)
    assert counts.sum() == 7 and edges[0] == 0 and edges[-1] > 2048 and len(counts) <= 18
    for number, count in enumerate(counts):
        assert count == sum(edges[number] <= length < edges[number + 1] for length in lengths)
    assert checking.bins_of(np.array([], dtype=int), 100)[0].sum() == 0
