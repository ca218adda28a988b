"""The YAML tasks and their metrics: hand-worked cases, and tiny data through lmms-eval's own task classes and evaluator."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset, Image
from lmms_eval import evaluator
from lmms_eval.api import task as lmms_task
from lmms_eval.tasks import TaskManager
from PIL import Image as Pillow

from align.common.errors import DataError, UsageError
from align.common.intervals import wilson_interval
from align.demo.writing import question_row, write_questions
from eval.harness import docs as lmms_docs
from eval.harness.adapter import SailLlava, conversation
from eval.harness.local import FOLDER, local_tasks, write_wrappers
from eval.measures.generation import (
    cider,
    estimate,
    matches,
    normalized,
    place,
    pope_yes_or_no,
    rouge_l,
    words,
    yes_no_scores,
    yes_or_no,
)
from mllm.conversations.templates import resolve_template
from mllm.model.saving import save_mllm
from tests.support.tiny_mllm import tiny_model

GROUPS = tuple(f"sprites_{kind}_{group}" for kind in ("what", "yesno") for group in ("aligned", "unseen"))
SPRITES = ("sprites_yesno", "sprites_what", "sprites_where", "sprites_count", "sprites_caption", *GROUPS)
PARITY = tuple(f"sail_parity_{name}" for name in ("gqa", "mmbench", "pope", "seed", "textvqa", "vizwiz", "vqav2"))
RNG = np.random.default_rng

ROOT = Path(__file__).resolve().parents[3]


# ---- metrics


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A red Dog.", "red dog"),
        ("  the   CAT!! ", "cat"),
        ("Two", "2"),
        ("there are three dogs", "there are 3 dogs"),
        ("It's a fox\N{RIGHT SINGLE QUOTATION MARK}s tail", "its foxs tail"),
        ("hot-air balloon", "hot air balloon"),
        ("3.5, or 1,000", "3.5 or 1,000"),
        ("Käse", "käse"),
        ("\N{FULLWIDTH DIGIT TWO}", "2"),
        ("the a an", ""),
        ("", ""),
    ],
)
def test_normalization(text, expected):
    assert normalized(text) == expected


@pytest.mark.parametrize(
    ("answer", "truth", "kind", "right"),
    [
        ("A dog.", "dog", "what", True),
        ("dogs", "dog", "what", False),
        ("dog and cat", "dog", "what", False),
        ("two", "2", "count", True),
        ("2.", "2", "count", True),
        ("3", "2", "count", False),
        ("In the upper left corner.", "in the top left", "where", True),
        ("left, at the top", "in the top left", "where", True),
        ("on the left", "in the top left", "where", False),
        ("in the middle", "in the center", "where", True),
        ("at the middle of the left side", "on the left", "where", True),
        ("somewhere", "on the left", "where", False),
        ("", "on the left", "where", False),
        ("on the left", "on the right", "where", False),
        ("", "dog", "what", False),
        ("the", "a", "what", False),
        ("a kitten", ["cat", "Kitten"], "", True),
    ],
)
def test_exact_match(answer, truth, kind, right):
    assert matches(answer, truth, kind) is right


def test_places_are_sets_of_words():
    assert place("in the top left") == place("LEFT TOP") == "left top" and place("top center") == "top" and place("center") == "center"
    assert place("where?") == ""


@pytest.mark.parametrize(
    ("text", "strict", "pope"),
    [
        ("Yes", "yes", "yes"),
        ("no.", "no", "no"),
        ("No, there is none", "no", "no"),
        ("yes, it is. No other", "yes", "yes"),
        ("There is not.", "", "no"),
        ("maybe", "", "yes"),
        ("nothing", "", "yes"),
        ("", "", "yes"),
    ],
)
def test_yes_and_no(text, strict, pope):
    assert yes_or_no(text) == strict and pope_yes_or_no(text) == pope


# 4 right yes, 1 wrong yes, 2 missed (one of them neither), 3 right no
PAIRS = [["yes", "yes"]] * 4 + [["yes", "no"]] + [["no", "yes"], ["", "yes"]] + [["no", "no"]] * 3


def test_popes_metrics_by_hand():
    assert yes_no_scores(PAIRS) == pytest.approx({"precision": 4 / 5, "recall": 4 / 6, "f1": 8 / 11, "yes_ratio": 5 / 10})
    assert yes_no_scores([["no", "no"]] * 3) == {"precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}
    assert yes_no_scores([["yes", "yes"], ["no", "no"]]) == {"precision": 1, "recall": 1, "f1": 1, "yes_ratio": 0.5}
    assert lmms_docs.precision(PAIRS) == 0.8 and lmms_docs.yes_ratio(PAIRS) == 0.5
    with pytest.raises(DataError, match="'maybe'"):
        yes_no_scores([["yes", "maybe"]])


def test_popes_metrics_with_groups_are_means_over_groups():
    grouped = [["yes", "yes", "random"], ["no", "no", "random"], ["yes", "no", "popular"], ["yes", "yes", "popular"]]
    assert yes_no_scores(grouped)["f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert yes_no_scores(grouped)["precision"] == pytest.approx((1 + 1 / 2) / 2)


def test_intervals_of_yes_no_metrics():
    value, low, high = estimate("precision", PAIRS, RNG(0), 0.95)
    assert (value, low, high) == (0.8, *wilson_interval(4, 5))
    assert estimate("recall", PAIRS, RNG(0), 0.95)[1:] == wilson_interval(4, 6)
    assert estimate("yes_ratio", PAIRS, RNG(0), 0.9)[1:] == wilson_interval(5, 10, 0.9)
    assert estimate("precision", [["no", "yes"]] * 9, RNG(0), 0.95) == (0, 0, 1), "never yes: nothing is known"
    value, low, high = estimate("f1", PAIRS * 50, RNG(0), 0.95)
    drawn = [yes_no_scores([(PAIRS * 50)[k] for k in RNG(n).integers(0, 500, 500)])["f1"] for n in range(300)]
    assert value == pytest.approx(8 / 11) and (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.01)


def test_intervals_of_rates_means_and_what_is_not_ours():
    assert estimate("accuracy", [1, 0.0, True, 1], RNG(0), 0.95) == (0.75, *wilson_interval(3, 4))
    value, low, high = estimate("soft_accuracy", [0.3, 0.6, 1.0] * 30, RNG(0), 0.95)
    assert value == pytest.approx(1.9 / 3) and low < value < high and high - low < 0.15
    assert estimate("rouge_l", [0, 0, 0], RNG(0), 0.95) == (0, 0, 0), "a degree is no rate"
    assert estimate("gpt_eval_score", [{"prediction": "A"}], RNG(0), 0.95) is None
    with pytest.raises(DataError, match="not finite"):
        estimate("accuracy", [1.0, float("nan")], RNG(0), 0.95)
    with pytest.raises(UsageError, match="no answers"):
        estimate("accuracy", [], RNG(0), 0.95)


def test_rouge_l_by_hand():
    # longest common subsequence "red dog": precision 2/3, recall 2/4, F with beta 1.2
    assert rouge_l("Red dog, here.", ["a red big dog"]) == pytest.approx((1 + 1.44) * (2 / 3) * (2 / 4) / (2 / 4 + 1.44 * 2 / 3))
    assert rouge_l("the cat", ["The cat."]) == pytest.approx(1) and rouge_l("", ["a cat"]) == 0


def test_cider_by_hand():
    same = cider([["a red dog runs", ["a red dog runs"]], ["two blue cats sleep", ["two blue cats sleep"]]])
    assert same == pytest.approx([10, 10])
    # of n = 1..4 only unigrams overlap: "dog" in both captions of 2, so weight ln 2 each, 1 of 2 words right, same length
    half = cider([["dog stone", ["dog tree"]], ["a b c d", ["e f g h"]]])
    assert half == pytest.approx([10 * (0.5 / 4), 0])
    assert lmms_docs.mean_cider([["dog stone", ["dog tree"]], ["a b c d", ["e f g h"]]]) == pytest.approx(0.625)


def test_words():
    assert words("Don't stop_me, NOW") == ["dont", "stop", "me", "now"]


# ---- rows


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Pillow.new("RGB", (40 + number, 30), ("red", "green", "blue")[number % 3]).save(buffer, "JPEG")
    return buffer.getvalue()


def test_images_come_from_bytes_paths_and_pictures(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "1.jpg").write_bytes(jpeg(1))
    root = {"image_root": str(tmp_path)}
    for value in (jpeg(1), {"bytes": jpeg(1), "path": "1.jpg"}, "sub/1.jpg", {"bytes": None, "path": "sub/1.jpg"}):
        assert [image.size for image in lmms_docs.images({"image": value}, root)] == [(41, 30)]
    assert [image.size for image in lmms_docs.images({"images": ["sub/1.jpg", jpeg(2)]}, root)] == [(41, 30), (42, 30)]
    assert lmms_docs.images({"image": Pillow.new("L", (5, 5))})[0].mode == "RGB"
    assert lmms_docs.images({"question": "2 + 2?"}) == [] and lmms_docs.images({"image": None}) == []
    for path in ("../1.jpg", "/etc/passwd", "http://x.org/1.jpg", "file:///etc/passwd", "sub/../../x"):
        with pytest.raises(DataError, match="below image_root"):
            lmms_docs.images({"id": "q7", "image": path}, root)
    with pytest.raises(DataError, match="row 'q7'.*cannot read"):
        lmms_docs.images({"id": "q7", "image": "gone.jpg"}, root)
    with pytest.raises(DataError, match=r"row 'q7'.*image_format"):
        lmms_docs.images({"id": "q7", "image": b"<html>"}, root)


def test_rows_of_a_kind():
    rows = Dataset.from_dict({"image": [{"bytes": jpeg(n), "path": None} for n in range(4)], "kind": ["what", "count", "what", "exists"]})
    kept = lmms_docs.only_what(rows)
    assert len(kept) == 2 and kept.features["image"] == Image(decode=False) and kept[1]["image"]["bytes"] == jpeg(2)
    assert len(lmms_docs.only_count(rows)) == 1
    with pytest.raises(DataError, match="'where'; there are count, exists, what"):
        lmms_docs.only_where(rows)
    with pytest.raises(DataError, match="no column 'image'"):
        lmms_docs.encoded_images(rows.remove_columns("image"))


def test_prompts():
    asked = {"pre_prompt": "Q: ", "post_prompt": "\nShort."}
    assert lmms_docs.question({"question": " Who? "}, asked) == "Q: Who?\nShort." and lmms_docs.question({"question": "Who?"}) == "Who?"
    ocr = lmms_docs.question_with_ocr({"question": "what brand?", "ocr_tokens": ["DAKOTA", "5"]}, asked)
    assert ocr == "what brand?\nReference OCR token: DAKOTA, 5\nShort."
    mmbench = {"hint": "Look.", "question": "Which?", "A": "one", "B": "two", "C": "nan", "D": None}
    assert lmms_docs.options(mmbench, asked) == "Look.\nWhich?\nA. one\nB. two\nShort."
    seed = {"question": "Which?", "choice_a": "one", "choice_b": "two", "choice_c": "three", "choice_d": "four"}
    assert lmms_docs.options(seed) == "Which?\nA. one\nB. two\nC. three\nD. four"


def test_scores_of_rows():
    row = {"answer": "Yes", "kind": "relation", "category": "popular"}
    assert lmms_docs.score_yes_no(row, ["yes."])["accuracy_relation"] == 1 and "accuracy_exists" not in lmms_docs.score_yes_no(row, ["no"])
    assert lmms_docs.score_yes_no(row, ["perhaps"])["f1"] == ["", "yes"]
    assert lmms_docs.score_pope(row, ["perhaps"])["f1"] == ["yes", "yes", "popular"]
    assert lmms_docs.score_exact({"answer": ["cat", "kitten"]}, ["A kitten"]) == {"exact_match": 1.0}
    assert (
        lmms_docs.score_letter({"answer": "B"}, [" b. two"])["exact_match"] == 1
        and lmms_docs.score_letter({"answer": "B"}, [""])["exact_match"] == 0
    )
    assert lmms_docs.score_caption({"answer": "a cat"}, ["a cat"]) == {"rouge_l": pytest.approx(1), "cider": ["a cat", ["a cat"]]}


# ---- tasks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    picture = [(f"{n}.jpg", jpeg(n)) for n in range(6)]
    relation = ("exists", "relation")
    yesno = [question_row(f"s{n}", picture[n % 6], f"Is there a dog {n}?", ("no", "yes")[n % 2], relation[n // 4 % 2]) for n in range(8)]
    write_questions(folder / "yesno.parquet", yesno)
    kinds = (("what", "dog"), ("where", "in the top left"), ("count", "2"))
    write_questions(folder / "open.parquet", [question_row(f"s{n}", picture[n], f"{k}?", a, k) for n in range(3) for k, a in kinds])
    write_questions(
        folder / "caption.parquet", [question_row(f"s{n}", picture[n], "Describe the picture.", f"a dog {n}", "caption") for n in range(4)]
    )
    return folder


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    model, processor = tiny_model()
    processor.chat_template = resolve_template(processor.tokenizer, "vicuna_v1")
    folder = tmp_path_factory.mktemp("mllm") / "model"
    save_mllm(model, processor, folder)
    return lambda: SailLlava(str(folder), batch_size=3, device="cpu", max_new_tokens=8)


@pytest.fixture(scope="module")
def evaluate(lm, tmp_path_factory):
    """Run tasks through lmms-eval in this process, with its cache in a temporary folder."""
    patch = pytest.MonkeyPatch()
    patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    lmms_task._resolve_hf_datasets_cache_dir.cache_clear()

    def run(tasks, include=None):
        manager = TaskManager("ERROR", include_path=str(include) if include else None, include_defaults=False, model_name="sail_llava")
        return evaluator.simple_evaluate(model=lm(), tasks=tasks, task_manager=manager, log_samples=True, batch_size=3, bootstrap_iters=0)

    yield run
    patch.undo()
    lmms_task._resolve_hf_datasets_cache_dir.cache_clear()


def test_every_task_parses_and_its_functions_are_there():
    found = local_tasks()
    assert set(found) == {*SPRITES, *PARITY, "my_vqa"}
    manager = TaskManager("ERROR", include_path=str(FOLDER), include_defaults=False)
    assert set(manager.all_tasks) == set(found)
    for name in found:
        config = manager._get_config(name)
        called = [config[key] for key in ("doc_to_visual", "doc_to_text", "process_docs", "process_results") if key in config]
        called += [metric["aggregation"] for metric in config["metric_list"] if metric["aggregation"] != "mean"]
        assert all(map(callable, called)) and len(called) >= 2 and config["test_split"], name
        assert config["generation_kwargs"]["temperature"] == 0 and config["generation_kwargs"]["max_new_tokens"] >= 16


def test_names_are_not_taken_by_lmms_evals_own_tasks():
    root = Path(evaluator.__file__).parent / "tasks"
    names = [path.stem for path in root.rglob("*.yaml")]
    assert len(names) > 500 and not {name for name in names if name.startswith(("sprites_", "sail_parity"))} and "my_vqa" not in names


def test_parity_prompts():
    manager = TaskManager("ERROR", include_path=str(FOLDER), include_defaults=False)
    short = "\nAnswer the question using a single word or phrase."
    suffix = {name: manager._get_config(name)["lmms_eval_specific_kwargs"]["default"]["post_prompt"] for name in PARITY}
    letter = "\nAnswer with the option's letter from the given choices directly."
    assert suffix.pop("sail_parity_vizwiz") == f"\nWhen the provided information is insufficient, respond with 'Unanswerable'.{short}"
    assert suffix.pop("sail_parity_mmbench") == suffix.pop("sail_parity_seed") == letter and set(suffix.values()) == {short}


def test_data_is_found_from_any_working_directory(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_tasks()["sprites_yesno"].data == (ROOT / "runs/quickstart/data/mllm/yesno.parquet",)
    places = {file.parent for task in local_tasks().values() for file in task.data}
    assert places == {ROOT / "runs/quickstart/data/mllm", ROOT / "data/my_vqa"}, "where the quickstart and the user put them"
    moved = local_tasks(data=str(data))
    assert moved["sprites_what"].data == (data / "open.parquet",) and moved["my_vqa"].data[0].name == "questions.jsonl"
    assert not moved["sail_parity_gqa"].data


def test_the_sprites_tasks_run_and_their_scores_are_right(data, evaluate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = local_tasks(data=str(data))
    tasks = [name for name in SPRITES if name not in GROUPS]
    wrappers = write_wrappers(tmp_path / "wrappers", [known[name] for name in tasks])
    said = iter(["yes", "No", "a dog", "the upper left", "two", "a dog 0"] * 9)
    monkeypatch.setattr("mllm.model.answering.Answerer.generate", lambda self, batch, given: [next(said) for _ in batch])
    monkeypatch.setattr(SailLlava, "_batches", lambda self, texts, settings: [[n] for n in range(len(texts))])
    content = evaluate(tasks, wrappers)
    assert {task: size["original"] for task, size in content["n-samples"].items()} == {
        "sprites_yesno": 8, "sprites_what": 3, "sprites_where": 3, "sprites_count": 3, "sprites_caption": 4,
    }  # fmt: skip
    for task, kind in (("sprites_what", "what"), ("sprites_where", "where"), ("sprites_count", "count")):
        samples = content["samples"][task]
        expected = [matches(row["filtered_resps"][0], row["target"], kind) for row in samples]
        assert [row["exact_match"] for row in samples] == expected and len(samples) == 3
        assert content["results"][task]["exact_match,none"] == pytest.approx(np.mean(expected))
    answers = [(yes_or_no(row["filtered_resps"][0]), row["target"]) for row in content["samples"]["sprites_yesno"]]
    found = content["results"]["sprites_yesno"]
    assert found["accuracy,none"] == np.mean([said == true for said, true in answers])
    assert found["f1,none"] == pytest.approx(yes_no_scores(answers)["f1"]) and found["yes_ratio,none"] == np.mean(
        [s == "yes" for s, _ in answers]
    )
    assert np.mean([found["accuracy_exists,none"], found["accuracy_relation,none"]]) == pytest.approx(found["accuracy,none"])
    captions = [[row["filtered_resps"][0], [row["target"]]] for row in content["samples"]["sprites_caption"]]
    assert content["results"]["sprites_caption"]["cider,none"] == pytest.approx(cider(captions).mean())


def test_a_users_questions_in_jsonl(evaluate, tmp_path, monkeypatch):
    (tmp_path / "mine" / "photos").mkdir(parents=True)
    (tmp_path / "mine" / "photos" / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "mine" / "questions.jsonl").write_text('{"id": "1", "image": "photos/1.jpg", "question": "What?", "answer": "dog"}\n')
    text = (
        (FOLDER / "my_vqa.yaml")
        .read_text()
        .replace("../../../data/my_vqa/", "")
        .replace("image_root: data/my_vqa", f"image_root: {tmp_path}/mine")
    )
    (tmp_path / "mine" / "own.yaml").write_text(text.replace("task: my_vqa", "task: own"))
    monkeypatch.chdir(tmp_path / "mine" / "photos")
    known = local_tasks(include=str(tmp_path / "mine"))
    assert known["own"].data == (tmp_path / "mine" / "questions.jsonl",)
    content = evaluate(["own"], write_wrappers(tmp_path / "wrappers", [known["own"]]))
    assert content["samples"]["own"][0]["arguments"][0] == "What?\nAnswer the question using a single word or phrase."
    assert content["results"]["own"]["exact_match,none"] in (0, 1)


def red_picture(doc):
    return [Pillow.new("RGB", (30, 30), "red")]


def first_choice(doc):
    return doc["choices"][0]


def first_pair(doc, results):
    [(log_prob, greedy)] = results
    assert isinstance(greedy, bool)
    return {"perplexity": log_prob}


CHOICES = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: rows.jsonl}}}}
test_split: test
doc_to_text: question
doc_to_visual: !function tests.eval.harness.test_tasks.red_picture
task: {task}
"""


def test_multiple_choice_takes_the_likeliest_answer(evaluate, lm, tmp_path):
    answerer, options = lm().answerer, ["dog", "the red tree", "yes"]
    questions = [f"how many {n}" for n in range(5)]
    talks = [conversation(question, red_picture(None)) for question in questions]
    scores = np.array([[answerer.score([talk], [option])[0][0] for option in options] for talk in talks])
    gold = [*scores.argmax(axis=1)[:4].tolist(), int(scores.argmin(axis=1)[4])]  # four of five are the likeliest
    rows = [{"question": text, "choices": options, "gold": right} for text, right in zip(questions, gold, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    choice = "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: gold\n"
    choice += "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    likely = "output_type: loglikelihood\ndoc_to_target: !function tests.eval.harness.test_tasks.first_choice\n"
    likely += "process_results: !function tests.eval.harness.test_tasks.first_pair\n"  # lmms-eval's own cannot unpack the pair
    likely += "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]\n"
    (tmp_path / "choice.yaml").write_text(CHOICES.format(task="choice") + choice)
    (tmp_path / "likely.yaml").write_text(CHOICES.format(task="likely") + likely)
    assert evaluate(["choice"], tmp_path)["results"]["choice"]["acc,none"] == 0.8
    found = evaluate(["likely"], tmp_path)["samples"]["likely"]
    assert [row["perplexity"] for row in found] == pytest.approx(scores[:, 0].tolist(), rel=1e-4)


def test_local_tasks_are_checked(tmp_path):
    with pytest.raises(UsageError, match="no folder"):
        local_tasks(include=str(tmp_path / "gone"))
    (tmp_path / "a.yaml").write_text("task: sprites_yesno\n")
    with pytest.raises(UsageError, match="two tasks are called 'sprites_yesno'"):
        local_tasks(include=str(tmp_path))
    (tmp_path / "a.yaml").write_text("task: [x\n")
    with pytest.raises(UsageError, match="not a YAML task"):
        local_tasks(include=str(tmp_path))
    (tmp_path / "a.yaml").write_text("group: mine\ntask: [x, y]\n")
    assert "mine" not in local_tasks(include=str(tmp_path))


def test_wrappers_hold_nothing_but_the_name_and_the_data(data, tmp_path):
    known = local_tasks(data=str(data))
    folder = write_wrappers(tmp_path, [known["sprites_count"], known["sail_parity_gqa"]])
    first, second = (yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in ("sprites_count", "sail_parity_gqa"))
    moved = {"data_files": {"test": str(data / "open.parquet")}}
    assert first == {"include": str(FOLDER / "sprites_count.yaml"), "task": "sprites_count", "dataset_kwargs": moved}
    assert second == {"include": str(FOLDER / "sail_parity_gqa.yaml"), "task": "sail_parity_gqa"}
    assert [path.name for path in write_wrappers(tmp_path, [known["my_vqa"]]).glob("*.yaml")] == ["my_vqa.yaml"], "old ones go"
