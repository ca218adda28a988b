"""What eval/lmms.py can be told. Every field is a flag; checked when it is made."""

from dataclasses import dataclass
from typing import Literal

from align.common.checks import check, check_least
from eval.measures.config import MeasuringFlags


@dataclass(frozen=True, kw_only=True)
class LmmsConfig(MeasuringFlags):
    """Ask MLLMs questions through lmms-eval and put the scores beside those of eval/run.py in one results.json and report."""

    mllm: tuple[str, ...] = ()
    """Model folders (mllm/finetune.py's or mllm/upgrade.py's output), each as PATH or NAME=PATH."""
    tasks: tuple[str, ...] = ()
    """Tasks: those of --list-tasks, of --include, or any that lmms-eval has."""
    data: str | None = None
    """Folder with the data files of the tasks of --list-tasks. None: where each task's YAML says."""
    include: str | None = None
    """Folder with YAML tasks of your own."""
    batch_size: int = 16
    """Questions a forward pass."""
    max_new_tokens: int = 1024
    """Longest answer, in tokens, of tasks that set no limit of their own."""
    template: str | None = None
    """Chat template instead of the model's own: plain, vicuna_v1, chatml, brief or own."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic; auto asks the hardware."""
    processes: int = 1
    """Processes (GPUs) that share the questions."""
    limit: int | None = None
    """Ask only the first so many questions of each task: for trying things out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = self.list_tasks or (self.mllm and self.tasks)
        check(bool(asked), "nothing to measure", "give --mllm FOLDER and --tasks NAME (--list-tasks shows those of the kit)")
        check_least(self, batch_size=1, max_new_tokens=1, processes=1, limit=1)
