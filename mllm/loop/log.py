"""The log of a training run: metrics and speed, to files, curves and the console."""

from typing import TYPE_CHECKING

import torch
from rich.console import Console

from align.runtime.console import Progress
from align.runtime.runs import RunLog

if TYPE_CHECKING:
    from mllm.loop.trainer import SailTrainer


class TrainingLog:
    """Writes rows to a RunLog and lines to the console. `peak` is the TFLOP/s of all devices; None leaves out the utilization."""

    def __init__(self, run_log: RunLog, console: Console, peak: float | None) -> None:
        self.run_log, self.console, self.peak = run_log, console, peak

    def start(self, step: int, steps: int) -> None:
        """Start the clock at `step` of `steps`."""
        self.progress = Progress(self.console, "step", steps, first=step)

    def write(self, trainer: "SailTrainer", updated: bool) -> None:
        """Write the row of the step just done; all processes must call it. `updated` says whether the step changed the weights."""
        step, optimizer = trainer.state.global_step, trainer.optimizer
        assert optimizer is not None
        loss = float(trainer.accelerator.reduce(trainer.step_loss.clone(), "mean"))
        row = {
            "step": step,
            "epoch": step / trainer.micro_batches.per_epoch,
            "loss": loss if updated else None,
            "grad_norm": trainer.grad_norm if updated else None,
            **{f"lr_{group['name']}": group["lr"] for group in optimizer.param_groups if "name" in group},
        }
        speed = self._speed(trainer)
        self.run_log.log(row, speed)
        note = (
            f"loss {f'{loss:.3f}' if updated else 'not finite, weights left as they were'}, "
            f"{speed['supervised_tokens_per_second']:.0f} supervised tokens/s, {speed['images_per_second']:.1f} images/s, "
            f"padding {speed['padding']:.0%}"
        )
        self.progress(step, note=f"{note}, MFU {speed['mfu']:.0%}" if "mfu" in speed else note, now=True)

    def _speed(self, trainer: "SailTrainer") -> dict[str, float]:
        """Return the rates over all processes since the last row, and reset the counts."""
        self.progress.add("waiting for data", trainer.waited)
        seconds, shares = self.progress.lap()
        names = sorted(trainer.seen)
        sums = torch.tensor([trainer.seen[name] for name in names], dtype=torch.float64, device=trainer.args.device)
        seen = dict(zip(names, trainer.accelerator.reduce(sums, "sum").tolist(), strict=True))
        speed = {
            "seconds": seconds,
            "supervised_tokens_per_second": seen["supervised"] / seconds,
            "tokens_per_second": seen["tokens"] / seconds,
            "images_per_second": seen["images"] / seconds,
            "padding": 1 - seen["tokens"] / max(seen["slots"], 1),
            "data_wait": shares["waiting for data"],
            "flops_per_second": seen["flops"] / seconds,
            "peak_memory": _peak_memory(trainer.args.device),
        }
        if self.peak:
            speed["mfu"] = speed["flops_per_second"] / (self.peak * 1e12)
        trainer.seen, trainer.waited = {}, 0.0
        return speed


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not available on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
