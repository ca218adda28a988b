"""The report: complete, self-contained, and safe whatever captions hold."""

import csv
import re
import subprocess
import sys

import pytest
from PIL import Image
from synthetic_results import make_results

from eval.figures import DARK, LIGHT, class_bars, curves, plain
from eval.page import found_runs, write_report

HOSTILE = '<script>alert({number})</script> & "q" $x_{{$ \x07 {color} 🐕 كلب'


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    results = make_results(folder, images=30, caption=HOSTILE)
    metrics = folder / "train" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])  # a run that is being written: its last row is cut
    path = write_report(folder / "eval", folder / "out", title="Tom & <Jerry>")
    return path, path.read_text(), results


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
        if entry.model in ("trained", "untrained"):
            factor = 1 if "rank" in entry.metric else 100
            assert f">{factor * entry.value:.1f}<" in page
    assert "A small demonstration." in page and "Pictures by nobody." in page and "truncated 1" in page
    assert results.command in page and "<h2>Training</h2>" in page


def test_figures_lie_beside_the_page_as_pngs(report):
    path, page, _ = report
    names = {figure.stem for figure in (path.parent / "figures").iterdir()}
    assert {"training-loss", "training-validation-recall", "training-mean-logits", "training-scale-t", "training-bias-b"} <= names
    assert {"bars-scenes-text_to_image", "bars-things-accuracy", "recall-scenes-t2i", "similarity-scenes"} <= names
    assert {"classes-sorted-things", "classes-best-things", "classes-worst-things"} <= names
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
    assert page.count('<div class="card example') == 4 + 4 + 6
    assert page.count('class="thumb right"') == 4, "each text query frames its one right image, in or behind the first five"


def test_results_without_examples_or_training_still_make_a_page(tmp_path):
    results = make_results(tmp_path, images=12, classes=6)
    for path in (tmp_path / "eval" / "examples").rglob("*.json"):
        path.unlink()
    (tmp_path / "train" / "metrics.jsonl").unlink()
    assert found_runs(results) == []
    page = write_report(tmp_path / "eval", tmp_path / "out", dark=False).read_text()
    assert "<h2>Training</h2>" not in page and "<h2>Results</h2>" in page


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
    assert plain("a\x00b\ud800c\n$d$") == "a b?c $d$"
    assert plain("one two three", 8) == "one two\nthree"
    for theme in (LIGHT, DARK):
        png = class_bars("$\\frac{", [("$x_{$", 3, 0.5), ("狗 🐕", 2, 0.25)], {"$x_{$": 0.0, "狗 🐕": 0.1}, "#123456", theme)
        assert png.startswith(b"\x89PNG")


def test_a_curve_of_one_point_is_drawn():
    assert curves("loss", {"loss": ([0], [0.7])}, LIGHT).startswith(b"\x89PNG")
