"""Measure aligned models on tasks, and write results.json, per-sample answers and a report.

    python eval/run.py --config align/recipes/quickstart.yaml
    python eval/run.py --model runs/flickr8k --tasks my_photos.yaml --data-root data --output runs/flickr8k/eval
    python eval/run.py --model glu=runs/glu linear=runs/linear --tasks sprites-unseen sprites-retrieval --no-baseline
    python eval/run.py --list-tasks

Each model is also measured with untrained heads, and classification beside the majority rate (--no-baseline: neither).
Frozen features are cached by content and encoder: a second run touches no encoder.
"""

import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.utils.logging import disable_progress_bar

from align.cli import run
from align.errors import DataError, UsageError
from align.files import hash_bytes
from align.gate import Limits, Reject, gate_image
from align.hardware import reuse_freed_memory, use_cores
from align.modeling import SailModel
from align.progress import Meter
from align.runs import generator, git_commit, versions
from eval.config import EvalConfig
from eval.examples import classification_examples, retrieval_examples, save_examples, shown_images
from eval.features import FeatureCache, aligned
from eval.page import SHOWN_METRICS, shown_value, write_report
from eval.prompts import prompt_set
from eval.results import Entry, ModelRecord, Results, TaskRecord, generated_half, merge_results, save_answers, save_results
from eval.retrieval import retrieval_chance, retrieval_entries, retrieval_table, retrieve
from eval.tasks import TASKS, TaskData, find_task, load_task, read_images
from eval.zeroshot import (
    class_weights,
    classification_chance,
    classification_entries,
    classification_table,
    majority_entries,
    zero_shot_classification,
)


@dataclass(frozen=True)
class Candidate:
    """A model to measure and what results say about it."""

    record: ModelRecord
    model: SailModel


def model_folder(path: Path) -> Path:
    """Return the model folder at `path`: itself, or the `best` or `last` model of a training run."""
    found = next((place for place in (path, path / "best", path / "last") if (place / "config.json").is_file()), None)
    if found is None:
        raise UsageError(
            f"{path} is neither a model folder (config.json) nor a training run with best/ or last/; make one with align/train.py"
        )
    return found


def open_models(config: EvalConfig, device: str) -> list[Candidate]:
    """Return the models to measure, the trained ones first, then each with untrained heads if a baseline is wanted."""
    pairs = [given.rpartition("=")[::2] for given in config.model]
    names = [name or ("trained" if len(pairs) == 1 else path) for name, path in pairs]
    if len(set(names)) < len(names):
        raise UsageError(f"two models have the same name ({', '.join(names)}); name them: --model NAME=PATH NAME=PATH")
    trained = []
    for name, (_, path) in zip(names, pairs, strict=True):
        folder = model_folder(Path(path))
        trained.append(candidate(name, "trained", SailModel.from_pretrained(folder), str(folder)))
    untrained = []
    for one in trained if config.baseline else []:
        name = "untrained" if len(trained) == 1 else f"{one.record.name} untrained"
        untrained.append(candidate(name, "untrained", one.model.untrained(config.seed), ""))
    for one in trained + untrained:
        nn.Module.to(one.model, torch.device(device))
    return trained + untrained


def candidate(name: str, kind: str, model: SailModel, folder: str) -> Candidate:
    """Return a model with its record: encoders, heads, and fingerprints of all three."""
    settings = model.config
    encoders = [Path(str(side["name"])).name for side in (settings.vision, settings.text)]
    heads = hash_bytes(b"".join(value.numpy(force=True).tobytes() for _, value in sorted(model.state_dict().items())))
    fingerprint = {f"vision {name}": value for name, value in settings.vision_fingerprint.items()}
    fingerprint |= {f"text {name}": value for name, value in settings.text_fingerprint.items()} | {"heads": heads}
    state = "" if kind == "trained" else "freshly initialized "
    description = f"{encoders[0]} + {encoders[1]}, {state}{settings.head} heads to {settings.width} dimensions"
    return Candidate(ModelRecord(name, kind, description, folder, fingerprint), model)


class Measurement:
    """Measures candidates task by task, and gathers what goes into results.json."""

    def __init__(self, config: EvalConfig, candidates: list[Candidate], console: Console) -> None:
        self.config, self.candidates, self.console = config, candidates, console
        self.output = Path(config.output)
        cache = Path(config.cache) if config.cache else self.output / "cache"
        self.cache = FeatureCache(cache, config.batch_size, config.text_batch_size, config.workers, config.max_reject_fraction)
        self.entries: list[Entry] = []
        self.tasks: list[TaskRecord] = []
        self.seconds = {"features": 0.0, "scores": 0.0}

    def measure(self, data: TaskData) -> None:
        """Measure every candidate on one task; all of them on exactly the same samples."""
        began = time.monotonic()
        features = {}
        for one in self.candidates:  # each in turn drops what its own encoder could not read
            data, _ = self.cache.images(data, one.model, Meter(self.console, f"{data.task.id}: encoded images", data.plan.rows))
        for one in self.candidates:
            features[one.record.name] = self.cache.images(data, one.model)[1]
        if data.task.kind == "classification":
            self._classification(data, features, began)
        else:
            self._retrieval(data, features, began)

    def _classification(self, data: TaskData, features: dict[str, np.ndarray], began: float) -> None:
        task, classes = data.task.id, len(data.class_names)
        prompts = prompt_set(self.config.templates or data.task.templates, data.class_names, data.folder)
        sentences = [sentence for of_class in prompts.sentences for sentence in of_class]
        texts = {one.record.name: self.cache.texts(sentences, one.model) for one in self.candidates}
        began = self._clock("features", began)
        answers = {}
        for one in self.candidates:
            name = one.record.name
            images = aligned(one.model.align_images, features[name], one.model.device)
            embedded = aligned(one.model.align_texts, texts[name], one.model.device)
            weights = class_weights(embedded, [len(of_class) for of_class in prompts.sentences])
            answers[name] = zero_shot_classification(images, weights, torch.from_numpy(data.labels))
            self.entries += classification_entries(
                answers[name], data.labels, classes, task, name, generator(self.config.seed, 11), self.config.confidence
            )
            save_answers(self.output, task, name, classification_table(answers[name], data.keys, data.labels, data.class_names))
        if self.config.baseline:
            self.entries += majority_entries(data.labels, classes, task, "majority", self.config.confidence)
            self.entries += classification_chance(len(data.keys), classes, task, "chance")
        chosen = classification_examples(answers, data.labels, data.class_names, self.config.examples, generator(self.config.seed, 12))
        save_examples(self.output, task, chosen, self._thumbnails(data, shown_images(chosen)))
        self._record(data, classes, prompts.id)
        self._clock("scores", began)

    def _retrieval(self, data: TaskData, features: dict[str, np.ndarray], began: float) -> None:
        task = data.task.id
        texts = {one.record.name: self.cache.texts(data.captions, one.model) for one in self.candidates}
        began = self._clock("features", began)
        answers, embeddings = {}, {}
        for one in self.candidates:
            name = one.record.name
            images = aligned(one.model.align_images, features[name], one.model.device)
            captions = aligned(one.model.align_texts, texts[name], one.model.device)
            embeddings[name] = (images, captions)
            answers[name] = retrieve(images, captions, torch.from_numpy(data.caption_image))
            self.entries += retrieval_entries(answers[name], task, name, generator(self.config.seed, 11), self.config.confidence)
            save_answers(self.output, task, name, retrieval_table(answers[name], data.keys, data.caption_image))
        if self.config.baseline:
            self.entries += retrieval_chance(np.bincount(data.caption_image), task, "chance")
        chosen = retrieval_examples(
            answers, embeddings, data.captions, data.caption_image, self.config.examples, generator(self.config.seed, 12)
        )
        save_examples(self.output, task, chosen, self._thumbnails(data, shown_images(chosen)))
        self._record(data, len(data.captions), "")
        self._clock("scores", began)

    def results(self) -> Results:
        """Return everything measured so far."""
        records = [one.record for one in self.candidates]
        used = {entry.model for entry in self.entries}
        descriptions = {"majority": "always names the most frequent classes", "chance": "a random order"}
        records += [ModelRecord(name, name, text, "", {}) for name, text in descriptions.items() if name in used]
        return Results(
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            command=shlex.join(["python", "eval/run.py", *sys.argv[1:]]),
            versions={**versions(), "source": git_commit() or "no git checkout"},
            seed=self.config.seed,
            confidence=self.config.confidence,
            seconds={name: round(value, 2) for name, value in self.seconds.items()},
            models=tuple(records),
            tasks=tuple(self.tasks),
            entries=tuple(self.entries),
        )

    def _record(self, data: TaskData, targets: int, prompts: str) -> None:
        task = data.task
        digest = data.digest[:16]
        self.tasks.append(TaskRecord(task.id, task.kind, len(data.keys), targets, prompts, digest, task.note, task.credit, data.rejected))

    def _thumbnails(self, data: TaskData, numbers: list[int]) -> Iterator[tuple[int, Image.Image]]:
        for number, encoded in read_images(data, numbers):
            try:
                yield number, gate_image(encoded, Limits())
            except Reject as reject:  # it was good when it was encoded
                changed = f"image {data.keys[number]!r} of {data.task.id} changed while it was measured"
                raise DataError(f"{changed} ({reject}); run again") from reject

    def _clock(self, part: str, began: float) -> float:
        now = time.monotonic()
        self.seconds[part] += now - began
        return now


def results_table(results: Results) -> Table:
    """Return the results as a table for the terminal: percents with their intervals."""
    table = Table(title="percent, with intervals; n = images or queries", title_justify="left")
    for heading in ("task", "metric", *(model.name for model in results.models), "n"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right", overflow="fold")
    for task in results.tasks:
        for metric, label in SHOWN_METRICS[task.kind].items():
            row = [results.value(task.id, metric, model.name) for model in results.models]
            found = [entry for entry in row if entry]
            if found:
                table.add_row(task.id, label, *(" ".join(shown_value(entry)) if entry else "-" for entry in row), str(found[0].n))
        table.add_section()
    return table


def main(config: EvalConfig) -> None:
    """Read the tasks, open the models, measure, save, report."""
    reuse_freed_memory()
    use_cores(1)
    console = Console()
    if config.list_tasks:
        for task in TASKS.values():
            console.print(f"{task.id}: {task.kind}, {task.layout}, in DATA_ROOT/{task.path}/{task.data}", highlight=False, soft_wrap=True)
        return
    disable_progress_bar()  # of transformers, for every checkpoint it opens
    tasks = [find_task(name) for name in config.tasks]
    data = [load_task(task, Path(config.data_root)) for task in tasks]
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    answered = generated_half(output, config.seed, config.confidence)
    job = Measurement(config, open_models(config, device), console)
    for one in data:
        job.measure(one)
    measured = job.results()
    results = merge_results(answered, measured) if answered else measured
    saved = save_results(output, results)
    console.print(results_table(measured))
    if config.report:
        began = time.monotonic()
        page = write_report(output, output, [Path(folder) for folder in config.train_runs])
        save_results(output, replace(results, seconds={**results.seconds, "report": round(time.monotonic() - began, 2)}))
        console.print(f"report: {page} (figures as PNG in {output / 'figures'})", highlight=False, soft_wrap=True)
    console.print(f"results: {saved}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run(main, EvalConfig, "eval")
