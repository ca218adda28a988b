"""How numbers are shown: names of metrics, percents with intervals, and the table for the terminal."""

from rich.table import Table

from eval.results.records import Entry, Results, TaskRecord

SHOWN_METRICS = {
    "classification": {"acc@1": "top-1 accuracy", "acc@5": "top-5 accuracy", "mean_per_class": "mean per class"},
    "retrieval": {
        f"{direction}_{metric}": f"{name} {label}"
        for direction, name in (("t2i", "text to image"), ("i2t", "image to text"))
        for metric, label in (("r@1", "R@1"), ("r@5", "R@5"), ("r@10", "R@10"), ("median_rank", "median rank"))
    },
    "compositional": {
        "text_score": "text score",
        "image_score": "image score",
        "group_score": "group score",
        "pair_accuracy": "right pairs",
    },
    "segmentation": {"miou": "mean IoU", "pixel_accuracy": "right pixels", "mean_class_accuracy": "mean per class"},
    "generation": {  # a task's main metric is the first of these that it has; other metrics come last
        "accuracy": "accuracy",
        "exact_match": "exact match",
        "cider": "CIDEr-D",
        "rouge_l": "ROUGE-L",
        "f1": "F1 of yes",
        "precision": "precision of yes",
        "recall": "recall of yes",
        "yes_ratio": "answers that are yes",
        "accuracy_exists": "accuracy, is it there",
        "accuracy_relation": "accuracy, is the relation true",
    },
}
POINTS = "(points)"  # suffix of metrics with a scale of their own


def shown_value(entry: Entry) -> tuple[str, str]:
    """Return value and interval for tables: percents, or plain ranks and points. A constant has no interval."""
    factor = 1 if "rank" in entry.metric or entry.metric.endswith(POINTS) else 100
    low, high = f"{factor * entry.low:.1f}", f"{factor * entry.high:.1f}"
    return f"{factor * entry.value:.1f}", "" if entry.low == entry.high == entry.value else f"{low} – {high}"


def shown_metrics(results: Results, task: TaskRecord) -> dict[str, str]:
    """Return the metrics measured on a task with the names shown, in table order. The main one is first."""
    found = dict.fromkeys(entry.metric for entry in results.entries if entry.task == task.id)
    known = {metric: label for metric, label in SHOWN_METRICS[task.kind].items() if metric in found}
    return known | {metric: metric for metric in found if task.kind == "generation" and metric not in known}


def results_table(results: Results, counted: str) -> Table:
    """Return the results as a table for the terminal: percents with intervals. `counted` says what n counts."""
    table = Table(title=f"percent, with intervals; n = {counted}", title_justify="left")
    for heading in ("task", "metric", *(model.name for model in results.models), "n"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right", overflow="fold")
    for task in results.tasks:
        for metric, label in shown_metrics(results, task).items():
            row = [results.value(task.id, metric, model.name) for model in results.models]
            n = next(entry.n for entry in row if entry)
            table.add_row(task.id, label, *(" ".join(shown_value(entry)) if entry else "-" for entry in row), str(n))
        table.add_section()
    return table
