"""Train alignment heads on pre-encoded features, or with the encoders in the loop.

    accelerate launch align/train.py --config align/recipes/quickstart.yaml
    accelerate launch align/train.py --config align/recipes/sail_l_gte.yaml --images a/images b/images ...
    accelerate launch --multi_gpu --num_processes 8 align/train.py --config align/recipes/sail_l_gte.yaml
    accelerate launch align/train.py --head token --data photos.jsonl --captions captions --output runs/tokens --steps 1000 --augment \
        --vision facebook/dinov2-large --text sentence-transformers/all-roberta-large-v1 --loss infonce --batch-size 1024
    python align/train.py --config recipe.yaml --dry-run

Leaves in --output: best/ and last/ (model folders), metrics.jsonl, tensorboard/, checkpoints/, manifest.json, config.yaml.
Interrupted runs resume with the same command from the newest checkpoint that verifies, to the same weights. On SIGTERM it
saves a checkpoint and exits with code 75.
"""

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter
from transformers.utils.logging import disable_progress_bar

from align.common.checkpoints import clean_checkpoints, newest_checkpoint, save_checkpoint
from align.common.commandline import run
from align.common.console import plain_console
from align.common.errors import NonFiniteError, Preempted, UsageError
from align.common.files import atomic_bytes, atomic_json, hash_file, human_bytes
from align.common.hardware import resolve_precision, reuse_freed_memory, use_cores
from align.common.recipes_yaml import refuse_other_config, to_recipe
from align.common.runs import JsonLines, add_launch
from align.model.losses import any_rank
from align.model.saving import save_model
from align.training.config import TrainConfig
from align.training.inputs import Features, from_data, from_stores, model_for
from align.training.online import OnlinePairs
from align.training.pairs import BatchOrder, block_rows_for, read_keys
from align.training.step import Objective, Schedule, Stepper, build_optimizer, validate

FREE_ON_RESUME = {"log_every", "save_every", "keep", "accumulate", "dry_run", "tile", "output", "embed_encoders", "workers"}


class Run:
    """Everything one run writes; silent on all processes but the first."""

    def __init__(self, config: TrainConfig, stepper: Stepper, tokenizer: Path, main_process: bool) -> None:
        self.config, self.stepper, self.tokenizer, self.main_process = config, stepper, tokenizer, main_process
        self.folder = Path(config.output)
        self.metrics, self.speed = JsonLines(self.folder / "metrics.jsonl"), JsonLines(self.folder / "speed.jsonl")
        self.state: dict[str, Any] = {"best": -1.0, "best_step": 0, "skipped": 0, "block_rows": 1}

    def resume(self, console: Console) -> int:
        """Load the newest checkpoint that verifies and return its step; 0 if there is none."""
        path, tensors, values, problems = newest_checkpoint(self.folder / "checkpoints")
        for problem in problems:
            console.print(f"passed over a checkpoint: {problem}")
        if path is not None:
            self.stepper.load_state(tensors, values["optimizer"])
            self.state = values["run"]
            console.print(f"going on from {path} (step {values['step']})")
        step = values.get("step", 0)
        if self.main_process:
            clean_checkpoints(self.folder / "checkpoints")
            for lines in (self.metrics, self.speed):
                lines.cut(step if path else -1)
            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step or None)
        return step

    def log(self, row: dict[str, Any], speed: dict[str, Any] | None = None) -> None:
        """Write a row of metrics (and of speed) to the JSON lines and to TensorBoard."""
        if not self.main_process:
            return
        self.metrics.append(row)
        if speed is not None:
            self.speed.append({"step": row["step"], **speed})
        for name, value in {**row, **(speed or {})}.items():
            if name != "step":
                self.board.add_scalar(name, value, row["step"])

    def validated(self, step: int, values: dict[str, float]) -> None:
        """Log a validation and keep the model as `best/` if it is the best so far."""
        self.log({"step": step, **values})
        if values["val_mean_recall"] > self.state["best"]:
            self.state |= {"best": values["val_mean_recall"], "best_step": step}
            self.save("best")

    def save(self, name: str) -> None:
        """Write the model folder `name`."""
        if self.main_process:
            save_model(self.stepper.model, self.folder / name, self.tokenizer, self.config.embed_encoders)

    def checkpoint(self, step: int) -> None:
        """Commit the whole state at `step`."""
        if self.main_process:
            tensors, values = self.stepper.state()
            state = {"optimizer": values, "run": self.state}
            save_checkpoint(self.folder / "checkpoints", step, tensors, state, self.config.keep)

    def skipped(self, step: int, keys: list[str]) -> None:
        """Count a non-finite step and write down which samples it held."""
        self.state["skipped"] += 1
        if self.main_process:
            atomic_json(self.folder / f"nonfinite-step-{step:08d}.json", {"step": step, "keys": keys})


def main(config: TrainConfig) -> None:
    """Open the features, build the heads, resume, train, validate, save."""
    reuse_freed_memory()
    state = PartialState(cpu=not torch.cuda.is_available())
    use_cores(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    console = plain_console(quiet=not state.is_main_process)
    disable_progress_bar()  # of transformers: a bar for each saved model
    if config.batch_size % state.num_processes:
        raise UsageError(f"--batch-size {config.batch_size} does not divide by {state.num_processes} processes")
    folder = Path(config.output)
    refuse_other_config(config, folder, "train", FREE_ON_RESUME)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # with --data workers are forked after the tokenizer has run
    features = from_data(config, state) if config.data else from_stores(config)
    pairs = features.pairs
    if config.keys:
        chosen = read_keys(config.keys)
        missing = pairs.only(chosen)
        console.print(f"{config.keys}: {len(chosen)} chosen, {missing} of them are no pair here")
    if config.val_rows:
        features.held_out = pairs.split(config.val_rows, config.seed)
    precision = resolve_precision(config.precision, state.device)
    model = model_for(config, features).to(state.device)
    steps = config.steps or max(1, math.floor((config.epochs or 0) * (len(pairs) // config.batch_size)))
    schedule = Schedule(config.lr, steps, config.warmup, config.min_lr)
    optimizer = build_optimizer(model, config.optimizer, config.lr, config.betas, config.weight_decay)
    objective = Objective(
        config.loss, config.reduction, config.positives, config.tile, config.fusemix,
        config.structure, config.structure_levels, config.feature_dropout,
    )  # fmt: skip
    stepper = Stepper(
        model, optimizer, schedule, objective, seed=config.seed, rank=state.process_index,
        accumulate=config.accumulate, precision=precision, max_grad_norm=config.max_grad_norm,
        log_scale_range=config.log_scale_range,
    )  # fmt: skip
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"{len(pairs)} pairs ({pairs.unpaired} images without partner left out), "
        f"{'encoded in every step' if config.data else human_bytes(pairs.nbytes) + ' of features'}, "
        f"{parameters / 1e6:.2f}M parameters, {steps} steps of {config.batch_size} on {state.num_processes} process(es)",
    )
    job = Run(config, stepper, features.tokenizer, state.is_main_process)
    job.state["block_rows"] = pairs.block_rows if isinstance(pairs, OnlinePairs) else block_rows_for(pairs)
    if config.dry_run:
        order = BatchOrder(len(pairs), config.batch_size, config.seed, job.state["block_rows"])
        share = config.batch_size // state.num_processes
        held = 16 * parameters + 4 * share * config.width * (2 + len(config.captions)) * 4 + 3 * 4 * config.tile**2
        console.print(f"{order.steps_per_epoch} steps an epoch, about {human_bytes(held)} a process beside the heads' activations")
        return
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_bytes(folder / "config.yaml", to_recipe(config, "train").encode())
        facts = {"pairs": len(pairs), "vision": pairs.image_fingerprint, "text": pairs.text_fingerprint, "processes": state.num_processes}
        facts |= {"keys": hash_file(Path(config.keys))} if config.keys else {}
        add_launch(folder, {"config": yaml.safe_load(to_recipe(config, "train"))["train"], **facts})
    first = job.resume(console)
    for opened, name in ((pairs, "rejects"), (features.held_out, "rejects-val")):
        if isinstance(opened, OnlinePairs):
            opened.resume(JsonLines(folder / f"{name}-{state.process_index}.jsonl"), first)
    train(job, features, range(first, steps), state, console)


def train(job: Run, features: Features, steps: range, state: PartialState, console: Console) -> None:
    """Do the steps, with logging, validation, checkpoints and a clean stop on SIGTERM."""
    config, stepper, pairs, held_out = job.config, job.stepper, features.pairs, features.held_out
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    order = BatchOrder(len(pairs), config.batch_size, config.seed, job.state["block_rows"])
    share = config.batch_size // state.num_processes
    part = slice(state.process_index * share, (state.process_index + 1) * share)
    if steps.start == 0 and held_out is not None:
        job.validated(0, validate(stepper.model, held_out, config.val_limit, stepper.precision))
    in_a_row, waited, begin, last_step = 0, 0.0, time.monotonic(), steps.start
    clock = time.monotonic()
    for step, batch in zip(steps, features.batches(order, config.seed, steps, part), strict=True):
        waited += time.monotonic() - clock
        result = stepper.step(batch, step)
        done, final = step + 1, step + 1 == steps.stop
        in_a_row = 0 if result.updated else in_a_row + 1
        if not result.updated:
            job.skipped(done, pairs.keys(order.indices(step)))
            console.print(f"step {done}: loss {result.loss}, gradient norm {result.grad_norm}: not finite, weights left as they were")
            if in_a_row >= config.max_nonfinite:
                job.checkpoint(step + 1 - in_a_row)
                raise NonFiniteError(f"{in_a_row} non-finite steps in a row; the last good state and the batches' keys are in {job.folder}")
        elif done % config.log_every == 0 or final:
            seconds = time.monotonic() - begin
            bias = stepper.model.logit_bias
            rate = (done - last_step) * config.batch_size / max(seconds, 1e-9)
            row = {
                "step": done, "epoch": done / order.steps_per_epoch, "loss": result.loss, "lr": stepper.schedule.at(step),
                "scale": stepper.model.logit_scale.exp().item(), "bias": 0.0 if bias is None else bias.item(),
                "positive_logit": result.positive_logit, "negative_logit": result.negative_logit, "grad_norm": result.grad_norm,
                "skipped": job.state["skipped"],
            }  # fmt: skip
            row |= {"structure": result.structure} if config.structure else {}
            encoding = features.encode_seconds()
            shares = {"data_wait": waited - encoding, "encode": encoding} if config.data else {"data_wait": waited}
            job.log(row, {"pairs_per_second": rate, **{name: spent / max(seconds, 1e-9) for name, spent in shares.items()}})
            left = (steps.stop - done) * seconds / max(1, done - last_step)
            logits = f"mean logit of positives {result.positive_logit:.2f}, negatives {result.negative_logit:.2f}"
            console.print(
                f"step {done}/{steps.stop} loss {result.loss:.4g} t {row['scale']:.1f} b {row['bias']:.2f} "
                f"{logits} | {rate:.0f} pairs/s, {left:.0f} s left",
            )
            waited, begin, last_step = 0.0, time.monotonic(), done
        if held_out is not None and (done % config.val_every == 0 or final):
            values = validate(stepper.model, held_out, config.val_limit, stepper.precision)
            job.validated(done, values)
            console.print(f"step {done}: validation R@1 image-to-text {values['val_i2t_r1']:.1%}, text-to-image {values['val_t2i_r1']:.1%}")
        stop = any_rank(bool(stopping), state.device)
        if done % config.save_every == 0 or final or stop:
            job.checkpoint(done)
        if stop and not final:
            raise Preempted(f"stopped by SIGTERM at step {done}, state saved; run the same command to go on")
        clock = time.monotonic()
    job.save("last")
    if held_out is None:
        job.save("best")
    state.wait_for_everyone()
    console.print(f"done: {job.folder}/best (step {job.state['best_step'] or steps.stop}) and {job.folder}/last")


if __name__ == "__main__":
    run(main, TrainConfig, "train")
