"""Write the report of a finished measurement again: one HTML page, its figures as PNG, the numbers as CSV.

    python eval/report.py --results runs/quickstart/eval
    python eval/report.py --results runs/flickr8k/eval --train-runs runs/flickr8k --title 'Flickr8k' --output site

It needs no model, no data and no network.
"""

from pathlib import Path

from align.runtime.commandline import run
from align.runtime.console import plain_console
from eval.page.config import ReportConfig


def main(config: ReportConfig) -> None:
    """Write the page and print its path."""
    from eval.page.page import write_report

    output = Path(config.output or config.results)
    output.mkdir(parents=True, exist_ok=True)
    runs = [Path(folder) for folder in config.train_runs]
    page = write_report(Path(config.results), output, runs, config.title, dark=config.theme == "both")
    plain_console().print(f"report: {page}")


if __name__ == "__main__":
    run(main, ReportConfig, "report")
