"""Section of a report's page that shows the streams of which logits are put together."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import NamedTuple

import numpy as np

from mlclip_jax.evaluation import charts, curves

_BINS = 48


class Streams(NamedTuple):
    """scores float32 `[m c]` of each stream by name, and the targets int8 `[m c]` of m images."""

    scores: Mapping[str, np.ndarray]
    targets: np.ndarray


def distributions(found: Streams | None) -> str:
    """Histograms of each stream's scores, of positives and of negatives (MKT's Figure 4)."""
    if found is None:
        return ""
    low, high = curves.score_range(np.concatenate([x.ravel() for x in found.scores.values()]))
    edges = charts.scale(np.linspace(low, high, _BINS + 1), low, high, charts.LEFT, charts.RIGHT)
    figures = []
    for name, scores in found.scores.items():
        counts = curves.histograms(scores, found.targets, bins=_BINS, low=low, high=high)
        pair = counts.sum(axis=1)
        share = pair / np.maximum(pair.sum(axis=1, keepdims=True), 1)
        tops = charts.scale(share, 0, share.max() or 1.0, charts.BOTTOM, charts.TOP + 4)
        negatives, positives = (charts.steps_path(edges, row) for row in tops)
        chart = charts.histogram(
            negatives, positives, (low, high), None, title=f"Scores of the {name} stream"
        )
        figures.append(f"<figure><h3>{escape(name.capitalize())}</h3>{chart}</figure>")
    return (
        f'<p class="note">Of the first {len(found.targets)} images, at one scale; each histogram '
        'has its highest bin at the top.</p><div class="legend"><span><i class="key s1"></i>'
        'positives</span><span><i class="key s0"></i>negatives (dashed)</span></div>'
        f'<div class="charts">{"".join(figures)}</div>'
    )
