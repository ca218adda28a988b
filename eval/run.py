"""Measure aligned models on tasks, and write results.json, per-sample answers and a report.

    python eval/run.py --config align/recipes/quickstart.yaml
    python eval/run.py --model runs/flickr8k --tasks my_photos.yaml --data-root data --output runs/flickr8k/eval
    python eval/run.py --model glu=runs/glu linear=runs/linear --tasks sprites-unseen sprites-retrieval --no-baseline
    python eval/run.py --model runs/mine openclip:ViT-L-14/openai SigLIP=hf:google/siglip-base-patch16-224 --tasks imagenet1k
    python eval/run.py --compare runs/a/eval runs/b/eval:trained --output runs/comparison
    python eval/run.py --list-tasks

Each aligned model is also measured with untrained heads, and classification beside the majority rate (--no-baseline: neither).
Models trained as one (openclip:ARCH/TAG, openclip:ARCH/FILE.safetensors, hf:FOLDER) are measured beside them on the same samples.
Frozen features are cached by content and encoder: a second run runs no encoder.
"""

import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from align.common.commandline import run
from align.common.console import Progress, plain_console
from align.common.errors import DataError
from align.common.hardware import reuse_freed_memory, use_cores
from align.common.reject_codes import Reject
from align.common.runs import git_commit, versions
from align.common.seeds import generator
from align.sources.gate import Limits, gate_image
from eval.measures.compositional import (
    compositional,
    compositional_chance,
    compositional_entries,
    compositional_examples,
    compositional_table,
)
from eval.measures.config import EvalConfig
from eval.measures.retrieval import retrieval_chance, retrieval_entries, retrieval_examples, retrieval_table, retrieve
from eval.measures.segmentation import (
    Prompted,
    label_maps,
    majority_answers,
    segmentation_answers,
    segmentation_entries,
    segmentation_examples,
    segmentation_table,
)
from eval.measures.windows import Windows
from eval.measures.zeroshot import (
    class_weights,
    classification_chance,
    classification_entries,
    classification_examples,
    classification_table,
    majority_entries,
    zero_shot_classification,
)
from eval.models.features import FeatureCache, aligned
from eval.models.measured import MeasuredModel, load_models
from eval.page.page import SHOWN_METRICS, shown_value, write_comparison, write_report
from eval.results.compare import compare, comparison_table, save_comparison
from eval.results.examples import save_examples, shown_images
from eval.results.records import Entry, ModelRecord, Results, TaskRecord, generated_half, merge_results, save_answers, save_results
from eval.tasks.data import TASKS, Task, TaskData, describe, find_task, load_task, protocol_note, read_images
from eval.tasks.masks import SegmentationData, load_segmentation
from eval.tasks.prompts import prompt_set

TaskLike = TaskData | SegmentationData


def open_task(task: Task, config: EvalConfig) -> TaskLike:
    """Return the samples of a task, read as its kind is; DataError, saying what to put where, if its data is missing or unusable."""
    root = Path(config.data_root)
    if task.kind == "segmentation":
        return load_segmentation(task, root, max_reject_fraction=config.max_reject_fraction)
    return load_task(task, root, cache=cache_folder(config))


def cache_folder(config: EvalConfig) -> Path:
    """Return the folder for what can be computed again."""
    return Path(config.cache) if config.cache else Path(config.output) / "cache"


class Measurement:
    """Measures models task by task, and gathers what goes into results.json."""

    def __init__(self, config: EvalConfig, models: list[MeasuredModel], console: Console) -> None:
        self.config, self.models, self.console = config, models, console
        self.output = Path(config.output)
        self.cache = FeatureCache(
            cache_folder(config), config.batch_size, config.text_batch_size, config.workers, config.max_reject_fraction
        )
        self.entries: list[Entry] = []
        self.tasks: list[TaskRecord] = []
        self.seconds = {"features": 0.0, "scores": 0.0}

    def measure(self, data: TaskLike) -> None:
        """Measure every model on one task; all of them on exactly the same samples."""
        began = time.monotonic()
        if isinstance(data, SegmentationData):
            self._segmentation(data, began)
            return
        features = {}
        for one in self.models:  # each in turn drops what its own encoder could not read
            data, _ = self.cache.images(data, one.model, Progress(self.console, f"{data.task.id}: encoded images", data.plan.rows))
        for one in self.models:
            features[one.record.name] = self.cache.images(data, one.model)[1]
        of_kind = {"classification": self._classification, "retrieval": self._retrieval, "compositional": self._compositional}
        of_kind[data.task.kind](data, features, began)

    def _classification(self, data: TaskData, features: dict[str, np.ndarray], began: float) -> None:
        task, classes = data.task.id, len(data.class_names)
        prompts = prompt_set(self.config.templates or data.task.templates, data.class_names, data.folder)
        sentences = [sentence for of_class in prompts.sentences for sentence in of_class]
        texts = {one.record.name: self.cache.texts(sentences, one.model) for one in self.models}
        began = self._clock("features", began)
        answers = {}
        for one in self.models:
            name = one.record.name
            images = aligned(one.model.project_image, features[name], one.model.device)
            embedded = aligned(one.model.project_text, texts[name], one.model.device)
            weights = class_weights(embedded, [len(of_class) for of_class in prompts.sentences])
            answers[name] = zero_shot_classification(images, weights, torch.from_numpy(data.labels), scale=one.model.scale)
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
        embeddings = self._embeddings(data, features)
        began = self._clock("features", began)
        answers = {}
        for name, (images, captions) in embeddings.items():
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

    def _compositional(self, data: TaskData, features: dict[str, np.ndarray], began: float) -> None:
        task, protocol = data.task.id, data.task.protocol
        embeddings = self._embeddings(data, features)
        began = self._clock("features", began)
        answers = {}
        for name, (images, captions) in embeddings.items():
            answers[name] = compositional(images, captions)
            self.entries += compositional_entries(answers[name], protocol, task, name, self.config.confidence)
            save_answers(self.output, task, name, compositional_table(answers[name], data.groups, data.categories))
        if self.config.baseline:
            self.entries += compositional_chance(len(data.keys) // 2, protocol, task, "chance")
        chosen = compositional_examples(
            answers, data.groups, data.categories, data.captions, self.config.examples, generator(self.config.seed, 12)
        )
        save_examples(self.output, task, chosen, self._thumbnails(data, shown_images(chosen)))
        self._record(data, len(data.captions), "")
        self._clock("scores", began)

    def _segmentation(self, data: SegmentationData, began: float) -> None:
        task, seed = data.task.id, self.config.seed
        prompts = prompt_set(self.config.templates or data.task.templates, data.names, data.folder)
        sentences = [sentence for of_name in prompts.sentences for sentence in of_name]
        prompted = []
        for one in self.models:
            embedded = aligned(one.model.project_text, self.cache.texts(sentences, one.model), one.model.device)
            weights = class_weights(embedded, [len(of_name) for of_name in prompts.sentences])  # of each name
            prompted.append(Prompted(one.model, one.record.fingerprint, weights, prompts.sentences))
        windows = Windows(*self.config.windows)
        report = Progress(self.console, f"{task}: images segmented", first=None)
        found = label_maps(data, prompted, cache_folder(self.config), windows=windows, report=report)
        maps = {one.record.name: of_model for one, of_model in zip(self.models, found, strict=True)}
        began = self._clock("features", began)
        answers = {}
        for name, predicted in maps.items():
            answers[name] = segmentation_answers(data, predicted)
            self.entries += segmentation_entries(answers[name], task, name, generator(seed, 11), self.config.confidence)
            table = segmentation_table(answers[name], data.keys)
            save_answers(self.output, task, name, table.replace_schema_metadata({"classes": json.dumps(data.class_names)}))
        if self.config.baseline:
            most = majority_answers(next(iter(answers.values())))
            self.entries += segmentation_entries(most, task, "majority", generator(seed, 11), self.config.confidence)
        chosen = segmentation_examples(self.output, data, maps, self.config.examples, generator(seed, 12))
        save_examples(self.output, task, chosen, ((number, data.image(number)) for number in shown_images(chosen)))
        noted = protocol_note(data.task, len(data.keys))
        if windows != Windows():
            noted = replace(noted, note=f"{windows}, not the default. {noted.note}".strip())
        self._record(replace(data, task=noted), len(data.class_names), prompts.id)
        self._clock("scores", began)

    def _embeddings(self, data: TaskData, features: dict[str, np.ndarray]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return every model's embeddings of the images (N, E) and captions (M, E) of a task."""
        found = {}
        for one in self.models:
            images = aligned(one.model.project_image, features[one.record.name], one.model.device)
            captions = aligned(one.model.project_text, self.cache.texts(data.captions, one.model), one.model.device)
            found[one.record.name] = (images, captions)
        return found

    def results(self) -> Results:
        """Return everything measured so far."""
        records = [one.record for one in self.models]
        used = {entry.model for entry in self.entries}
        descriptions = {"majority": "always names the most frequent class", "chance": "a random order"}
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

    def _record(self, data: TaskLike, targets: int, prompts: str) -> None:
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
    console = plain_console()
    if config.list_tasks:
        for task in TASKS.values():
            console.print(describe(task))
        return
    if config.compare:
        first, second = config.compare
        comparison = compare(first, second, generator(config.seed, 13), config.seed, config.confidence)
        saved = save_comparison(Path(config.output), comparison)
        console.print(comparison_table(comparison))
        console.print(f"report: {write_comparison(comparison, saved.parent)}")
        return
    disable_progress_bar()  # of transformers, for every checkpoint it opens
    tasks = [find_task(name) for name in config.tasks]
    data = [open_task(task, config) for task in tasks]  # all of them, so that wrong data is told before hours of encoding
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    answered = generated_half(output, config.seed, config.confidence)
    trusted = config.trust_remote_code
    models = load_models(config.model, device, untrained=config.baseline, seed=config.seed, trust_remote_code=trusted)
    job = Measurement(config, models, console)
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
        console.print(f"report: {page} (figures as PNG in {output / 'figures'})")
    console.print(f"results: {saved}")


if __name__ == "__main__":
    run(main, EvalConfig, "eval")
