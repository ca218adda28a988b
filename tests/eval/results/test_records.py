"""results.json: what is saved is what is loaded, and nothing else is accepted."""

import json
import math

import pyarrow as pa
import pytest

from align.common.errors import DamagedError, UsageError
from eval.results.records import (
    Entry,
    answers_path,
    csv_rows,
    file_name,
    load_answers,
    load_results,
    merge_results,
    save_answers,
    save_results,
)
from tests.support.synthetic_results import make_results


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    return folder / "eval", make_results(folder, images=12, classes=6)


def test_results_load_as_they_were_saved(saved):
    folder, results = saved
    assert load_results(folder) == results
    content = json.loads((folder / "results.json").read_text())
    assert content["format_version"] == 1
    assert set(content["entries"][0]) == {"task", "metric", "value", "low", "high", "n", "model"}
    assert all(0 <= e["value"] <= 1 for e in content["entries"] if "rank" not in e["metric"]), "fractions, not percents"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(format_version=2), "format version 2"),
        (lambda c: c.pop("seed"), "expected the fields"),
        (lambda c: c.update(surprise=1), "surprise"),
        (lambda c: c["entries"][3].pop("low"), r"entries\[3\]"),
        (lambda c: c["entries"][0].update(value="0.5"), "value should be float"),
        (lambda c: c["entries"][0].update(n=True), "n should be int"),
        (lambda c: c["entries"][0].update(n=1.5), "n should be int"),
        (lambda c: c.update(entries={}), "should be a list"),
    ],
)
def test_damaged_results_are_refused_with_the_place(saved, tmp_path, change, says):
    content = json.loads((saved[0] / "results.json").read_text())
    change(content)
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(DamagedError, match=says):
        load_results(tmp_path)


def test_missing_and_broken_files_say_what_to_do(tmp_path):
    with pytest.raises(UsageError, match=r"eval/run\.py"):
        load_results(tmp_path)
    (tmp_path / "results.json").write_text('{"format_version": 1, "entr')
    with pytest.raises(DamagedError, match="not valid JSON"):
        load_results(tmp_path)


def test_entries_of_unknown_models_and_double_names_are_refused(saved):
    from dataclasses import replace

    _, results = saved
    with pytest.raises(UsageError, match="no listed task or model"):
        replace(results, entries=(Entry("scenes", "t2i_r@1", 0.5, 0.4, 0.6, 9, "other"),))
    with pytest.raises(UsageError, match="same name"):
        replace(results, models=results.models + results.models[:1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_none_is_refused(value):
    with pytest.raises(UsageError, match="finite"):
        Entry("t", "acc@1", value, 0.0, 1.0, 3, "m")


def test_answers_are_kept_by_task_and_model(tmp_path):
    table = pa.table({"key": ["a"], "rank": [1]})
    path = save_answers(tmp_path, "my/task", "../glu w8", table)
    assert path == answers_path(tmp_path, "my/task", "../glu w8") and path.parent == tmp_path / "answers"
    assert load_answers(tmp_path, "my/task", "../glu w8").equals(table)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DamagedError, match="measure again"):
        load_answers(tmp_path, "my/task", "../glu w8")
    with pytest.raises(DamagedError):
        load_answers(tmp_path, "my/task", "never measured")


def test_file_names_are_safe():
    assert file_name("../../etc/passwd") == "_.._etc_passwd"
    assert file_name("a b/c:d") == "a_b_c_d"
    assert file_name("..") == "_"


@pytest.mark.parametrize("change", [{"digest": "other"}, {"prompts": "sentences:mine.json@12345678"}])
def test_numbers_of_other_data_or_prompts_do_not_stay_beside_new_ones(saved, change):
    from dataclasses import replace

    _, old = saved
    task = next(task for task in old.tasks if task.id == "things")
    entry = replace(old.value("things", "acc@1", "trained"), model="new")
    model = replace(old.models[0], name="new")
    again = replace(old, models=(model,), tasks=(task,), entries=(entry,))
    kept = merge_results(old, again)
    assert {e.model for e in kept.entries if e.task == "things"} > {"new", "trained"}
    other = merge_results(old, replace(again, tasks=(replace(task, **change),)))
    assert [e for e in other.entries if e.task == "things"] == [entry]
    assert [e for e in other.entries if e.task == "scenes"] == [e for e in old.entries if e.task == "scenes"]


def test_csv_rows_hold_every_entry(saved):
    _, results = saved
    rows = csv_rows(results)
    assert rows[0] == ["task", "metric", "value", "low", "high", "n", "model"]
    assert len(rows) == 1 + len(results.entries)


def test_a_crash_while_saving_leaves_the_old_results(saved, tmp_path, monkeypatch):
    _, results = saved
    save_results(tmp_path, results)

    def crash(*_):
        raise OSError("pulled plug")

    monkeypatch.setattr("align.common.files.os.replace", crash)
    with pytest.raises(OSError, match="pulled plug"):
        save_results(tmp_path, results)
    monkeypatch.undo()
    assert load_results(tmp_path) == results
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
