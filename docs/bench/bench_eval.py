"""Measure a whole evaluation against CLIP_benchmark's on the same model, images and prompts; the result is `eval.md` beside this file.

    python docs/bench/bench_eval.py
    python docs/bench/bench_eval.py --classes 1000 --images 5000

Zero-shot classification as on ImageNet (80 templates a class) runs from opening the files of a small random open_clip model to the
numbers: by eval/run.py (which also writes intervals, answers and examples), again by it with features cached, and by
CLIP_benchmark's loop. Retrieval ranks random embeddings of the size of COCO's Karpathy test split. Each way has a process of its
own. Times are CPU seconds of one thread, on which other work on the machine has little influence.
"""

import json
import multiprocessing
import os
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import tyro
from bench_loss import machine
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from align.common.hardware import reuse_freed_memory
from align.common.seeds import generator
from eval.measures.config import EvalConfig
from eval.measures.retrieval import KS, retrieval_entries, retrieve
from eval.results.records import load_answers, load_results
from eval.run import main as run_eval
from eval.tasks.prompts import TEMPLATES, package_classes

ARCHITECTURE = "bench-small"
MODEL = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 224, "layers": 6, "width": 256, "head_width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}
OURS, AGAIN, THEIRS, KEPT = "eval/run.py", "eval/run.py, second run", "CLIP_benchmark", "CLIP_benchmark, freed memory kept"


@dataclass(frozen=True)
class BenchConfig:
    """Sizes to measure; the defaults take about two minutes."""

    classes: int = 50
    """Classes, each with 80 sentences."""
    images: int = 400
    """JPEGs of 500 x 375 to classify."""
    batch: int = 64
    """Images a forward pass."""
    pairs: tuple[int, int] = (5_000, 25_000)
    """Images and captions to retrieve."""
    width: int = 512
    """Aligned width E of retrieval."""
    output: Path = Path(__file__).with_name("eval.md")
    """Where the tables are written."""


@dataclass(frozen=True)
class Measured:
    """CPU seconds, bytes of memory gained at the peak, metrics, and what was answered to each image."""

    seconds: float
    gained: int
    metrics: dict[str, float]
    answers: np.ndarray


def measured(work: Callable[[], tuple[dict[str, float], np.ndarray]]) -> Measured:
    """Return what `work` cost and found, on one thread and without what it prints."""
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        metrics, answers = work()
    seconds = time.process_time() - began
    return Measured(seconds, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), metrics, answers)


def in_new_process(function: Callable[..., Measured], *arguments: Any) -> Measured:
    """Return what `function` finds in a process of its own, so that memory peaks and allocator settings do not mix."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def make_world(folder: Path, config: BenchConfig) -> None:
    """Write a random model, its architecture, and a task of images in folders named by class number."""
    (folder / f"{ARCHITECTURE}.json").write_text(json.dumps(MODEL))
    open_clip.add_model_config(folder / f"{ARCHITECTURE}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(ARCHITECTURE)
    with torch.no_grad():  # as it is initialized, it would answer the same to every image
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.visual.class_embedding.zero_()
        model.visual.positional_embedding.zero_()
    save_file(model.state_dict(), folder / "model.safetensors")
    random = np.random.default_rng(0)
    for number in range(config.images):
        place = folder / "photos" / f"{number % config.classes:04d}"
        place.mkdir(parents=True, exist_ok=True)
        blots = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        blots.resize((500, 375), Image.Resampling.BICUBIC).save(place / f"{number:06d}.jpg", quality=90)
    names = class_names(config)
    (folder / "photos" / "classnames.txt").write_text("".join(f"{number:04d}\t{name}\n" for number, name in enumerate(names)))
    (folder / "photos.yaml").write_text(
        "id: photos\nkind: classification\nlayout: folder\npath: photos\nclasses: classnames.txt\ntemplates: imagenet80\n"
    )


def class_names(config: BenchConfig) -> list[str]:
    """Return the first names of ImageNet's classes."""
    return list(package_classes("imagenet1k")[: config.classes])


def ours(folder: Path, config: BenchConfig) -> Measured:
    """Measure eval/run.py; a second call finds the features of the first."""
    open_clip.add_model_config(folder / f"{ARCHITECTURE}.json")
    if hasattr(os, "sched_setaffinity"):  # eval/run.py takes every core that it may use
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    def work() -> tuple[dict[str, float], np.ndarray]:
        run_eval(
            EvalConfig(
                model=(f"small=openclip:{ARCHITECTURE}/{folder}/model.safetensors",),
                tasks=(str(folder / "photos.yaml"),),
                data_root=str(folder),
                output=str(folder / "out"),
                workers=0,
                batch_size=config.batch,
                device="cpu",
                report=False,
            )  # fmt: skip
        )
        results = load_results(folder / "out")
        metrics = {name: results.value("photos", name, "small").value for name in ("acc@1", "acc@5", "mean_per_class")}
        return metrics, load_answers(folder / "out", "photos", "small")["predicted"].to_numpy()

    return measured(work)


def theirs(folder: Path, config: BenchConfig, keep: bool) -> Measured:
    """Measure what CLIP_benchmark's `evaluate` does, step by step to know each answer; `keep`: freed memory is kept, as in eval/run.py."""
    open_clip.add_model_config(folder / f"{ARCHITECTURE}.json")
    # numpy no longer turns an array of one element into a float, which clip_benchmark 1.6 asks of it
    setattr(zeroshot_classification, "float", lambda array: array.item())  # noqa: B010
    if keep:
        reuse_freed_memory()

    def work() -> tuple[dict[str, float], np.ndarray]:
        model, _, transform = open_clip.create_model_and_transforms(ARCHITECTURE, pretrained=str(folder / "model.safetensors"))
        model.eval()
        loader = DataLoader(ImageFolder(str(folder / "photos"), transform), config.batch)
        classifier = zeroshot_classification.zero_shot_classifier(
            model, open_clip.get_tokenizer(ARCHITECTURE), class_names(config), list(TEMPLATES["imagenet80"]), "cpu", amp=False
        )
        logits, labels = zeroshot_classification.run_classification(model, classifier, loader, "cpu", amp=False)
        first, fifth = zeroshot_classification.accuracy(logits, labels, topk=(1, 5))
        answers = logits.argmax(1).numpy()
        return {"acc@1": first, "acc@5": fifth, "mean_per_class": float(balanced_accuracy_score(labels, answers))}, answers

    return measured(work)


def embeddings(config: BenchConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return images (N, E), captions (M, E) near them, and the image of each caption (M,)."""
    random = torch.Generator().manual_seed(0)
    images, captions = config.pairs
    owner = torch.arange(images).repeat_interleave(captions // images)
    seen = normalize(torch.randn(images, config.width, generator=random), dim=1)
    noise = normalize(torch.randn(len(owner), config.width, generator=random), dim=1)
    return seen, normalize(seen[owner] + 5 * noise, dim=1), owner


def our_retrieval(config: BenchConfig, intervals: bool) -> Measured:
    """Measure exact ranks in chunks and the ten best answers to each query, with or without metrics and their intervals."""
    images, captions, owner = embeddings(config)
    reuse_freed_memory()

    def work() -> tuple[dict[str, float], np.ndarray]:
        answers = retrieve(images, captions, owner)
        if intervals:
            entries = retrieval_entries(answers, "t", "m", generator(0, 11), 0.95)
            return {entry.metric: entry.value for entry in entries if "median" not in entry.metric}, np.zeros(0)
        sides = {"i2t": answers.i2t_ranks, "t2i": answers.t2i_ranks}
        return {f"{side}_r@{k}": float((ranks <= k).mean()) for side, ranks in sides.items() for k in KS}, np.zeros(0)

    return measured(work)


def their_retrieval(config: BenchConfig) -> Measured:
    """Measure CLIP_benchmark's loop with a model that only looks embeddings up."""
    images, captions, owner = embeddings(config)
    each = len(captions) // len(images)
    reuse_freed_memory()

    class Looking:
        encode_image = staticmethod(lambda rows: rows)
        encode_text = staticmethod(lambda numbers: captions[numbers])

    starts = range(0, len(images), config.batch)
    numbers = torch.arange(len(captions)).view(-1, each).tolist()
    loader = [(images[at : at + config.batch], numbers[at : at + config.batch]) for at in starts]

    def work() -> tuple[dict[str, float], np.ndarray]:
        found = zeroshot_retrieval.evaluate(Looking(), loader, torch.tensor, "cpu", amp=False, recall_k_list=list(KS))
        sides = {"i2t": "text", "t2i": "image"}
        return {f"{side}_r@{k}": found[f"{name}_retrieval_recall@{k}"] for side, name in sides.items() for k in KS}, np.zeros(0)

    return measured(work)


def classification(config: BenchConfig) -> list[str]:
    """Return a table of the four ways to classify; AssertionError if their answers differ by more than features in fp16 explain."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_world(folder, config)
        ways = {OURS: in_new_process(ours, folder, config), AGAIN: in_new_process(ours, folder, config)}
        ways[THEIRS] = in_new_process(theirs, folder, config, False)
        ways[KEPT] = in_new_process(theirs, folder, config, True)
    lines = [
        f"{config.classes:,} classes x 80 templates, {config.images:,} JPEGs of 500 x 375, batches of {config.batch}.",
        "",
        "| way | s | CLIP_benchmark / way | acc@1 | acc@5 | mean per class | first answers as CLIP_benchmark's |",
        "|---|---|---|---|---|---|---|",
    ]
    base = ways[THEIRS]
    assert ways[OURS].metrics == ways[AGAIN].metrics and (ways[OURS].answers == ways[AGAIN].answers).all()
    assert len(np.unique(base.answers)) > 1, "a model that always answers the same compares nothing"
    for way, one in ways.items():
        same = float((one.answers == base.answers).mean())
        assert same >= 0.99, f"{way}: {1 - same:.1%} of the first answers differ"
        assert all(abs(one.metrics[metric] - value) <= 0.01 for metric, value in base.metrics.items()), f"{one.metrics}, {base.metrics}"
        shown = " | ".join(f"{value:.2%}" for value in one.metrics.values())
        lines.append(f"| {way} | {one.seconds:.1f} | {base.seconds / one.seconds:.1f} | {shown} | {same:.1%} |")
    return lines


def retrieval(config: BenchConfig) -> list[str]:
    """Return a table of the ways to rank; AssertionError if recalls differ."""
    ways = {
        "exact ranks in chunks, ten best answers": in_new_process(our_retrieval, config, False),
        "the same, and intervals": in_new_process(our_retrieval, config, True),
        "CLIP_benchmark": in_new_process(their_retrieval, config),
    }
    images, captions = config.pairs
    lines = [
        f"{images:,} images x {captions:,} captions, E = {config.width}; memory = gained at the peak, without the embeddings given.",
        "",
        "| way | s | MiB | " + " | ".join(f"{side} R@{k}" for side in ("i2t", "t2i") for k in KS) + " |",
        "|---|---|---|" + "---|" * 2 * len(KS),
    ]
    base = ways["CLIP_benchmark"].metrics
    for way, one in ways.items():
        # a query may change sides where two cosines differ by their last bit, which depends on the shape of the product
        assert all(abs(one.metrics[metric] - value) < 2 / images for metric, value in base.items()), f"{one.metrics}, {base}"
        shown = " | ".join(f"{one.metrics[f'{side}_r@{k}']:.2%}" for side in ("i2t", "t2i") for k in KS)
        lines.append(f"| {way} | {one.seconds:.1f} | {one.gained / 2**20:,.0f} | {shown} |")
    return lines


def main() -> None:
    """Measure both, print the tables and write them with command and machine."""
    config = tyro.cli(BenchConfig)
    lines = [
        "# A whole evaluation against CLIP_benchmark's loop",
        "",
        f"Command: `python {shlex.join(['docs/bench/bench_eval.py', *sys.argv[1:]])}`",
        "",
        f"Machine: {machine()}. Times are CPU seconds of one thread.",
        "",
        *classification(config),
        "",
        "The model is random, so accuracies are near chance; what is compared is the first answer to every image. Ours come from features",
        "kept as float16. eval/run.py also hashes the data and writes intervals, answers and examples; its page is left out.",
        "",
    ]
    print("\n".join(lines))
    table = retrieval(config)
    print("\n".join(table))
    config.output.write_text("\n".join([*lines, *table]) + "\n")


if __name__ == "__main__":
    main()
