"""The log of a training run: what was learnt and how fast, to files, curves and the console."""

import time
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from align.common.runs import RunLog

if TYPE_CHECKING:
    from mllm.loop.trainer import SailTrainer


class TrainingLog:
    """Reduces what the processes counted since the last row, writes it to a RunLog and prints a line.

    `peak` is the TFLOP/s that all devices together can do at best (None: the utilization is left out).
    """

    def __init__(self, run_log: RunLog, console: Console, peak: float | None) -> None:
        self.run_log, self.console, self.peak = run_log, console, peak

    def start(self, step: int) -> None:
        """Start the clock of a run that begins after `step` steps."""
        self._first, self._began, self._last = step, time.monotonic(), time.monotonic()

    def write(self, trainer: "SailTrainer", updated: bool) -> None:
        """Write the row of the step just done, on all processes at once; `updated` says whether it changed the weights."""
        state, optimizer = trainer.state, trainer.optimizer
        assert optimizer is not None
        loss = float(trainer.accelerator.reduce(trainer.step_loss.clone(), "mean"))
        row = {
            "step": state.global_step,
            "epoch": state.global_step / trainer.micro_batches.per_epoch,
            "loss": loss if updated else None,
            "grad_norm": trainer.grad_norm if updated else None,
            **{f"lr_{group['name']}": group["lr"] for group in optimizer.param_groups if "name" in group},
        }
        speed = self._speed(trainer)
        self.run_log.log(row, speed)
        left = (state.max_steps - state.global_step) * (time.monotonic() - self._began) / max(1, state.global_step - self._first)
        shown = f"{loss:.3f}" if updated else "not finite, weights left as they were"
        mfu = f", MFU {speed['mfu']:.0%}" if "mfu" in speed else ""
        self.console.print(
            f"step {state.global_step}/{state.max_steps} loss {shown} | {speed['supervised_tokens_per_second']:.0f} supervised tokens/s, "
            f"{speed['images_per_second']:.1f} images/s, padding {speed['padding']:.0%}, waited {speed['data_wait']:.0%}{mfu}, "
            f"{left:.0f} s left"
        )

    def _speed(self, trainer: "SailTrainer") -> dict[str, float]:
        """Return the rates since the last row, over all processes, and begin to count anew."""
        seconds = max(time.monotonic() - self._last, 1e-9)
        names = sorted(trainer.seen)
        sums = torch.tensor([trainer.seen[name] for name in names], dtype=torch.float64, device=trainer.args.device)
        seen = dict(zip(names, trainer.accelerator.reduce(sums, "sum").tolist(), strict=True))
        speed = {
            "seconds": seconds,
            "supervised_tokens_per_second": seen["supervised"] / seconds,
            "tokens_per_second": seen["tokens"] / seconds,
            "images_per_second": seen["images"] / seconds,
            "padding": 1 - seen["tokens"] / max(seen["slots"], 1),
            "data_wait": trainer.waited / seconds,
            "flops_per_second": seen["flops"] / seconds,
            "peak_memory": _peak_memory(trainer.args.device),
        }
        if self.peak:
            speed["mfu"] = speed["flops_per_second"] / (self.peak * 1e12)
        trainer.seen, trainer.waited, self._last = {}, 0.0, time.monotonic()
        return speed


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # there is none on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
