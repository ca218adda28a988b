"""Choose training pairs that cover many concepts evenly: the best candidates of each concept, shared out rarest concept first.

    python align/curate.py --candidates features/cc12m/captions-raw --concepts concepts.txt --output curated/cc12m
    python align/curate.py --candidates a/captions-raw b/captions-raw --images a/images b/images --concepts concepts.txt \
        --duplicates near --exclude features/imagenet-val/images --output curated/ab
    python align/curate.py --candidates features/cc12m/images --model runs/mine/best --concepts concepts.txt --output curated/cc12m
    python align/curate.py --candidates features/cc12m/images --concept-store features/shots/images --concept-labels shots.csv \
        --output curated/cc12m
    python align/train.py --keys curated/cc12m/chosen.parquet --images features/cc12m/images --captions features/cc12m/captions-raw \
        --epochs 50 --output runs/curated

Leaves in --output: chosen.parquet (key, data, store, concept, score, rank), coverage.csv, coverage.json and coverage.png (each concept
before and after), manifest.json, config.yaml, prototypes/ and lists/, from which other --per-concept, --duplicates and --exclude are
served without scoring again.

Interrupted runs resume with the same command from the last committed shards, to the same result. To share the work, run
`--parts 8 --part 0` to `--part 7` anywhere, then the same command without --part.
"""

import signal
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from rich.console import Console
from rich.panel import Panel
from torch import Tensor

from align.common.checkpoints import clean_checkpoints, newest_checkpoint, save_checkpoint
from align.common.commandline import run
from align.common.console import Progress, plain_console
from align.common.errors import Preempted, UsageError
from align.common.files import atomic_bytes, atomic_path, hash_bytes, hash_file, human_bytes, remove_temporaries
from align.common.fingerprints import compare_encoders, compare_fingerprints
from align.common.hardware import reuse_freed_memory, use_cores
from align.common.locks import Lease
from align.common.recipes_yaml import refuse_other_config, to_recipe
from align.common.runs import add_launch
from align.curation.concepts import evaluation_note, evaluation_sets, read_labels, read_names, shot_prototypes, text_prototypes
from align.curation.config import CurateConfig
from align.curation.coverage import coverage_table, write_coverage
from align.curation.duplicates import Distinct
from align.curation.scoring import Candidates, Projection, chunk_rows, normalize, score_shard, scored_chunks
from align.curation.toplists import Assignment, Picker, TopLists, assign, first_ones
from align.encoders.spec import TextSpec
from align.encoders.text import load_text_encoder
from align.features.store import FeatureStore
from align.model.dual_encoder import SailModel

FREE_ON_RESUME = {
    *("per_concept", "duplicates", "duplicate_cosine", "images", "exclude", "exclude_cosine", "part", "save_every", "text_batch_size"),
    *("trust_remote_code", "dry_run", "output", "concepts_from_evaluation"),
}


def open_candidates(folders: tuple[str, ...]) -> Candidates:
    """Return the stores in `folders` as one."""
    return Candidates([FeatureStore(folder) for folder in folders])


def _model(config: CurateConfig, device: torch.device) -> SailModel:
    return SailModel.from_pretrained(config.model, trust_remote_code=config.trust_remote_code).to(device)


class Space:
    """Where candidates and concepts meet: the candidates' own features, or the shared space of an aligned model."""

    def __init__(self, config: CurateConfig, candidates: Candidates, device: torch.device) -> None:
        """Load the model if one is given; UsageError if text concepts are to score images without one."""
        self.config, self.candidates, self.device = config, candidates, device
        self.model: Any = _model(config, device) if config.model else None
        if self.model is None and config.concepts and candidates.kind == "image":
            raise UsageError(
                "text concepts can score images only in the space of an aligned model; give --model, or captions to choose from"
            )
        self.project = self.projection(candidates)

    def projection(self, features: Candidates) -> Projection:
        """Return what takes features of a store to the space; FingerprintError if they are another encoder's than the space's."""
        if self.model is None:
            compare_fingerprints(features.fingerprint, self.candidates.fingerprint, str(self.candidates.stores[0].folder))
            return normalize
        expected = self.model.config.vision_fingerprint if features.kind == "image" else self.model.config.text_fingerprint
        compare_encoders(expected, features.fingerprint, str(features.stores[0].folder))
        return self.model.project_image if features.kind == "image" else self.model.project_text

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Return (T, E) normalized embeddings of texts, by the model's text encoder or by the one that encoded the candidates."""
        if self.model is not None:
            return self.model.project_text(self.model.text_encoder.encode(texts, self.config.text_batch_size).to(self.device))
        header = self.candidates.stores[0].header
        if not header.loader:
            raise UsageError(
                f"{self.candidates.stores[0].folder} names no encoder (it was imported); give --model, or concepts as a --concept-store"
            )
        precision = header.fingerprint.get("precision", "fp32")
        spec = TextSpec(**header.loader, precision=precision, trust_remote_code=self.config.trust_remote_code)
        encoder = load_text_encoder(spec, self.device)
        compare_encoders(encoder.fingerprint, header.fingerprint, str(self.candidates.stores[0].folder))
        return normalize(encoder.encode(texts, self.config.text_batch_size).to(self.device))


def concept_names(config: CurateConfig) -> tuple[str, ...]:
    """Return the names of the concepts: the lines of --concepts, or the labels of --concept-labels in alphabetical order."""
    if config.concepts:
        return read_names(Path(config.concepts))
    return tuple(sorted(set(read_labels(Path(str(config.concept_labels)))["label"].to_pylist())))


def inputs_of(config: CurateConfig, candidates: Candidates, names: tuple[str, ...]) -> dict[str, Any]:
    """Return what decides all scores, as fingerprints: lists are continued only if every field is the same."""
    shots = FeatureStore(config.concept_store) if config.concept_store else None
    weights = Path(config.model or "") / "model.safetensors"
    return {
        "concepts": hash_bytes("\n".join(names).encode()),
        "templates": list(config.templates) if config.concepts else [],
        "shots": [shots.header.data, shots.fingerprint, hash_file(Path(str(config.concept_labels)))] if shots else [],
        "candidates": [[store.header.data, len(store)] for store in candidates.stores],
        "features": candidates.fingerprint,
        "model": hash_file(weights) if config.model and weights.exists() else config.model,
    }


def prototypes_of(config: CurateConfig, space: Space, names: tuple[str, ...], inputs: dict[str, Any]) -> Tensor:
    """Return (C, E) normalized prototypes, made once and kept in --output, so that a continued run scores against the very same."""
    folder = Path(config.output) / "prototypes"
    path, tensors, state, _ = newest_checkpoint(folder)
    if path is not None:
        compare_fingerprints(inputs, state["inputs"], str(folder))
        return tensors["prototypes"].to(space.device)
    if config.concepts:
        made = text_prototypes(names, config.templates, space.encode_texts)
    else:
        shots = open_candidates((str(config.concept_store),))
        made = shot_prototypes(shots, read_labels(Path(str(config.concept_labels))), space.projection(shots))[1]
    save_checkpoint(folder, 0, {"prototypes": made.cpu()}, {"inputs": inputs}, keep=1)
    return made.to(space.device)


def part_folder(config: CurateConfig, part: int) -> Path:
    """Return where the lists of one part of the shards are kept."""
    return Path(config.output) / "lists" / f"part-{part}-of-{config.parts}"


def score_part(
    config: CurateConfig, part: int, space: Space, prototypes: Tensor, inputs: dict[str, Any], console: Console
) -> tuple[TopLists, np.ndarray]:
    """Return the lists of one part's shards and (C,) how many of its candidates have each concept as their best; resumes and commits."""
    folder = part_folder(config, part)
    candidates, lists = space.candidates, TopLists(len(prototypes), config.top, chunk_rows(len(prototypes)))
    best = np.zeros(len(lists), dtype=np.int64)
    shards = range(part, len(candidates.shards), config.parts)
    stopping: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    with Lease(folder, f"run-{uuid.uuid4().hex[:8]}"):
        clean_checkpoints(folder)
        path, tensors, state, problems = newest_checkpoint(folder)
        for problem in problems:
            console.print(f"passed over lists: {problem}")
        if path is not None:
            compare_fingerprints(inputs, state["inputs"], str(path))
            best += tensors.pop("best").numpy()
            lists.load_state({name: tensor.numpy() for name, tensor in tensors.items()})
        done, rows = state.get("step", 0), 0
        left = sum(len(candidates.rows_of(shard)) for shard in shards[done:])
        progress = Progress(console, f"part {part}: scored rows", left)
        for number, shard in enumerate(shards[done:], done + 1):
            best += score_shard(candidates, shard, prototypes, space.project, lists)
            rows += len(candidates.rows_of(shard))
            if number % config.save_every == 0 or number == len(shards) or stopping:
                tensors = {name: torch.from_numpy(array) for name, array in {**lists.state(), "best": best}.items()}
                save_checkpoint(folder, number, tensors, {"inputs": inputs}, keep=2)
            if stopping and number < len(shards):
                raise Preempted(f"stopped by SIGTERM after shard {number} of {len(shards)}, lists saved; run the same command to go on")
            progress(rows, now=number == len(shards))
    signal.signal(signal.SIGTERM, before)
    return lists, best


def _features_at(store: Candidates, rows: np.ndarray, samples: np.ndarray) -> np.ndarray:
    return store.features(rows[samples])


def picker(config: CurateConfig, candidates: Candidates) -> tuple[Picker, np.ndarray, int]:
    """Return how a concept picks, which samples may not be used (S,) bool, and how many those are (they have no image)."""
    taken = np.zeros(len(candidates), dtype=bool)
    if config.duplicates == "keep" and not config.exclude:
        return first_ones, taken, 0
    compared = candidates
    features: Callable[[np.ndarray], np.ndarray] = candidates.features
    if config.images:
        compared = open_candidates(config.images)
        rows = candidates.rows_in(compared)
        taken = rows < 0
        features = partial(_features_at, compared, rows)
    excluded = open_candidates(config.exclude) if config.exclude else None
    if excluded is not None:
        compare_fingerprints(excluded.fingerprint, compared.fingerprint, str(compared.stores[0].folder))
    cosine = config.duplicate_cosine if config.duplicates == "near" else None
    away = None if excluded is None else excluded.features(np.arange(len(excluded)))
    distinct = Distinct(
        features, identical=config.duplicates != "keep", cosine=cosine, excluded=away, exclude_cosine=config.exclude_cosine
    )  # fmt: skip
    return distinct, taken, int(taken.sum())


def write_chosen(folder: Path, candidates: Candidates, names: tuple[str, ...], assignment: Assignment, note: str) -> np.ndarray:
    """Write chosen.parquet, by concept and rank, and return the sample numbers in it."""
    samples = np.concatenate(assignment.rows)
    home = np.searchsorted(candidates.starts, samples, side="right") - 1
    table = pa.table(
        {
            "key": pa.array(candidates.keys(samples), pa.string()),
            "data": pa.array([store.header.data for store in candidates.stores]).take(pa.array(home)),
            "store": pa.array([str(store.folder) for store in candidates.stores]).take(pa.array(home)),
            "concept": pa.array(names).take(pa.array(np.repeat(np.arange(len(names)), [len(rows) for rows in assignment.rows]))),
            "score": np.concatenate(assignment.scores),
            "rank": np.concatenate(assignment.ranks),
        }
    )
    with atomic_path(folder / "chosen.parquet") as temporary:
        pq.write_table(table.replace_schema_metadata({"note": note}), temporary, compression="zstd")
    return samples


def main(config: CurateConfig) -> None:
    """Open candidates and concepts, score what is not scored yet, share out, report coverage."""
    reuse_freed_memory()
    use_cores(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = plain_console()
    folder = Path(config.output)
    candidates, names = open_candidates(config.candidates), concept_names(config)
    refuse_other_config(config, folder, "curate", FREE_ON_RESUME)
    space = Space(config, candidates, device)
    sets = list(dict.fromkeys([*([config.concepts_from_evaluation] if config.concepts_from_evaluation else []), *evaluation_sets(names)]))
    note = evaluation_note(sets)
    if note:
        console.print(Panel(note, style="bold red"), soft_wrap=False)
    width = space.model.config.width if space.model is not None else candidates.width
    size = TopLists.nbytes(len(names), config.top, chunk_rows(len(names)))
    console.print(
        f"{len(candidates)} {candidates.kind} rows x {len(names)} concepts: {2 * width * len(candidates) * len(names) / 1e12:.3g} TFLOP; "
        f"lists of {config.top}: {human_bytes(size)} of memory and twice that on disk"
    )
    if config.top >= len(candidates):
        console.print(f"--top {config.top} holds all candidates: rarity then goes by the worst of them; give a --top well below")
    needed = size * (2 if config.parts > 1 and config.part is None else 1) + len(candidates)
    if needed > psutil.virtual_memory().available:
        free = human_bytes(psutil.virtual_memory().available)
        raise UsageError(f"the lists need {human_bytes(needed)} of memory, {free} are free; give a smaller --top or fewer concepts")
    if config.dry_run:
        return
    launched = folder if config.part is None else part_folder(config, config.part)  # parts may be started at once
    launched.mkdir(parents=True, exist_ok=True)
    if config.part is None:
        remove_temporaries(folder)
    atomic_bytes(folder / "config.yaml", to_recipe(config, "curate").encode())
    inputs = inputs_of(config, candidates, names)
    add_launch(launched, {"config": yaml.safe_load(to_recipe(config, "curate"))["curate"], "inputs": inputs, "note": note})
    prototypes = prototypes_of(config, space, names, inputs)
    wanted = range(config.parts) if config.part is None else [config.part]
    lists, before = score_part(config, wanted[0], space, prototypes, inputs, console)
    if config.part is not None:
        console.print(f"part {config.part} of {config.parts} is done; when all are, run the same command without --part")
        return
    for part in wanted[1:]:
        other, count = score_part(config, part, space, prototypes, inputs, console)
        lists.merge(other)
        before += count
    pick, taken, unusable = picker(config, candidates)
    assignment = assign(lists, config.per_concept, taken, pick)
    samples = write_chosen(folder, candidates, names, assignment, note)
    chosen = np.zeros(len(candidates), dtype=bool)
    chosen[samples] = True
    after = np.zeros(len(names), dtype=np.int64)
    for shard in range(len(candidates.shards)):
        for scores, _ in scored_chunks(candidates, shard, prototypes, space.project, only=chosen):
            after += np.bincount(scores.argmax(axis=1), minlength=len(names))
    table = coverage_table(names, before, after, assignment)
    values = write_coverage(folder, table, {"note": note, "candidates": int(before.sum()), "without_image": unusable})
    passed = ", ".join(f"{count} {reason}" for reason, count in values["passed_over"].items()) or "none"
    console.print(
        f"chosen {values['chosen']} of {values['candidates']} samples (passed over: {passed}; without an image: {unusable}); "
        f"effective concepts {values['effective_concepts_before']:.1f} -> {values['effective_concepts_after']:.1f} of {len(names)}; "
        f"concepts that are nobody's best {values['concepts_without_candidates']} -> {values['concepts_without_chosen']}"
    )
    console.print(f"done: train on it with `align/train.py --keys {folder}/chosen.parquet`; coverage in {folder}/coverage.csv and .png")


if __name__ == "__main__":
    run(main, CurateConfig, "curate")
