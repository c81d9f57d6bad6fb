"""The page of a report: one HTML file that needs nothing else, from disk or anywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from mlclip_jax.evaluation import charts, curves
from mlclip_jax.evaluation.findings import AP_CONVENTION, Entry, Findings
from mlclip_jax.evaluation.gallery import examples, mistakes
from mlclip_jax.evaluation.label_map import label_features
from mlclip_jax.evaluation.streams import distributions

_MOST_PICKED = 1000  # classes whose curves can be picked
_MOST_BARS = 120  # of more classes, the best and the worst halves
_BINS = 36


def render(found: Findings) -> str:
    """The page as text."""
    sections = [
        ("figures", "Figures", _headline(found)),
        ("groups", "Groups of classes", _groups(found)),
        ("curves", "Precision, recall and scores", _curves(found)),
        ("streams", "Scores by stream", distributions(found.streams)),
        ("bars", "Average precision by class", _bars(found)),
        ("labels", "Label features", label_features(found)),
        ("training", "Training", _training(found)),
        ("mistakes", "Worst mistakes", mistakes(found)),
        ("examples", "Examples", examples(found)),
        ("all", "All classes", _classes(found)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#at-{key}">{title}</a>' for key, title, _ in sections)
    notes = "".join(f"<p>{escape(note)}</p>" for note in found.notes)
    body = "".join(
        f'<section id="at-{key}"><h2>{title}</h2>{content}</section>\n'
        for key, title, content in sections
    )
    title = escape(found.title)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{title}</title><style>\n{_asset("page.css")}'
        f"</style></head>\n<body><header><h1>{title}</h1>{notes}"
        f'<nav aria-label="Sections">{links}</nav></header>\n<main>\n{body}</main>\n'
        f"<script>\n{_asset('page.js')}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return (files("mlclip_jax.evaluation") / name).read_text(encoding="utf-8")


def percent(value: float) -> str:
    """A fraction in per cent, a dash for none."""
    return f"{100 * value:.1f}" if math.isfinite(value) else "-"


def _scroll(table: str, name: str, *, tall: bool = False) -> str:
    """A table in a box of its own that scrolls, by keyboard too."""
    more = " tall" if tall else ""
    return (
        f'<div class="scroll{more}" tabindex="0" role="region" aria-label="{escape(name)}">'
        f"{table}</div>"
    )


def _weights(entry: Entry) -> str:
    """What a column's weights are, in words."""
    kind = {"raw": "raw weights", "ema": "averaged weights (EMA)", None: "nothing trained"}
    words = [kind[entry.weights]]
    if entry.checkpoint is not None:
        words += [f"{entry.checkpoint} checkpoint", f"step {entry.step}"]
    return ", ".join(words)


def _headline(found: Findings) -> str:
    """Figures of the protocol by column, and below them how each came about."""
    conventions: dict[str, list[str]] = {}
    first = next(iter(found.figures.values()))
    for name, figure in first.items():
        conventions.setdefault(figure.convention, []).append(name)
    number_of = {words: i + 1 for i, words in enumerate(conventions)}
    heads = "".join(
        f'<th scope="col">{escape(title)}<small>{"<br>".join(_weights(entry).split(", "))}</small>'
        "</th>"
        for title, entry in found.entries.items()
    )
    if found.paper:
        heads += '<th scope="col">paper</th>'
    rows = []
    for name, figure in first.items():
        values = [found.figures[title][name].value for title in found.entries]
        best = max((percent(v) for v in values if math.isfinite(v)), key=float, default=None)
        bold = ' class="best"' if len(values) > 1 else ""
        cells = [f"<td{bold if percent(v) == best else ''}>{percent(v)}</td>" for v in values]
        if found.paper:
            number = found.paper.get(name)
            cells.append(f"<td>{'' if number is None else f'{number:.1f}'}</td>")
        at = number_of[figure.convention]
        note = f'<sup><a href="#c{at}" aria-label="convention {at}">{at}</a></sup>'
        rows.append(f'<tr><th scope="row">{escape(name)} {note}</th>{"".join(cells)}</tr>')
    table = (
        f'<table><thead><tr><th scope="col">metric, %</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
    items = "".join(
        f'<li id="c{number_of[words]}"><b>{escape(", ".join(names))}</b>: {escape(words)}.</li>'
        for words, names in conventions.items()
    )
    paper = " “paper”: what the authors published for this row." if found.paper else ""
    return (
        f'<p class="note">Protocol “{escape(found.protocol.name)}”; the highest figure of a row is '
        f"bold.{paper}</p>{_scroll(table, 'Figures')}"
        f'<h3 style="margin-top:1rem">How each figure came about</h3><ol class="notes">{items}</ol>'
    )


def _groups(found: Findings) -> str:
    """mAP by subset and group of the label space and by frequency in training."""
    groups = found.class_groups()
    if not groups:
        return ""
    names = [f"{name} · {len(part)}" for name, part in groups.items()]
    panels = _panels(names, found.group_means(groups), "mAP by group of classes, %")
    words = "Mean average precision over the classes of a group; behind a name, their number."
    if found.train_counts is not None:
        words += " Head, medium and tail go by positives in the training labels."
    return f'<p class="note">{words}</p>{charts.legend(found.entries.keys())}{panels}'


def _panels(names: Sequence[str], values: Mapping[str, np.ndarray], title: str) -> str:
    made = []
    for rows in charts.panels(len(names)):
        part = {key: value[rows] for key, value in values.items()}
        made.append(f"<figure>{charts.bars(names[rows], part, title=title)}</figure>")
    return f'<div class="charts">{"".join(made)}</div>'


def _bars(found: Findings) -> str:
    """Bars of AP: by group where there are groups, else from the best class to the worst."""
    values = {title: entry.result.per_class_ap for title, entry in found.entries.items()}
    names, space = found.space.names, found.space
    main = np.nan_to_num(found.main.result.per_class_ap, nan=-1.0)
    order = np.argsort(-main, kind="stable")

    def chart(part: np.ndarray, title: str) -> str:
        chosen = {key: value[part] for key, value in values.items()}
        return charts.bars([names[i] for i in part], chosen, title=title)

    words = "sorted by the last column"
    if space.taxonomy is not None and len(space) <= _MOST_BARS:
        groups = space.taxonomy.group_names
        made = [
            f"<figure><h3>{escape(name)}</h3>"
            f"{chart(np.array(space.taxonomy.members(name)), f'AP of {name}, %')}</figure>"
            for name in groups
        ]
        panels, words = f'<div class="charts">{"".join(made)}</div>', "by group"
    elif len(space) <= _MOST_BARS:
        panels = _panels(
            [names[i] for i in order], {k: v[order] for k, v in values.items()}, "AP by class, %"
        )
    else:
        half = _MOST_BARS // 2
        words += f": the {half} best and the {half} worst of {len(space)} classes"
        panels = "".join(
            f"<h3>{name}</h3>"
            + _panels([names[i] for i in p], {k: v[p] for k, v in values.items()}, "AP, %")
            for name, p in (("Best", order[:half]), ("Worst", order[-half:]))
        )
    return (
        f'<p class="note">In per cent, {words}. {AP_CONVENTION.capitalize()}.</p>'
        f"{charts.legend(values.keys())}{panels}"
    )


def _curves(found: Findings) -> str:
    """Micro precision-recall and score histograms, with one class of the reader's choice."""
    main = found.main.result
    usable = np.flatnonzero(found.positives > 0)
    if not len(usable):
        return ""
    usable = usable[np.argsort(-found.positives[usable], kind="stable")][:_MOST_PICKED]
    usable.sort()
    low, high = curves.score_range(main.scores)
    counts = np.concatenate(
        [
            curves.histograms(main.scores[:, part], main.targets[:, part], bins=_BINS, low=low,
                              high=high)
            for part in np.array_split(np.arange(len(found.space)), -(-len(found.space) // 512))
        ],
        axis=1,
    )  # fmt: skip
    edges = charts.scale(np.linspace(low, high, _BINS + 1), low, high, charts.LEFT, charts.RIGHT)

    def areas(pair: np.ndarray, cut: float | None) -> dict[str, Any]:
        share = pair / np.maximum(pair.sum(axis=1, keepdims=True), 1)
        tops = charts.scale(share, 0, share.max() or 1.0, charts.BOTTOM, charts.TOP + 4)
        line = None
        if cut is not None and low <= cut <= high:
            at = float(charts.scale(cut, low, high, charts.LEFT, charts.RIGHT))
            line = f"M{at:.4g} {charts.TOP:g}V{charts.BOTTOM:g}"
        negatives, positives = (charts.steps_path(edges, row) for row in tops)
        return {"negatives": negatives, "positives": positives, "cut": line}

    shown = list(found.shown.values())
    everything = areas(counts.sum(axis=1), found.threshold) | {
        "curves": [""] * len(shown),
        "words": "All classes: the curves are over all decisions together (micro).",
    }
    drawn = [everything]
    for label in usable:
        drawn.append(_picked(found, int(label)) | areas(counts[:, label], _cut(found, int(label))))
    micro = []
    for style, (title, entry) in enumerate(found.shown.items()):
        recall, precision = curves.micro_curve(entry.result.scores, entry.result.targets)
        micro.append(charts.Curve(f"{title}, micro", recall, precision, style))
    extra = "".join(
        f'<path class="line s{i + 2}" id="curve{i}" d=""><title>{escape(title)}, picked class'
        "</title></path>"
        for i, title in enumerate(found.shown)
    )
    chart = charts.lines(
        micro, title="Precision over recall, micro", x_label="recall", y_label="precision",
        x_range=(0.0, 1.0), y_range=(0.0, 1.0), extra=extra,
    )  # fmt: skip
    cut = math.inf if found.threshold is None else found.threshold
    scores = charts.histogram(
        everything["negatives"], everything["positives"], (low, high), cut,
        title="Histograms of scores of positives and negatives",
    )  # fmt: skip
    options = "".join(
        f'<option value="{i + 1}">{escape(found.space.names[label])}</option>'
        for i, label in enumerate(usable)
    )
    styles = {i: f"{title}, micro" for i, title in enumerate(found.shown)}
    styles |= {i + 2: f"{title}, picked class" for i, title in enumerate(found.shown)}
    marks = charts.legend(styles, dashes=True)
    data = json.dumps(drawn, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    main_title = escape(list(found.entries)[-1])
    return (
        '<div class="controls"><label for="pick">Class</label> <select id="pick">'
        f'<option value="0">all classes</option>{options}</select></div>'
        '<p class="note" id="picked" aria-live="polite"></p><div class="charts">'
        f"<figure><h3>Precision over recall</h3>{marks}{chart}</figure>"
        f"<figure><h3>Scores of {main_title}</h3>"
        '<div class="legend"><span><i class="key s1"></i>positives</span><span>'
        '<i class="key s0"></i>negatives (dashed)</span><span>│ threshold of the best F1 '
        f"({escape(found.chosen_on)})</span></div>{scores}</figure></div>"
        f'<script type="application/json" id="curves">{data}</script>'
    )


def _cut(found: Findings, label: int) -> float | None:
    value = float(found.thresholds[label])
    return value if math.isfinite(value) else None


def _picked(found: Findings, label: int) -> dict[str, Any]:
    """Curves of one class and the sentence about it."""
    paths, words = [], []
    for title, entry in found.shown.items():
        result = entry.result
        target = result.targets[:, label]
        counts = target != 0 if (target < 0).any() else np.ones(len(target), bool)
        recall, precision = curves.class_curve(result.scores[counts, label], target[counts] > 0)
        x = charts.scale(recall, 0, 1, charts.LEFT, charts.RIGHT)
        paths.append(charts.path(x, charts.scale(precision, 0, 1, charts.BOTTOM, charts.TOP)))
        words.append(f"{title} {percent(result.per_class_ap[label])}")
    sentence = (
        f"{found.space.names[label]}: {found.positives[label]} positives; average precision "
        f"{', '.join(words)} %."
    )
    return {"curves": paths, "words": sentence}


def _training(found: Findings) -> str:
    """Loss and mAP over the steps."""
    if not found.history:
        return ""
    losses, scores = training_series(found.history)
    made = []
    if losses[0]:
        steps, values = np.asarray(losses[0], float), np.asarray(losses[1], float)
        drawn = [charts.Curve("each log entry", steps, values, 1, thin=len(values) >= 10)]
        if len(values) >= 10:
            drawn.append(charts.Curve("running mean", steps, curves.running_mean(values), 1))
        chart = charts.lines(drawn, title="Loss over steps", x_label="step", y_label="loss")
        made.append(f"<figure><h3>Training loss</h3>{chart}</figure>")
    if scores:
        drawn = [
            charts.Curve(name, np.asarray(at, float), np.asarray(mean, float), i % charts.SERIES)
            for i, (name, (at, mean)) in enumerate(scores.items())
        ]
        chart = charts.lines(
            drawn, title="mAP over steps", x_label="step", y_label="mAP, %", percent=True
        )
        made.append(
            f"<figure><h3>mAP</h3>{charts.legend(scores.keys(), dashes=True)}{chart}</figure>"
        )
    return f'<div class="charts">{"".join(made)}</div>'


def training_series(
    history: Sequence[Mapping[str, Any]],
) -> tuple[tuple[list, list], dict[str, tuple[list, list]]]:
    """(loss, mAP by split and weights) over the steps, from the rows of a run's metrics.jsonl."""
    losses: tuple[list, list] = ([], [])
    scores: dict[str, tuple[list, list]] = {}
    for row in history:
        if row["split"] == "train":
            series, value = losses, row.get("loss")
        else:
            weights = "EMA" if row.get("weights") == "ema" else "raw"
            series = scores.setdefault(f"{row['split']}, {weights}", ([], []))
            value = row.get("mAP")
        series[0].append(row["step"])
        series[1].append(math.nan if value is None else value)
    return losses, scores


def _classes(found: Findings) -> str:
    """The table of all classes; its headers sort."""
    space = found.space
    columns: list[tuple[str, list[Any]]] = []
    columns.append(("positives", [int(v) for v in found.positives]))
    if found.train_counts is not None:
        columns.append(("in training", [int(v) for v in found.train_counts]))
    columns.append(("threshold", [float(v) for v in found.thresholds]))
    columns += [(f"AP {t}", [float(v) for v in e.result.per_class_ap])
                for t, e in found.entries.items()]  # fmt: skip
    groups = None
    if space.taxonomy is not None:
        groups = [space.taxonomy.group_names[g] for g in space.taxonomy.group_of]
    names = ["class", *(["group"] if groups else []), *(name for name, _ in columns)]
    head = "".join(
        f'<th scope="col"{mark}><button type="button">{escape(name)}</button></th>'
        for name in names
        for mark in [' class="left"' if name == "group" else ""]
    )
    rows = []
    for label, name in enumerate(space.names):
        cells = f'<td class="left">{escape(groups[label])}</td>' if groups else ""
        for title, values in columns:
            value = values[label]
            if not math.isfinite(value):
                cells += '<td data-value="">-</td>'
            elif title.startswith("AP "):
                cells += f'<td data-value="{value:.6g}">{100 * value:.1f}</td>'
            else:
                shown = f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
                cells += f'<td data-value="{value:.6g}">{shown}</td>'
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    table = (
        f'<table id="classes"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )
    where = (
        "the validation images" if found.chosen_on == "validation" and found.split != "validation"
        else "these very images, which flatters"
    )  # fmt: skip
    return (
        '<p class="note">Click a header to sort. AP in per cent: '
        f"{AP_CONVENTION}. Threshold: of the logit, with the highest F1 of the class on {where}."
        '</p><div class="controls"><label for="filter">Find a class</label> '
        '<input id="filter" type="search" autocomplete="off"></div>'
        f"{_scroll(table, 'All classes', tall=True)}"
    )
