"""Section of a report's page that shows label features: a picture of each method, compactness."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from mlclip_jax.evaluation import charts
from mlclip_jax.evaluation.findings import COMPACTNESS_CONVENTION, Findings
from mlclip_jax.evaluation.label_features import (
    RETRIEVED,
    TSNE_FROM,
    Compactness,
    perplexity,
    project,
    turn,
)
from mlclip_jax.labels.space import Taxonomy

_COLOURS = 6  # of groups, in page.css
# Circle, square, triangle, diamond, cross: of about one area, within 1.3 of the centre. Their
# number and that of the colours have no common divisor, so 30 groups all look different.
_MARKS = (
    "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0z",
    "M-.89-.89h1.78v1.78h-1.78z",
    "M0-1.3L1.25.85H-1.25z",
    "M0-1.3L1.3 0L0 1.3L-1.3 0z",
    "M-.4-1.3h.8v.9h.9v.8h-.9v.9h-.8v-.9h-.9v-.8h.9z",
)
_MANY = 150  # labels of more have smaller marks
_MOST_NAMES = 300  # labels whose names are tried; tooltips have them all
_MARGIN = 8.0
_TEXT, _SMALL = 10.0, 7.2  # names on a narrow page, and the further ones of a wide one: page.css


def label_features(found: Findings) -> str:
    """Pictures of label features coloured by group, and the compactness of the groups.

    Empty where no two groups are known, or no method has one vector for each label.
    """
    compact = found.compactness()
    if not compact:
        return ""
    space = found.grouped
    taxonomy, count = space.taxonomy, len(space)
    # The baseline and the column that matters come first, side by side.
    titles = [title for title in dict.fromkeys([*found.shown, *compact]) if title in compact]
    features = found.label_features
    places: dict[str, np.ndarray] = {}
    for title in titles:
        place = project(features[title])
        places[title] = turn(place, places[titles[0]]) if places else place
    size = 3.2 if count <= _MANY else 2.0
    # One scale for both axes of all pictures, as large as fits a square.
    extent = np.max([np.ptp(place, axis=0) for place in places.values()], axis=0)
    zoom = (charts.WIDTH - 2 * _MARGIN) / max(float(extent.max()), 1e-9)
    middle = np.array([charts.WIDTH / 2, extent[1] * zoom / 2 + _MARGIN])
    pictures = []
    for title, place in places.items():
        centre = (place.min(axis=0) + place.max(axis=0)) / 2
        points = middle + (place - centre) * zoom
        silhouette = f"silhouette {_figure(compact[title].silhouette)}"
        if np.isfinite(compact[title].retrieval):
            silhouette += f", top-{RETRIEVED} retrieval {100 * compact[title].retrieval:.1f} %"
        picture = charts.svg(
            2 * middle[1],
            _dots(points, space.names, taxonomy)
            + _names(points, space.names, taxonomy, 1.3 * size, 2 * middle[1]),
            f"Label features of {title} in two dimensions",
            f"{count} labels in {len(taxonomy)} groups; {silhouette}. The figures by group are in "
            "the chart of compactness below.",
        )
        pictures.append(
            f'<figure><h3>{escape(title)} <span class="note">{silhouette}</span></h3>'
            f"{picture}</figure>"
        )
    how, caution = "the two principal components", ""
    if count >= TSNE_FROM:
        how = f"t-SNE (perplexity {perplexity(count):.3g}, from principal components, fixed seed)"
        caution = " t-SNE keeps neighbours together; long distances mean little."
    marks = "".join(
        f'<path id="mark{i}" transform="scale({size:g})" d="{d}"/>' for i, d in enumerate(_MARKS)
    )
    keys = "".join(
        f'<span><svg class="mark" viewBox="{-1.5 * size:g} {-1.5 * size:g} {3 * size:g} '
        f'{3 * size:g}" aria-hidden="true"><use class="g{g % _COLOURS}" href="#{_mark(g)}"/></svg>'
        f"{escape(name)}</span>"
        for g, name in enumerate(taxonomy.group_names)
    )
    return (
        f'<p class="note">Every mark is a label, its colour and shape the group: {how} of the '
        f"label features at unit length.{caution} All pictures have the same spread and are turned "
        "to lie over the first. Names stand where there is room, and in the tooltip of each "
        "mark.</p>"
        f'<svg class="marks" aria-hidden="true"><defs>{marks}</defs></svg>'
        f'<div class="legend">{keys}</div><div class="maps">{"".join(pictures)}</div>'
        f"{_compactness(found, compact)}"
    )


def _compactness(found: Findings, compact: dict[str, Compactness]) -> str:
    """Lines from the cosine with other groups to the cosine within, by group."""
    titles = [*found.entries, *found.vectors]
    styles = {i: title for i, title in enumerate(titles) if title in compact}
    cosines = np.concatenate([c for one in compact.values() for c in (one.within, one.between)])
    x_range = charts.value_range([cosines])
    names, made = found.grouped.taxonomy.group_names, []
    for rows in charts.panels(len(names)):
        values = {
            style: (compact[title].between[rows], compact[title].within[rows])
            for style, title in styles.items()
        }
        chart = charts.spans(names[rows], values, x_range, title="Compactness of groups, cosine")
        made.append(f"<figure>{chart}</figure>")
    return (
        '<h3 style="margin-top:1rem">Compactness of the groups</h3><p class="note">From the stroke '
        "(cosine with other groups) to the dot (cosine within the group); behind it the "
        f"difference: the larger, the more compact. {COMPACTNESS_CONVENTION.capitalize()}.</p>"
        f'{charts.legend(styles)}<div class="charts">{"".join(made)}</div>'
    )


def _mark(group: int) -> str:
    return f"mark{group % len(_MARKS)}"


def _figure(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}" if np.isfinite(value) else "-"  # never "-0.00"


def _dots(points: np.ndarray, names: Sequence[str], taxonomy: Taxonomy) -> str:
    """A mark for each label, with its name and group as tooltip."""
    made = []
    for g, group in enumerate(taxonomy.group_names):
        dots = "".join(
            f'<use href="#{_mark(g)}" x="{points[i, 0]:.4g}" y="{points[i, 1]:.4g}">'
            f"<title>{escape(names[i])} ({escape(group)})</title></use>"
            for i in taxonomy.members(g)
        )
        made.append(f'<g class="g{g % _COLOURS}">{dots}</g>')
    return "".join(made)


def _names(
    points: np.ndarray, names: Sequence[str], taxonomy: Taxonomy, size: float, height: float
) -> str:
    """Names beside, above or below the marks (of half width `size`), covering no mark or name.

    Those that fit at the size of narrow pages stand first; between them, of class "more", those
    that only fit at the smaller size of wide pages.
    """
    rank = np.zeros(len(names))
    for g in range(len(taxonomy)):
        members = list(taxonomy.members(g))
        rank[members] = np.arange(len(members))
    order = np.argsort(rank, kind="stable")[:_MOST_NAMES]  # a label of each group in turn
    edge = np.array([charts.WIDTH, height]) - 1
    taken = np.concatenate([points - size, points + size], axis=1)  # [n 4]: left top right bottom
    made, done = [], set()
    for letters, kind in ((_TEXT, ""), (_SMALL, "more")):
        gap, over = size + 1.5, size + letters / 2
        for i in order:
            words = charts.shorten(names[i], charts.WIDTH / 3, letters)
            half = charts.text_width(words, letters) / 2
            sides = (
                ("start", gap, 0.0),
                ("end", -gap, 0.0),
                ("middle", 0, -over),
                ("middle", 0, over),
            )
            for anchor, *move in () if i in done else sides:
                x, y = points[i] + move
                centre = x + {"start": half, "end": -half, "middle": 0}[anchor]
                low = np.array([centre - half, y - letters / 2])
                high = np.array([centre + half, y + letters / 2])
                if (low < 1).any() or (high > edge).any():
                    continue
                if ((taken[:, :2] < high) & (low < taken[:, 2:])).all(axis=1).any():
                    continue
                taken = np.vstack([taken, [*low, *high]])
                made.append(charts.text(x, y, words, anchor=anchor, name=kind))
                done.add(i)
                break
    return "".join(made)
