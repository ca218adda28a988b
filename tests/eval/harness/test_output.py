"""lmms-eval's output: complete runs become results, incomplete ones errors; both halves share one results.json and report."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from align.common.errors import DataError, UsageError
from align.common.intervals import wilson_interval
from align.demo.writing import question_row, write_questions
from eval import lmms
from eval.harness import launch
from eval.harness.config import LmmsConfig
from eval.harness.launch import asked_models
from eval.harness.output import answers_table, majority_entry, model_record, read_run, run_entries, task_record
from eval.page.page import write_report
from eval.results.examples import drawn_questions, save_thumbnail
from eval.results.records import Entry, Results, generated_half, load_answers, load_results, merge_results, save_results
from mllm.conversations.templates import resolve_template
from mllm.model.saving import save_mllm
from tests.support.synthetic_results import make_results
from tests.support.tiny_mllm import tiny_model

ANSWERS = ("yes", "no", "yes, there is", "maybe", "<script>alert(1)</script> & $x$")
PROMPT = "\nAnswer briefly."


def sample(number: int, said: str, true: str = "yes") -> dict:
    first = said.split()[0].strip(",") if said.split()[0].strip(",") in ("yes", "no") else ""
    pair = {name: [first, true] for name in ("precision", "recall", "f1", "yes_ratio")}
    return {
        "doc_id": number, "target": true, "filtered_resps": said, "input": f"Is it {number}?{PROMPT}", "accuracy": float(first == true),
        "accuracy_exists": float(first == true), **pair,
    }  # fmt: skip


def numbers(rows) -> dict:
    said_yes, true_yes = [r["f1"][0] == "yes" for r in rows], [r["f1"][1] == "yes" for r in rows]
    right = sum(a and b for a, b in zip(said_yes, true_yes, strict=True))
    precision, recall = right / max(1, sum(said_yes)), right / max(1, sum(true_yes))
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    accuracy = sum(row["accuracy"] for row in rows) / len(rows)
    values = {"accuracy": accuracy, "accuracy_exists": accuracy, "precision": precision, "recall": recall, "f1": f1}
    return {f"{name},none": value for name, value in {**values, "yes_ratio": sum(said_yes) / len(rows)}.items()}


def write_run(folder: Path, tasks: dict[str, list[dict]], total: int | None = None, **config) -> Path:
    """Write what lmms-eval leaves behind; return its results file."""
    place = folder / "a__model"
    place.mkdir(parents=True)
    settings = {
        "lmms_eval_specific_kwargs": {"default": {"post_prompt": PROMPT}},
        "metadata": {"note": "A note.", "credit": "Nobody."},
        **config,
    }
    content = {
        "results": {
            task: {"alias": task, "samples": len(rows), **numbers(rows), "accuracy_stderr,none": "N/A"} for task, rows in tasks.items()
        },
        "group_subtasks": {task: [] for task in tasks},
        "configs": {task: {"task": task, **settings} for task in tasks},
        "n-samples": {task: {"original": total or len(rows), "effective": len(rows)} for task, rows in tasks.items()},
    }
    path = place / "20300101_000000_results.json"
    path.write_text(json.dumps(content))
    for task, rows in tasks.items():
        (place / f"20300101_000000_samples_{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(count: int = 10, shift: int = 0) -> list[dict]:
    return [sample(n, ANSWERS[(n + shift) % 5], ("yes", "no")[n % 2]) for n in range(count)]


def change(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


# ---- reading a run


def test_a_complete_run_is_read(tmp_path):
    write_run(tmp_path, {"b": rows_of(), "a": rows_of(6)})
    runs = read_run(tmp_path, ["a", "b"])
    assert [run.task for run in runs] == ["a", "b"] and [len(run.answered) for run in runs] == [6, 10]
    assert ("accuracy", "none") in runs[0].numbers and not any("stderr" in metric or metric == "samples" for metric, _ in runs[0].numbers)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda p: p.unlink(), "0 results files"),
        (lambda p: shutil.copy(p, p.with_name("x_results.json")), "2 results files"),
        (lambda p: change(p, lambda c: c["n-samples"].pop("t")), "lacks the tasks"),
        (lambda p: change(p, lambda c: c["results"].update(t={"alias": "t", "accuracy,none": "N/A"})), "no number.*accuracy 'N/A'"),
        (lambda p: change(p, lambda c: c["results"]["t"].update({"accuracy,none": math.nan})), "no finite number"),
        (lambda p: p.with_name("20300101_000000_samples_t.jsonl").unlink(), "is missing"),
        (lambda p: change(p, lambda c: c["n-samples"]["t"].update(original=11)), "10 of 11 questions"),
        (lambda p: change(p, lambda c: c["n-samples"]["t"].update(original=9)), "of 9 questions"),
    ],
)
def test_incomplete_runs_are_errors(tmp_path, break_it, says):
    break_it(write_run(tmp_path, {"t": rows_of()}))
    with pytest.raises(DataError, match=says):
        read_run(tmp_path, ["t"])


def test_missing_cut_and_repeated_answers_are_errors(tmp_path):
    path = write_run(tmp_path, {"t": rows_of()}).with_name("20300101_000000_samples_t.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:9]) + lines[9][:20])
    with pytest.raises(DataError, match="cut or damaged"):
        read_run(tmp_path, ["t"])
    path.write_text("".join([*lines[:9], lines[0]]))
    with pytest.raises(DataError, match="9 of 10"):
        read_run(tmp_path, ["t"])
    with pytest.raises(DataError, match="lacks the tasks other"):
        read_run(tmp_path, ["t", "other"])


def test_a_limit_is_what_was_asked_for(tmp_path):
    write_run(tmp_path, {"t": rows_of(4)}, total=10)
    [run] = read_run(tmp_path, ["t"], limit=4)
    assert len(run.answered) == 4 and task_record(run).note == "A note. t: only the first 4 of 10 questions were asked."
    with pytest.raises(DataError, match="4 of 10"):
        read_run(tmp_path, ["t"])


def test_a_group_gives_its_tasks_and_filters_their_own_answers(tmp_path):
    path = write_run(tmp_path, {"part1": rows_of(), "part2": rows_of(6)})
    strict = [{**row, "accuracy": 0.0} for row in rows_of(6)]
    logged = path.with_name("20300101_000000_samples_part2.jsonl")
    logged.write_text(logged.read_text() + "".join(json.dumps(row) + "\n" for row in strict))

    def edit(content):
        content["group_subtasks"]["whole"] = ["part1", "part2"]
        content["results"]["part2"]["accuracy,strict"] = 0.0

    change(path, edit)
    runs = read_run(tmp_path, ["whole"])
    assert [run.task for run in runs] == ["part1", "part2"] and set(runs[1].samples) == {"none", "strict"}
    entries = {entry.metric: entry for entry in run_entries(runs[1], "m", np.random.default_rng(0), 0.95)}
    assert entries["accuracy strict"].value == 0 and entries["accuracy"].value > 0


# ---- numbers


def test_entries_have_intervals_and_are_computed_again(tmp_path):
    path = write_run(tmp_path, {"t": rows_of()})
    [run] = read_run(tmp_path, ["t"])
    entries = {entry.metric: entry for entry in run_entries(run, "m", np.random.default_rng(0), 0.95)}
    right = sum(row["accuracy"] for row in rows_of())
    assert (entries["accuracy"].low, entries["accuracy"].high) == wilson_interval(int(right), 10) and entries["accuracy"].n == 10
    assert entries["f1"].low < entries["f1"].value < entries["f1"].high
    change(path, lambda c: c["results"]["t"].update({"recall,none": 0.9999}))
    with pytest.raises(DataError, match="lmms-eval says recall is 0.9999"):
        run_entries(read_run(tmp_path, ["t"])[0], "m", np.random.default_rng(0), 0.95)


def test_numbers_that_lmms_eval_alone_computes_stand_without_interval(tmp_path):
    path = write_run(tmp_path, {"t": [{**row, "judge": {"answer": "A"}, "score": 0.5} for row in rows_of()]})
    change(path, lambda c: c["results"]["t"].update({"judge,none": 0.25, "score,none": 1234.5}))
    found = {entry.metric: entry for entry in run_entries(read_run(tmp_path, ["t"])[0], "m", np.random.default_rng(0), 0.95)}
    assert (found["judge"].low, found["judge"].high, found["judge"].n) == (0.25, 0.25, 10)
    assert found["score (points)"].value == 1234.5


def test_the_majority_answer(tmp_path):
    write_run(tmp_path, {"t": [sample(n, "yes", "no" if n < 7 else "yes") for n in range(10)]})
    [entry] = majority_entry(read_run(tmp_path, ["t"])[0], 0.95)
    assert entry == Entry("t", "accuracy", 0.7, *wilson_interval(7, 10), 10, "majority")
    write_run(tmp_path / "soft", {"t": [{**row, "accuracy": 0.3} for row in rows_of()]})
    assert majority_entry(read_run(tmp_path / "soft", ["t"])[0], 0.95) == []
    write_run(tmp_path / "lists", {"t": [{**row, "target": "['yes', 'yeah']"} for row in rows_of()]})
    assert majority_entry(read_run(tmp_path / "lists", ["t"])[0], 0.95) == []


def test_answers_are_kept_with_plain_questions(tmp_path):
    rows = rows_of()
    write_run(
        tmp_path, {"t": [{**row, "filtered_resps": [row["filtered_resps"], "again"]} if row["doc_id"] == 3 else row for row in rows[::-1]]}
    )
    table = answers_table(read_run(tmp_path, ["t"])[0]).to_pylist()
    assert [row["key"] for row in table] == [str(n) for n in range(10)] and table[3]["answer"] == "maybe | again"
    assert table[0] == {"key": "0", "question": "Is it 0?", "expected": "yes", "answer": "yes", "score": 1.0}


def test_the_record_of_a_task_changes_with_its_data(tmp_path):
    picture = ("1.jpg", b"bytes")
    write_questions(tmp_path / "q.parquet", [question_row("1", picture, "What?", "dog", "what")])
    files = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "q.parquet")}}}
    write_run(tmp_path / "run", {"t": rows_of()}, **files)
    record = task_record(read_run(tmp_path / "run", ["t"])[0])
    assert (record.kind, record.images, record.targets, record.prompts) == ("generation", 10, 10, "Answer briefly.")
    assert (record.note, record.credit) == ("A note.", "Nobody.")
    write_run(tmp_path / "same", {"t": rows_of(shift=2)}, **files)
    assert task_record(read_run(tmp_path / "same", ["t"])[0]) == record, "other answers, same questions"
    write_questions(tmp_path / "q.parquet", [question_row("1", ("1.jpg", b"other"), "What?", "dog", "what")])
    assert task_record(read_run(tmp_path / "same", ["t"])[0]).digest != record.digest


# ---- merging


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Results of eval/run.py, and results of an MLLM, in memory."""
    folder = tmp_path_factory.mktemp("halves")
    old = make_results(folder, images=12, classes=6)
    write_run(folder / "run", {"sprites_yesno": rows_of()})
    [run] = read_run(folder / "run", ["sprites_yesno"])
    record = replace(old.models[0], name="MLLM trained", kind="mllm", description="an LLM that sees", fingerprint={"weights": "1"})
    entries = (*run_entries(run, "MLLM trained", np.random.default_rng(0), 0.95), *majority_entry(run, 0.95))
    majority = replace(old.models[2], description="other words")
    new = Results(
        "2030-01-02",
        "python eval/lmms.py --mllm x",
        {"lmms-eval": "0.7.3"},
        0,
        0.95,
        {"lmms": 1.0},
        (record, majority),
        (task_record(run),),
        entries,
    )
    return old, new


def test_both_halves_lie_in_one_file(halves):
    old, new = halves
    both = merge_results(old, new)
    assert set(both.entries) == {*old.entries, *new.entries} and len(both.tasks) == 3
    assert [model.name for model in both.models] == ["trained", "untrained", "majority", "chance", "MLLM trained"]
    assert both.command.splitlines() == [old.command, new.command] and both.versions == {**old.versions, **new.versions}
    assert merge_results(both, new) == both, "the same run again changes nothing"


def test_measuring_the_zero_shot_half_again_keeps_the_answers(halves, tmp_path):
    old, new = halves
    assert generated_half(tmp_path, 0, 0.95) is None
    save_results(tmp_path, old)
    assert generated_half(tmp_path, 0, 0.95) is None
    save_results(tmp_path, merge_results(old, new))
    half = generated_half(tmp_path, 0, 0.95)
    assert {task.kind for task in half.tasks} == {"generation"} and set(half.entries) == set(new.entries)
    again = merge_results(half, replace(old, entries=old.entries[:2]))
    assert set(again.entries) == {*new.entries, *old.entries[:2]}
    with pytest.raises(UsageError, match="another --output"):
        generated_half(tmp_path, 1, 0.95)


def test_what_is_no_longer_comparable_goes(halves):
    old, new = halves
    both = merge_results(old, new)
    renamed = tuple(replace(entry, model="MLLM other") for entry in new.entries if entry.model == "MLLM trained")
    other = replace(new, models=(replace(new.models[0], name="MLLM other"),), entries=renamed)
    three = merge_results(both, other)
    assert three.value("sprites_yesno", "accuracy", "MLLM trained") and three.value("sprites_yesno", "accuracy", "MLLM other")
    fresh = replace(other, tasks=(replace(other.tasks[0], digest="new data"),))
    assert merge_results(both, fresh).value("sprites_yesno", "accuracy", "MLLM trained") is None
    retrained = replace(new, models=(replace(new.models[0], fingerprint={"weights": "2"}), new.models[1]), entries=new.entries[:1])
    kept = [entry for entry in merge_results(both, retrained).entries if entry.model == "MLLM trained"]
    assert kept == [new.entries[0]]
    with pytest.raises(UsageError, match="confidence 0.95, not seed 0 and confidence 0.9"):
        merge_results(old, replace(new, confidence=0.9))


# ---- the entry, with lmms-eval replaced by a function that writes what it would


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two/model")):
        model, processor = tiny_model(seed=seed)
        processor.chat_template = resolve_template(processor.tokenizer, "vicuna_v1")
        model.config.sail_fingerprint = {"encoder": "tiny-dino"}
        if seed == 0:
            model.config.sail_head = "trained"
        (folder / name).parent.mkdir(exist_ok=True)
        save_mllm(model, processor, folder / name)
    return folder


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (50, 40), ("red", "green", "blue")[number % 3])


@pytest.fixture
def data(tmp_path):
    for name in ("yesno", "open"):
        write_questions(tmp_path / f"{name}.parquet", [question_row("1", ("1.jpg", b"bytes"), "Is it 1?", "yes", "exists")])
    return tmp_path


@pytest.fixture
def fake_run(monkeypatch):
    """Let every model answer, but those in `failing`."""
    failing, seen = set(), []

    def run(command, log, console):
        for job in yaml.safe_load(Path(command[-1]).read_text()):
            settings = dict(pair.split("=", 1) for pair in job["model_args"].split(","))
            seen.append({**job, **settings})
            if failing & {settings["pretrained"], *job["tasks"].split(",")}:
                continue
            place = Path(job["output_path"])
            write_run(place, {task: rows_of(shift=len(seen)) for task in job["tasks"].split(",")})
            for task in job["tasks"].split(","):
                for number in drawn_questions(task, range(10), int(settings["examples"]), int(settings["seed"])):
                    save_thumbnail(Path(settings["thumbnails"]), task, number, picture(number))
        log.write_text("junk\n\x1b[31mValueError: too sad\x1b[0m\nit/s\n" if failing else "fine")
        return 0

    monkeypatch.setattr(launch, "_run", run)
    return failing, seen


def config(models, data, **changes) -> LmmsConfig:
    settings = {"mllm": (f"trained={models / 'one'}", f"untrained={models / 'two'}"), "tasks": ("sprites_yesno",), "examples": 3}
    return LmmsConfig(**{**settings, "output": str(data / "eval"), "data": str(data), **changes})


def test_models_become_columns_with_what_they_are_made_of(models):
    first, second = asked_models([f"good={models / 'one'}", f"bad={models / 'two'}"])
    assert (first.record.name, first.record.kind, second.record.kind) == ("MLLM good", "mllm", "mllm_random")
    assert second.folder == models / "two" / "model"
    assert first.record.description == "llama (2 layers of width 32) sees through tiny-dino and a trained glu head"
    assert (
        first.record.fingerprint["weights"] != second.record.fingerprint["weights"] and first.record.fingerprint["encoder"] == "tiny-dino"
    )
    assert asked_models([str(models / "one")])[0].record.name == "MLLM trained"
    for given, says in ((["a=x", "a=y"], "same name"), ([str(models)], "neither an MLLM folder")):
        with pytest.raises(UsageError, match=says):
            asked_models(given)


def test_both_encoders_of_a_model_are_described(models, tmp_path):
    shutil.copytree(models / "one", tmp_path / "two")
    config = json.loads((tmp_path / "two/config.json").read_text())
    beside = {"sail_head": "none", "sail_fingerprint": {"encoder": "tiny-clip", "layer": 2}}
    (tmp_path / "two/config.json").write_text(json.dumps(config | {"sail_beside": [beside], "sail_join": "sequence"}))
    record = model_record("x", tmp_path / "two")
    assert record.description.endswith("sees through tiny-dino and a trained glu head and, joined by sequence, tiny-clip and no head")
    assert record.fingerprint["encoder"] == "tiny-dino" and record.fingerprint["second encoder"] == "tiny-clip"


def test_a_folder_without_weights_is_no_model(models, tmp_path):
    shutil.copy(models / "one" / "config.json", tmp_path / "config.json")
    with pytest.raises(DataError, match="0 weight files"):
        model_record("x", tmp_path)


def test_the_entry_merges_into_results_that_are_there(models, data, fake_run):
    old = make_results(data, images=12, classes=6)
    lmms.main(config(models, data))
    both = load_results(data / "eval")
    assert set(old.entries) < set(both.entries) and [task.id for task in both.tasks] == ["scenes", "things", "sprites_yesno"]
    assert both.value("sprites_yesno", "accuracy", "MLLM untrained") and both.value("sprites_yesno", "accuracy", "majority")
    assert both.versions["lmms-eval"] and both.seconds["encode"] == 12.0
    assert load_answers(data / "eval", "sprites_yesno", "MLLM trained").num_rows == 10
    page = (data / "eval" / "report.html").read_text()
    for heading in ("What it answers: sprites_yesno", "What it sees: scenes", "What it names: things"):
        assert heading in page
    assert page.count('<div class="card example') == 14 + 3 and "MLLM untrained" in page
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page
    assert not [
        path for path in pq.read_table(data / "eval/answers/sprites_yesno--MLLM_trained.parquet")["score"].to_pylist() if path is None
    ]
    lmms.main(config(models, data, mllm=(f"third={models / 'one'}",)))
    examples = json.loads((data / "eval" / "examples" / "sprites_yesno.json").read_text())
    assert set(examples["items"][0]["answers"]) == {"MLLM trained", "MLLM untrained", "MLLM third"}, "the earlier models' answers stay"
    assert len(examples["thumbs"]) == 3


def test_what_lmms_eval_is_told(models, data, fake_run):
    lmms.main(
        config(models, data, tasks=("sprites_yesno", "mme"), limit=10, precision="bf16", template="chatml", batch_size=4, report=False)
    )
    job = fake_run[1][0]
    assert (job["model"], job["tasks"], job["limit"], job["batch_size"], job["log_samples"]) == (
        "sail_llava",
        "sprites_yesno,mme",
        10,
        4,
        True,
    )
    assert (job["dtype"], job["template"], job["pretrained"]) == ("bf16", "chatml", str(models / "one"))
    wrapper = yaml.safe_load((Path(job["include_path"]) / "sprites_yesno.yaml").read_text())
    assert wrapper["dataset_kwargs"] == {"data_files": {"test": str(data / "yesno.parquet")}}
    assert not (data / "eval" / "report.html").exists()


def test_a_model_that_fails_is_an_error_and_the_others_are_kept(models, data, fake_run):
    fake_run[0].add(str(models / "two" / "model"))
    with pytest.raises(
        DataError, match=r"MLLM untrained: 0 results files.*ValueError: too sad.*other models' and tasks' results were kept"
    ):
        lmms.main(config(models, data))
    assert load_results(data / "eval").value("sprites_yesno", "accuracy", "MLLM trained")
    fake_run[0].add(str(models / "one"))
    before = (data / "eval" / "results.json").read_bytes()
    with pytest.raises(DataError, match="MLLM trained"):
        lmms.main(config(models, data))
    assert (data / "eval" / "results.json").read_bytes() == before


def test_a_task_that_fails_costs_the_others_nothing(models, data, fake_run):
    """Without a number, or so that lmms-eval does not finish; and no file of an earlier run is lost before new ones are complete."""
    both = ("sprites_yesno", "sprites_what")
    lmms.main(config(models, data, tasks=both))
    place = data / "eval/lmms/MLLM_trained"
    old = sorted(path.name for path in place.rglob("*"))
    fake_run[0].add("sprites_what")
    with pytest.raises(
        DataError, match=r"MLLM trained: task sprites_what: 0 results.*MLLM untrained.*too sad.*other models' and tasks' results"
    ):
        lmms.main(
            config(models, data, tasks=both, mllm=(f"third={models / 'one'}", f"trained={models / 'one'}", f"untrained={models / 'two'}"))
        )
    found = load_results(data / "eval")
    assert found.value("sprites_yesno", "accuracy", "MLLM third") and not found.value("sprites_what", "accuracy", "MLLM third")
    assert found.value("sprites_what", "accuracy", "MLLM trained"), "that of the run before"
    assert sorted(path.name for path in place.rglob("*")) == old and list((data / "eval/lmms").glob("MLLM_third.incomplete/*/a__model"))
    assert not list((data / "eval/lmms").glob("*.partial"))
    fake_run[0].clear()
    lmms.main(config(models, data, tasks=both, mllm=(f"third={models / 'one'}",)))
    assert load_results(data / "eval").value("sprites_what", "accuracy", "MLLM third")
    assert (data / "eval/lmms/MLLM_third").is_dir()


def test_of_several_tasks_those_with_a_number_are_read(tmp_path):
    path = write_run(tmp_path, {"a": rows_of(), "b": rows_of(), "c": rows_of(), "d": rows_of()})
    change(path, lambda c: c["results"].update(b={"alias": "b", "submission,none": None}))
    change(path, lambda c: c["results"]["c"].update({"accuracy,none": math.nan}))
    path.with_name("20300101_000000_samples_d.jsonl").unlink()
    failures = []
    assert [run.task for run in read_run(tmp_path, ["a", "b", "c", "d", "e"], None, failures)] == ["a"]
    assert [said.split(" ")[1] for said in failures[1:]] == ["b", "c", "d"][:2] + ["is"], failures
    assert "lacks the tasks e" in failures[0] and "submission None" in failures[1] and "accuracy nan" in failures[2]
    with pytest.raises(DataError, match="lacks the tasks e.*task b"):
        read_run(tmp_path, ["b", "e"])


def test_wrong_requests_are_refused_before_anything_runs(models, data, fake_run):
    with pytest.raises(DataError, match=r"caption.parquet there \(`make quickstart` makes it\), or give --data"):
        lmms.main(config(models, data, tasks=("sprites_caption",)))
    make_results(data, images=12, classes=6)
    with pytest.raises(UsageError, match="made with --seed 0 --confidence 0.95"):
        lmms.main(config(models, data, seed=3))
    odd = data / "a,b"
    shutil.copytree(models / "one", odd)
    with pytest.raises(UsageError, match="commas"):
        lmms.main(config(models, data, mllm=(str(odd),)))
    assert not fake_run[1]
    for wrong in ({"mllm": ()}, {"tasks": ()}, {"batch_size": 0}, {"limit": 0}, {"confidence": 1.0}):
        with pytest.raises(UsageError):
            config(models, data, **wrong)


def test_the_tasks_are_listed(capsys):
    lmms.main(LmmsConfig(list_tasks=True))
    shown = capsys.readouterr().out
    assert (
        re.search(r"sprites_yesno: .*runs/quickstart/data/mllm/yesno.parquet", shown) and "sail_parity_gqa: lmms-eval downloads it" in shown
    )


def test_the_report_of_generated_answers_alone(models, data, fake_run):
    lmms.main(config(models, data, tasks=("sprites_yesno", "sprites_what")))
    page = write_report(data / "eval", data / "out", dark=False).read_text()
    names = {figure.stem for figure in (data / "out" / "figures").iterdir()}
    assert {"bars-generation", "bars-sprites_yesno-yes_or_no"} <= names
    assert "What it sees" not in page and "sees through tiny-dino and a trained glu head" in page and "Nobody." in page
    assert page.count("10 questions, each with “Answer briefly.”") == 2, "among the facts about the tasks"
    rows = re.findall(r'>accuracy</td><td class="main">([\d.]+)', page)
    values = [load_results(data / "eval").value(task, "accuracy", "MLLM trained").value for task in ("sprites_yesno", "sprites_what")]
    assert rows == [f"{100 * value:.1f}" for value in values]


# ---- the real thing


@pytest.mark.slow
def test_lmms_eval_itself_from_another_folder(models, data, tmp_path, monkeypatch, capsys):
    """A run of two models, one of them damaged; the other's answers equal those of the adapter in this process."""
    from eval.harness.adapter import SailLlava

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    from io import BytesIO

    def jpeg(number):
        buffer = BytesIO()
        picture(number).save(buffer, "JPEG")
        return f"{number}.jpg", buffer.getvalue()

    rows = [
        question_row(f"s{n}", jpeg(n), f"Is there a dog {n}?", ("yes", "no")[n % 2], ("exists", "relation")[n // 3 % 2]) for n in range(9)
    ]
    write_questions(data / "yesno.parquet", rows)
    shutil.copytree(models / "one", tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"MLLM bad: 0 results files.*results were kept") as failure:
        lmms.main(config(models, data, mllm=(f"good={models / 'one'}", "bad=damaged"), batch_size=4))
    assert "damaged" in str(failure.value)
    answers = load_answers(data / "eval", "sprites_yesno", "MLLM good").to_pylist()
    lm = SailLlava(str(models / "one"), device="cpu", batch_size=1)
    from eval.harness.adapter import conversation
    from mllm.model.answering import Decoding

    talks = [conversation(row["question"], [Image.open(BytesIO(row["image"]["bytes"])).convert("RGB")]) for row in rows]
    assert [row["answer"] for row in answers] == [lm.answerer.generate([talk], Decoding(16, until=("\n",)))[0] for talk in talks]
    assert len(list((data / "eval" / "examples" / "sprites_yesno").glob("*.jpg"))) == 3
    lmms.main(config(models, data, mllm=(f"both={models / 'one'}",), processes=2, report=False))
    assert load_answers(data / "eval", "sprites_yesno", "MLLM both").to_pylist() == answers, "two processes answer as one"
