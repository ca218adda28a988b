"""The index of conversations: what encoding gives, cached for the same inputs only, rejects counted."""

import pickle

import pytest

from align.common.errors import DataError
from mllm.conversations import index as module
from mllm.conversations.index import build_index
from mllm.conversations.tokens import IGNORED
from tests.support.short_conversations import chat, conversation, varied


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


def test_chats_go_to_other_processes(make):
    again = pickle.loads(pickle.dumps(chat()))
    messages = make(varied(1))[0].messages
    assert again.encode(messages) == chat().encode(messages) and again.fingerprint == chat().fingerprint
