"""Prompt sets: the published 80, files of templates, sentences for each class."""

import hashlib
import json
import re
import subprocess
import sys

import pytest

from align.common.errors import DataError, UsageError
from eval.tasks.prompts import TEMPLATES, fill, package_templates, prompt_set, read_lines


def test_imagenet80_is_the_published_set():
    templates = TEMPLATES["imagenet80"]
    assert len(templates) == len(set(templates)) == 80
    assert {"itap of my {c}.", "a jpeg corrupted photo of the {c}.", "the {c} in a video game.", "a photo of many {c}."} <= set(templates)
    # of the sorted published list, one a line
    digest = hashlib.sha256("\n".join(sorted(templates)).encode()).hexdigest()
    assert digest == "6861574a25b4ae6dea5d76663d7914c835c4e1faee1d0d670f46a538a212e418"


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_has_one_place_for_the_class(name):
    assert all(template.count("{c}") == 1 for template in TEMPLATES[name])


def test_other_braces_are_plain_text():
    assert fill(("{0} {c} {}", "{{c}}"), "a {c} {x}") == ("{0} a {c} {x} {}", "{a {c} {x}}")


def test_a_set_by_id_gives_each_class_its_sentences(tmp_path):
    prompts = prompt_set("simple", ("dog", "cat"), tmp_path)
    assert prompts.id == "simple"
    assert prompts.sentences == (("a photo of a dog.",), ("a photo of a cat.",))


def test_templates_from_a_file_in_clip_benchmarks_format(tmp_path):
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of a {c}, a type of food.\n{c}\n")
    prompts = prompt_set("zeroshot_classification_templates.txt", ("pie",), tmp_path)
    assert prompts.sentences == (("a photo of a pie, a type of food.", "pie"),)
    assert prompts.id.startswith("templates:zeroshot_classification_templates.txt@")
    other_classes = prompt_set("zeroshot_classification_templates.txt", ("cake", "soup"), tmp_path)
    assert other_classes.id == prompts.id, "the same templates for other classes are the same prompts"
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    assert prompt_set("zeroshot_classification_templates.txt", ("pie",), tmp_path).id != prompts.id


def test_sentences_of_each_class_from_json_have_another_id(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps({"cat": ["it purrs"], "dog": ["it barks", "a loyal animal"], "extra": ["x"]}))
    prompts = prompt_set("s.json", ("dog", "cat"), tmp_path)
    assert prompts.sentences == (("it barks", "a loyal animal"), ("it purrs",))
    first = prompts.id
    assert first.startswith("sentences:s.json@")
    (tmp_path / "s.json").write_text(json.dumps({"cat": ["it meows"], "dog": ["it barks", "a loyal animal"]}))
    assert prompt_set("s.json", ("dog", "cat"), tmp_path).id != first


@pytest.mark.parametrize(
    ("name", "content", "error", "says"),
    [
        ("imagenet8", None, UsageError, "imagenet80"),
        ("missing.txt", None, DataError, "put the file at"),
        ("t.txt", "a photo of a {}.\n", DataError, "line 1"),
        ("t.txt", "a {c}\n\nthe {c}\n", DataError, "blank line"),
        ("s.json", '{"dog": ["x"]}', DataError, "'cat'"),
        ("s.json", '{"dog": ["x"], "cat": []}', DataError, "'cat'"),
        ("s.json", '{"dog": ["x"], "cat": "x"}', DataError, "'cat'"),
        ("s.json", '["x"]', DataError, "object"),
        ("s.json", "{", DataError, "not valid JSON"),
    ],
)
def test_wrong_prompts_say_what_is_wrong(tmp_path, name, content, error, says):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=says):
        prompt_set(name, ("dog", "cat"), tmp_path)


def test_lines_survive_windows_line_ends_and_byte_order_marks(tmp_path):
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfdog\r\nhot dog \r\n\r\n")
    assert read_lines(tmp_path / "names.txt") == ("dog", "hot dog")


def test_ucf101_is_the_published_set():
    templates = TEMPLATES["ucf101"]
    assert len(templates) == len(set(templates)) == 48
    assert {"a photo of a person {c}.", "a example of the person during {c}.", "a demonstration of the person practicing {c}."} <= set(
        templates
    )


def test_packaged_templates_are_read_without_importing_the_package(tmp_path):
    prompts = prompt_set("clip:food101", ("pie",), tmp_path)
    assert prompts.sentences == (("a photo of pie, a type of food.",),)
    assert re.fullmatch(r"clip:food101@[0-9a-f]{8}", prompts.id)
    assert len(prompt_set("clip:imagenet1k", ("dog",), tmp_path).sentences[0]) == 80
    assert set(package_templates("imagenet1k")) == set(TEMPLATES["imagenet80"]), "ours are the package's"
    code = "import sys; from eval.tasks.prompts import package_classes; package_classes('pets'); sys.exit('clip_benchmark' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_or_missing_packaged_templates_say_so(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="did you mean 'food101'"):
        prompt_set("clip:food11", ("pie",), tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"sail-upgrade-kit\[clip\]"):
        prompt_set("clip:food101", ("pie",), tmp_path)
