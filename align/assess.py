"""Compare encoder pairs, layers and features before training, by cheap scores and short probes.

    python align/assess.py --data pairs.jsonl --image-root photos --captions captions --output runs/assess --layers all \
        --vision embedded:efficientnet-lite0 embedded:vit-s14-focus --features cls mean cls_mean \
        --text embedded:minilm embedded:mpnet --labelled cifar10 --random-weights embedded:efficientnet-lite0
    python align/assess.py ... --dry-run                    # candidates and disk, nothing encoded
    python align/assess.py ... --trained runs/a runs/b      # how well was the ranking after full training predicted?

One forward pass gives all layers of an encoder. OUTPUT/pairs holds stores like those of align/encode.py: train on the winner's.
Interrupted runs resume with the same command, also with more encoders or layers. OUTPUT gets table.csv, assessment.json, manifest.json,
heat-TEXT.png, scatter-TEXT.png, worth.png. `bash scripts/assess.sh` repeats the experiments of docs/LOG.md.
"""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from align.assessment.config import AssessConfig
from align.runtime.commandline import run, set_up

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from align.assessment.scores import Settings
    from align.assessment.tables import Assessed
    from align.assessment.worth import Worth
    from align.common.hardware import Arithmetic

TABLE_ROWS = 20


def settings_of(config: AssessConfig, precision: "Arithmetic") -> "Settings":
    """Return the settings of the scores."""
    from align.assessment.probing import Training
    from align.assessment.scores import Settings

    training = Training(
        width=config.probe_width, batch_size=config.probe_batch, lr=config.probe_lr, steps=config.probe_steps,
        every=config.probe_every, patience=config.probe_patience, precision=precision,
    )  # fmt: skip
    return Settings(
        training, test_rows=config.test_rows, similarity_rows=config.similarity_rows, neighbors=config.neighbors,
        class_neighbors=config.class_neighbors, resamples=config.resamples, seed=config.seed,
    )  # fmt: skip


def report(
    config: AssessConfig, texts: list[str], results: list["Assessed"], weights: "np.ndarray", worth: "list[Worth]", pairs: int,
    console: "Console",
) -> None:  # fmt: skip
    """Write table, JSON, figures; print the best candidates, correlations, advice and the next commands.

    `weights`: bootstrap weights of the test images; `pairs`: those that were drawn.
    """
    from align.assessment import tables
    from align.assessment.commands import next_commands
    from align.assessment.figures import heat_map, scatter, worth_curves
    from align.assessment.scores import NO_LABELS, NO_PATCHES
    from align.common.files import atomic_bytes, atomic_json

    folder = Path(config.output)
    targets = ["probing", *(["trained"] if config.trained else [])]
    found = {target: tables.correlations(results, target, config.seed) for target in targets}
    follows = tables.follows(results, config.seed)
    said = tables.recommend(results, weights) + [NO_LABELS] * (not config.labelled) + [NO_PATCHES] * (not config.patch_images)
    ranks = {text: tables.rank_matrix(results, text) for text in texts}
    said += [one.sentence() for one in worth]
    commands = next_commands(config, tables.ranked(results)[0].candidate, pairs)
    facts = {"recommendation": said, "follows": follows, "correlations": found, "spearman": ranks, "commands": commands}
    facts["worth"] = list(map(asdict, worth))
    listed = [{**asdict(r.candidate), "scores": {name: asdict(score) for name, score in r.scores.items()}} for r in results]
    atomic_bytes(folder / "table.csv", tables.table_csv(results).encode())
    atomic_json(folder / "assessment.json", {"config": asdict(config), **facts, "candidates": listed})
    if judged := [one for one in worth if one.score]:
        atomic_bytes(folder / "worth.png", worth_curves(judged))
    for text in texts:
        atomic_bytes(folder / f"heat-{text}.png", heat_map(results, text))
        for target, rows in found.items():
            if any(row["text"] == text for row in rows):
                name = "scatter" if target == "probing" else f"scatter-{target}"
                atomic_bytes(folder / f"{name}-{text}.png", scatter(results, text, target, rows))
    console.print(tables.shown(results, TABLE_ROWS))
    for target, rows in found.items():
        if rows:
            console.print(tables.shown_correlations(rows, target))
    console.print("\n".join([*map(tables.shown_follows, follows), *said]))
    console.print(f"{folder}: table.csv, assessment.json, figures; scores of {len(results)} candidates")
    console.print("\n".join(["next:", *(f"  {command}" for command in commands)]))


def main(config: AssessConfig) -> None:
    """Take the output folder, or for a dry run a view of it, and assess."""
    from align.common.folders import dry_view
    from align.runtime.runs import run_folder

    console, folder = set_up(), Path(config.output)
    if config.dry_run:
        with dry_view(folder) as view:
            assess(replace(config, output=str(view)), console)
        return
    with run_folder(folder, waiting=console.print):
        assess(config, console)


def assess(config: AssessConfig, console: "Console") -> None:
    """Sample the pairs, encode them with every encoder, score every candidate, report."""
    from align.assessment.assessment import Assessment
    from align.assessment.candidates import folder_name
    from align.assessment.encoding import draw_samples, encode_texts, encode_visions, refuse_equal_names
    from align.assessment.tables import trained_scores
    from align.common.hardware import choose_device, resolve_precision
    from align.runtime.console import Progress
    from align.runtime.runs import add_launch

    device, folder = choose_device(), Path(config.output)
    precision = resolve_precision(config.precision, device)
    refuse_equal_names([folder_name(name) for name in (*config.vision, *config.text)])

    samples = draw_samples(config)
    counts = ", ".join(f"{sample.plan.rows} {name}" for name, sample in samples.items())
    console.print(f"{counts} to be seen by {len(config.vision)} vision encoder(s)")
    options = {"precision": precision, "trust_remote_code": config.trust_remote_code}
    visions = encode_visions(config, samples, options, device, console)
    texts = encode_texts(config, samples["pairs"], options, device, console, taken=[vision.name for vision in visions])
    for v in visions:
        console.print(f"{v.name}: layers {' '.join(map(str, v.layers))}; {' '.join(v.features)}")
    candidates = sum(len(v.layers) * len(v.features) for v in visions) * len(texts)
    console.print(f"texts: {' '.join(texts)}; {candidates} candidates")
    if config.dry_run:
        return

    add_launch(folder, {"config": asdict(config), "data": {name: sample.plan.digest for name, sample in samples.items()}})
    settings, patches = settings_of(config, precision), config.patch_images > 0
    assessment = Assessment(folder / "scores", samples["pairs"], visions, texts, config.captions, settings, device, patches)
    if config.labelled and (note := assessment.add_labels(samples["labelled"], config.label_column)):
        console.print(note)
    progress, results = Progress(console, "scored", candidates), []
    for result in assessment.results():
        results.append(result)
        scores = ", ".join(f"{name} {100 * score.value:.1f}" for name, score in result.scores.items())
        progress(len(results), note=f"{result.candidate.name}: {scores}", now=True)
    results = trained_scores(config.trained, results)
    worths = assessment.worth_of_best(results, config.worth, config.trained, partial(Progress, console))
    report(config, texts, results, assessment.test_weights, worths, samples["pairs"].plan.rows, console)


if __name__ == "__main__":
    run(main, AssessConfig, "assess")
