"""A report on evaluations: tables for the terminal, `report.json` and the page `report.html`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlclip_jax.evaluation import page
from mlclip_jax.evaluation.findings import Findings, as_json

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def percent(fraction: float) -> str:
    """A figure such as "87.4"; a dash where there is no figure."""
    return "-" if np.isnan(fraction) else f"{100 * fraction:.1f}"


def headline(found: Findings) -> Table:
    """Header and rows of the protocol's figures in per cent, a column for each entry."""
    header = ["metric, %", *found.entries, *(["paper"] if found.paper else [])]
    rows = []
    for name in next(iter(found.figures.values())):
        row = [name, *(percent(found.figures[title][name].value) for title in found.entries)]
        if found.paper:
            row.append(f"{found.paper[name]:.1f}" if name in found.paper else "")
        rows.append(row)
    return header, rows


def class_table(found: Findings) -> Table:
    """Header and rows of average precision by class, with the number of positive images."""
    rows = [
        [
            name,
            str(found.positives[label]),
            *(percent(entry.result.per_class_ap[label]) for entry in found.entries.values()),
        ]
        for label, name in enumerate(found.space.names)
    ]
    return ["class", "positives", *(f"AP {title}, %" for title in found.entries)], rows


def plain(table: Table) -> str:
    """A table for the terminal: first column left, the others right."""
    header, rows = table
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def text(line: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        return "  ".join([line[0].ljust(widths[0]), *padded[1:]]).rstrip()

    return "\n".join([text(header), "-" * len(text(header)), *map(text, rows)])


def write_report(folder: Path, found: Findings) -> Path:
    """Write `report.json` and `report.html` into `folder` (made where missing); the page."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps(as_json(found), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(numbers + "\n", encoding="utf-8")
    path = folder / "report.html"
    path.write_text(page.render(found), encoding="utf-8")
    return path
