"""Scores of every candidate over the images that all stores share. Scores computed earlier are read from the cache."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.assessment import worth
from align.assessment.candidates import Candidate, captions_of, feature_columns, read_labels, rows_of, texts_of, unique_keys
from align.assessment.encoding import EncodedVision, Sample
from align.assessment.probing import CaptionedFeatures
from align.assessment.scores import Score, Scorer, Settings, TextSide, cached
from align.assessment.tables import Assessed, ranked
from align.assessment.worth import Worth
from align.common.errors import DataError
from align.common.files import hash_bytes, hash_file
from align.runtime.console import Progress

FEW_OF_CLASS = 8  # labelled images per class; with fewer, most of the 20 neighbors are of other classes


class Assessment:
    """All candidates and the data they are scored on: stores, captions, labels and splits."""

    def __init__(
        self, folder: Path, pairs: Sample, visions: Sequence[EncodedVision], texts: Sequence[str], captions: Sequence[str],
        settings: Settings, device: torch.device, patches: bool,
    ) -> None:  # fmt: skip
        """`captions` are the columns that every text encoder encoded. `folder` is the score cache. `patches`: stores of patches exist."""
        self.pairs, self.visions, self.settings, self.with_patches = pairs, visions, settings, patches
        self.stores = {(v.name, layer): pairs.store(v.name, f"layer-{layer:02d}") for v in visions for layer in v.layers}
        self.columns = captions
        self.captioned = captioned = {name: [pairs.store(name, f"captions-{column}") for column in captions] for name in texts}
        every = [*self.stores.values(), *itertools.chain(*captioned.values())]
        common = set.intersection(*map(unique_keys, every))
        self.keys = [key for key in every[0].keys.to_pylist() if key in common]
        self.scorer, self.cached = Scorer(settings, len(self.keys), device), partial(cached, folder)
        self.texts = {name: TextSide(*captions_of(stores, self.keys), self.scorer.sample, device) for name, stores in captioned.items()}
        self.text_fingerprints = {name: [store.fingerprint for store in stores] for name, stores in captioned.items()}
        self.facts: dict[str, Any] = {"data": pairs.plan.digest, "keys": hash_bytes(repr(self.keys).encode())}
        self.draws = {"resamples": settings.resamples, "seed": settings.seed}
        self.labelled: Sample | None = None
        self.labels: dict[str, int] = {}  # by key
        self.label_column = ""

    @property
    def test_weights(self) -> np.ndarray:
        """Bootstrap weights (R, n) over the test images of the probes."""
        return self.scorer.resamples(len(self.scorer.rows[2]))

    def add_labels(self, labelled: Sample, column: str) -> str:
        """Also score by the classes in `column` of the labelled images. Return a warning if there are too few, else an empty string."""
        self.labelled, self.label_column = labelled, column
        self.labels = read_labels(labelled.source, labelled.plan, column)
        classes = len(set(self.labels.values()))
        if len(self.labels) >= FEW_OF_CLASS * classes:
            return ""
        return (
            f"{len(self.labels)} labelled images of {classes} classes: below {FEW_OF_CLASS} a class, k-NN and the linear probe say little; "
            "raise --labelled-rows or give --labelled more images"
        )

    def results(self) -> Iterator[Assessed]:
        """Yield every candidate with its scores; scores that are not in the cache are computed."""
        for vision in self.visions:
            for layer in vision.layers:
                yield from self._of_layer(vision, layer)

    def _of_layer(self, vision: EncodedVision, layer: int) -> Iterator[Assessed]:
        store, scorer = self.stores[vision.name, layer], self.scorer
        rows = rows_of(store, self.keys)
        patches = {text: self._patch_scores(vision, layer, text) if self.with_patches else {} for text in self.texts}
        for feature in vision.features:
            columns = feature_columns(rows, feature, vision.has_cls)
            image = {**store.fingerprint, "feature": feature}
            classes = self._class_scores(vision, layer, feature, image) if self.labelled else {}
            for text, side in self.texts.items():
                fingerprints = self.text_fingerprints[text]
                facts = {**self.facts, "settings": asdict(self.settings), "image": image, "texts": fingerprints}
                probing = self.cached({**facts, "kind": "probing"}, partial(scorer.probing, columns, side))
                relations = self.cached({**facts, "kind": "relations"}, partial(scorer.relations, columns, side))
                stored = (store.fingerprint, fingerprints[0]) if image == store.fingerprint else None
                candidate = Candidate(vision.name, layer, feature, text, vision.random)
                yield Assessed(candidate, {**probing, **classes, **relations, **patches[text]}, stored)

    def _patch_scores(self, vision: EncodedVision, layer: int, text: str) -> dict[str, Score]:
        store = self.pairs.store(vision.name, f"patches-{layer:02d}")
        there = unique_keys(store)
        rows = np.array([row for row, key in enumerate(self.keys) if key in there])
        width = self.stores[vision.name, layer].width // (2 if vision.has_cls else 1)
        facts = {**self.facts, **self.draws, "kind": "patches", "image": store.fingerprint, "texts": self.text_fingerprints[text]}
        captioned = [self.keys[row] for row in rows]
        return self.cached(facts, lambda: self.scorer.patches(rows_of(store, captioned), width, self.texts[text].mean_of(rows)))

    def _class_scores(self, vision: EncodedVision, layer: int, feature: str, image: dict[str, Any]) -> dict[str, Score]:
        assert self.labelled is not None
        store = self.labelled.store(vision.name, f"layer-{layer:02d}")
        keys = sorted(unique_keys(store) & self.labels.keys())
        if not keys:
            raise DataError(f"{self.labelled.source.data}: no usable image has a class in {self.label_column!r}; give --label-column")
        facts: dict[str, Any] = {"kind": "classes", "image": image, "data": self.labelled.plan.digest, "column": self.label_column}
        facts |= {"neighbors": self.settings.class_neighbors, **self.draws}
        numbers = np.array([self.labels[key] for key in keys])
        columns = partial(feature_columns, feature=feature, has_cls=vision.has_cls)
        return self.cached(facts, lambda: self.scorer.with_labels(columns(rows_of(store, keys)), numbers))

    def worth_of_best(self, results: Sequence[Assessed], count: int, runs: Sequence[str], progress: Callable[..., Progress]) -> list[Worth]:
        """Return what the alignment of the `count` best candidates is worth to an MLLM: in closed form, and by each run of its features.

        `progress(what, total)` makes progress lines.
        """
        order, found = np.concatenate(self.scorer.rows[::-1]), []  # the test images first
        for result in ranked(results)[:count]:
            named = f"worth of {result.candidate.name}: curves fitted"
            matching = [run for run in runs if result.fingerprints and worth.fingerprints_of(Path(run)) == result.fingerprints]
            for run in ["", *matching]:
                seen = worth.keys_seen_by(Path(run)) if run else set()
                unseen = order[[seen is not None and self.keys[row] not in seen for row in order]][: len(self.scorer.rows[2])]
                enough = not run or len(unseen) >= worth.LEAST_TEST
                told = progress(named, len(worth.plan_of(len(self.scorer.rows[0]))))
                found.append(Worth(result.candidate, run, self._worth(result.candidate, run, unseen, told) if enough else None))
        return found

    def _worth(self, candidate: Candidate, run: str, test: np.ndarray, progress: Progress) -> Score:
        vision = next(vision for vision in self.visions if vision.name == candidate.vision)
        store, stores = self.stores[candidate.vision, candidate.layer], self.captioned[candidate.text]
        training = np.setdiff1d(self.scorer.rows[0], test)
        facts = {**self.facts, **self.draws, "kind": "worth", "feature": candidate.feature, "image": store.fingerprint}
        facts |= {"texts": self.text_fingerprints[candidate.text], "test": test.tolist(), "rows": self.settings.test_rows}
        facts |= {"run": hash_file(Path(run) / "best" / "model.safetensors") if run else None}

        def compute() -> dict[str, Score]:
            columns, side = feature_columns(rows_of(store, self.keys), candidate.feature, vision.has_cls), self.texts[candidate.text]
            pairs = CaptionedFeatures(columns, side.captions, side.owners)
            texts = texts_of(stores, self.pairs.source, self.pairs.plan, self.columns, self.keys)
            named = worth.Named.of(pairs, texts, stores[0].folder / "tokenizer", training, self.settings.seed)
            maps = worth.trained_maps(Path(run)) if run else worth.closed_form_maps(pairs, training)
            weights = self.scorer.resamples(len(test))
            return {"worth": worth.measured(named, maps, (training, test), weights, self.settings.seed, progress)}

        return self.cached(facts, compute)["worth"]
