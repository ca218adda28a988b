"""Choose the encoder pair, layer and feature before training: cheap scores and short probes of every candidate, side by side.

    python align/assess.py --data pairs.jsonl --image-root photos --captions captions --output runs/assess --layers all \
        --vision embedded:efficientnet-lite0 embedded:vit-s14-focus --features cls mean cls_mean \
        --text embedded:minilm embedded:mpnet --labelled cifar10 --random-weights embedded:efficientnet-lite0
    python align/assess.py ... --dry-run                    # candidates and disk, nothing encoded
    python align/assess.py ... --trained runs/a runs/b      # how well was the ranking after full training predicted?

All layers of an encoder come from one forward pass. The stores in OUTPUT/pairs are those of align/encode.py: train on the winner's.
Interrupted runs resume with the same command; more encoders or layers add to what is there. `bash scripts/assess.sh` repeats
the experiments of docs/LOG.md. OUTPUT gets table.csv, assessment.json, heat-TEXT.png, scatter-TEXT.png and manifest.json.
"""

import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from align.assessment.candidates import (
    captions_of,
    chosen_features,
    chosen_layers,
    feature_columns,
    folder_name,
    random_copy,
    read_labels,
    rows_of,
    sampled_plan,
    text_name,
    unique_keys,
)
from align.assessment.config import AssessConfig
from align.assessment.figures import heat_map, scatter
from align.assessment.probing import Training
from align.assessment.scores import NO_LABELS, NO_PATCHES, Cache, Candidate, Score, Scorer, Settings, TextSide
from align.assessment.tables import (
    Assessed,
    correlations,
    follows,
    rank_matrix,
    recommend,
    shown,
    shown_correlations,
    table_csv,
    trained_scores,
)
from align.common.commandline import run
from align.common.console import Progress, plain_console
from align.common.errors import DataError, UsageError
from align.common.files import atomic_bytes, atomic_json, hash_bytes, human_bytes
from align.common.hardware import resolve_precision, reuse_freed_memory, use_cores
from align.common.runs import add_launch
from align.encoders.spec import TextSpec, VisionSpec
from align.encoders.text import load_text_encoder
from align.encoders.trust import split_revision
from align.encoders.vision import load_vision_encoder
from align.features.extract import Extraction
from align.features.layers import LayerExtraction, LayerFeatures
from align.features.store import FeatureStore
from align.sources.plan import Plan, Source

TABLE_ROWS = 20
FEW_OF_CLASS = 8  # labelled images of a class: below, a neighborhood of 20 is mostly of others


@dataclass(frozen=True)
class Vision:
    """A vision encoder among the candidates."""

    name: str
    layers: list[int]
    features: list[str]
    has_cls: bool
    random: bool


class Assessment:
    """One run: the sample, its stores, and the scores of every candidate."""

    def __init__(self, config: AssessConfig, console: Console) -> None:
        self.config, self.console, self.folder = config, console, Path(config.output)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = resolve_precision(config.precision, self.device)
        self.options: Any = {"precision": self.precision, "trust_remote_code": config.trust_remote_code}
        self.pairs = Source(config.data, config.layout, config.image_column, config.key_column, config.image_root)
        self.plans = {"pairs": sampled_plan(self.pairs, config.rows, config.seed, config.captions, self.folder / "pairs")}
        self.labelled = None
        if config.labelled:
            self.labelled = Source(config.labelled, image=config.image_column, key=config.key_column)
            columns = (config.label_column,)
            self.plans["labelled"] = sampled_plan(self.labelled, config.labelled_rows, config.seed, columns, self.folder / "labelled")
        names = [folder_name(name) for name in (*config.vision, *config.text)]
        if len(set(names)) < len(names):
            raise UsageError(f"two encoders would share a name ({', '.join(names)}); rename one folder")

    def encoders(self) -> Iterator[tuple[str, bool]]:
        """Yield each vision encoder's id or folder and whether its weights are random."""
        yield from ((name, False) for name in self.config.vision)
        if self.config.random_weights is not None:
            for name in self.config.random_weights or self.config.vision:
                yield random_copy(name, self.folder / "random" / folder_name(name, True), self.config.seed), True

    def encode(self) -> tuple[list[Vision], list[str]]:
        """Encode what is missing, one encoder in memory at a time; return the vision encoders with their layers, and the texts' names."""
        found = []
        for name, random in self.encoders():
            encoder = load_vision_encoder(VisionSpec(*split_revision(name), **self.options), self.device)
            layers = chosen_layers(("last",) if random else self.config.layers, name, encoder.backbone.first, encoder.layers)
            features = chosen_features(("auto",) if random else self.config.features, encoder.has_cls)
            found.append(Vision(folder_name(name), layers, features, encoder.has_cls, random))
            for part, source in (("pairs", self.pairs), ("labelled", self.labelled)):
                if source is None:
                    continue
                patches = self.config.patch_images if part == "pairs" else 0
                outputs = LayerFeatures(encoder, layers, with_patches=patches > 0)
                options: dict[str, Any] = {"batch_size": self.config.batch_size, "workers": self.config.workers}
                folder = self.folder / part / folder_name(name)
                self._fill(LayerExtraction(source, self.plans[part], folder, outputs, patches, **options), self.plans[part])
        texts: list[str] = []
        for name in self.config.text:
            spec = TextSpec(*split_revision(name), **self.options)
            text: Any = load_text_encoder(spec, self.device)
            last: int = text.layers
            if not last and set(self.config.text_layers) - {"last", "all", "-1"}:
                raise UsageError(f"{name}: its blocks are not one list, so its inner layers cannot be read; give --text-layers last")
            for layer in reversed(chosen_layers(self.config.text_layers, name, 1, last) if last else [last]):
                if layer != last:
                    text = None  # one in memory at a time
                    text = load_text_encoder(replace(spec, layer=layer), self.device)
                options = {"text": text, "columns": self.config.captions, "text_batch_size": self.config.text_batch_size}
                texts.append(text_name(name, layer, last))
                if len({*texts, *(v.name for v in found)}) < len(texts) + len(found):
                    raise UsageError(f"two candidates would share the name {texts[-1]}; rename one folder")
                folder = self.folder / "pairs" / texts[-1]
                self._fill(Extraction(self.pairs, self.plans["pairs"], folder, workers=0, **options), self.plans["pairs"])
        return found, texts

    def _fill(self, job: Extraction, plan: Plan) -> None:
        """Encode the shards that are missing in one folder, and say what was rejected."""
        pending = job.pending()
        if self.config.dry_run:
            self.console.print(f"{job.output}: {len(job.writers)} stores, {human_bytes(job.predicted_bytes())} to encode")
            return
        rows = sum(plan.lengths[shard] for shard in pending)
        rejects = job.fill(f"assess-{uuid.uuid4().hex[:8]}", Progress(self.console, f"{job.output.relative_to(self.folder)}:", rows))
        if len(rejects):
            self.console.print(f"{job.output}: {len(rejects)} rejected (each in rejects.parquet)")

    def score(self, visions: list[Vision], names: list[str]) -> tuple[list[Assessed], Scorer]:
        """Return the scores of every candidate, with each of the texts `names`, over the images that all stores have in common."""
        config, pairs = self.config, self.folder / "pairs"
        texts = {name: [FeatureStore(pairs / name / f"captions-{c}") for c in config.captions] for name in names}
        stores = {(v.name, k): FeatureStore(pairs / v.name / f"layer-{k:02d}") for v in visions for k in v.layers}
        order = next(iter(stores.values())).keys.to_pylist()
        common = set.intersection(*(unique_keys(store) for store in (*stores.values(), *(s for listed in texts.values() for s in listed))))
        keys = [key for key in order if key in common]
        how = Training(
            width=config.probe_width, batch_size=config.probe_batch, lr=config.probe_lr, steps=config.probe_steps,
            every=config.probe_every, patience=config.probe_patience, precision=self.precision,
        )  # fmt: skip
        settings = Settings(
            how, test_rows=config.test_rows, similarity_rows=config.similarity_rows, neighbors=config.neighbors,
            class_neighbors=config.class_neighbors, resamples=config.resamples, seed=config.seed,
        )  # fmt: skip
        scorer, cache = Scorer(settings, len(keys), self.device), Cache(self.folder / "scores")
        sides = {name: TextSide(*captions_of(listed, keys), scorer.sample, self.device) for name, listed in texts.items()}
        prints = {name: [store.fingerprint for store in listed] for name, listed in texts.items()}
        facts: dict[str, Any] = {"settings": asdict(settings), "data": self.plans["pairs"].digest, "keys": hash_bytes(repr(keys).encode())}
        labels = self._labels()
        results: list[Assessed] = []
        todo = sum(len(v.layers) * len(v.features) * len(texts) for v in visions)
        progress = Progress(self.console, "scored", todo)
        for vision in visions:
            for layer in vision.layers:
                store = stores[vision.name, layer]
                rows = rows_of(store, keys)
                shared = {text: self._patch_scores(vision, layer, sides[text], prints[text], keys, scorer, cache) for text in texts}
                for feature in vision.features:
                    columns = feature_columns(rows, feature, vision.has_cls)
                    image = {**store.fingerprint, "feature": feature}
                    classes = self._class_scores(vision, layer, feature, image, labels, scorer, cache)
                    for text, side in sides.items():
                        candidate = Candidate(vision.name, layer, feature, text, vision.random)
                        own = {**facts, "image": image, "texts": prints[text]}
                        scores = cache.get({**own, "kind": "probing"}, partial(scorer.probing, columns, side))
                        scores = {**scores, **classes, **cache.get({**own, "kind": "relations"}, partial(scorer.relations, columns, side))}
                        exact = (store.fingerprint, prints[text][0]) if image == store.fingerprint else None
                        results.append(Assessed(candidate, {**scores, **shared[text]}, exact))
                        told = ", ".join(f"{name} {100 * score.value:.1f}" for name, score in results[-1].scores.items())
                        progress(len(results), note=f"{candidate.name}: {told}", now=True)
        return results, scorer

    def _patch_scores(
        self, vision: Vision, layer: int, side: TextSide, prints: list[dict[str, Any]], keys: list[str], scorer: Scorer, cache: Cache
    ) -> dict[str, Score]:
        if self.config.patch_images == 0:
            return {}
        store = FeatureStore(self.folder / "pairs" / vision.name / f"patches-{layer:02d}")
        there = unique_keys(store)
        rows = np.array([row for row, key in enumerate(keys) if key in there])
        width = FeatureStore(self.folder / "pairs" / vision.name / f"layer-{layer:02d}").width // (2 if vision.has_cls else 1)
        own: dict[str, Any] = {
            "kind": "patches",
            "image": store.fingerprint,
            "texts": prints,
            "data": self.plans["pairs"].digest,
            "keys": hash_bytes(repr(keys).encode()),
        }
        own |= {"resamples": self.config.resamples, "seed": self.config.seed}
        return cache.get(own, lambda: scorer.patches(rows_of(store, [keys[row] for row in rows]), width, side.mean_of(rows)))

    def _labels(self) -> dict[str, int]:
        if self.labelled is None:
            return {}
        labels = read_labels(self.labelled, self.plans["labelled"], self.config.label_column)
        classes = len(set(labels.values()))
        if len(labels) < FEW_OF_CLASS * classes:
            self.console.print(
                f"{len(labels)} labelled images of {classes} classes: below {FEW_OF_CLASS} a class, k-NN and the linear probe say little; "
                "raise --labelled-rows or give --labelled more images"
            )
        return labels

    def _class_scores(
        self, vision: Vision, layer: int, feature: str, image: dict[str, Any], labels: dict[str, int], scorer: Scorer, cache: Cache
    ) -> dict[str, Score]:
        if not labels:
            return {}
        store = FeatureStore(self.folder / "labelled" / vision.name / f"layer-{layer:02d}")
        keys = sorted(unique_keys(store) & labels.keys())
        if not keys:
            raise DataError(f"{self.config.labelled}: no usable image has a class in {self.config.label_column!r}; give --label-column")
        own: dict[str, Any] = {"kind": "classes", "image": image, "data": self.plans["labelled"].digest, "column": self.config.label_column}
        own |= {"neighbors": self.config.class_neighbors, "resamples": self.config.resamples, "seed": self.config.seed}
        numbers = np.array([labels[key] for key in keys])
        return cache.get(own, lambda: scorer.with_labels(feature_columns(rows_of(store, keys), feature, vision.has_cls), numbers))


def report(config: AssessConfig, names: list[str], results: list[Assessed], scorer: Scorer, console: Console) -> None:
    """Write table, JSON and figures; print the best candidates, the correlations and the recommendation."""
    folder = Path(config.output)
    results = trained_scores(config.trained, results)
    targets = ["probing", *(["trained"] if config.trained else [])]
    found = {target: correlations(results, target, config.seed) for target in targets}
    answers, said = follows(results, config.seed), recommend(results, scorer.resamples(len(scorer.rows[2])))
    said += [] if config.labelled else [NO_LABELS]
    said += [] if config.patch_images else [NO_PATCHES]
    atomic_bytes(folder / "table.csv", table_csv(results).encode())
    listed = [{**asdict(r.candidate), "scores": {name: asdict(score) for name, score in r.scores.items()}} for r in results]
    ranks = {text: rank_matrix(results, text) for text in names}
    facts = {"recommendation": said, "follows": answers, "correlations": found, "spearman": ranks, "candidates": listed}
    atomic_json(folder / "assessment.json", {"config": asdict(config), **facts})
    for text in names:
        atomic_bytes(folder / f"heat-{text}.png", heat_map(results, text))
        for target, rows in found.items():
            if any(row["text"] == text for row in rows):
                atomic_bytes(
                    folder / f"scatter{'' if target == 'probing' else f'-{target}'}-{text}.png", scatter(results, text, target, rows)
                )
    console.print(shown(results, TABLE_ROWS))
    for target, rows in found.items():
        if rows:
            console.print(shown_correlations(rows, target))
    for row in answers:
        gap = f"r {row['r_knn']:.2f} against {row['r_linear_probe']:.2f}, difference {row['low']:.2f} to {row['high']:.2f}"
        console.print(f"Does alignment with {row['text']} follow weighted k-NN more than the linear probe? {row['answer']} ({gap}).")
    console.print("\n".join(said))
    console.print(f"{folder}: table.csv, assessment.json, figures; scores of {len(results)} candidates")


def main(config: AssessConfig) -> None:
    """Sample the pairs, encode them with every encoder, score every candidate, report."""
    reuse_freed_memory()
    use_cores(1)
    console = plain_console()
    Path(config.output).mkdir(parents=True, exist_ok=True)
    job = Assessment(config, console)
    rows = {part: plan.rows for part, plan in job.plans.items()}
    console.print(", ".join(f"{count} {part}" for part, count in rows.items()) + f" to be seen by {len(config.vision)} vision encoder(s)")
    visions, texts = job.encode()
    todo = sum(len(v.layers) * len(v.features) * len(texts) for v in visions)
    console.print("\n".join(f"{v.name}: layers {' '.join(map(str, v.layers))}; {' '.join(v.features)}" for v in visions))
    console.print(f"texts: {' '.join(texts)}; {todo} candidates")
    if config.dry_run:
        return
    add_launch(Path(config.output), {"config": asdict(config), "data": {part: plan.digest for part, plan in job.plans.items()}})
    results, scorer = job.score(visions, texts)
    report(config, texts, results, scorer, console)


if __name__ == "__main__":
    run(main, AssessConfig, "assess")
