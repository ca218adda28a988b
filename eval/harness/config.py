"""Flags of eval/lmms.py. Each field is a flag. Values are checked when the config is created."""

from dataclasses import dataclass
from typing import Literal

from align.common.checks import check, check_least
from eval.measures.config import MeasuringFlags


@dataclass(frozen=True, kw_only=True)
class LmmsConfig(MeasuringFlags):
    """Ask MLLMs questions through lmms-eval; the scores join those of eval/run.py in one results.json and report."""

    mllm: tuple[str, ...] = ()
    """Model folders (output of mllm/finetune.py or mllm/upgrade.py), each PATH or NAME=PATH."""
    tasks: tuple[str, ...] = ()
    """Tasks of --list-tasks, of --include, or of lmms-eval itself."""
    data: str | None = None
    """Folder with the data files of the --list-tasks tasks. None: the path in each task's YAML."""
    include: str | None = None
    """Folder with your own YAML tasks."""
    batch_size: int = 16
    """Questions per forward pass."""
    max_new_tokens: int = 1024
    """Longest answer in tokens, for tasks that set no limit."""
    template: str | None = None
    """Chat template instead of the model's own: plain, vicuna_v1, chatml, brief or own."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic; auto chooses by hardware."""
    processes: int = 1
    """Processes (GPUs) that share the questions."""
    limit: int | None = None
    """Ask only the first N questions of each task, for quick trials."""

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = self.list_tasks or (self.mllm and self.tasks)
        check(bool(asked), "nothing to measure", "give --mllm FOLDER and --tasks NAME (--list-tasks shows those of the kit)")
        check_least(self, batch_size=1, max_new_tokens=1, processes=1, limit=1)
