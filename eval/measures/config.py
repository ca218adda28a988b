"""What eval/run.py can be told. Every field is a flag; checked when it is made."""

from dataclasses import dataclass

from align.common.checks import check, check_least, check_share


@dataclass(frozen=True, kw_only=True)
class MeasuringFlags:
    """How what is measured is summed up and shown; a base of configs."""

    output: str = "runs/eval"
    """Folder for results.json (what the other command wrote there is kept), answers/, examples/ and the report."""
    device: str = "auto"
    """Where the models run: auto (a GPU if there is one), cpu, cuda, cuda:1."""
    baseline: bool = True
    """Also measure each aligned model with untrained heads, and give what chance and the most frequent answer would score."""
    seed: int = 0
    """Seed of untrained heads, the bootstrap and the choice of examples."""
    confidence: float = 0.95
    """Confidence of the intervals."""
    examples: int = 8
    """Examples shown in the report, per task and direction."""
    train_runs: tuple[str, ...] = ()
    """Training runs whose curves the report shows (folders with metrics.jsonl). Empty: those the models lie in."""
    report: bool = True
    """Write report.html, its figures and entries.csv beside the results."""
    list_tasks: bool = False
    """Print the known tasks and where their data belongs, then exit."""

    def __post_init__(self) -> None:
        check_least(self, examples=0)
        check(0 < self.confidence < 1, f"--confidence {self.confidence}", "must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(MeasuringFlags):
    """Measure aligned models on tasks: results.json with intervals, per-sample answers and a report."""

    model: tuple[str, ...] = ()
    """Models, each as MODEL or NAME=MODEL: a training run's output or model folder; to compare with, openclip:ARCH/TAG (or a local
    .safetensors file in place of the tag) and hf:FOLDER or hf:HUB_ID (CLIP, SigLIP)."""
    tasks: tuple[str, ...] = ()
    """Task ids (see --list-tasks) or YAML files that describe a task of your own."""
    data_root: str = "data"
    """Folder below which every task's data lies."""
    cache: str | None = None
    """Folder for frozen features, kept by task and encoder fingerprint. None: OUTPUT/cache."""
    templates: str | None = None
    """Prompts for every classification task instead of its own: a set's id, or a .txt or .json file in the task's folder."""
    batch_size: int = 64
    """Images a forward pass."""
    text_batch_size: int = 256
    """Sentences a forward pass."""
    workers: int = 2
    """Processes that read and decode images beside the forward pass."""
    windows: tuple[int, int, int] = (448, 448, 224)
    """Segmentation: the image's shorter side after resizing, a window's side and the stride, in pixels."""
    max_reject_fraction: float = 0.05
    """Stop when a larger share of a task's samples is rejected."""
    trust_remote_code: bool = False
    """Run code that ships with the aligned models' encoders: of those on the hub whose revision was pinned, and of local folders."""
    compare: tuple[str, ...] = ()
    """Instead of measuring, say which differences between two results, A and B, are real: each FOLDER (its trained model) or FOLDER:MODEL.
    Writes comparison.html, .json and .csv to OUTPUT."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(len(self.compare) in (0, 2), f"--compare with {len(self.compare)}", "give two results, A and B, each FOLDER or FOLDER:MODEL")
        asked = self.list_tasks or self.compare or (self.model and self.tasks)
        check(bool(asked), "nothing to measure", "give --model FOLDER and --tasks ID (--list-tasks shows the known ids)")
        check_least(self, batch_size=1, text_batch_size=1, workers=0)
        side, window, stride = self.windows
        windows = f"--windows {side} {window} {stride}"
        check(side >= 1 and 1 <= stride <= window, windows, "SIDE WINDOW STRIDE must be at least 1 pixel, and the stride at most a window")
        check_share("max-reject-fraction", self.max_reject_fraction)
