"""Concepts of a curation: names, prototypes, evaluation sets. Shapes: `C` concepts, `E` width of the space of the scores."""

import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn import functional

from align.common.errors import DataError, UsageError
from align.common.files import hash_bytes, hash_file, read_json
from align.common.fingerprints import compare_fingerprints
from align.curation.config import CurateConfig
from align.curation.pool import CandidatePool
from align.curation.scoring import ConceptSpace, Projection, chunk_rows
from align.features.store import FeatureStore
from align.runtime.checkpoints import newest_checkpoint, save_checkpoint

LABELS_SCHEMA = pa.schema([("key", pa.string()), ("label", pa.string())])


def read_names(path: Path) -> tuple[str, ...]:
    """Return the concept names of a text file, one per line. Raise UsageError if there are none or one appears twice."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--concepts {path} cannot be read as UTF-8 text ({error}); give a file with one name a line") from error
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated or not names:
        wrong = f"{repeated[:5]} stand there twice" if repeated else "no names in it"
        raise UsageError(f"--concepts {path}: {wrong}; one name a line, once")
    return tuple(names)


def read_labels(path: Path) -> pa.Table:
    """Return columns key and label of a .parquet or .csv file. Raise DataError if they are missing or a key appears twice."""
    try:
        if path.suffix == ".csv":
            table = pyarrow.csv.read_csv(path, convert_options=pyarrow.csv.ConvertOptions(column_types=LABELS_SCHEMA))
        else:
            table = pq.read_table(path)
        table = table.select(LABELS_SCHEMA.names).cast(LABELS_SCHEMA)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{path} is not a .parquet or .csv with the columns key and label ({error})") from error
    if pc.count_distinct(table["key"]).as_py() < len(table):
        raise DataError(f"{path}: a key stands there twice; give each key one label")
    return table


@torch.no_grad()
def shot_prototypes(shots: CandidatePool, labels: pa.Table, project: Projection) -> tuple[tuple[str, ...], Tensor]:
    """Return sorted labels and (C, E) normalized means of their normalized rows. Skip rows without label; DataError if a label has none."""
    names = tuple(sorted(set(labels["label"].to_pylist())))
    places = {name: number for number, name in enumerate(names)}
    numbers = {row["key"]: places[row["label"]] for row in labels.to_pylist()}
    owners = np.array([numbers.get(key, -1) for key in shots.keys(np.arange(len(shots)))])
    rows, sums = np.flatnonzero(owners >= 0), torch.zeros(0)
    for start in range(0, len(rows), chunk_rows(1)):
        part = rows[start : start + chunk_rows(1)]
        vectors = project(torch.from_numpy(shots.features(part)).float()).cpu()
        sums = sums if len(sums) else torch.zeros(len(names), vectors.shape[1])
        sums.index_add_(0, torch.from_numpy(owners[part]), vectors)
    counts = np.bincount(owners[rows], minlength=len(names))
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty:
        missing = f"{len(empty)} of {len(names)} labels have no row in the concept store"
        raise DataError(f"{missing}, the first is {empty[0]!r}; compare the keys")
    return names, functional.normalize(sums, dim=1)


def concept_names(config: CurateConfig) -> tuple[str, ...]:
    """Return the concept names: the lines of --concepts, or the sorted labels of --concept-labels."""
    if config.concepts:
        return read_names(Path(config.concepts))
    return tuple(sorted(set(read_labels(Path(str(config.concept_labels)))["label"].to_pylist())))


def inputs_of(config: CurateConfig, candidates: CandidatePool, names: tuple[str, ...]) -> dict[str, Any]:
    """Return fingerprints of everything that decides the scores. Lists are resumed only if all fields are equal."""
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


def make_prototypes(config: CurateConfig, space: ConceptSpace, names: tuple[str, ...]) -> Tensor:
    """Return (C, E) normalized prototypes in `space`: the mean over a name's templates, or over a label's shots."""
    if config.concepts:
        texts = [template.replace("{c}", name) for name in names for template in config.templates]
        rows = space.encode_texts(texts, config.text_batch_size, config.trust_remote_code)  # (C templates, E), normalized
        return functional.normalize(rows.view(len(names), len(config.templates), -1).mean(dim=1), dim=1)
    shots = CandidatePool.open(str(config.concept_store))
    return shot_prototypes(shots, read_labels(Path(str(config.concept_labels))), space.projection(shots))[1]


def kept_prototypes(folder: Path, inputs: dict[str, Any], make: Callable[[], Tensor]) -> Tensor:
    """Return (C, E) prototypes, made once and kept in `folder`. Raise FingerprintError if other inputs made them."""
    path, tensors, state, _ = newest_checkpoint(folder)
    if path is not None:
        compare_fingerprints(inputs, state["inputs"], str(folder))
        return tensors["prototypes"]
    made = make().cpu()
    save_checkpoint(folder, 0, {"prototypes": made}, {"inputs": inputs}, keep=1)
    return made


def evaluation_sets(names: Sequence[str]) -> list[str]:
    """Return the clip_benchmark evaluation sets whose classes are all in `names`, ignoring case; [] if it is not installed."""
    found = importlib.util.find_spec("clip_benchmark")  # not imported: its list of class names is read as data
    paths = [Path(folder) / "datasets" / "en_classnames.json" for folder in found.submodule_search_locations or ()] if found else []
    known: dict[str, list[str]] = next((read_json(path) for path in paths if path.exists()), {})
    given = {name.casefold() for name in names}
    return [name for name, classes in known.items() if given >= {word.casefold() for word in classes}]


def evaluation_note(noticed: Sequence[str], told: str | None = None) -> str:
    """Return the note that results must carry if evaluation sets were `noticed` or the user `told` of one, else ""."""
    sets = list(dict.fromkeys(filter(None, [told, *noticed])))
    if not sets:
        return ""
    return (
        f"NOTE: the concepts are the classes of an evaluation set ({', '.join(sets)}). The training data was chosen with knowledge of what "
        "is asked there, so a model trained on it is not zero-shot on this set in the strict sense: say so beside its numbers."
    )
