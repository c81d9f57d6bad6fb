"""Sections of a report's page that show images: examples, and the worst mistakes."""

from __future__ import annotations

import math
from html import escape

import numpy as np

from mlclip_jax.evaluation.findings import Findings
from mlclip_jax.evaluation.pictures import data_uri, worst

_MOST_EXAMPLES = 14
_MOST_CHIPS, _MOST_SHOWN, _MOST_HIGHEST = 8, 6, 8
_BESIDE = (
    f" Below: the {_MOST_HIGHEST} highest labels of each, those that are there in bold, with the "
    "probability where a method gives one, and a bar below which it is less than 0.5."
)
_SIGNS = {"correct": "✓", "missed": "○", "wrong": "✗"}


def examples(found: Findings) -> str:
    """Images spread evenly over the split with their labels: correct, missed and wrong."""
    result = found.main.result
    if found.image is None or found.threshold is None:
        return ""
    last = len(result.index) - 1
    rows = np.unique(np.linspace(0, last, _MOST_EXAMPLES).round().astype(int))
    made = []
    for row in rows:
        present, chosen = result.targets[row] > 0, result.scores[row] > found.threshold
        kinds = {
            "correct": present & chosen, "missed": present & ~chosen, "wrong": ~present & chosen,
        }  # fmt: skip
        chips = [
            _chip(kind, found.space.names[label])
            for kind, which in kinds.items()
            for label in np.flatnonzero(which)
        ]
        more = len(chips) - _MOST_CHIPS
        if more > 0:
            chips = [*chips[:_MOST_CHIPS], f'<span class="chip missed">+{more}</span>']
        made.append(_picture(found, int(row), "".join(chips) + _highest(found, int(row))))
    where = (
        "validation images" if found.chosen_on != found.split
        else "these very images, which flatters"
    )  # fmt: skip
    signs = " ".join(_chip(kind, kind) for kind in _SIGNS)
    return (
        f'<p class="note">Images spread evenly over the split, labelled by '
        f"{escape(list(found.entries)[-1])}: a label is given where its logit exceeds "
        f"{found.threshold:.3g}, the threshold of the highest overall F1 on {where}. {signs}"
        f"{_BESIDE if len(found.shown) > 1 else ''}</p>"
        f'<div class="gallery">{"".join(made)}</div>'
    )


def _highest(found: Findings, row: int) -> str:
    """The highest labels of an image by task, of the baseline and of what matters.

    Source: Figure 6 of MKT; Figures 5 and 6 of ADDS, whose lists have eight and seven.
    """
    if len(found.shown) < 2:
        return ""
    lines = []
    for task in found.protocol.tasks:
        everything = task.classes == "all"
        classes = np.arange(len(found.space)) if everything else found.space.indices(task.classes)
        for title, entry in found.shown.items():
            own = entry.result.task_scores.get(task.classes)
            scores = entry.result.scores[row, classes] if own is None else own[row]
            order = np.argsort(-scores, kind="stable")[:_MOST_HIGHEST]
            highest = np.asarray(classes)[order].tolist()
            of = dict(zip(np.asarray(classes).tolist(), scores.tolist(), strict=True))
            names = [_named(found, row, i, of[i] if entry.sigmoid else None) for i in highest]
            given = sum(of[i] >= 0 for i in highest) if entry.sigmoid else 0
            parts = [", ".join(part) for part in (names[:given], names[given:]) if part]
            bar = "| " if entry.sigmoid and not given else ""
            lines.append(f"{escape(f'{task.name} {title}'.strip())}: {bar}{' | '.join(parts)}")
    return f'</div><div class="note">{"<br>".join(lines)}'


def _named(found: Findings, row: int, label: int, logit: float | None) -> str:
    """A label, in bold where it is there, and its probability."""
    name = escape(found.space.names[label])
    name = f"<strong>{name}</strong>" if found.main.result.targets[row, label] > 0 else name
    return name if logit is None else f"{name}&nbsp;{0.5 * (1 + math.tanh(0.5 * logit)):.2f}"


def mistakes(found: Findings) -> str:
    """The negatives furthest above, and the positives furthest below, their class's threshold."""
    if found.image is None:
        return ""
    result, parts = found.main.result, []
    for positive, title in ((False, "False positives"), (True, "False negatives")):
        listed = worst(result.scores, result.targets, found.thresholds, positive=positive)
        made = []
        for mistake in listed:
            name = found.space.names[mistake.label]
            chip = _chip("missed" if positive else "wrong", name)
            score = float(result.scores[mistake.row, mistake.label])
            words = f"logit {score:.3g}, {mistake.margin:.2g} {'below' if positive else 'above'}"
            present = np.flatnonzero(result.targets[mistake.row] > 0)
            shows = ", ".join(found.space.names[i] for i in present[:_MOST_SHOWN]) or "nothing"
            shows += ", …" if len(present) > _MOST_SHOWN else ""
            caption = f'{chip}</div><div class="note">{words}<br>shows: {escape(shows)}'
            made.append(_picture(found, mistake.row, caption))
        gallery = f'<div class="gallery">{"".join(made)}</div>' if made else "<p>None.</p>"
        parts.append(f'<h3 style="margin-top:1rem">{title}</h3>{gallery}')
    return (
        f'<p class="note">Of {escape(list(found.entries)[-1])}: scores furthest on the wrong side '
        "of the threshold of their class, at most two of a class; an image comes once in a list."
        f"</p>{''.join(parts)}"
    )


def _chip(kind: str, name: str) -> str:
    return f'<span class="chip {kind}">{_SIGNS[kind]} {escape(name)}</span>'


def _picture(found: Findings, row: int, chips: str) -> str:
    number = int(found.main.result.index[row])
    image = found.image(number)
    tiny = ' class="tiny"' if max(image.shape[:2]) < 150 else ""
    return (
        f'<figure><img{tiny} alt="image {number}" src="{data_uri(image)}">'
        f'<div class="chips">{chips}</div></figure>'
    )
