"""A results folder made of random embeddings and drawn pictures, for tests of the report and of what it reads."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from align.common.files import atomic_bytes
from eval.measures.compositional import (
    compositional,
    compositional_chance,
    compositional_entries,
    compositional_examples,
    compositional_table,
)
from eval.measures.retrieval import retrieval_chance, retrieval_entries, retrieval_examples, retrieval_table, retrieve
from eval.measures.segmentation import SegmentationAnswers, confusion_matrix, segmentation_entries, segmentation_table
from eval.measures.zeroshot import (
    classification_chance,
    classification_entries,
    classification_examples,
    classification_table,
    majority_entries,
    zero_shot_classification,
)
from eval.results.examples import save_examples, shown_images
from eval.results.records import Entry, ModelRecord, Results, TaskRecord, save_answers, save_results

MODELS = {"trained": 0.25, "CLIP": 0.5, "untrained": 9.0}  # noise: how far from the truth each one is
PARTS = ("sky", "grass & leaf", "<b>road</b>", "sea")
PART_COLORS = ("#7fb2e5", "#5f9e4b", "#8c8c8c", "#2b5fa8")
COLORS = ("red", "orange", "gold", "green", "teal", "blue", "purple", "brown", "black", "gray")


def picture(number: int) -> Image.Image:
    image = Image.new("RGB", (96, 96), "whitesmoke")
    draw = ImageDraw.Draw(image)
    left = 10 + 4 * (number % 9)
    shape = draw.ellipse if number % 2 else draw.rectangle
    shape((left, 20, left + 40, 60 + number % 20), fill=COLORS[number % len(COLORS)])
    return image


def unit(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(values, dim=-1)


def outlined(classes: np.ndarray) -> Image.Image:
    colors = np.array([[int(color[at : at + 2], 16) for at in (1, 3, 5)] for color in PART_COLORS], dtype=np.uint8)
    return Image.fromarray(colors[classes]).resize((168, 168), Image.Resampling.NEAREST)


def make_results(
    folder: Path,
    images: int = 40,
    classes: int = 30,
    caption: str = "a {color} shape number {number}",
    width: int = 32,
    things: str = "things",
    swaps: str = "swaps",
    seed: int = 0,
    noise: float = 1.0,
    whole: bool = False,
) -> Results:
    """Write a results folder below `folder/eval` and a training run below `folder/train`; return the results.

    `things` and `swaps` name the classification and the compositional task; answers differ by `seed` and `noise`, samples do not.
    `whole` adds a CLIP model, the compositional task and one of segmentation to classification and retrieval.
    """
    output = folder / "eval"
    output.mkdir(parents=True)
    rng, made = np.random.default_rng(seed), torch.Generator().manual_seed(100 + seed)
    torch.manual_seed(0)
    spread = {name: noise * by if name == "trained" else by for name, by in MODELS.items() if whole or name != "CLIP"}

    def near(truth: torch.Tensor, by: float) -> torch.Tensor:
        return unit(truth + by * torch.randn(truth.shape, generator=made))

    keys = [f"scene-{number:04d}" for number in range(images)]
    owner = torch.arange(images).repeat_interleave(2)
    captions = [caption.format(color=COLORS[number % 10], number=f"{number}.{part}") for number in range(images) for part in (0, 1)]
    x = unit(torch.randn(images, width))
    embeddings = {name: (x, near(x[owner], 1.12 * by)) for name, by in spread.items()}
    entries, found = [], {}
    for name, (i, c) in embeddings.items():
        found[name] = retrieve(i, c, owner)
        entries += retrieval_entries(found[name], "scenes", name, rng, 0.95)
        save_answers(output, "scenes", name, retrieval_table(found[name], keys, owner.numpy()))
    entries += retrieval_chance(np.full(images, 2), "scenes", "chance")
    chosen = retrieval_examples(found, embeddings, captions, owner.numpy(), 4, rng)
    save_examples(output, "scenes", chosen, [(n, picture(n)) for n in shown_images(chosen)])

    labels = torch.arange(images) % classes
    names = [f"{COLORS[number % 10]} thing {number}" for number in range(classes)]
    weights = unit(torch.randn(classes, width))
    said = {}
    for name, by in spread.items():
        said[name] = zero_shot_classification(near(weights[labels], by), weights, labels, scale=20.0)
        entries += classification_entries(said[name], labels.numpy(), classes, things, name, rng, 0.95)
        save_answers(output, things, name, classification_table(said[name], keys, labels.numpy(), names))
    entries += majority_entries(labels.numpy(), classes, things, "majority", 0.95) + classification_chance(
        images, classes, things, "chance"
    )
    chosen = classification_examples(said, labels.numpy(), names, 6, rng)
    save_examples(output, things, chosen, [(n, picture(n)) for n in shown_images(chosen)])

    if whole:
        entries += make_pairs(output, swaps, images, caption, spread, made, rng)
        entries += make_segmentation(output, images, spread, keys, rng)

    run = folder / "train"
    (run / "best").mkdir(parents=True)
    rows = []
    for step in range(0, 250, 5):
        fit = 1 - np.exp(-step / 60)
        row = {"step": step, "epoch": step / 50, "loss": 0.7 * np.exp(-step / 50), "lr": 1e-3 * np.cos(step / 160), "grad_norm": 1.0}
        logits = {"positive_logit": -10 + 14 * fit, "negative_logit": -10 - 2 * fit}
        rows.append({**row, **logits, "scale": 20 + step / 20, "bias": -10 - fit})
        if step % 50 == 0:
            rows.append(
                {
                    "step": step,
                    **{f"val_{d}_r{k}": float(min(1, fit * (0.6 + 0.03 * k))) for d in ("i2t", "t2i") for k in (1, 5, 10)},
                }
            )
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = Results(
        created="2030-01-01T00:00:00Z",
        command="python eval/run.py --model runs/train/best --tasks scenes things",
        versions={"python": "3.11", "torch": "2.14.1"},
        seed=0,
        confidence=0.95,
        seconds={"encode": 12.0, "score": 1.0},
        models=(
            ModelRecord(
                "trained",
                "trained",
                "a small vision encoder + a small text encoder, glu heads",
                str(run / "best"),
                {"vision.encoder": "tiny"},
            ),
            ModelRecord("untrained", "untrained", "the same with fresh heads", "", {}),
            ModelRecord("majority", "majority", "always the most frequent classes", "", {}),
            ModelRecord("chance", "chance", "a random order", "", {}),
            *([ModelRecord("CLIP", "clip", "a dual encoder trained as one", "", {"weights": "ef56"})] if whole else []),
        ),
        tasks=(
            TaskRecord("scenes", "retrieval", images, 2 * images, "", "ab12", "A small demonstration.", "", {}),
            TaskRecord(
                things,
                "classification",
                images,
                classes,
                "simple",
                "cd34",
                "A small demonstration.",
                "Pictures by nobody.",
                {"truncated": 1},
            ),
            *(
                [
                    TaskRecord("outlines", "segmentation", images, len(PARTS), "simple", "ef78", "A small demonstration.", "", {}),
                    TaskRecord(swaps, "compositional", 2 * images, 2 * images, "", "ef56", "A small demonstration.", "", {}),
                ]
                if whole
                else []
            ),
        ),
        entries=tuple(entries),
    )
    save_results(output, results)
    return results


def make_pairs(
    output: Path, task: str, groups: int, caption: str, spread: dict[str, float], made: torch.Generator, rng: np.random.Generator
) -> list[Entry]:
    """Write answers and examples of a compositional task of two categories."""
    keys = [str(number // 2) for number in range(2 * groups)]
    categories = ["left & right" if number % 3 else "<i>count</i>" for number in range(groups) for _ in (0, 1)]
    texts = [caption.format(color=COLORS[number % 10], number=f"{number} of a pair") for number in range(2 * groups)]
    matched, entries = {}, []
    for name, by in spread.items():
        truth = unit(torch.randn(2 * groups, 32, generator=made))
        matched[name] = compositional(truth, unit(truth + 4 * by * torch.randn(truth.shape, generator=made)))
        entries += compositional_entries(matched[name], "winoground", task, name, 0.95)
        save_answers(output, task, name, compositional_table(matched[name], keys, categories))
    entries += compositional_chance(groups, "winoground", task, "chance")
    chosen = compositional_examples(matched, keys, categories, texts, 4, rng)
    save_examples(output, task, chosen, [(n, picture(n)) for item in chosen["items"] for n in item["images"]])
    return entries


def make_segmentation(output: Path, images: int, spread: dict[str, float], keys: list[str], rng: np.random.Generator) -> list[Entry]:
    """Write answers and examples of the task `outlines`: maps of 4 classes in bands, of which each model gets some pixels wrong."""
    shape = (24, 24)
    (output / "examples" / "outlines").mkdir(parents=True)
    truths = [((np.add.outer(np.arange(24), np.arange(24)) + 5 * number) // 12) % len(PARTS) for number in range(images)]
    entries, items = [], []
    for n in range(2):
        place = f"outlines/{n}--truth.jpg"
        atomic_bytes(output / "examples" / place, jpeg(outlined(truths[n])))
        parts = [{"name": name, "color": color} for name, color in zip(PARTS, PART_COLORS, strict=True)]
        items.append({"image": n, "key": keys[n], "classes": parts, "truth": place, "answers": {}})
    for name, by in spread.items():
        confusions = []
        for n, truth in enumerate(truths):
            wrong = rng.random(shape) < min(0.9, by)
            maps = np.where(wrong, rng.integers(0, len(PARTS), shape), truth)
            confusions.append(confusion_matrix(truth, maps, len(PARTS)))
            if n < 2:
                place = f"outlines/{n}--{name}.jpg"
                atomic_bytes(output / "examples" / place, jpeg(outlined(maps)))
                items[n]["answers"][name] = {"overlay": place, "pixel_accuracy": float((maps == truth).mean())}
        counts = np.stack(confusions)  # (N, C, C)
        tp = counts.diagonal(axis1=1, axis2=2)
        answers = SegmentationAnswers(counts.sum(axis=0), tp, counts.sum(axis=1) - tp, counts.sum(axis=2) - tp)
        entries += segmentation_entries(answers, "outlines", name, rng, 0.95)
        table = segmentation_table(answers, keys).replace_schema_metadata({"classes": json.dumps(PARTS)})
        save_answers(output, "outlines", name, table)
    save_examples(output, "outlines", {"items": items}, [(n, picture(n)) for n in range(2)])
    return entries


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG")
    return buffer.getvalue()
