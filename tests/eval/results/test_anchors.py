"""Published numbers: as printed, by exact id, never beside ours in a column."""

import pytest

from align.common.errors import DamagedError
from eval.results.anchors import anchors_of, prompts_note, published_numbers, shown_anchor
from eval.results.records import TaskRecord
from eval.tasks.registry import TASKS


def record(task, kind="classification", prompts="imagenet80"):
    return TaskRecord(task, kind, 9, 9, prompts, "aa", "", "", {})


def value(name, task, metric):
    return next(anchor for anchor in published_numbers() if anchor.name == name).values[task][metric]


def test_the_published_table_is_copied_right():
    assert value("SAIL-L, GTE", "imagenet1k", "acc@1") == 65.4
    assert value("SAIL-L, NV2", "coco_karpathy", "i2t_r@1") == 62.4 and value("SAIL-L, NV2", "coco_karpathy", "t2i_r@1") == 48.6
    assert value("CLIP-L, LAION-400M", "flickr30k_karpathy", "t2i_r@1") == 70.2
    assert value("SAIL-L, GTE", "winoground", "image_score") == 13.25
    assert value("freeze-align, DINOv2-L + ARL", "imagenet1k", "acc@1") == 76.3
    assert value("SAIL-L, tuned", "sail_parity_vqav2", "exact_match") == 76.77
    assert value("the same, two positives", "coco_karpathy", "t2i_r@1") == 32.9
    ten = ("food101", "cifar10", "cifar100", "sun397", "cars", "fgvc_aircraft", "dtd", "pets", "caltech101", "flowers")
    mean = sum(value("SAIL-L, NV2", task, "acc@1") for task in ten) / 10
    assert mean == pytest.approx(72.1, abs=0.05), "the paper's own mean"


def test_every_anchor_belongs_to_a_task_of_the_kit():
    for anchor in published_numbers():
        for task in anchor.values:
            assert task in TASKS or task.startswith("sail_parity_"), f"{anchor.name}: {task} is no task, so this is never shown"


def test_anchors_are_found_by_exact_id_only():
    assert {anchor.name for anchor in anchors_of(record("winoground", "compositional"), ["text_score"])} == {
        "SAIL-L, GTE", "SAIL-L, NV2", "CLIP-L, LAION-400M",
    }  # fmt: skip
    for own in ("imagenet", "imagenet1k-mine", "sprites-unseen", "things"):
        assert anchors_of(record(own), ["acc@1"]) == []
    assert anchors_of(record("imagenet1k"), ["mean_per_class"]) == [], "a metric that nobody published"
    kinds = [anchor.more for anchor in anchors_of(record("imagenet1k"), ["acc@1"])]
    assert kinds == sorted(kinds) and not kinds[0] and kinds[-1]


def test_numbers_are_shown_as_printed():
    sail = next(anchor for anchor in published_numbers() if anchor.name == "SAIL-L, GTE")
    assert [shown_anchor(sail, "winoground", metric) for metric in ("text_score", "image_score", "pair_accuracy")] == ["34.0", "13.25", ""]


def test_other_prompts_are_said():
    freeze = next(anchor for anchor in published_numbers() if anchor.name.startswith("freeze-align"))
    sail = next(anchor for anchor in published_numbers() if anchor.name == "SAIL-L, GTE")
    own = record("imagenet1k", prompts="sentences:classes.json@12345678")
    assert "published with sentences written for each class, ours with templates (imagenet80)" in prompts_note(freeze, record("imagenet1k"))
    assert prompts_note(sail, record("imagenet1k")) == "" and prompts_note(freeze, own) == ""
    assert "published with templates, ours with sentences" in prompts_note(sail, own)
    assert prompts_note(freeze, record("coco_karpathy", "retrieval", "")) == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1", "expected a list"),
        ("- {name: a, source: b, protocol: c, prompts: templates}", "expected the fields"),
        ("- {name: a, source: b, protocol: c, prompts: other, values: {}}", "unknown prompts"),
        ("- {name: a, source: b, protocol: c, prompts: none, values: {t: {m: 140}}}", "percentages"),
        ("- {name: a, source: b, protocol: c, prompts: none, values: {t: 3}}", "percentages"),
        ("- {name: a, source: b, protocol: c, prompts: none, values: {}, more: 3}", "true or false"),
    ],
)
def test_damaged_files_are_refused(tmp_path, text, says):
    path = tmp_path / "published.yaml"
    path.write_text(text)
    with pytest.raises(DamagedError, match=says):
        published_numbers(path)
