"""The lmms-eval adapter on a tiny random model, against loops over single, unpadded, uncached forward passes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.models import get_model, get_model_manifest
from PIL import Image

from align.common.errors import DataError, UsageError
from eval.harness.adapter import SailLlava, conversation, decoding
from mllm.conversations.templates import resolve_template
from mllm.model.answering import Answerer, Conversation, Decoding
from mllm.model.saving import save_mllm
from tests.support.tiny_mllm import tiny_model

ROOT = Path(__file__).resolve().parents[3]
COLORS = ("red", "green", "blue", "white", "black", "orange")
QUESTIONS = (
    "what is left of the dog",
    "how many",
    "a tree and a car on the image: where is the red one?",
    "yes or no?",
    "b",
    "hello world",
)


def picture(number: int) -> Image.Image:
    image = Image.new("RGB", (60 + 10 * number, 50), COLORS[number % 6])
    image.paste(COLORS[(number + 1) % 6], (5 * number, 5, 5 * number + 20, 30))
    return image


@pytest.fixture(scope="module")
def tiny():
    model, processor = tiny_model()
    processor.chat_template = resolve_template(processor.tokenizer, "vicuna_v1")
    return model, processor


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("mllm") / "model"
    save_mllm(*tiny, path)
    return path


@pytest.fixture(scope="module")
def lm(folder):
    return SailLlava(str(folder), batch_size="4", device="cpu")


def talk(number: int, images: int = 1) -> Conversation:
    return conversation(QUESTIONS[number % 6], [picture(number + extra) for extra in range(images)])


# no image, one, two; prompts of very different lengths
TALKS = [talk(0), talk(1), talk(2, 2), talk(3, 0), talk(4), talk(5, 0)]


def slow_logits(answerer, ids, images):
    """Logits (T, V) of one row, without padding, mask, cache or positions."""
    pixels = {"pixel_values": answerer.processor.image_processor(images)["pixel_values"]} if images else {}
    with torch.no_grad():
        return answerer.model(input_ids=torch.tensor([ids]), use_cache=False, **pixels).logits[0]


def slow_answer(answerer, one, limit, penalty=1.0):
    """Greedy decoding of one conversation, one whole forward pass a token."""
    ids, written = answerer.chat.prompt_ids(one.messages), []
    for _ in range(limit):
        scores = slow_logits(answerer, ids + written, one.images)[-1]
        if penalty != 1.0:
            seen = torch.tensor(sorted(set(ids + written)))
            scores[seen] = torch.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
        token = int(scores.argmax())
        if token in answerer.stop_ids:
            break
        written.append(token)
    return answerer.processor.tokenizer.decode(written, skip_special_tokens=True).strip()


def test_batched_generation_equals_one_by_one_without_padding(tiny):
    answerer = Answerer(*tiny)
    slow = [slow_answer(answerer, one, 12) for one in TALKS]
    assert answerer.generate(TALKS, Decoding(12)) == slow
    assert [answerer.generate([one], Decoding(12))[0] for one in TALKS] == slow
    assert len(set(slow)) > 3, "the answers depend on question and image"
    assert answerer.generate(TALKS[::-1], Decoding(12)) == slow[::-1]
    penalized = [slow_answer(answerer, one, 8, 1.8) for one in TALKS[3:4]]
    assert answerer.generate(TALKS[3:4], Decoding(8, repetition_penalty=1.8)) == penalized


def test_the_image_is_seen(tiny):
    answerer = Answerer(*tiny)
    scores = {answerer.score([conversation("a", [picture(number)])], ["dog"])[0][0] for number in range(4)}
    assert len(scores) == 4


def test_scores_are_sums_of_log_softmax_over_the_answers_own_tokens(tiny):
    answerer = Answerer(*tiny)
    answers = ["yes", "the red dog is left of the tree", "no", " a cat ", "5", "on and on and on"]
    found = answerer.score(TALKS, answers)
    for one, answer, (log_prob, greedy) in zip(TALKS, answers, found, strict=True):
        prompt = answerer.chat.prompt_ids(one.messages)
        own = answerer.processor.tokenizer(" " + answer.strip(), add_special_tokens=False)["input_ids"]  # vicuna: "ASSISTANT: yes</s>"
        table = slow_logits(answerer, prompt + own, one.images).double().log_softmax(-1)
        expected = sum(float(table[len(prompt) - 1 + at, token]) for at, token in enumerate(own))
        assert log_prob == pytest.approx(expected, abs=1e-4) and log_prob < 0
        assert greedy == all(int(table[len(prompt) - 1 + at].argmax()) == token for at, token in enumerate(own))
    assert answerer.score(TALKS[1:2], answers[1:2])[0][0] == pytest.approx(found[1][0], abs=1e-4)


def test_a_learned_answer_is_written_and_is_greedy():
    model, processor = tiny_model()
    processor.chat_template = resolve_template(processor.tokenizer, "vicuna_v1")
    answerer = Answerer(model, processor)
    encoded = answerer.chat.encode([*TALKS[0].messages, {"role": "assistant", "content": "the red dog"}])
    batch = {"input_ids": torch.tensor([encoded.input_ids]), "labels": torch.tensor([encoded.labels])}
    pixels = processor.image_processor(TALKS[0].images)["pixel_values"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model.train()(**batch, pixel_values=pixels).loss.backward()
        optimizer.step()
    answerer = Answerer(model, processor)
    assert answerer.generate([TALKS[1], TALKS[0]], Decoding(12))[1] == "the red dog"
    [right, wrong] = answerer.score([TALKS[0]] * 2, ["the red dog", "the red cat"])
    assert right[1] and not wrong[1] and right[0] > wrong[0] and right[0] > -1


def test_answers_end_before_until_and_at_the_end_token(tiny):
    answerer = Answerer(*tiny)
    whole = answerer.generate(TALKS, Decoding(24))
    for text, one in zip(whole, TALKS, strict=True):
        stop = text[len(text) // 2 :][:2]
        if not stop.strip():
            continue
        for until in ((stop,), ("never", stop), (stop, "")):
            [cut] = answerer.generate([one], Decoding(24, until=until))
            assert cut == text[: text.find(stop)].strip() and stop not in cut
    special = answerer.processor.tokenizer.decode([answerer.stop_ids[0]])
    assert answerer.generate(TALKS, Decoding(24, until=(special,))) == whole, "a special token is no text"


def test_sampling_follows_the_seed_and_differs_from_greedy(tiny):
    answerer = Answerer(*tiny)
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        drawn.append(answerer.generate(TALKS, Decoding(12, temperature=3.0, top_p=0.95)))
    assert drawn[0] == drawn[1] != answerer.generate(TALKS, Decoding(12))


def test_the_llms_own_generation_config_changes_nothing():
    model, processor = tiny_model()
    processor.chat_template = resolve_template(processor.tokenizer, "vicuna_v1")
    plain = Answerer(model, processor).generate(TALKS[:2], Decoding(8))
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, max_length=5)
    assert Answerer(model, processor).generate(TALKS[:2], Decoding(8)) == plain


def test_an_answer_ends_where_the_models_positions_do(tiny):
    answerer = Answerer(*tiny)
    prompt = len(answerer.chat.prompt_ids(TALKS[0].messages))
    answerer.context = prompt + 3
    short = answerer.generate([TALKS[3], TALKS[0]], Decoding(12))  # the first has no image: more room
    assert short == [slow_answer(answerer, TALKS[3], 12), slow_answer(answerer, TALKS[0], 3)]
    answerer.context = prompt
    with pytest.raises(DataError, match=f"{prompt} tokens"):
        answerer.generate([TALKS[0]], Decoding(1))
    with pytest.raises(DataError, match="shorten"):
        answerer.score([TALKS[0]], ["yes"])


def test_wrong_conversations_are_refused(tiny):
    with pytest.raises(UsageError, match="1 image parts and 0 images"):
        Conversation([{"role": "user", "content": [{"type": "image"}]}], [])
    with pytest.raises(UsageError, match="exactly one image"):
        Answerer(*tiny).generate([talk(0, 2)], Decoding(4, num_beams=2))
    with pytest.raises(UsageError, match="start at 1"):
        Decoding(0)
    with pytest.raises(UsageError, match="temperature"):
        Decoding(temperature=-1.0)


def test_beams_of_a_batch_equal_beams_alone(tiny):
    answerer = Answerer(*tiny)
    rows = [talk(0), talk(1), talk(4)]
    assert answerer.generate(rows, Decoding(6, num_beams=3)) == [answerer.generate([one], Decoding(6, num_beams=3))[0] for one in rows]


# ---- the adapter


class Docs:
    """What lmms-eval hands the adapter: rows by task, split and number, and functions of a row."""

    def __init__(self, lm, count: int = 6, images: int = 1) -> None:
        self.rows = [{"images": [picture(n + k) for k in range(images)], "question": QUESTIONS[n % 6]} for n in range(count)]
        lm.task_dict["fake"] = {"test": self.rows}

    def request(self, kind, *head, number=0, visual=True, tail=True):
        visuals = (lambda doc: doc["images"]) if visual else (lambda doc: None)
        arguments = (*head[:2], visuals, *head[2:], number, "fake", "test") if tail else head
        return Instance(kind, arguments, 0, {"task": "fake", "doc_id": number, "repeats": 1})


def test_the_name_resolves_through_lmms_evals_registry():
    assert get_model("sail_llava") is SailLlava
    assert get_model_manifest("sail_llava").simple_class_path == "eval.harness.adapter.SailLlava"
    code = "import sys, eval.harness.plugin; assert not [m for m in sys.modules if m.startswith(('mllm', 'align', 'eval.harness.adapter'))]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_settings_of_lmms_eval_and_processes(lm):
    assert (lm.rank, lm.world_size, lm.batch_size, str(lm.device)) == (0, 1, 4, "cpu") and lm.is_simple
    assert lm.accelerator.num_processes == 1


def test_answers_come_in_the_order_of_requests_and_settings_are_not_mixed(lm, monkeypatch):
    docs = Docs(lm, 6)
    settings = [{"max_new_tokens": 3, "temperature": 0, "until": ["\n\n"]}, {"max_new_tokens": 7, "until": ["\n\n"]}]
    requests = [docs.request("generate_until", row["question"], settings[n % 2], number=n) for n, row in enumerate(docs.rows)]
    batches = []
    plain = lm.answerer.generate
    monkeypatch.setattr(lm.answerer, "generate", lambda batch, given: batches.append((len(batch), given)) or plain(batch, given))
    answers = lm.generate_until(requests)
    assert sorted((size, given.max_new_tokens) for size, given in batches) == [(3, 3), (3, 7)]
    monkeypatch.undo()
    assert answers == [slow_answer(lm.answerer, talk(n), (3, 7)[n % 2]) for n in range(6)]


def test_requests_without_images(lm):
    docs = Docs(lm)
    request = docs.request("generate_until", "how many", {"max_new_tokens": 5}, visual=False)
    assert lm.generate_until([request]) == [slow_answer(lm.answerer, conversation("how many", []), 5)]


def test_loglikelihood_is_a_log_probability_and_reaches_tasks_as_they_want_it(lm):
    docs = Docs(lm)
    requests = [docs.request("loglikelihood", row["question"], f" {QUESTIONS[-n]}", number=n) for n, row in enumerate(docs.rows)]
    found = lm.loglikelihood(requests)
    expected = lm.answerer.score([talk(n) for n in range(6)], [QUESTIONS[-n] for n in range(6)])
    for (log_prob, greedy), (value, right) in zip(found, expected, strict=True):
        assert log_prob == pytest.approx(value, abs=1e-4) and log_prob < 0 and greedy == right
    # multiple_choice takes the smallest number for the best; a task of the kind loglikelihood wants the log-probability itself
    task = [unwrap_generation_output(one)[0] for one in found]
    assert [value for value, _ in task] == [-value for value, _ in found]
    asked = docs.request("loglikelihood", "a", lambda doc: "dog", number=1)
    [one] = lm.loglikelihood([asked])
    assert unwrap_generation_output(one)[0] == (one[0], one[1]) and one[0] < 0
    [bare] = lm.loglikelihood([docs.request("loglikelihood", "a question", " yes", tail=False)])
    assert bare[0] == pytest.approx(lm.answerer.score([conversation("a question", [])], ["yes"])[0][0], abs=1e-4)


def test_rounds_go_on_until_the_task_says_so(lm):
    docs = Docs(lm, 3)
    asked = []

    def ask(doc, previous_output, round_idx, previous_round_info):
        asked.append((doc["question"], round_idx, len(previous_output), previous_round_info))
        done = round_idx == (1 if doc["question"] == QUESTIONS[0] else 3)
        visuals = doc["images"] if round_idx == 1 else None
        return visuals, f"what now {round_idx}", done, previous_output, round_idx * 10

    requests = [
        docs.request("generate_until_multi_round", row["question"], {"max_new_tokens": 4}, ask, number=n) for n, row in enumerate(docs.rows)
    ]
    answers = lm.generate_until_multi_round(requests)
    assert [len(one) for one in answers] == [1, 3, 3]
    assert answers[1][0] == slow_answer(lm.answerer, talk(1), 4)
    assert answers[1][1] == slow_answer(lm.answerer, conversation("what now 1", [picture(1)]), 4)
    assert answers[1][2] == slow_answer(lm.answerer, conversation("what now 2", []), 4)
    assert (QUESTIONS[1], 3, 3, 20) in asked
    assert all(unwrap_generation_output(one)[0] == one for one in answers), "what lmms-eval hands to the task"
    forever = docs.request("generate_until_multi_round", "a", {"max_new_tokens": 1}, lambda doc, **_: (None, "b", False, None, None))
    with pytest.raises(UsageError, match="never says"):
        lm.generate_until_multi_round([forever])


def test_errors_are_raised_not_turned_into_empty_answers(lm):
    docs = Docs(lm)
    docs.rows[1]["images"] = ["video.mp4"]
    with pytest.raises(UsageError, match="no video"):
        lm.generate_until([docs.request("generate_until", "a", {}, number=1)])
    with pytest.raises(UsageError, match="mystery"):
        lm.generate_until([docs.request("generate_until", "a", {"mystery": 1})])
    with pytest.raises(KeyError):
        lm.generate_until(
            [
                Instance(
                    "generate_until", ("a", {}, lambda doc: doc["gone"], 0, "fake", "test"), 0, {"task": "fake", "doc_id": 0, "repeats": 1}
                )
            ]
        )


@pytest.mark.parametrize(
    ("text", "images", "kinds"),
    [
        ("what?", 1, ["image", "what?"]),
        ("what?", 3, ["image", "image", "image", "what?"]),
        ("what?", 0, ["what?"]),
        ("<image> is left of <image>, yes?", 2, ["image", " is left of ", "image", ", yes?"]),
        ("what does <image> mean? see <image>", 1, ["image", "what does <image> mean? see <image>"]),
        ("what does <image> mean?", 0, ["what does <image> mean?"]),
    ],
)
def test_where_images_go(text, images, kinds):
    made = conversation(text, [picture(n) for n in range(images)])
    assert [part.get("text", "image") for part in made.messages[0]["content"]] == kinds and len(made.images) == images


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Decoding(99)),
        ({"max_new_tokens": 16, "temperature": 0.0, "top_p": 1.0, "num_beams": 1, "do_sample": False}, Decoding(16)),
        ({"temperature": 0.2, "do_sample": False, "top_p": 0.9}, Decoding(99)),
        ({"temperature": 0, "do_sample": True}, Decoding(99)),
        ({"do_sample": True, "top_k": 5}, Decoding(99, temperature=1.0, top_k=5)),
        ({"temperature": 0.7, "top_p": 0.9}, Decoding(99, temperature=0.7, top_p=0.9)),
        ({"until": "\n", "stop_sequences": ["END"], "image_aspect_ratio": "original"}, Decoding(99, until=("\n", "END"))),
        ({"until": None, "top_p": None}, Decoding(99)),
    ],
)
def test_generation_settings_of_tasks(settings, expected):
    before = json.dumps(settings)
    assert decoding(settings, 99) == expected
    assert json.dumps(settings) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"batch_size": "auto"}, "whole number"),
        ({"batch_size": 0}, "whole number"),
        ({"dtype": "int8"}, "allowed: auto, fp32"),
        ({"conv_template": "v1"}, "unknown model_args conv_template"),
        ({"pretrained": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_model_args_are_refused(folder, arguments, says):
    with pytest.raises(UsageError, match=says):
        SailLlava(**{"pretrained": str(folder), "device": "cpu", **arguments})


def test_another_template_and_precision(folder):
    lm = SailLlava(str(folder), device="cpu", dtype="bf16", template="plain", max_batch_size=None)
    assert lm.answerer.model.dtype == torch.bfloat16
    assert "USER" not in lm.answerer.chat.prompt(talk(0).messages)
    Docs(lm)
    assert isinstance(lm.generate_until([Docs(lm).request("generate_until", "a", {"max_new_tokens": 3})])[0], str)
    lm.clean()
    assert not hasattr(lm, "answerer")
