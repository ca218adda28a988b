"""Flags of eval/report.py. Each field is a flag."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ReportConfig:
    """Write one HTML page, its figures and a CSV from results. This needs no model, no data and no network."""

    results: str
    """Folder with results.json, answers/ and examples/ (the output of eval/run.py)."""
    output: str | None = None
    """Folder for report.html, figures/ and entries.csv. None: the results folder."""
    train_runs: tuple[str, ...] = ()
    """Training runs whose curves are shown (folders with metrics.jsonl). Empty: the runs that contain the models."""
    title: str = "What the encoder learned"
    """Heading of the page."""
    theme: Literal["both", "light"] = "both"
    """both: also embed dark figures, for dark screens. light: only light figures, half the size."""
