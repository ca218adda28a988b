"""Conversation files: layouts agree, hostile rows have codes and harm nobody else, images stay below their root, memory stays small."""

import io
import json
import pickle
import random
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from align.common.errors import DataError, UsageError
from align.common.reject_codes import REJECT_CODES, Reject
from mllm.conversations import table as module
from mllm.conversations.files import _ArrayReader, read_rows
from mllm.conversations.rows import normalize
from mllm.conversations.table import open_conversations

IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def turns(*values):
    return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]


def picture(number=0):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 40 % 256, 9, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def opened(path, tmp_path, **options):
    return open_conversations([str(path)], cache=tmp_path / "cache", **options)


LLAVA = [
    {"id": "000001", "image": "coco/1.png", "conversations": turns("<image>\nWhat is it?", "A dog.", "Red?", "No.")},
    {"id": 17, "image": "coco/2.png", "conversations": turns("What is it?\n<image>", "A cat.")},
    {"id": "sharegpt", "conversations": turns("Hi", "Hello 🐕")},
    {"image": ["coco/1.png", "coco/2.png"], "conversations": turns("<image>\n<image>\nSame?", "No.")},
    {"id": 3.5, "image": "coco/1.png", "conversations": turns("<image>", "Caption")},
]


def with_images(folder):
    (folder / "coco").mkdir()
    for number in (1, 2):
        (folder / "coco" / f"{number}.png").write_bytes(picture(number))


def as_files(folder):
    """The rows of LLAVA in every layout."""
    write(folder / "array.json", json.dumps(LLAVA, indent=1))
    write(folder / "lines.jsonl", "\n".join(map(json.dumps, LLAVA)))
    messages = []
    for row in LLAVA:
        said = [{"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        images = row.get("image", [])
        messages.append({"id": row.get("id"), "messages": said, "images": images if isinstance(images, list) else [images]})
    write(folder / "messages.jsonl", "\n".join(map(json.dumps, messages)))
    for row in messages:
        row["id"] = None if row["id"] is None else str(row["id"])
    pq.write_table(pa.Table.from_pylist(messages), folder / "paths.parquet", row_group_size=2)
    for row in messages:
        row["images"] = [{"bytes": (folder / path).read_bytes(), "path": path} for path in row["images"]]
    pq.write_table(pa.Table.from_pylist(messages), folder / "bytes.parquet", row_group_size=3)


EXPECTED = [
    [[IMAGE, text("What is it?")], "A dog.", "Red?", "No."],
    [[IMAGE, text("What is it?")], "A cat."],
    ["Hi", "Hello 🐕"],
    [[IMAGE, text("\n"), IMAGE, text("\nSame?")], "No."],
    [[IMAGE], "Caption"],
]


@pytest.mark.parametrize("name", ["array.json", "lines.jsonl", "messages.jsonl", "paths.parquet", "bytes.parquet"])
def test_layouts_agree(tmp_path, name):
    with_images(tmp_path)
    as_files(tmp_path)
    data = opened(tmp_path / name, tmp_path)
    assert len(data) == len(LLAVA) and not data.codes
    for number in range(len(data)):
        row = data[number]
        assert [message["content"] for message in row.messages] == EXPECTED[number]
        assert [message["role"] for message in row.messages] == ["user", "assistant"] * (len(EXPECTED[number]) // 2)
        assert row.source == f"{name}:{number}"
        wanted = LLAVA[number].get("image", [])
        wanted = wanted if isinstance(wanted, list) else [wanted]
        assert [data.read_image(image) for image in row.images] == [(tmp_path / path).read_bytes() for path in wanted]
    ids = [data[number].id for number in range(5)]
    assert ids[:3] == ["000001", "17", "sharegpt"] and ids[3] == f"{name.partition('.')[0]}-000000003"


def test_image_parts_make_literal_marks_data():
    asked = {"role": "user", "content": [text("<image> is what I type: "), IMAGE, text("<image>")]}
    messages, images, _ = normalize({"images": ["a.png"], "messages": [asked, {"role": "assistant", "content": "<image>"}]})
    assert messages[0]["content"] == [text("<image> is what I type: "), IMAGE, text("<image>")] and len(images) == 1
    inside = [
        {"role": "user", "content": [{"type": "image", "image": "b.png"}, text("What?")]},
        {"role": "assistant", "content": [text("B")]},
    ]
    messages, images, _ = normalize({"messages": inside})
    assert images[0].path == "b.png" and messages[0]["content"] == [IMAGE, text("What?")] and messages[1]["content"] == "B"


PLACES = [  # human values, number of images, what becomes of the first value (None: image_count)
    (["<image>\nWhat?"], 1, [IMAGE, text("What?")]),
    (["  What?  <image>\n"], 1, [IMAGE, text("What?")]),
    (["Look <image> here"], 1, [IMAGE, text("Look  here")]),
    (["<image>\nWhat is <image> in HTML?"], 1, [IMAGE, text("What is <image> in HTML?")]),
    (["What is <image> in HTML?"], 0, "What is <image> in HTML?"),
    (["<image>\nWhat?"], 0, None),
    (["What?"], 1, None),
    (["<image>\n<image>\nWhat?"], 1, None),
    (["<image>\nWhat?"], 2, None),
    (["1: <image> 2: <image> same?"], 2, [text("1: "), IMAGE, text(" 2: "), IMAGE, text(" same?")]),
    (["<image>\nA?", "<image>\nB?"], 2, [IMAGE, text("A?")]),
    (["A? <image> b", "B?"], 1, [IMAGE, text("A?  b")]),
    (["<image>"], 1, [IMAGE]),
    (["<image><image>"], 2, [IMAGE, IMAGE]),
]


@pytest.mark.parametrize("values, images, first", PLACES)
def test_where_the_marks_are_images(values, images, first):
    row = {"image": [f"{n}.png" for n in range(images)], "conversations": turns(*(v for value in values for v in (value, "ok <image>")))}
    if first is None:
        with pytest.raises(Reject, match="image_count"):
            normalize(row)
        return
    messages, found, _ = normalize(row)
    assert messages[0]["content"] == first and messages[1]["content"] == "ok <image>" and len(found) == images


GOOD = json.dumps({"id": "good", "conversations": turns("Hi", "Hello")})
HOSTILE = {  # a row as it stands in the file, and its code
    "[1, 2]": "row_type",
    "null": "row_type",
    '"text"': "row_type",
    "12": "row_type",
    '{"id": "x"}': "row_fields",
    '{"id": 1, "conversations": []}': "row_fields",
    '{"id": 1, "conversations": "hello"}': "row_fields",
    '{"id": 1, "conversations": ["a", "b"]}': "row_fields",
    '{"id": 1, "turns": NaN, "score": Infinity, "conversations": [{"from": "human", "value": NaN}, {"from": "gpt", "value": "b"}]}': (
        "content_type"
    ),
    '{"id": 1, "id": 2, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}': "row_duplicate_name",
    '{"id": 1, "conversations": [{"from": "human", "from": "gpt", "value": "a"}]}': "row_duplicate_name",
    '{"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "b"}]}': "content_type",
    '{"conversations": [{"from": "human", "value": null}, {"from": "gpt", "value": "b"}]}': "content_type",
    '{"conversations": [{"from": "human"}, {"from": "gpt", "value": "b"}]}': "content_type",
    '{"messages": [{"role": "user", "content": [{"type": "video"}]}, {"role": "assistant", "content": "b"}]}': "content_type",
    '{"messages": [{"role": "user", "content": ["a"]}, {"role": "assistant", "content": "b"}]}': "content_type",
    '{"conversations": [{"from": "human", "value": "a\\ud83d"}, {"from": "gpt", "value": "b"}]}': "text_invalid",
    '{"conversations": [{"from": "human", "value": "a\\u0000"}, {"from": "gpt", "value": "b"}]}': "text_invalid",
    '{"conversations": [{"from": "tool", "value": "a"}, {"from": "gpt", "value": "b"}]}': "role_unknown",
    '{"conversations": [{"from": ["human"], "value": "a"}, {"from": "gpt", "value": "b"}]}': "role_unknown",
    '{"conversations": [{"value": "a"}, {"from": "gpt", "value": "b"}]}': "role_unknown",
    '{"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}': "role_order",
    '{"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}': "role_order",
    '{"conversations": [{"from": "human", "value": "a"}]}': "role_order",
    '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]}': "empty_answer",
    '{"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "b"}]}': "empty_question",
    '{"image": "a.png", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}': "image_count",
    '{"image": "../../etc/passwd", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}]}': "unsafe_path",
    '{"image": "http://x/a.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}]}': "unsafe_path",
    '{"image": "data:image/png;base64,AA", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}]}': (
        "unsafe_path"
    ),
    '{"image": "a\\ud800.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}]}': "unsafe_path",
    '{"image": 7, "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}]}': "image_type",
    '{"image": "", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}]}': "image_count",
    '{"image": [null], "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}]}': "image_count",
    '{"image": ["a.png", null], "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}]}': "image_missing",
    '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "<image>"}], "n": %s}' % ("9" * 5000): "row_syntax",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}]}': (
        "image_role"
    ),
}


@pytest.mark.parametrize("layout", ["json", "json with CRLF and a mark", "jsonl", "jsonl with CRLF and a mark"])
def test_hostile_rows_are_counted_and_the_others_kept(tmp_path, layout):
    rows = [row for hostile in HOSTILE for row in (hostile, GOOD)]
    end = "\r\n" if "CRLF" in layout else "\n"
    body = "[" + f",{end}".join(rows) + "]" if layout.startswith("json ") or layout == "json" else end.join(rows)
    data = (b"\xef\xbb\xbf" if "mark" in layout else b"") + body.encode()
    path = tmp_path / ("a.jsonl" if layout.startswith("jsonl") else "a.json")
    path.write_bytes(data)
    found = opened(path, tmp_path)
    assert len(found) == len(HOSTILE) and all(found[n].id == "good" for n in range(len(found)))
    rejects = list(found.rejects())
    assert {reject.source: reject.code for reject in rejects} == {f"{path.name}:{2 * n}": code for n, code in enumerate(HOSTILE.values())}
    assert sum(found.codes.values()) == len(HOSTILE) and set(found.codes) <= set(REJECT_CODES)


def test_an_absolute_path_is_read_below_the_image_root_only(tmp_path):
    write(tmp_path / "x.png", b"X")
    places = (tmp_path / "x.png", "/etc/passwd", f"{tmp_path}-other/x.png")
    rows = [{"image": str(place), "conversations": turns("<image>", "b")} for place in places]
    write(tmp_path / "a.json", json.dumps(rows).encode())
    found = opened(tmp_path / "a.json", tmp_path)
    assert found.read_image(found[0].images[0]) == b"X"
    for number in (1, 2):
        with pytest.raises(Reject, match="unsafe_path.*is outside.*--image-root"):
            found.read_image(found[number].images[0])


def test_bytes_that_are_not_utf8_cost_their_row(tmp_path):
    bad = GOOD.encode().replace(b"Hello", b"H\xff\xfe")
    write(tmp_path / "a.json", b"[" + b",".join([GOOD.encode(), bad, GOOD.encode()]) + b"]")
    write(tmp_path / "a.jsonl", b"\n".join([GOOD.encode(), bad, b"", b'{"id": ', b"[" * 100_000, GOOD.encode()]))
    assert opened(tmp_path / "a.json", tmp_path).codes == {"text_invalid": 1}
    lines = opened(tmp_path / "a.jsonl", tmp_path)
    assert lines.codes == {"row_utf8": 1, "row_blank": 1, "row_syntax": 2} and len(lines) == 2


BROKEN = {
    "[" + GOOD: "ends within the array",
    "[" + GOOD + ",": "row 1",
    "[" + GOOD + ",]": "row 1",
    "[" + GOOD + " " + GOOD + "]": "expected , or ]",
    "[" + GOOD + "]x": "more after the end",
    '[{"id": "open': "row 0",
    '[{"id": 1, bad}]': "row 0",
    GOOD: "begin with \\[",
    "": "begin with \\[",
    "[" * 100_000: "too deep",
    "[]": "no row that can be used .it is empty",
    "[1]": "no row that can be used .row_type 1",
}


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_array_is_refused_with_its_row(tmp_path, content):
    with pytest.raises(DataError, match=BROKEN[content]):
        opened(write(tmp_path / "a.json", content), tmp_path)
    assert not list(tmp_path.glob("cache/*.partial"))


def test_the_array_reader_does_not_depend_on_where_reads_end():
    choose = random.Random(0)
    values = [
        choose.choice([{"a": "é🐕" * choose.randint(0, 9)}, {"b": [1, {"c": "]},["}]}, 123, {}, "x", -1.5e3, True]) for _ in range(60)
    ]
    data = (json.dumps(values[:30], ensure_ascii=False, indent=2)[:-1] + "," + json.dumps(values[30:])[1:] + " \n").encode()
    for step in (1, 2, 3, 7, 64, 10_000):
        read = list(_ArrayReader("a", io.BytesIO(data).read, step).elements())
        assert [v if isinstance(v, dict) else v.code for v in read] == [v if isinstance(v, dict) else "row_type" for v in values]


def test_a_large_array_is_read_in_little_memory(tmp_path):
    row = json.dumps({"id": 1, "image": "a/b.jpg", "conversations": turns("<image>\nWhat?", "word " * 800)})
    write(tmp_path / "a.json", "[" + ",".join([row] * 6_000) + "]")
    tracemalloc.start()
    count = sum(isinstance(record, dict) for record in read_rows(str(tmp_path / "a.json")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 6_000 and (tmp_path / "a.json").stat().st_size > 23 << 20 and peak < 6 << 20


def test_images_stay_below_their_root(tmp_path):
    (tmp_path / "root").mkdir()
    with_images(tmp_path / "root")
    (tmp_path / "secret.png").write_bytes(picture())
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "secret.png")
    rows = [
        {"id": n, "image": path, "conversations": turns("<image>", "a")}
        for n, path in enumerate(["coco/1.png", "link.png", "gone.png", "coco"])
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    data = opened(path, tmp_path, image_root=str(tmp_path / "root"))
    assert data.read_image(data[0].images[0]) == picture(1)
    for number, code in ((1, "unsafe_path"), (2, "file_missing"), (3, "file_kind")):
        with pytest.raises(Reject) as caught:
            data.read_image(data[number].images[0])
        assert caught.value.code == code
    assert opened(path, tmp_path).files[0].root == str(tmp_path)


def test_weights_repeat_and_choose_rows_by_the_seed(tmp_path):
    for name, count in (("a", 40), ("b", 10)):
        write(
            tmp_path / f"{name}.jsonl", "\n".join(json.dumps({"id": f"{name}{n}", "conversations": turns("q", "a")}) for n in range(count))
        )
    specs = [f"{tmp_path}/a.jsonl:0.25", f"{tmp_path}/b.jsonl:2.5"]
    ids = {}
    for seed in (0, 0, 1):
        data = open_conversations(specs, cache=tmp_path / "cache", seed=seed)
        found = [data[number].id for number in range(len(data))]
        assert seed not in ids or ids[seed] == (found, data.fingerprint)
        ids[seed] = (found, data.fingerprint)
        counts = {name: found.count(name) for name in found}
        assert sum(name[0] == "a" for name in counts) == 10 and all(counts[name] == 1 for name in counts if name[0] == "a")
        assert sorted(count for name, count in counts.items() if name[0] == "b") == [2] * 5 + [3] * 5
        first, copies = data.distinct()
        assert len(first) == 20 and all(data[int(first[copies[n]])].id == found[n] for n in range(len(found)))
    assert ids[0] != ids[1]
    for spec, words in (("a.jsonl:0", "above 0"), ("a.jsonl:-1", "above 0"), ("a.jsonl:nan", "above 0"), ("a.jsonl:x", "weight is 'x'"),
                        ("none.jsonl", "no such file"), ("a.txt", "no such file")):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            open_conversations([f"{tmp_path}/{spec}"], cache=tmp_path / "cache")
    write(tmp_path / "c.txt", GOOD)
    with pytest.raises(UsageError, match=r"are read from \.json, "):
        open_conversations([f"{tmp_path}/c.txt"], cache=tmp_path / "cache")
    write(tmp_path / "with:2", GOOD)
    with pytest.raises(UsageError, match="image root"):
        open_conversations([f"{tmp_path}/a.jsonl"], image_root=str(tmp_path / "none"), cache=tmp_path / "cache")
    with pytest.raises(UsageError, match="no conversation files"):
        open_conversations([])


def test_the_cache_is_used_only_while_it_is_whole_and_of_the_same_content(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", GOOD)
    reads = []
    original = module.read_rows
    monkeypatch.setattr(module, "read_rows", lambda name: reads.append(name) or original(name))
    first = opened(path, tmp_path)
    opened(path, tmp_path)
    assert len(reads) == 1
    arrow = tmp_path / "cache" / first.files[0].arrow.rpartition("/")[2]
    damaged = bytearray(arrow.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    arrow.write_bytes(damaged)
    assert opened(path, tmp_path)[0].id == "good" and len(reads) == 2
    arrow.with_suffix(".rejects.jsonl").unlink()
    opened(path, tmp_path)
    assert len(reads) == 3
    write(tmp_path / "a.jsonl", GOOD.replace("Hello", "Hallo"))
    changed = opened(path, tmp_path)
    assert len(reads) == 4 and changed[0].messages[1]["content"] == "Hallo" and changed.fingerprint != first.fingerprint


def test_rows_survive_pickling_and_other_processes(tmp_path):
    with_images(tmp_path)
    as_files(tmp_path)
    data = opened(tmp_path / "bytes.parquet", tmp_path)
    data[0]
    again = pickle.loads(pickle.dumps(data))
    assert again[3] == data[3] and again.read_image(again[3].images[1]) == picture(2)
    assert len(pickle.dumps(data)) < 5000


def test_a_row_with_too_much_text_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("mllm.conversations.rows.MAX_TEXT_CHARS", 40)
    rows = [{"conversations": turns("q", "a" * length)} for length in (39, 40)]
    data = opened(write(tmp_path / "a.json", json.dumps(rows)), tmp_path)
    assert data.codes == {"text_large": 1} and len(data) == 1 and next(data.rejects()).source == "a.json:1"


def test_parquet_without_conversations_or_with_damage(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column conversations, messages, texts; it has text"):
        opened(tmp_path / "a.parquet", tmp_path)
    write(tmp_path / "b.parquet", b"PAR1 nothing")
    with pytest.raises(DataError, match="cannot be read"):
        opened(tmp_path / "b.parquet", tmp_path)
    as_rows = pa.Table.from_pylist([{"id": str(n), "conversations": turns("q" * 50, f"a{n}")} for n in range(6)])
    pq.write_table(as_rows, tmp_path / "c.parquet", row_group_size=2, compression="none", use_dictionary=False)
    whole = (tmp_path / "c.parquet").read_bytes()
    place = pq.read_metadata(tmp_path / "c.parquet").row_group(1).column(0).data_page_offset
    write(tmp_path / "c.parquet", whole[:place] + b"\xff" * 12 + whole[place + 12 :])
    data = opened(tmp_path / "c.parquet", tmp_path)
    assert data.codes == {"row_unreadable": 2} and [data[n].id for n in range(len(data))] == ["0", "1", "4", "5"]


def test_a_text_of_many_marks_is_split_in_linear_time():
    row = {"conversations": turns("x " + "<image>" * 100_000 + " y", "a")}
    assert normalize(row)[0][0]["content"].startswith("x <image>")
    with pytest.raises(Reject, match="image_count"):
        normalize({"conversations": turns("<image>" * 100_000, "a")})
