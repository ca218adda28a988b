"""What eval/report.py can be told. Every field is a flag; checked when it is made."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ReportConfig:
    """Write one HTML page, its figures and a CSV from results; needs no model, no data and no network."""

    results: str
    """Folder with results.json, answers/ and examples/ (the output of eval/run.py)."""
    output: str | None = None
    """Folder for report.html, figures/ and entries.csv. None: the results folder."""
    train_runs: tuple[str, ...] = ()
    """Training runs whose curves are shown (folders with metrics.jsonl). Empty: those the models lie in."""
    title: str = "What the encoder learned"
    """Heading of the page."""
    theme: Literal["both", "light"] = "both"
    """Also embed dark figures for readers whose screen is dark, or light ones only (half the size)."""
