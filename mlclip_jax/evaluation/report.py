"""A report on evaluations: tables for the terminal and a folder with Markdown and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlclip_jax.evaluation import plots
from mlclip_jax.evaluation.evaluator import EvalResult
from mlclip_jax.evaluation.metrics import best_f1_threshold
from mlclip_jax.labels.space import LabelSpace

_MOST_EXAMPLES = 15
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def percent(fraction: float) -> str:
    """A figure such as "87.4"; a dash where there is no figure."""
    return "-" if np.isnan(fraction) else f"{100 * fraction:.1f}"


def headline(results: Mapping[str, EvalResult]) -> Table:
    """Header and rows of the table of metrics in per cent, a column for each named result."""
    first = next(iter(results.values()))
    rows = [
        [name, *(percent(result.metrics[name]) for result in results.values())]
        for name in first.metrics
    ]
    return ["metric, %", *results], rows


def class_table(space: LabelSpace, results: Mapping[str, EvalResult]) -> Table:
    """Header and rows of average precision by class, with the number of positive images."""
    positives = (next(iter(results.values())).targets > 0).sum(axis=0)
    rows = [
        [name, str(positives[label]), *(percent(r.per_class_ap[label]) for r in results.values())]
        for label, name in enumerate(space.names)
    ]
    return ["class", "positives", *(f"AP {name}, %" for name in results)], rows


def plain(table: Table) -> str:
    """A table for the terminal: first column left, the others right."""
    header, rows = table
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def text(line: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        return "  ".join([line[0].ljust(widths[0]), *padded[1:]]).rstrip()

    return "\n".join([text(header), "-" * len(text(header)), *map(text, rows)])


def markdown(table: Table) -> str:
    """The same as Markdown; bars inside cells are escaped."""
    header, rows = table
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = [header, rule, *rows]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )


def training_series(
    history: Sequence[Mapping[str, Any]],
) -> tuple[plots.Series, dict[str, plots.Series]]:
    """(loss, mAP by split and weights) over the steps, from the rows of a run's metrics.jsonl."""
    losses: plots.Series = ([], [])
    curves: dict[str, plots.Series] = {}
    for row in history:
        if row["split"] == "train":
            series, value = losses, row.get("loss")
        else:
            weights = "EMA" if row.get("weights") == "ema" else "raw"
            series = curves.setdefault(f"{row['split']}, {weights}", ([], []))
            value = row.get("mAP")
        series[0].append(row["step"])
        series[1].append(np.nan if value is None else value)
    return losses, curves


def write_report(
    folder: Path,
    space: LabelSpace,
    results: Mapping[str, EvalResult],
    *,
    title: str,
    split: str,
    notes: Sequence[str] = (),
    image: Callable[[int], np.ndarray] | None = None,
    validation: EvalResult | None = None,
    history: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write `report.md` and its pictures.

    Args:
        folder: made where missing.
        space: the labels.
        results: evaluations of one split by name, the baseline first, the one that matters last.
        title: heading of the page.
        split: the name of the split that the results are of.
        notes: paragraphs below it (which split, weights, checkpoint).
        image: uint8 `[h w 3]` of an index of the results, for the grid of examples.
        validation: evaluation of the last result's weights on other images; the threshold that
            decides which labels the grid shows is chosen there.
        history: rows of the training run's metrics.jsonl, for the curves.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    average_precision = {name: result.per_class_ap for name, result in results.items()}
    plots.per_class_bars(space, average_precision, folder / "per_class.png")
    page = [f"# {title}", *notes, markdown(headline(results))]
    page += ["## Average precision by class", "![Bars of average precision](per_class.png)"]
    name, last = list(results.items())[-1]
    if image is not None and (last.targets > 0).any():
        page += _examples(folder, space, name, last, image, validation)
    if history:
        page += _training(folder, results, history, split)
    page += ["## All classes", markdown(class_table(space, results))]
    path = folder / "report.md"
    path.write_text("\n\n".join(page) + "\n", encoding="utf-8")
    return path


def _examples(
    folder: Path,
    space: LabelSpace,
    name: str,
    result: EvalResult,
    image: Callable[[int], np.ndarray],
    validation: EvalResult | None,
) -> list[str]:
    """Draws labelled images; the section about them."""
    chosen_on = result if validation is None else validation
    threshold = best_f1_threshold(chosen_on.scores, chosen_on.targets)
    rows = np.unique(np.linspace(0, len(result.index) - 1, _MOST_EXAMPLES).round().astype(int))
    plots.example_grid(
        space,
        [image(int(result.index[row])) for row in rows],
        result.targets[rows],
        result.scores[rows] > threshold,
        folder / "examples.png",
    )
    where = "these very images, which flatters" if validation is None else "validation images"
    return [
        "## Examples",
        f"Images spread evenly over the split, labelled by {name}: a label is given where its "
        f"logit exceeds {threshold:.3g}, the threshold of the highest overall F1 on {where}.",
        "![Images with correct, missed and wrong labels](examples.png)",
    ]


def _training(
    folder: Path,
    results: Mapping[str, EvalResult],
    history: Sequence[Mapping[str, Any]],
    split: str,
) -> list[str]:
    """Draws the run's curves; the section about them."""
    losses, curves = training_series(history)
    baseline = None
    if len(results) > 1:
        name, first = next(iter(results.items()))
        baseline = f"{split}, {name}", first.metrics["mAP"]
    plots.training_curves(losses, curves, folder / "training.png", baseline=baseline)
    return ["## Training", "![Loss and mAP over the steps](training.png)"]
