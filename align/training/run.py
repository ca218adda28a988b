"""One training run: its steps and its output in the run folder (log rows, validations, checkpoints, models)."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console

from align.common.errors import NonFiniteError, Preempted
from align.common.files import atomic_json, require_free
from align.common.fingerprints import compare_inputs
from align.common.preemption import noted, reason
from align.model.saving import package, save_model
from align.runtime.checkpoints import checkpoints, clean_checkpoints, newest_checkpoint, save_checkpoint
from align.runtime.console import Progress
from align.runtime.processes import any_rank
from align.runtime.runs import RunLog
from align.training.data import TrainingData
from align.training.pairs import BatchOrder, PairBatch
from align.training.step import Stepper, StepResult, validate


@dataclass(eq=False)
class Run:
    """Trains and writes to `folder`. Only the first process prints."""

    folder: Path
    data: TrainingData
    stepper: Stepper
    process: PartialState
    console: Console
    _: KW_ONLY
    steps: int
    batch_size: int  # pairs over all processes
    every: dict[str, int]  # steps between "log" rows, "val" validations and "save" checkpoints
    val_limit: int  # images
    keep: int  # checkpoints
    max_nonfinite: int  # steps in a row
    embed_encoders: bool  # copy them into the saved models
    trackers: Sequence[str] = ()  # beside TensorBoard and JSON lines

    def __post_init__(self) -> None:
        self.state: dict[str, Any] = {"best": -1.0, "best_step": 0, "skipped": 0, "block_rows": self.data.pairs.block_rows}
        self._nonfinite_in_a_row = self._logged = 0
        self._done = 0
        self._due = False  # a checkpoint, once a step updates the weights

    def train(self) -> None:
        """Run the remaining steps. On SIGTERM save a checkpoint and raise Preempted. NonFiniteError after too many non-finite steps."""
        first = self._resume()
        self._require_space()
        with closing(self.log), noted() as stopping:
            self._train(first, stopping)

    def _train(self, first: int, stopping: Callable[[], bool]) -> None:
        self.order = BatchOrder(len(self.data.pairs), self.batch_size, self.stepper.seed, self.state["block_rows"])
        share = self.batch_size // self.process.num_processes
        part = slice(self.process.process_index * share, (self.process.process_index + 1) * share)
        self._logged = first
        if first == 0:
            self._validate(0)
        self.progress = Progress(self.console, "step", self.steps, first)
        for step, batch in enumerate(self._timed(self.data.pairs.batches(self.order, range(first, self.steps), part)), first):
            result = self.stepper.step(batch, step)
            done, final = step + 1, step + 1 == self.steps
            self._done = done
            if not result.updated:
                self._skip(result, done)
            else:
                self._nonfinite_in_a_row = 0
                if done % self.every["log"] == 0 or final:
                    self._log(result, done)
            if done % self.every["val"] == 0 or final:
                self._validate(done)
            stop = any_rank(stopping(), self.process.device)
            self._due = self._due or done % self.every["save"] == 0
            if final:
                self._checkpoint(done)
            elif stop or (self._due and result.updated):  # a series of non-finite steps begins anew when it is resumed
                self._checkpoint(done - self._nonfinite_in_a_row)
            if stop and not final:
                raise Preempted(f"stopped by {reason()} at step {done}, state saved; run the same command to go on")
        self._finish()

    def _resume(self) -> int:
        """Load the newest checkpoint that verifies. Return its step, or 0 without one. FingerprintError if an input is another one."""
        path, tensors, values, problems = newest_checkpoint(self.folder / "checkpoints")
        for problem in problems:
            self.console.print(f"passed over a checkpoint: {problem}")
        if path is not None:
            if self.process.is_main_process:
                compare_inputs(self.data.inputs, values.get("inputs"), str(path))
            self.stepper.load_state(tensors, values["optimizer"])
            self.state = values["run"]
            self.console.print(f"going on from {path} (step {values['step']})")
        if self.process.is_main_process:
            clean_checkpoints(self.folder / "checkpoints")
        self.log = RunLog(self.folder, values.get("step"), self.trackers, writing=self.process.is_main_process)
        step = values.get("step", 0)
        self.data.list_rejects(self.folder, self.process.process_index, step)
        return step

    def _require_space(self) -> None:
        """Raise DiskFullError unless checkpoints and models that the run will write fit on the disk."""
        if not self.process.is_main_process:
            return
        weights = sum(tensor.nbytes for tensor in self.stepper.model.state_dict().values())
        moments = 2 if isinstance(self.stepper.optimizer, torch.optim.AdamW) else 1
        missing = max(1, self.keep + 1 - len(checkpoints(self.folder / "checkpoints")))
        models = 3 - sum((self.folder / name).is_dir() for name in ("best", "last"))
        require_free(self.folder, missing * (1 + moments) * weights + models * weights)

    def _timed(self, batches: Iterator[PairBatch]) -> Iterator[PairBatch]:
        """Yield batches and record the time waited for each. Time of encoders in the loop is recorded separately."""
        asked = time.monotonic()
        for batch in batches:
            waited, encoding = time.monotonic() - asked, self.data.pairs.encode_seconds()
            self.progress.add("data_wait", waited - (encoding or 0.0))
            if encoding is not None:
                self.progress.add("encode", encoding)
            yield batch
            asked = time.monotonic()

    def _log(self, result: StepResult, done: int) -> None:
        model, (seconds, shares) = self.stepper.model, self.progress.lap()
        row = {
            "step": done, "epoch": done / self.order.steps_per_epoch, "loss": result.loss, "lr": self.stepper.schedule.at(done - 1),
            "scale": model.logit_scale.exp().item(), "bias": 0.0 if model.logit_bias is None else model.logit_bias.item(),
            "positive_logit": result.positive_logit, "negative_logit": result.negative_logit, "grad_norm": result.grad_norm,
            "skipped": self.state["skipped"],
        }  # fmt: skip
        rate, self._logged = (done - self._logged) * self.batch_size / seconds, done
        self.log.log(row, {"pairs_per_second": rate, **shares})
        logits = f"mean logit of positives {result.positive_logit:.2f}, negatives {result.negative_logit:.2f}"
        note = f"loss {result.loss:.4g} t {row['scale']:.1f} b {row['bias']:.2f} {logits}, {rate:.0f} pairs/s"
        self.progress(done, note=note, now=True)

    def _validate(self, done: int) -> None:
        """Log a validation if there is data for it. Save the model as `best/` if it is the best so far."""
        if self.data.held_out is None:
            return
        values = validate(self.stepper.model, *self.data.held_out.everything(self.val_limit), self.stepper.precision)
        self.log.log({"step": done, **values})
        if values["val_mean_recall"] > self.state["best"]:
            self.state |= {"best": values["val_mean_recall"], "best_step": done}
            self._save("best")
        if done:
            i2t, t2i = values["val_i2t_r1"], values["val_t2i_r1"]
            self.console.print(f"step {done}: validation R@1 image-to-text {i2t:.1%}, text-to-image {t2i:.1%}")

    def _skip(self, result: StepResult, done: int) -> None:
        """Count a non-finite step and list its samples. After too many in a row save the last good state and raise NonFiniteError."""
        self.state["skipped"] += 1
        self._nonfinite_in_a_row += 1
        count = self._nonfinite_in_a_row
        if self.process.is_main_process:
            keys = self.data.pairs.keys(self.order.indices(done - 1))
            atomic_json(self.folder / f"nonfinite-step-{done:08d}.json", {"step": done, "keys": keys})
        self.console.print(f"step {done}: loss {result.loss}, gradient norm {result.grad_norm}: not finite, weights left as they were")
        if count >= self.max_nonfinite:
            self._checkpoint(done - count)
            raise NonFiniteError(f"{count} non-finite steps in a row; the last good state and the batches' keys are in {self.folder}")

    def _checkpoint(self, step: int) -> None:
        """Save the state at `step`: the last step done, or the one before a series of non-finite steps, which changed nothing."""
        self._due = False
        if self.process.is_main_process:
            tensors, values = self.stepper.state()
            counted = self.state | ({} if step >= self._done else {"skipped": self.state["skipped"] - (self._done - step)})
            state = {"optimizer": values, "run": counted, "inputs": self.data.inputs}
            save_checkpoint(self.folder / "checkpoints", step, tensors, state, self.keep)

    def _save(self, name: str) -> None:
        if self.process.is_main_process:
            save_model(self.stepper.model, self.folder / name, self.data.tokenizer)

    def _finish(self) -> None:
        """Save the last model. Without validation it is also the best one. Then both get copies of the encoders, if asked for."""
        self._save("last")
        if self.data.held_out is None:
            self._save("best")
        if self.embed_encoders and self.process.is_main_process:
            for name in ("best", "last"):
                package(self.folder / name, self.folder / name, {})
        self.process.wait_for_everyone()
        best = f"step {self.state['best_step'] or self.steps}"
        if self.data.held_out is not None and self.state["best_step"] == 0:
            best = "step 0: NO validation was better than that of the untrained heads, which this folder holds"
        self.console.print(f"done: {self.folder}/best ({best}) and {self.folder}/last")
