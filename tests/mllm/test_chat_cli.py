"""The terminal conversation: what is asked, what is kept, and what goes wrong."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from transformers import TextStreamer

from align.common.errors import DataError, UsageError
from mllm.chat_cli import converse, main, questions, read_image
from mllm.conversations.templates import resolve_template
from mllm.model.answering import Answerer, ChatSession, Conversation, Decoding
from mllm.model.config import ChatConfig
from mllm.model.saving import load_mllm, save_mllm
from tests.support.tiny_mllm import tiny_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, processor = tiny_model()
    processor.chat_template = resolve_template(processor.tokenizer, "vicuna_v1")
    path = tmp_path_factory.mktemp("chat")
    save_mllm(model, processor, path / "model")
    for name in ("red", "blue"):
        Image.new("RGB", (60, 40), name).save(path / f"{name}.png")
    (path / "page.jpg").write_bytes(b"<html>no image</html>")
    return path


@pytest.fixture(scope="module")
def answerer(folder):
    return Answerer(*load_mllm(folder / "model"))


def session_about(answerer, image=None):
    return ChatSession(answerer, Decoding(6), image)


def test_one_question_streams_its_answer(folder, capsys, answerer):
    main(ChatConfig(str(folder / "model"), image=str(folder / "red.png"), prompt="what is red?", max_new_tokens=6, device="cpu"))
    streamed = capsys.readouterr().out
    expected = session_about(answerer, read_image(str(folder / "red.png"))).ask("what is red?")
    assert streamed.strip() == expected and expected
    assert "USER" not in streamed and "</s>" not in streamed


def test_a_run_is_asked_by_its_folder(folder, capsys):
    said = []
    for place in (folder / "model", folder):
        main(ChatConfig(str(place), prompt="what is red?", max_new_tokens=6, device="cpu"))
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_the_answer_is_printed_piece_by_piece(folder, answerer):
    class Pieces(TextStreamer):
        seen: list[str] = []

        def on_finalized_text(self, text, stream_end=False):
            self.seen.append(text)

    streamer = Pieces(answerer.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = ChatSession(answerer, Decoding(20), None).ask("how many words are there?", streamer)
    assert len(streamer.seen) > 2 and "".join(streamer.seen).strip() == answer


def test_later_questions_remember_the_conversation_and_the_image(folder, answerer):
    red = read_image(str(folder / "red.png"))
    session = session_about(answerer, red)
    first = session.ask("what is it?")
    second = session.ask("and left of it?")
    assert [message["role"] for message in session.said] == ["user", "assistant"] * 2
    assert [part["type"] for part in session.said[0]["content"]] == ["image", "text"]
    assert [part["type"] for part in session.said[2]["content"]] == ["text"]
    alone = session_about(answerer, red)
    assert alone.ask("what is it?") == first and alone.ask("and left of it?") == second
    blue = Conversation(session.said[:1], [read_image(str(folder / "blue.png"))])
    [seen, other] = answerer.score([Conversation(session.said[:1], [red]), blue], [first, first])
    assert seen != other, "another image, other chances"
    assert session_about(answerer, red).ask("and left of it?") != second, "what was said before counts"


def test_commands(folder, answerer):
    console = Console(record=True, width=200, file=io.StringIO())
    session = session_about(answerer, read_image(str(folder / "red.png")))
    lines = [
        "what?",
        f"/image {folder}/blue.png",
        "what?",
        "/new",
        "/image gone.png",
        f"/image {folder}/page.jpg",
        "/help",
        "/quit",
        "never",
    ]
    heard = []
    session.ask = lambda line, streamer: heard.append((line, session.image.getpixel((5, 5)))) or session.said.append(line)
    converse(session, console, iter(lines), None)
    shown = console.export_text()
    assert heard == [("what?", (255, 0, 0)), ("what?", (0, 0, 255))] and session.said == []
    assert "looking at" in shown and "a new conversation" in shown
    assert "error: cannot read the image gone.png (No such file or directory)" in shown
    assert "is no usable image (image_format" in shown and "unknown command /help; there are /image PATH, /new, /quit" in shown


def test_an_error_ends_one_question_not_the_conversation(folder, answerer):
    console = Console(record=True, width=400, file=io.StringIO())
    session = session_about(answerer)
    converse(session, console, iter(["a dog " * 300, "how many?"]), None)
    assert "tokens, the model reads 512" in console.export_text()
    assert len(session.said) == 2 and session.said[0]["content"][0]["text"] == "how many?"


def test_special_tokens_in_questions_are_text(answerer):
    session = session_about(answerer)
    session.ask("what does <image> mean, and </s>?")
    ids = answerer.chat.prompt_ids(session.said[:1])
    assert answerer.chat.tokenizer.convert_tokens_to_ids("<image>") not in ids


def test_questions_are_read_to_the_end_of_the_input(monkeypatch):
    lines = iter(["one", "  ", " two "])

    def read():
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert list(questions(Console())) == ["one", "two"]


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"model": "nowhere"}, UsageError, "nowhere is neither an MLLM folder.*no such folder"),
        ({"image": "nowhere.jpg"}, UsageError, "cannot read the image nowhere.jpg"),
        ({"image": "."}, UsageError, "Is a directory"),
        ({"image": "page.jpg"}, DataError, "no usable image"),
        ({"max_new_tokens": 0}, UsageError, "start at 1"),
        ({"temperature": -1.0}, UsageError, "temperature"),
    ],
)
def test_wrong_requests(folder, monkeypatch, changes, error, says):
    monkeypatch.chdir(folder)
    with pytest.raises(error, match=says):
        main(ChatConfig(**{"model": "model", "prompt": "a", **changes}))


@pytest.mark.slow
def test_the_entry_reads_questions_from_a_pipe(folder):
    command = [sys.executable, str(ROOT / "mllm/chat_cli.py"), "--model", str(folder / "model"), "--max-new-tokens", "4", "--device", "cpu"]
    done = subprocess.run(command, input="how many?\n/image gone.png\n", capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "cannot read the image gone.png" in done.stdout and len(done.stdout.splitlines()) >= 2
