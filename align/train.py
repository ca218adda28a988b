"""Train alignment heads on pre-encoded features, or with the encoders in the loop.

    accelerate launch align/train.py --config align/recipes/quickstart.yaml
    accelerate launch align/train.py --config align/recipes/sail_l_gte.yaml --images a/images b/images ...
    accelerate launch --multi_gpu --num_processes 8 align/train.py --config align/recipes/sail_l_gte.yaml
    accelerate launch align/train.py --head token --data photos.jsonl --captions captions --output runs/tokens --steps 1000 --augment \
        --vision facebook/dinov2-large --text sentence-transformers/all-roberta-large-v1 --loss infonce --batch-size 1024
    python align/train.py --config recipe.yaml --dry-run

Writes to --output: best/ and last/ (model folders), metrics.jsonl, tensorboard/, checkpoints/, manifest.json, config.yaml. Interrupted
runs resume with the same command to the same weights. On SIGTERM a run saves a checkpoint and exits with code 75.
"""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from align.common.checks import check_divides
from align.common.files import hash_file, human_bytes
from align.runtime.commandline import run, set_up
from align.runtime.recipes_yaml import refuse_other_config, write_recipe
from align.training.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import PartialState
    from rich.console import Console

    from align.training.data import TrainingData

FREE_ON_RESUME = {"log_every", "save_every", "keep", "accumulate", "dry_run", "tile", "output", "embed_encoders", "workers", "report_to"}


def main(config: TrainConfig) -> None:
    """Refuse other settings, take the run's folder, train."""
    from align.runtime.runs import require_trackers, run_folder

    require_trackers(config.report_to)  # before torch is loaded
    from accelerate import PartialState

    from align.common.folders import dry_view
    from align.common.hardware import choose_device

    state = PartialState(cpu=choose_device().type == "cpu")
    console = set_up(quiet=not state.is_main_process)
    check_divides(config.batch_size, state.num_processes)
    folder = Path(config.output)
    refuse_other_config(config, folder, "train", FREE_ON_RESUME)
    if config.dry_run:
        with dry_view(folder) as view:
            train(replace(config, output=str(view)), state, console)
        return
    with run_folder(folder, state.is_main_process, console.print):
        state.wait_for_everyone()  # only once the first process has the folder
        train(config, state, console)


def train(config: TrainConfig, state: "PartialState", console: "Console") -> None:
    """Open the features, build the heads, write config and manifest, train from the newest checkpoint."""
    from align.common.hardware import resolve_precision
    from align.model.saving import require_whole
    from align.runtime.processes import same_on_all
    from align.training.data import build_model, fit_batch
    from align.training.run import Run
    from align.training.step import Objective, Schedule, Stepper, build_optimizer

    data = open_data(config, state, console)
    batch_size = fit_batch(config.batch_size, len(data.pairs), state.num_processes, console.print)
    steps = config.steps or max(1, math.floor((config.epochs or 0) * (len(data.pairs) // batch_size)))
    model = build_model(config, data).to(state.device)
    if config.embed_encoders:
        require_whole(model.config)  # before training
    same_on_all(model.parameters())
    stepper = Stepper(
        model,
        build_optimizer(model, config.optimizer, config.lr, config.betas, config.weight_decay),
        Schedule(config.lr, steps, config.warmup, config.min_lr),
        Objective(config.loss, config.reduction, config.tile, config.feature_dropout),
        seed=config.seed, rank=state.process_index, accumulate=config.accumulate,
        precision=resolve_precision(config.precision, state.device),
        max_grad_norm=config.max_grad_norm, log_scale_range=config.log_scale_range,
    )  # fmt: skip
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"{len(data.pairs)} pairs ({data.pairs.unpaired} images without partner left out), "
        f"{'encoded in every step' if config.data else human_bytes(data.pairs.nbytes) + ' of features'}, "
        f"{parameters / 1e6:.2f}M parameters, {steps} steps of {batch_size} on {state.num_processes} process(es)",
    )
    if config.dry_run:
        console.print(estimate(config, data, parameters, batch_size, state.num_processes))
        return
    if state.is_main_process:
        write_manifest(config, data, state.num_processes)
    Run(
        Path(config.output), data, stepper, state, console, steps=steps, batch_size=batch_size,
        every={"log": config.log_every, "val": config.val_every, "save": config.save_every},
        val_limit=config.val_limit, keep=config.keep, max_nonfinite=config.max_nonfinite, embed_encoders=config.embed_encoders,
        trackers=config.report_to,
    ).train()  # fmt: skip


def open_data(config: TrainConfig, state: "PartialState", console: "Console") -> "TrainingData":
    """Return the training pairs, with the validation pairs split off."""
    from align.training.data import from_samples, from_stores
    from align.training.online import OnlinePairs
    from align.training.pairs import read_keys

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # with --data, workers fork after the tokenizer has run
    data = from_samples(config, state) if config.data else from_stores(config)
    for remark in data.remarks:
        console.print(remark)
    if config.keys:
        missing = data.pairs.only(chosen := read_keys(config.keys))
        data.inputs["keys"] = hash_file(Path(config.keys))
        console.print(f"{config.keys}: {len(chosen)} chosen, {missing} of them are no pair here")
    if config.val_rows:
        data.hold_out(config.val_rows, config.seed, console.print)
    if config.val_apart is not None:
        assert not isinstance(data.held_out, OnlinePairs | None) and not isinstance(data.pairs, OnlinePairs)
        left_out = data.pairs.leave_out_near(data.held_out, config.val_apart)
        console.print(f"--val-apart {config.val_apart}: {left_out} pairs left out, as near to a held-out image")
    if config.positives != "diagonal" and not config.data:
        console.print(f"--positives {config.positives}: {data.pairs.repeated} pairs share their image with an earlier pair")
    return data


def estimate(config: TrainConfig, data: "TrainingData", parameters: int, batch_size: int, processes: int) -> str:
    """Return a sentence with the steps per epoch and the memory per process."""
    from align.training.pairs import BatchOrder

    order, share = BatchOrder(len(data.pairs), batch_size, config.seed), batch_size // processes
    held = 16 * parameters + 4 * share * config.width * (2 + len(config.captions)) * 4 + 3 * 4 * config.tile**2
    return f"{order.steps_per_epoch} steps an epoch, about {human_bytes(held)} a process beside the heads' activations"


def write_manifest(config: TrainConfig, data: "TrainingData", processes: int) -> None:
    """Write config.yaml, and add this launch and its data to manifest.json."""
    from align.runtime.runs import add_launch

    folder, pairs = Path(config.output), data.pairs
    folder.mkdir(parents=True, exist_ok=True)
    settings = write_recipe(config, folder, "train")
    facts = {"pairs": len(pairs), "vision": pairs.image_fingerprint, "text": pairs.text_fingerprint, "processes": processes}
    facts["inputs"] = data.inputs
    add_launch(folder, {"config": settings, **facts})


if __name__ == "__main__":
    run(main, TrainConfig, "train")
