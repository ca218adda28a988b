"""The report: complete, self-contained, and safe whatever captions hold."""

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from align.common.errors import DamagedError, UsageError
from eval.page.figures import DARK, LIGHT, class_bars, class_gains, curves, forest, model_color, plain
from eval.page.page import _notes, found_runs, write_report
from eval.page.sections import Figures, segmentation
from eval.results.anchors import published_numbers
from eval.results.calibration import calibration
from eval.results.records import ModelRecord, load_answers, load_results, save_answers, save_results
from eval.results.tables import shown_value
from tests.support.synthetic_results import make_results

HOSTILE = '<script>alert({number})</script> & "q" $x_{{$ \x07 {color} 🐕 كلب'


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    results = make_results(folder, images=30, caption=HOSTILE, whole=True)
    metrics = folder / "train" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])  # a run that is being written: its last row is cut
    path = write_report(folder / "eval", folder / "out", title="Tom & <Jerry>")
    return path, path.read_text(), results


def test_a_note_stands_once_and_names_its_tasks_unless_it_is_of_all(report):
    results = report[2]
    first, *others = results.tasks
    some = replace(results, tasks=(replace(first, note="a"), *(replace(task, note="") for task in others)))
    assert _notes(some) == [f"{first.id}: a"]
    assert _notes(replace(results, tasks=tuple(replace(task, note="a") for task in results.tasks))) == ["a"]


class Tables(HTMLParser):
    """Reads the tables of a page: a list of rows of (class, text) cells for each."""

    def __init__(self, page):
        super().__init__()
        self.tables, self.cell = [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.cell = [dict(attrs).get("class") or "", ""]
            self.tables[-1][-1].append(self.cell)
        elif tag == "span" and self.cell:
            self.cell[1] += "|"

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell[1] += data


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A page whose tasks have the ids of published ones."""
    folder = tmp_path_factory.mktemp("official")
    results = make_results(folder, images=24, classes=6, things="imagenet1k", swaps="winoground", whole=True)
    return write_report(folder / "eval", folder / "out", dark=False).read_text(), results


def test_the_page_needs_nothing_from_outside(report):
    _, page, _ = report
    assert not re.findall(r"https?://|//[a-z]+\.", page)
    assert not re.findall(r"<(?:script|link|iframe|object|embed)\b", page)
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) > 30 and all(source.startswith("data:image/") for source in sources)
    assert "default-src 'none'" in page and 'name="viewport"' in page and "@media print" in page and "prefers-color-scheme: dark" in page


def test_captions_and_titles_are_text_not_markup(report):
    _, page, _ = report
    assert "&lt;script&gt;alert(" in page and "Tom &amp; &lt;Jerry&gt;" in page


def test_every_number_of_the_tables_is_there(report):
    _, page, results = report
    for entry in results.entries:
        if entry.model in ("trained", "untrained", "CLIP"):
            factor = 1 if "rank" in entry.metric else 100
            assert f">{factor * entry.value:.1f}<" in page
    assert "A small demonstration." in page and "Pictures by nobody." in page and "truncated 1" in page
    assert results.command in page and '<h2 id="training">Training</h2>' in page


def test_figures_lie_beside_the_page_as_pngs(report):
    path, page, _ = report
    names = {figure.stem for figure in (path.parent / "figures").iterdir()}
    assert {"training-loss", "training-validation-recall", "training-mean-logits", "training-scale-t", "training-bias-b"} <= names
    assert {"bars-scenes-text_to_image", "bars-things-accuracy", "recall-scenes-t2i", "similarity-scenes"} <= names
    assert {"classes-sorted-things", "classes-best-things", "classes-worst-things", "reliability-things"} <= names
    assert {f"gains-{task}-{model}" for task in ("things", "outlines") for model in ("untrained", "CLIP")} <= names
    assert {"bars-swaps-which_belongs_to_which", "categories-swaps", "bars-outlines-segmentation", "classes-all-outlines"} <= names
    for figure in (path.parent / "figures").iterdir():
        with Image.open(figure) as image:
            image.load()
            assert image.format == "PNG" and image.width >= 600
    assert page.count('class="dark-only"') == len(names)


def test_the_csv_holds_the_entries(report):
    path, _, results = report
    rows = list(csv.DictReader((path.parent / "entries.csv").open()))
    assert len(rows) == len(results.entries)
    assert {(row["task"], row["metric"], row["model"], float(row["value"])) for row in rows} == {
        (e.task, e.metric, e.model, e.value) for e in results.entries
    }


def test_right_answers_are_marked_and_misses_are_shown(report):
    _, page, _ = report
    assert page.count('<div class="card example') == 4 + 4 + 6 + 4 + 2
    assert page.count('class="thumb right"') == 4, "each text query frames its one right image, in or behind the first five"


def test_results_without_examples_or_training_still_make_a_page(tmp_path):
    results = make_results(tmp_path, images=12, classes=6)
    for path in (tmp_path / "eval" / "examples").rglob("*.json"):
        path.unlink()
    (tmp_path / "train" / "metrics.jsonl").unlink()
    assert found_runs(results) == []
    page = write_report(tmp_path / "eval", tmp_path / "out", dark=False).read_text()
    assert 'id="training"' not in page and '<h2 id="results">Results</h2>' in page and "What it sees" not in page


def test_links_of_the_contents_lead_somewhere(report):
    _, page, _ = report
    targets, places = re.findall(r'href="#([^"]*)"', page), re.findall(r'id="([^"]*)"', page)
    assert len(set(places)) == len(places) and set(targets) <= set(places)
    assert {"results", "table-things", "classification-things", "compositional-swaps", "segmentation-outlines", "measured"} <= set(targets)


def test_tables_hold_our_numbers_in_our_columns(report):
    _, page, results = report
    tables = {
        task.id: table
        for task, table in zip(sorted(results.tasks, key=lambda task: ORDER.index(task.id)), Tables(page).tables, strict=False)
    }
    for task, table in tables.items():
        head = [text for _, text in table[0]]
        assert head[:2] == ["metric", "trained"] and "CLIP" in head
        for entry in results.entries:
            if entry.task == task and entry.model in head:
                value, interval = shown_value(entry)
                column = [row[head.index(entry.model)][1] for row in table[1:]]
                assert (f"{value}|{interval}" if interval else value) in column


ORDER = ("things", "scenes", "swaps", "outlines")  # by kind


def test_headlines_name_the_baseline_and_clip_apart(report):
    _, page, results = report
    cards = re.findall(r'<div class="card"><div class="what">(.*?)</div>(.*?)</div></div>', page, re.DOTALL)
    assert [what for what, _ in cards] == [
        "things, top-1 accuracy", "scenes, text to image R@1", "swaps, group score", "outlines, mean IoU",
    ]  # fmt: skip
    for (_, card), task, metric in zip(cards, ORDER, ("acc@1", "t2i_r@1", "group_score", "miou"), strict=True):
        shown = {entry.model: f"{100 * entry.value:.1f}%" for entry in results.entries if (entry.task, entry.metric) == (task, metric)}
        assert f">{shown['trained']} <small>from {shown['untrained']}</small>" in card, "from untrained heads, not from majority or CLIP"
        assert f'<span class="clip">CLIP {shown["CLIP"]}</span>' in card
        for name in {"majority", "chance"} & shown.keys():
            assert f"<span>{name} {shown[name]}</span>" in card


def renamed(results, models):
    """The same results with the trained model's numbers under other names: what many models look like."""
    own = [entry for entry in results.entries if entry.model == "trained"]
    others = [entry for entry in results.entries if entry.model in ("majority", "chance")]
    entries = [replace(entry, model=model.name) for model in models for entry in own]
    floors = [model for model in results.models if model.kind in ("majority", "chance")]
    return replace(results, models=(*models, *floors), entries=(*entries, *others))


def page_of(folder, results, names):
    """Write the page of `results` whose answers and examples are the trained model's for each of `names`."""
    for path in (folder / "eval" / "examples").rglob("*.json"):
        text = json.loads(path.read_text())
        for one in [*text.get("t2i", []), *text.get("i2t", []), *text.get("items", [])]:
            one["answers"] = dict.fromkeys(names, one["answers"]["trained"])
        if "matrix" in text:
            text["matrix"]["scores"] = dict.fromkeys(names, text["matrix"]["scores"]["trained"])
        path.write_text(json.dumps(text))
    for task in results.tasks:
        answers = load_answers(folder / "eval", task.id, "trained")
        for name in names:
            save_answers(folder / "eval", task.id, name, answers)
    save_results(folder / "eval", results)
    return write_report(folder / "eval", folder / "out", dark=False).read_text()


@pytest.mark.parametrize("kind", ["clip", "untrained"])
def test_without_a_trained_model_the_others_have_cards_and_examples(tmp_path, kind):
    results = renamed(make_results(tmp_path, images=12, classes=6), [ModelRecord("theirs", kind, "what they are", "", {})])
    page = page_of(tmp_path, results, ["theirs"])
    assert page.count('<div class="card"><div class="what">') == 2 and 'class="lead">what they are<' in page
    assert "From a caption to images" in page and page.count('<div class="card example') == 4 + 4 + 6


def test_every_model_of_many_has_a_card_examples_and_columns_that_fit(tmp_path):
    names = [f"run-{number}-with-a-long-name-of-its-own" for number in range(12)]
    results = renamed(
        make_results(tmp_path, images=12, classes=6), [ModelRecord(name, "trained", f"about {name}", "", {}) for name in names]
    )
    page = page_of(tmp_path, results, names)
    cards = re.findall(r'<div class="card"><div class="what">.*?</div></div>', page, re.DOTALL)
    lead = re.search(r'<p class="lead">(.*?)</p>', page)[1]
    for name in names:
        assert all(name in card for card in cards) and f"<b>{name}</b>: about {name}" in lead
    assert page.count('<div class="card example') == 4 + 4 + 6 and page.count(f'<p class="said-by">{names[-1]} ') == 4 + 4 + 6
    for table in Tables(page).tables[:4]:
        assert len(table[0]) <= 9
    heads = [text for table in Tables(page).tables[:4] for _, text in table[0]]
    assert all(heads.count(name) == 2 for name in names), "once for each task"


def test_sections_without_content_are_left_out(tmp_path):
    make_results(tmp_path, images=12, classes=6)
    for path in (tmp_path / "eval" / "examples").rglob("*.json"):
        path.unlink()
    (tmp_path / "train" / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "lr": {"llm": 1.0}}\n')
    page = write_report(tmp_path / "eval", tmp_path / "out", dark=False).read_text()
    assert "From a caption to images" not in page and 'id="training"' not in page
    assert not re.search(r'<div class="grid[^"]*">\s*</div>', page) and not re.search(r"<h[23][^>]*>[^<]*</h[23]>\s*<h2", page)


def test_a_value_that_hardly_moves_is_a_flat_line(monkeypatch):
    limits = []
    monkeypatch.setattr("eval.page.figures.png", lambda figure: limits.append(figure.axes[0].get_ylim()))
    curves("bias b", {"b": (range(10), [-10 + 0.001 * step for step in range(10)])}, LIGHT)
    curves("loss", {"loss": (range(10), [2 - 0.1 * step for step in range(10)])}, LIGHT)
    assert limits[0][1] - limits[0][0] > 2 and limits[1][1] - limits[1][0] < 1.2


def test_published_numbers_are_in_published_columns_only(official):
    page, results = official
    seen = {}
    for table in Tables(page).tables:
        head = table[0]
        for row in table[1:]:
            for (kind, name), (cell_kind, text) in zip(head, row, strict=False):
                assert (kind == "published") == (cell_kind == "published") == name.startswith("published: ")
                if cell_kind == "published":
                    assert "|" not in text, "no interval"
                    if text:
                        seen.setdefault(row[0][1] if row[0][0] != "published" else "", set()).add((name, text))
    assert {("published: SAIL-L, GTE", "65.4"), ("published: CLIP-L, LAION-400M", "72.7"), ("published: dino.txt", "81.1")} <= seen[
        "top-1 accuracy"
    ]
    assert ("published: freeze-align, DINOv2-L + ARL (other prompts)", "76.3") in seen["top-1 accuracy"]
    assert seen["group score"] == {
        ("published: SAIL-L, GTE", "8.75"), ("published: SAIL-L, NV2", "15.0"), ("published: CLIP-L, LAION-400M", "8.75"),
    }  # fmt: skip
    assert set(seen) == {"top-1 accuracy", "text score", "image score", "group score"}
    assert "other prompts: published with sentences written for each class, ours with templates (simple)" in page
    names = {anchor.name for anchor in published_numbers()}
    assert not names & {model.name for model in results.models} and all(entry.model not in names for entry in results.entries)


def test_tasks_of_other_names_have_no_published_columns(report):
    _, page, _ = report
    assert "published:" not in page and 'class="published"' not in page


def test_pairs_show_both_pictures_and_every_cosine(report):
    path, page, _ = report
    examples = json.loads((path.parent.parent / "eval" / "examples" / "swaps.json").read_text())
    tables = [table for table in Tables(page).tables if table[0][0][0] == "caption small"]
    assert len(tables) == len(examples["items"]) == 4
    for table, item in zip(tables, examples["items"], strict=True):
        assert table[0][0][1] == item["category"] and len(table[0]) == 3
        scores = item["answers"]["trained"]["scores"]
        for c, row in enumerate(table[1:]):
            assert row[0][1] == item["captions"][c].replace("\x07", "\x07")
            assert [float(text) for _, text in row[1:]] == pytest.approx([round(scores[i][c], 3) for i in (0, 1)], abs=6e-4)
            assert ("own" in row[1 + c][0]) and ("best" in row[1 + c][0]) == (scores[c][c] > scores[1 - c][c])
            assert ("wrong" in row[2 - c][0]) == (scores[1 - c][c] > scores[c][c])
    right = sum(answer[part] for item in examples["items"] for answer in item["answers"].values() for part in ("text", "image", "group"))
    section = page[page.index('id="compositional-swaps"') : page.index('id="segmentation-outlines"')]
    assert section.count("badge hit") == right


def test_outlines_have_truth_overlays_and_a_legend(report):
    _, page, _ = report
    section = page[page.index('id="segmentation-outlines"') : page.index('id="measured"')]
    assert section.count("<figcaption>truth</figcaption>") == 2 and section.count("<figcaption>CLIP: ") == 2
    assert '<i style="background: #7fb2e5"></i>sky' in section and "&lt;b&gt;road&lt;/b&gt;" in section and "<b>road" not in page


def test_colors_of_a_legend_are_colors_and_lost_pictures_are_missed(tmp_path):
    results = make_results(tmp_path, images=12, classes=6, whole=True)
    folder = tmp_path / "eval"
    task = next(task for task in results.tasks if task.id == "outlines")
    examples = json.loads((folder / "examples" / "outlines.json").read_text())
    examples["items"][0]["classes"][0]["color"] = "red;position:fixed"
    drawn = Figures(tmp_path / "figures", dark=False)
    shown = segmentation(results, task, examples, folder, drawn)
    assert [part["color"] for part in shown["items"][0]["classes"]] == ["#808080", "#5f9e4b", "#8c8c8c", "#2b5fa8"]
    (folder / "examples" / "outlines" / "0--truth.jpg").unlink()
    with pytest.raises(DamagedError, match="measure again"):
        segmentation(results, task, examples, folder, drawn)


def test_calibration_is_shown_where_confidence_is_known(report):
    path, page, _ = report
    answers = load_answers(path.parent.parent / "eval", "things", "trained")
    found = calibration(answers["confidence"].to_numpy(), answers["rank"].to_numpy() == 1)
    table = next(table for table in Tables(page).tables if table[0][-1][1] == "expected error")
    row = next(row for row in table if row[0][1] == "trained")
    assert [text for _, text in row[1:]] == [f"{100 * value:.1f}" for value in (found.mean_confidence, found.mean_accuracy, found.error)]


def test_calibration_by_hand():
    confidence = np.array([0.95, 0.85, 0.55, 0.5])
    found = calibration(confidence, np.array([True, False, True, True]), bins=2)  # 0.5 belongs to the lower bin
    assert found.count.tolist() == [1, 3] and found.confidence == pytest.approx([0.5, 0.7833333])
    assert found.accuracy == pytest.approx([1.0, 2 / 3]) and found.error == pytest.approx(0.25 * 0.5 + 0.75 * abs(2 / 3 - 0.7833333))
    assert calibration(np.array([0.0, 1.0]), np.array([False, True])).error == 0.0
    for wrong in (np.zeros(0), np.array([1.2]), np.array([np.nan])):
        with pytest.raises(UsageError):
            calibration(wrong, wrong > 0)


def test_calibration_equals_a_plain_loop():
    rng = np.random.default_rng(0)
    confidence, correct = rng.random(500), rng.random(500) < 0.6
    error = 0.0
    for k in range(15):
        rows = [n for n in range(500) if k / 15 < confidence[n] <= (k + 1) / 15]
        error += abs(sum(confidence[n] for n in rows) - sum(correct[n] for n in rows)) / 500
    assert calibration(confidence, correct).error == pytest.approx(error)


def test_models_of_one_kind_have_their_own_colors(report):
    path, _, _ = report
    models = load_results(path.parent.parent / "eval").models
    for theme in (LIGHT, DARK):
        colors = [model_color(model, models, theme) for model in models]
        assert len(set(colors)) == len(colors)


def test_gains_and_differences_are_drawn_whatever_their_sign():
    rows = [("$x_{$", 3, 0.5), None, ("b", 1, 0.0), ("狗", 2, -0.25)]
    for theme in (LIGHT, DARK):
        assert class_gains("gain", rows, theme).startswith(b"\x89PNG") and class_gains("one", [("a", 1, 0.0)], theme)
        assert forest([("$t_{$ acc@1", 0.1, 0.02, 0.2, True), ("t r@1", -0.1, -0.3, 0.1, False)], theme).startswith(b"\x89PNG")


def test_the_entry_needs_no_torch_and_can_leave_out_dark_figures(tmp_path):
    make_results(tmp_path, images=12, classes=6)
    code = (
        "import sys; sys.argv = ['eval/report.py', '--results', sys.argv[1], '--theme', 'light']; import runpy;"
        "runpy.run_path('eval/report.py', run_name='__main__'); assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "eval")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    assert 'class="dark-only"' not in (tmp_path / "eval" / "report.html").read_text()


def test_labels_are_drawn_as_plain_text():
    subject = ModelRecord("m", "trained", "", "", {})
    assert plain("a\x00b\ud800c\n$d$") == "a b?c $d$"
    assert plain("one two three", 8) == "one two\nthree"
    for theme in (LIGHT, DARK):
        png = class_bars("$\\frac{", [("$x_{$", 3, 0.5), ("狗 🐕", 2, 0.25)], {"$x_{$": 0.0, "狗 🐕": 0.1}, subject, [subject], theme)
        assert png.startswith(b"\x89PNG")


def test_a_curve_of_one_point_is_drawn():
    assert curves("loss", {"loss": ([0], [0.7])}, LIGHT).startswith(b"\x89PNG")
