"""A results folder made of random embeddings and drawn pictures, for tests of the report and of what it reads."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from eval.examples import classification_examples, retrieval_examples, save_examples, shown_images
from eval.results import ModelRecord, Results, TaskRecord, save_answers, save_results
from eval.retrieval import retrieval_chance, retrieval_entries, retrieval_table, retrieve
from eval.zeroshot import (
    classification_chance,
    classification_entries,
    classification_table,
    majority_entries,
    zero_shot_classification,
)

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


def make_results(
    folder: Path, images: int = 40, classes: int = 30, caption: str = "a {color} shape number {number}", width: int = 32
) -> Results:
    """Write a results folder below `folder/eval` and a training run below `folder/train`; return the results."""
    output = folder / "eval"
    output.mkdir(parents=True)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    keys = [f"scene-{number:04d}" for number in range(images)]
    owner = torch.arange(images).repeat_interleave(2)
    captions = [caption.format(color=COLORS[number % 10], number=f"{number}.{part}") for number in range(images) for part in (0, 1)]
    x = unit(torch.randn(images, width))
    embeddings = {
        "trained": (x, unit(x[owner] + 0.28 * torch.randn(2 * images, width))),
        "untrained": (unit(torch.randn(images, width)), unit(torch.randn(2 * images, width))),
    }
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
    pictures = {
        "trained": unit(weights[labels] + 0.25 * torch.randn(images, width)),
        "untrained": unit(torch.randn(images, width)),
    }
    said = {}
    for name, i in pictures.items():
        said[name] = zero_shot_classification(i, weights, labels)
        entries += classification_entries(said[name], labels.numpy(), classes, "things", name, rng, 0.95)
        save_answers(output, "things", name, classification_table(said[name], keys, labels.numpy(), names))
    entries += majority_entries(labels.numpy(), classes, "things", "majority", 0.95) + classification_chance(
        images, classes, "things", "chance"
    )
    chosen = classification_examples(said, labels.numpy(), names, 6, rng)
    save_examples(output, "things", chosen, [(n, picture(n)) for n in shown_images(chosen)])

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
        ),
        tasks=(
            TaskRecord("scenes", "retrieval", images, 2 * images, "", "ab12", "A small demonstration.", "", {}),
            TaskRecord(
                "things",
                "classification",
                images,
                classes,
                "simple",
                "cd34",
                "A small demonstration.",
                "Pictures by nobody.",
                {"truncated": 1},
            ),
        ),
        entries=tuple(entries),
    )
    save_results(output, results)
    return results
