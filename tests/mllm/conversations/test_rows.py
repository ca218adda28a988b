"""Whatever a row says is used, known to be mere description, or rejects it; all spellings of "no image" are one."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.common.errors import DataError
from align.common.reject_codes import Reject
from mllm.conversations.rows import normalize
from mllm.conversations.table import open_conversations
from mllm.conversations.tokens import IGNORED
from tests.support.short_conversations import chat, conversation

TALK = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a dog"}]
NOTHING = [None, "", [], [""], [None], {}, "None", " null ", "nan", "N/A", False, float("nan"), {"bytes": None, "path": None},
           {"bytes": b"", "path": ""}, [{"bytes": None, "path": "none"}]]  # fmt: skip


UNMARKED = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def code_of(row, ignored=()):
    try:
        normalize(row, ignored)
    except Reject as reject:
        return reject.code
    return "good"


def learned(row, template="vicuna_v1"):
    """Return the texts of a row that a model learns."""
    one = chat(template=template)
    labels = one.encode(normalize(row)[0]).labels
    runs, last = [], None
    for place, label in enumerate(labels):
        if label != IGNORED:
            runs = [*runs[:-1], [*runs[-1], label]] if last == place - 1 else [*runs, [label]]
            last = place
    return [one.tokenizer.decode(run, skip_special_tokens=True).strip() for run in runs]


@pytest.mark.parametrize("name", ["video", "videos", "audio", "audios", "tools", "functions", "history", "chosen", "rejected", "loss",
                                  "weight", "objects", "bbox", "mask", "system_message", "a_key_of_tomorrow"])  # fmt: skip
@pytest.mark.parametrize("value", ["x", ["x"], 0.5, True, {"a": 1}])
def test_an_unknown_key_that_holds_something_rejects_its_row_by_name(name, value):
    with pytest.raises(Reject, match=f"{name}.*--ignore-keys {name}") as caught:
        normalize({"conversations": TALK, name: value})
    assert caught.value.code == "row_key"
    assert code_of({"conversations": TALK, name: value}, (name,)) == "good"
    for empty in (None, "", [], {}, float("nan")):
        assert code_of({"conversations": TALK, name: empty}) == "good"


def test_what_only_describes_a_row_is_no_reason_to_reject_it():
    row = {"conversations": TALK, "id": 1, "model": "gpt", "source": "coco", "question_id": 7, "data_source": "x", "width_list": [3]}
    assert code_of(row) == "good"


@pytest.mark.parametrize("turn", [{"tool_calls": [1]}, {"name": "Bob"}, {"video": "a.mp4"}, {"role": "user"}, {"reasoning_content": "x"}])
def test_a_turns_keys_are_read_alike(turn):
    assert code_of({"conversations": [TALK[0], {**TALK[1], **turn}]}) == "row_key"


@pytest.mark.parametrize("part", [{"type": "text", "text": "a", "audio": "b"}, {"type": "image", "image": "a.png", "max_pixels": 7},
                                  {"type": "text", "text": "a", "image": "b.png"}])  # fmt: skip
def test_a_parts_keys_are_read_alike(part):
    assert code_of({"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "b"}]}) == "row_key"


def test_a_media_part_is_rejected():
    for kind in ("video", "audio", "input_audio", "file"):
        parts = [{"type": kind, kind: "a"}, {"type": "text", "text": "what?"}]
        assert code_of({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "b"}]}) == "content_type"


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_the_rows_system_text_is_used(name):
    messages, _, _ = normalize({name: "A is B", "conversations": TALK})
    assert messages[0] == {"role": "system", "content": "A is B"} and len(messages) == 3
    assert "A is B" in chat().prompt(messages[:2])
    own = [{"from": "system", "value": "A is B"}, *TALK]
    assert normalize({name: "A is B", "conversations": own})[0] == messages, "said twice, it is one"
    assert code_of({name: "C is D", "conversations": own}) == "row_key"
    assert code_of({name: ["A"], "conversations": TALK}) == "content_type"
    assert code_of({"system": "a", "system_prompt": "b", "conversations": TALK}) == "row_key"


@pytest.mark.parametrize(
    "name, no, yes", [("loss", False, True), ("loss", 0, 1), ("weight", 0, 1), ("weight", 0.0, 1.0), ("train", False, None)]
)
@pytest.mark.parametrize("template", ["vicuna_v1", "brief", UNMARKED])
def test_an_answer_that_is_not_to_be_learned_is_not(name, no, yes, template):
    answers = ({"content": "a green dog", name: no}, {"content": "a red dog", name: yes}, {"content": "a cat"})
    row = {"messages": [turn for answer in answers for turn in ({"role": "user", "content": "what?"}, {"role": "assistant", **answer})]}
    assert learned(row, template) == ["a red dog", "a cat"]
    assert learned({"messages": row["messages"][:2] + row["messages"][4:]}, template) == ["a cat"]
    with pytest.raises(Reject, match="no_supervised_tokens"):
        learned({"messages": row["messages"][:2]}, template)


@pytest.mark.parametrize(
    "turn", [{"weight": 0.5}, {"loss": "false"}, {"weight": -1}, {"loss": 2}, {"weight": [1]}, {"loss": True, "weight": 0}]
)
def test_what_cannot_be_done_with_an_answer_is_rejected(turn):
    assert code_of({"conversations": [TALK[0], {**TALK[1], **turn}]}) == "row_key"
    assert code_of({"conversations": [{**TALK[0], "loss": True}, TALK[1]]}) == "row_key", "questions are never learned"
    assert code_of({"conversations": [{**TALK[0], "loss": False}, TALK[1]]}) == "good"


def test_turns_are_dropped_only_behind_what_is_learned():
    row = conversation(0, turns=3)
    for turn in (1, 3):
        row["conversations"][turn]["loss"] = False
    messages, one = normalize(row)[0], chat()
    length = len(one.encode(messages).input_ids)
    with pytest.raises(Reject, match="too_long"):
        one.encode(messages, length - 1)
    row["conversations"][3]["loss"] = True
    messages = normalize(row)[0]
    assert one.encode(messages, length - 1).dropped_turns == 1


@pytest.mark.parametrize("name", ["image", "images"])
@pytest.mark.parametrize("nothing", NOTHING, ids=map(repr, NOTHING))
def test_all_spellings_of_no_image_are_one(name, nothing):
    bare = {"conversations": TALK}
    assert normalize({**bare, name: nothing}) == normalize(bare)
    part = {"type": "image", "image": nothing}
    shown = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}, {"role": "assistant", "content": "b"}]}
    assert code_of(shown) == "image_count"
    assert len(normalize({**shown, "image": "a.png"})[1]) == 1


def test_turns_in_two_keys_are_rejected():
    assert code_of({"conversations": TALK, "messages": [{"role": "user", "content": "a"}]}) == "row_fields"
    assert code_of({"conversations": TALK, "messages": None}) == code_of({"conversations": TALK, "messages": []}) == "good"


def test_pairs_of_questions_and_answers_are_read_with_their_images_first(tmp_path):
    pairs = [{"user": "What?", "assistant": "A dog.", "source": "x"}, {"user": "Red?", "assistant": "No.", "source": "x"}]
    messages, images, _ = normalize({"images": [b"1", b"2"], "texts": pairs})
    assert messages[0]["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}] and len(images) == 2
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    rows = [{"images": [{"bytes": b"1", "path": None}], "texts": pairs}, {"images": [], "texts": pairs[:1]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    found = open_conversations([str(tmp_path / "c.parquet")], cache=tmp_path / "cache")
    assert [len(found[n].images) for n in range(2)] == [1, 0] and not found.codes
    assert code_of({"texts": [{"user": "What?", "assistant": None}]}) == "empty_answer"
    pq.write_table(pa.Table.from_pylist([{"image": b"1", "caption": "a dog"}]), tmp_path / "d.parquet")
    with pytest.raises(DataError, match="no column conversations.*it has image, caption.*list of {from, value}.*make one of captions"):
        open_conversations([str(tmp_path / "d.parquet")], cache=tmp_path / "cache")


def test_marks_in_pairs_of_questions_and_answers_place_the_images():
    pairs = [{"user": "Is <image> like <image>?", "assistant": "No."}]
    parts = normalize({"images": [b"1", b"2"], "texts": pairs}).messages[0]["content"]
    assert [part["type"] for part in parts] == ["text", "image", "text", "image", "text"]
    parts = normalize({"images": [b"1"], "texts": pairs}).messages[0]["content"]
    assert [part["type"] for part in parts] == ["image", "text"] and parts[1]["text"] == pairs[0]["user"], "other marks are words"


@pytest.mark.parametrize("name", ["conversations", "messages", "texts"])
def test_turns_as_an_object_of_lists_are_read(name, tmp_path):
    ask, say = {"conversations": ("human", "gpt"), "messages": ("user", "assistant"), "texts": ("user", "assistant")}[name]
    columns = (
        {"from": [ask, say] * 2, "value": ["what?", "a dog", "red?", "no"]}
        if name != "texts"
        else {ask: ["what?", "red?"], say: ["a dog", "no"]}
    )
    assert [m["content"] for m in normalize({name: columns}).messages] == ["what?", "a dog", "red?", "no"]
    pq.write_table(pa.Table.from_pylist([{name: columns}]), tmp_path / "a.parquet")
    assert not open_conversations([str(tmp_path / "a.parquet")], cache=tmp_path / "cache").codes
    with pytest.raises(Reject, match="not of one length"):
        normalize({name: {**columns, next(iter(columns)): ["what?"]}})
    with pytest.raises(Reject, match=f"{name} is a str"):
        normalize({name: json.dumps(TALK)})


@pytest.mark.parametrize("answers", [1, 2])
@pytest.mark.parametrize("system", [[], [{"from": "system", "value": "be brief"}]])
def test_answers_before_the_first_question_are_left_out_and_counted(answers, system, tmp_path):
    row = {"conversations": [*system, *[{"from": "gpt", "value": "hello"}] * answers, *TALK]}
    plain = normalize({"conversations": [*system, *TALK]})
    assert normalize(row) == plain._replace(skipped=answers)
    assert normalize(
        {"image": "a.png", "conversations": [*row["conversations"][:-2], {"from": "human", "value": "<image>\nwhat?"}, TALK[1]]}
    ).images
    assert code_of({"conversations": row["conversations"][:-2]}) == "role_order", "there is no question"
    (tmp_path / "a.json").write_text(json.dumps([row, {"conversations": TALK}, {"conversations": TALK[1:]}]))
    for _ in range(2):  # read, then from the cache
        found = open_conversations([str(tmp_path / "a.json")], cache=tmp_path / "cache")
        assert found.codes == {"role_order": 1} and found.skipped == 1 and "1 conversations begin with an answer" in found.remarks[0]


def test_parquet_and_json_reject_the_same_rows(tmp_path):
    rows = [{"id": "v", "video": "a.mp4", "conversations": TALK}, {"id": "s", "video": None, "conversations": TALK},
            {"id": "w", "video": "", "conversations": [TALK[0], {**TALK[1], "weight": 0.5}]}]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(rows))
    full = [{**row, "conversations": [{"weight": None, **turn} for turn in row["conversations"]]} for row in rows]
    pq.write_table(pa.Table.from_pylist(full), tmp_path / "a.parquet")
    for name in ("a.json", "a.parquet"):
        found = open_conversations([str(tmp_path / name)], cache=tmp_path / "cache")
        assert found.codes == {"row_key": 2} and found[0].id == "s"
        again = open_conversations([str(tmp_path / name)], cache=tmp_path / "cache", ignored=["video", "weight"])
        assert not again.codes and len(again) == 3 and again.fingerprint != found.fingerprint
