"""What eval/lmms.py can be told. Every field is a flag; checked when it is made."""

from dataclasses import dataclass
from typing import Literal

from align.common.checks import check, check_least


@dataclass(frozen=True)
class LmmsConfig:
    """Ask MLLMs questions through lmms-eval and put the scores beside those of eval/run.py in one results.json and report."""

    mllm: tuple[str, ...] = ()
    """Model folders (mllm/finetune.py's or mllm/upgrade.py's output), each as PATH or NAME=PATH."""
    tasks: tuple[str, ...] = ()
    """Tasks: those of --list-tasks, of --include, or any that lmms-eval has."""
    output: str = "runs/eval"
    """Folder for results.json (what eval/run.py wrote there is kept), answers/, examples/, the report and lmms-eval's own files."""
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
    device: str = "auto"
    """Where the models run: auto (a GPU if there is one), cpu, cuda."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic; auto asks the hardware."""
    processes: int = 1
    """Processes (GPUs) that share the questions."""
    limit: int | None = None
    """Ask only the first so many questions of each task: for trying things out."""
    baseline: bool = True
    """Also give what always answering the most frequent answer would score."""
    seed: int = 0
    """Seed of the bootstrap and the choice of examples."""
    confidence: float = 0.95
    """Confidence of the intervals."""
    examples: int = 8
    """Examples shown in the report, per task."""
    train_runs: tuple[str, ...] = ()
    """Training runs whose curves the report shows (folders with metrics.jsonl). Empty: those the models lie in."""
    report: bool = True
    """Write report.html, its figures and entries.csv beside the results."""
    list_tasks: bool = False
    """Print the tasks that come with the kit and where their data belongs, then exit."""

    def __post_init__(self) -> None:
        asked = self.list_tasks or (self.mllm and self.tasks)
        check(bool(asked), "nothing to measure", "give --mllm FOLDER and --tasks NAME (--list-tasks shows those of the kit)")
        check_least(self, batch_size=1, max_new_tokens=1, processes=1, examples=0, limit=1)
        check(0 < self.confidence < 1, f"--confidence {self.confidence}", "must lie between 0 and 1")
