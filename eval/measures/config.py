"""Flags of eval/run.py. Each field is a flag. Values are checked when the config is created."""

from dataclasses import dataclass

from align.common.checks import check, check_least, check_share


@dataclass(frozen=True, kw_only=True)
class MeasuringFlags:
    """Flags that eval/run.py and eval/lmms.py share."""

    output: str = "runs/eval"
    """Folder for results.json, answers/, examples/ and the report. Results of the other command in it are kept."""
    device: str = "auto"
    """Where the models run: auto (a GPU if there is one), cpu, cuda, cuda:1."""
    baseline: bool = True
    """Also measure each aligned model with untrained heads, and report chance and the most frequent answer."""
    seed: int = 0
    """Seed for untrained heads, the bootstrap and the choice of examples."""
    confidence: float = 0.95
    """Confidence level of the intervals."""
    examples: int = 8
    """Examples in the report, per task and direction."""
    train_runs: tuple[str, ...] = ()
    """Training runs whose curves the report shows (folders with metrics.jsonl). Empty: the runs that contain the models."""
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
    """Models, each MODEL or NAME=MODEL: a run or model folder, openclip:ARCH/TAG, openclip:ARCH/FILE.safetensors, hf:FOLDER, hf:HUB_ID."""
    tasks: tuple[str, ...] = ()
    """Task ids (see --list-tasks), or YAML files that describe your own tasks."""
    data_root: str = "data"
    """Folder that contains the data of all tasks."""
    cache: str | None = None
    """Folder for frozen features, stored by content and encoder. None: OUTPUT/cache."""
    templates: str | None = None
    """Prompts for classification and segmentation: a set's id, or a .txt or .json file in the task's folder. None: each task's own."""
    batch_size: int = 64
    """Images per forward pass."""
    text_batch_size: int = 256
    """Sentences per forward pass."""
    workers: int = 2
    """Processes that read and decode images while the encoder runs."""
    windows: tuple[int, int, int] = (448, 448, 224)
    """Segmentation: the image's shorter side after resizing, the window's side and the stride, in pixels."""
    max_reject_fraction: float = 0.05
    """Stop if a larger share of a task's samples is rejected."""
    trust_remote_code: bool = False
    """Run code that ships with the aligned models' encoders: local folders, and hub encoders with a pinned revision."""
    compare: tuple[str, ...] = ()
    """Compare two results instead of measuring, each FOLDER (its trained model) or FOLDER:MODEL. Writes comparison.* to OUTPUT."""

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
