"""Hugging Face's Trainer on batches of a given order, with learning rates per group, committed checkpoints, and a guard against bad steps.

A checkpoint is Trainer's own folder, with the trained tensors instead of the whole model (DeepSpeed: its engine's files). It counts
only once COMMIT, the hashes of all its files, is written.
"""

import copy
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback

from align.common.errors import DiskFullError, NonFiniteError
from align.common.files import atomic_json, disk_full_named, failpoint, require_free
from align.common.preemption import stay
from align.runtime.checkpoints import checkpoints, commit_checkpoint, delete_all_but
from align.runtime.processes import any_rank
from mllm.loop.log import TrainingLog
from mllm.loop.parameter_groups import load_trained, optimizer_groups, trained_tensors

TRAINED, INPUTS = "trained.safetensors", "inputs.json"
Item = int | Sequence[int]  # a row, or the rows of a pack


class MicroBatches:
    """This process's micro-batches, in an order of samples that does not depend on the number of processes.

    `batches(epoch)` returns an epoch's global batches. Each step has `accumulate` micro-batches, lists of `size` items.
    """

    def __init__(self, batches: Callable[[int], Sequence[Sequence[Item]]], steps: int, size: int, rank: int, world: int) -> None:
        self.batches, self.steps, self.size, self.rank, self.world = batches, steps, size, rank, world
        first = batches(0)
        self.per_epoch = len(first)
        self.accumulate = math.ceil(max(map(len, first)) / (size * world))

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def items(self, step: int) -> Sequence[Item]:
        """Return the global batch of a step (counted from 0)."""
        return self.batches(step // self.per_epoch)[step % self.per_epoch]

    def __iter__(self) -> Iterator[list[Item]]:
        for step in range(self.steps):
            items = self.items(step)
            for piece in range(self.accumulate):
                start = (piece * self.world + self.rank) * self.size
                yield list(items[start : start + self.size])


class SailTrainer(Trainer):
    """Trainer over `MicroBatches`. `rates` are the learning rates of the groups; `make_optimizer(groups)` returns the optimizer.

    Once `stopping()` is true it finishes the step, saves a checkpoint, stops, and sets `stopped`.
    """

    def __init__(
        self, *, micro_batches: MicroBatches, rates: dict[str, float],
        make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], log: TrainingLog, log_every: int, save_every: int,
        max_nonfinite: int, keep: int, stopping: Callable[[], bool], inputs: dict[str, Any], checkpoint_bytes: int,
        train_dataset: Dataset[Any], **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(train_dataset=train_dataset, **options)
        self.micro_batches, self.rates, self.make_optimizer = micro_batches, rates, make_optimizer
        self.max_nonfinite, self.keep, self.stopping = max_nonfinite, keep, stopping
        self.inputs, self.checkpoint_bytes = inputs, checkpoint_bytes
        self.step_loss: Tensor = torch.zeros((), device=self.args.device)  # of this process, summed over its micro-batches
        self.grad_norm = 0.0
        self.nonfinite_in_a_row = 0
        self._good: tuple[Any, ...] | None = None
        self.seen: dict[str, float] = {}
        self.waited = 0.0
        self.stopped = False
        self.remove_callback(PrinterCallback)
        self.add_callback(Watch(self, log, log_every, save_every))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a loader of this process's micro-batches. On resume, Trainer skips finished ones without reading them."""
        workers = self.args.dataloader_num_workers
        dataset: Any = self.train_dataset
        return DataLoader(
            dataset, batch_sampler=self.micro_batches, collate_fn=self.data_collator, num_workers=workers,
            pin_memory=self.args.device.type == "cuda", persistent_workers=False,
            prefetch_factor=2 * self.micro_batches.accumulate if workers else None, worker_init_fn=stay,
        )  # fmt: skip

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer over the parameter groups."""
        if self.optimizer is None:
            chosen: Any = model if model is not None else self.model
            self.optimizer = self.make_optimizer(optimizer_groups(chosen, self.rates, self.args.weight_decay))
        return self.optimizer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the micro-batches of a step. Add up their counts and the time waited for them."""
        began = time.monotonic()
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.waited += time.monotonic() - began
        for batch in samples:
            for name, value in batch.pop("counts").items():
                self.seen[name] = self.seen.get(name, 0) + value
        self.step_loss = torch.zeros((), device=self.args.device)
        return samples, items

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        """Return the loss of a micro-batch after its backward pass."""
        loss = super().training_step(*arguments, **named)
        self.step_loss += loss.detach().to(self.step_loss.dtype)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient norm. If it is not finite, drop the gradients, so that the step changes nothing."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self.is_deepspeed_enabled:
            self._judge(float(norm))
            if self.nonfinite_in_a_row:
                model.zero_grad(set_to_none=True)
        return norm

    def _judge(self, norm: float) -> None:
        self.grad_norm = norm
        self.nonfinite_in_a_row = 0 if math.isfinite(norm) else self.nonfinite_in_a_row + 1

    def finish_step(self) -> bool:
        """Return whether the step updated the weights. List the rows of a skipped step; NonFiniteError after too many in a row."""
        if self.is_deepspeed_enabled:  # it skips such steps itself (`check_grad_overflow`) and reports the norm afterwards
            engine: Any = self.model_wrapped
            norm, skipped = engine.get_global_grad_norm(), bool(getattr(engine.optimizer, "overflow", False))
            self._judge(math.inf if skipped else float(norm if norm is not None else 0.0))
        if not self.nonfinite_in_a_row:
            self.remember()
            return True
        folder, step = Path(str(self.args.output_dir)), self.state.global_step
        if self.is_world_process_zero():
            atomic_json(folder / f"nonfinite-step-{step:08d}.json", {"step": step, "rows": self.micro_batches.items(step - 1)})
        if self.nonfinite_in_a_row >= self.max_nonfinite:
            if self.rewind():
                self._save_checkpoint(self.model_wrapped, None)
            raise NonFiniteError(
                f"{self.nonfinite_in_a_row} steps in a row without finite gradients (rows in {folder}/nonfinite-*.json); "
                "weights are those before them; lower the learning rates or look at these rows"
            )
        return False

    def remember(self) -> None:
        """Remember the counters, rates and random states of this step: a non-finite step changes nothing else."""
        if self.is_deepspeed_enabled or self.lr_scheduler is None or self.optimizer is None:
            return
        rates = [group["lr"] for group in self.optimizer.param_groups]
        counted = self.state.global_step, self.state.epoch, copy.deepcopy(self.lr_scheduler.state_dict()), rates
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self._good = *counted, random.getstate(), np.random.get_state(), torch.get_rng_state(), devices

    def rewind(self) -> bool:
        """Go back to the last step that updated the weights, before the current series of non-finite ones.

        Return False where that is impossible (DeepSpeed counts in its engine): then the checkpoint before the series stays the newest.
        """
        if self._good is None or self.lr_scheduler is None or self.optimizer is None:
            return False
        self.state.global_step, self.state.epoch, schedule, rates, plain, numpy, cpu, devices = self._good
        self.lr_scheduler.load_state_dict(schedule)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        random.setstate(plain)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        for number, state in enumerate(devices):
            torch.cuda.set_rng_state(state, number)
        return True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the trained tensors in a checkpoint. DeepSpeed writes its own files with the optimizer."""
        if self.is_deepspeed_enabled:
            return
        assert output_dir is not None and self.model is not None
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(trained_tensors(self.model), Path(output_dir) / TRAINED, {"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        chosen: Any = model if model is not None else self.model
        load_trained(chosen, load_file(Path(resume_from_checkpoint) / TRAINED), resume_from_checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder, writing = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}", self.is_world_process_zero()
        if writing and folder.exists():
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        failpoint("mllm-checkpoint")
        try:
            with disk_full_named(folder, self.checkpoint_bytes):
                if writing:
                    require_free(folder, self.checkpoint_bytes)
                super()._save_checkpoint(model, trial)
        except DiskFullError:
            shutil.rmtree(folder, ignore_errors=True)  # half-written
            raise
        self.accelerator.wait_for_everyone()
        if writing:
            atomic_json(folder / INPUTS, self.inputs)
            failpoint("mllm-written")
            commit_checkpoint(folder)
            failpoint("mllm-committed")
            delete_all_but(self.keep, checkpoints(folder.parent, committed=True))
        self.accelerator.wait_for_everyone()


class Watch(TrainerCallback):
    """Checks and logs steps, and requests checkpoints: when due, at the end, and to stop."""

    def __init__(self, trainer: SailTrainer, log: TrainingLog, every: int, save_every: int) -> None:
        self.trainer, self.log, self.every, self.save_every = trainer, log, every, save_every
        self._due = False  # a checkpoint, once a step updates the weights

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.trainer.remember()
        self.log.start(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check the step, log it if due, and request a checkpoint if due or if the run must stop."""
        updated = self.trainer.finish_step()
        if state.global_step % self.every == 0 or state.global_step == state.max_steps or not updated:
            self.log.write(self.trainer, updated)
        stopped = self.trainer.stopped = any_rank(self.trainer.stopping(), args.device)
        final = state.global_step >= state.max_steps
        self._due = self._due or state.global_step % self.save_every == 0
        control.should_training_stop = stopped or final
        # a series of non-finite steps begins anew when it is resumed
        control.should_save = final or (stopped and (updated or self.trainer.rewind())) or (self._due and updated)
        self._due = self._due and not control.should_save
