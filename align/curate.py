"""Choose training pairs that cover many concepts evenly. Each concept gets its best candidates, rarest concept first.

    python align/curate.py --candidates features/cc12m/captions-raw --concepts concepts.txt --output curated/cc12m
    python align/curate.py --candidates a/captions-raw b/captions-raw --images a/images b/images --concepts concepts.txt \
        --duplicates near --exclude features/imagenet-val/images --output curated/ab
    python align/curate.py --candidates features/cc12m/images --model runs/mine/best --concepts concepts.txt --output curated/cc12m
    python align/curate.py --candidates features/cc12m/images --concept-store features/shots/images --concept-labels shots.csv \
        --output curated/cc12m
    python align/train.py --keys curated/cc12m/chosen.parquet --images features/cc12m/images --captions features/cc12m/captions-raw \
        --epochs 50 --output runs/curated

Writes to --output: chosen.parquet (key, data, store, concept, score, rank), coverage.csv, .json and .png (each concept before and after),
manifest.json, config.yaml, prototypes/ and lists/. Other --per-concept, --duplicates and --exclude reuse lists/ without scoring again.
Interrupted runs resume with the same command from the last committed shards, to the same result. To share the work, run
`--parts 8 --part 0` to `--part 7` anywhere, then the same command without --part.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from align.curation.config import CurateConfig
from align.runtime.commandline import run, set_up

if TYPE_CHECKING:
    import numpy as np
    import torch
    from rich.console import Console
    from torch import Tensor

    from align.curation.scoring import ConceptSpace
    from align.curation.toplists import TopLists

FREE_ON_RESUME = {
    *("per_concept", "duplicates", "duplicate_cosine", "images", "exclude", "exclude_cosine", "part", "save_every", "text_batch_size"),
    *("trust_remote_code", "dry_run", "output", "concepts_from_evaluation"),
}


def choose(
    config: CurateConfig, space: "ConceptSpace", names: tuple[str, ...], prototypes: "Tensor", lists: "TopLists", before: "np.ndarray",
    per_concept: int, note: str,
) -> str:  # fmt: skip
    """Assign candidates to concepts, write the choice and its coverage, and return the totals as a sentence."""
    import numpy as np

    from align.curation.assignment import assign, refuse_all, write_chosen
    from align.curation.coverage import coverage_table, shown_coverage, write_coverage
    from align.curation.duplicates import picker_for
    from align.curation.pool import CandidatePool
    from align.curation.scoring import best_counts

    folder, candidates = Path(config.output), space.candidates
    images, excluded = (CandidatePool.open(*folders) if folders else None for folders in (config.images, config.exclude))
    pick, taken = picker_for(candidates, images, excluded, config.duplicates, config.duplicate_cosine, config.exclude_cosine)
    facts = {"note": note, "candidates": int(before.sum()), "without_image": int(taken.sum())}
    assignment = assign(lists, per_concept, taken, pick)
    refuse_all(assignment, int(before.sum()))
    write_chosen(folder / "chosen.parquet", candidates, names, assignment, note)
    after = best_counts(space, prototypes, np.concatenate(assignment.rows))
    return shown_coverage(write_coverage(folder, coverage_table(names, before, after, assignment), facts))


def main(config: CurateConfig) -> None:
    """Open candidates and concepts, score what is missing, assign, report coverage."""
    from rich.panel import Panel

    from align.common.hardware import choose_device
    from align.curation.assignment import numbers_for
    from align.curation.concepts import concept_names, evaluation_note, evaluation_sets
    from align.curation.pool import CandidatePool
    from align.curation.scoring import ConceptSpace
    from align.model.dual_encoder import SailModel
    from align.runtime.recipes_yaml import refuse_other_config
    from align.runtime.runs import run_folder

    console, folder = set_up(), Path(config.output)
    device = choose_device()
    candidates, names = CandidatePool.open(*config.candidates), concept_names(config)
    refuse_other_config(config, folder, "curate", FREE_ON_RESUME)
    model = SailModel.from_pretrained(config.model, trust_remote_code=config.trust_remote_code).to(device) if config.model else None
    space = ConceptSpace(candidates, model, device, texts=config.concepts is not None)
    note = evaluation_note(evaluation_sets(names), config.concepts_from_evaluation)
    if note:
        console.print(Panel(note, style="bold red"), soft_wrap=False)
    top, per_concept, said = numbers_for(candidates, config.top, config.per_concept, len(names))
    for sentence in said:
        console.print(sentence)
    console.print(space.work(len(names), top, lists=2 if config.parts > 1 and config.part is None else 1))
    if config.dry_run:
        return

    with run_folder(folder, config.part is None, console.print):  # parts, which may be started at once, have leases of their own
        curate(config, space, names, (top, per_concept), note, device, console)


def curate(
    config: CurateConfig, space: "ConceptSpace", names: tuple[str, ...], numbers: tuple[int, int], note: str, device: "torch.device",
    console: "Console",
) -> None:  # fmt: skip
    """Score what is missing, assign, report coverage. `numbers`: how many each list holds, and how many are chosen for a concept."""
    from align.curation.concepts import inputs_of, kept_prototypes, make_prototypes
    from align.curation.scoring import score_shards
    from align.runtime.recipes_yaml import write_recipe
    from align.runtime.runs import add_launch

    folder, candidates = Path(config.output), space.candidates
    parts = [folder / "lists" / f"part-{part}-of-{config.parts}" for part in range(config.parts)]
    launched = folder if config.part is None else parts[config.part]  # parts may be started at once
    launched.mkdir(parents=True, exist_ok=True)
    inputs = inputs_of(config, candidates, names)
    add_launch(launched, {"config": write_recipe(config, folder, "curate"), "inputs": inputs, "note": note})
    prototypes = kept_prototypes(folder / "prototypes", inputs, lambda: make_prototypes(config, space, names)).to(device)

    def scored(part: int) -> "tuple[TopLists, np.ndarray]":
        shards = range(part, len(candidates.shards), config.parts)
        return score_shards(parts[part], shards, space, prototypes, numbers[0], inputs, config.save_every, console)

    lists, before = scored(config.part or 0)
    if config.part is not None:
        console.print(f"part {config.part} of {config.parts} is done; when all are, run the same command without --part")
        return
    for part in range(1, config.parts):
        other, count = scored(part)
        lists.merge(other)
        before += count
    console.print(choose(config, space, names, prototypes, lists, before, numbers[1], note))
    console.print(f"done: train on it with `align/train.py --keys {folder}/chosen.parquet`; coverage in {folder}/coverage.csv and .png")


if __name__ == "__main__":
    run(main, CurateConfig, "curate")
