"""A measurement: all models on all tasks, on exactly the same samples. It also writes answers/ and examples/."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from align.common.seeds import generator
from align.runtime.console import Progress
from align.runtime.runs import git_commit, versions
from align.sources.gate import Limits
from align.sources.trial import try_samples
from eval.measures.compositional import (
    compositional,
    compositional_chance,
    compositional_entries,
    compositional_examples,
    compositional_table,
)
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
from eval.models.dual_encoder import DualEncoder
from eval.models.features import FeatureCache, projected
from eval.models.measured import MeasuredModel
from eval.results.examples import save_examples, shown_images
from eval.results.records import Entry, ModelRecord, Results, TaskRecord, save_answers
from eval.tasks.data import TaskData, load_task, pictures, protocol_note
from eval.tasks.masks import SegmentationData, load_segmentation
from eval.tasks.prompts import prompt_set
from eval.tasks.task import Task

DESCRIPTIONS = {"majority": "always names the most frequent class", "chance": "a random order"}


def read_task(task: Task, root: Path, cache: Path, max_reject_fraction: float) -> TaskData | SegmentationData:
    """Return a task's samples; DataError, which says what to put where, if its data is missing or unusable."""
    if task.kind == "segmentation":
        return load_segmentation(task, root, max_reject_fraction=max_reject_fraction)
    data = load_task(task, root, cache=cache)
    limits = Limits(gray_bits=task.gray_bits)
    tried = try_samples(data.source, data.plan, (), True, limits, max_reject_fraction)  # before a model is loaded
    return replace(data, remarks=(*data.remarks, *tried))


@dataclass
class Measurement:
    """Measures all models task by task, and writes answers and examples to `output`. The options are those of `EvalConfig`."""

    models: Sequence[MeasuredModel]
    cache: FeatureCache
    output: Path
    console: Console
    templates: str | None = None
    windows: Windows = Windows()
    baseline: bool = True
    examples: int = 8
    seed: int = 0
    confidence: float = 0.95
    entries: list[Entry] = field(default_factory=list)
    tasks: list[TaskRecord] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"features": 0.0, "scores": 0.0})

    def measure(self, data: TaskData | SegmentationData) -> None:
        """Measure every model on one task."""
        began = time.monotonic()
        if isinstance(data, SegmentationData):
            self._segmentation(data, began)
            return
        for one in self.models:  # each encoder drops the images it cannot read, so that all models keep the same ones
            data, _ = self.cache.images(data, one.model, Progress(self.console, f"{data.task.id}: encoded images", data.plan.rows))
        features = {one.record.name: self.cache.images(data, one.model)[1] for one in self.models}
        of_kind = {"classification": self._classification, "retrieval": self._retrieval, "compositional": self._compositional}
        of_kind[data.task.kind](data, features, began)

    def results(self, command: str) -> Results:
        """Return everything measured so far. `command` is the command line that was run."""
        used = {entry.model for entry in self.entries}
        constant = [ModelRecord(name, name, text, "", {}) for name, text in DESCRIPTIONS.items() if name in used]
        return Results(
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            command=command,
            versions={**versions(), "source": git_commit() or "no git checkout"},
            seed=self.seed,
            confidence=self.confidence,
            seconds={name: round(value, 2) for name, value in self.seconds.items()},
            models=(*(one.record for one in self.models), *constant),
            tasks=tuple(self.tasks),
            entries=tuple(self.entries),
        )

    def _classification(self, data: TaskData, features: dict[str, np.ndarray], began: float) -> None:
        task, classes, answers = data.task.id, len(data.class_names), {}
        prompts = prompt_set(self.templates or data.task.templates, data.class_names, data.folder)
        prompted = self._prompted(prompts.sentences)
        began = self._clock("features", began)
        for one, told in zip(self.models, prompted, strict=True):
            images = projected(one.model.project_image, features[one.record.name], one.model.device)
            said = zero_shot_classification(images, told.weights, torch.from_numpy(data.labels), scale=one.model.scale)
            answers[name := one.record.name] = said
            self.entries += classification_entries(said, data.labels, classes, task, name, generator(self.seed, 11), self.confidence)
            save_answers(self.output, task, name, classification_table(said, data.keys, data.labels, data.class_names))
        if self.baseline:
            self.entries += majority_entries(data.labels, classes, task, "majority", self.confidence)
            self.entries += classification_chance(len(data.keys), classes, task, "chance")
        chosen = classification_examples(answers, data.labels, data.class_names, self.examples, generator(self.seed, 12))
        self._finish(data, classes, prompts.id, chosen, began)

    def _retrieval(self, data: TaskData, features: dict[str, np.ndarray], began: float) -> None:
        task, owner, answers = data.task.id, data.caption_image, {}
        embeddings = self._of_captions(data, features)
        began = self._clock("features", began)
        for name, (images, captions) in embeddings.items():
            answers[name] = retrieve(images, captions, torch.from_numpy(owner))
            self.entries += retrieval_entries(answers[name], task, name, generator(self.seed, 11), self.confidence)
            save_answers(self.output, task, name, retrieval_table(answers[name], data.keys, owner))
        if self.baseline:
            self.entries += retrieval_chance(np.bincount(owner), task, "chance")
        chosen = retrieval_examples(answers, embeddings, data.captions, owner, self.examples, generator(self.seed, 12))
        self._finish(data, len(data.captions), "", chosen, began)

    def _compositional(self, data: TaskData, features: dict[str, np.ndarray], began: float) -> None:
        task, protocol, answers = data.task.id, data.task.protocol, {}
        embeddings = self._of_captions(data, features)
        began = self._clock("features", began)
        for name, (images, captions) in embeddings.items():
            answers[name] = compositional(images, captions)
            self.entries += compositional_entries(answers[name], protocol, task, name, self.confidence)
            save_answers(self.output, task, name, compositional_table(answers[name], data.groups, data.categories))
        if self.baseline:
            self.entries += compositional_chance(len(data.keys) // 2, protocol, task, "chance")
        chosen = compositional_examples(answers, data.groups, data.categories, data.captions, self.examples, generator(self.seed, 12))
        self._finish(data, len(data.captions), "", chosen, began)

    def _segmentation(self, data: SegmentationData, began: float) -> None:
        task, answers = data.task.id, {}
        prompts = prompt_set(self.templates or data.task.templates, data.names, data.folder)
        report = Progress(self.console, f"{task}: images segmented", first=None)
        found = label_maps(data, self._prompted(prompts.sentences), self.cache.folder, windows=self.windows, report=report)
        maps = {one.record.name: of_model for one, of_model in zip(self.models, found, strict=True)}
        began = self._clock("features", began)
        for name, predicted in maps.items():
            answers[name] = segmentation_answers(data, predicted)
            self.entries += segmentation_entries(answers[name], task, name, generator(self.seed, 11), self.confidence)
            table = segmentation_table(answers[name], data.keys)
            save_answers(self.output, task, name, table.replace_schema_metadata({"classes": json.dumps(data.class_names)}))
        if self.baseline:
            most = majority_answers(next(iter(answers.values())))
            self.entries += segmentation_entries(most, task, "majority", generator(self.seed, 11), self.confidence)
        chosen = segmentation_examples(self.output, data, maps, self.examples, generator(self.seed, 12))
        noted = protocol_note(data.task, len(data.keys))
        if self.windows != Windows():
            noted = replace(noted, note=f"{self.windows}, not the default. {noted.note}".strip())
        self._finish(replace(data, task=noted), len(data.class_names), prompts.id, chosen, began)

    def _prompted(self, sentences: Sequence[Sequence[str]]) -> list[Prompted]:
        """Return every model with one embedding per class name: the mean over the name's `sentences`."""
        texts, counts = list(chain.from_iterable(sentences)), [len(of_name) for of_name in sentences]
        weights = [class_weights(self._embedded(one.model, texts), counts) for one in self.models]
        return [Prompted(one.model, one.record.fingerprint, w, sentences) for one, w in zip(self.models, weights, strict=True)]

    def _of_captions(self, data: TaskData, features: dict[str, np.ndarray]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return each model's embeddings of a task's images (N, E) and captions (M, E), by model name."""
        found = {}
        for name, model in ((one.record.name, one.model) for one in self.models):
            found[name] = (projected(model.project_image, features[name], model.device), self._embedded(model, data.captions))
        return found

    def _embedded(self, model: DualEncoder, texts: Sequence[str]) -> Tensor:
        return projected(model.project_text, self.cache.texts(texts, model), model.device)

    def _finish(self, data: TaskData | SegmentationData, targets: int, prompts: str, chosen: dict[str, Any], began: float) -> None:
        """Write a task's examples, record what was measured, and add the time for scoring."""
        task, numbers = data.task, shown_images(chosen)
        images = ((n, data.image(n)) for n in numbers) if isinstance(data, SegmentationData) else pictures(data, numbers)
        save_examples(self.output, task.id, chosen, images)
        digest = data.digest[:16]
        self.tasks.append(TaskRecord(task.id, task.kind, len(data.keys), targets, prompts, digest, task.note, task.credit, data.rejected))
        self._clock("scores", began)

    def _clock(self, part: str, began: float) -> float:
        now = time.monotonic()
        self.seconds[part] += now - began
        return now
