"""Images in a page, and which mistakes are worth showing."""

from __future__ import annotations

import base64
import io
from typing import NamedTuple

import numpy as np

from mlclip_jax.evaluation.ranking import has_explicit_negative

_SIDE = 168  # pixels of the longer side of a thumbnail
_CANDIDATES = 3  # of each class


class Mistake(NamedTuple):
    """Row of the result, class, and by how much the score is beyond the class's threshold."""

    row: int
    label: int
    margin: float


def data_uri(image: np.ndarray) -> str:
    """A thumbnail of uint8 `[h w 3]` as a data URI: JPEG, or PNG where the image is tiny."""
    from PIL import Image

    made = Image.fromarray(np.asarray(image, np.uint8))
    kind = "PNG" if max(made.size) <= 64 else "JPEG"
    made.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    made.save(buffer, kind, **({"quality": 82} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def worst(
    scores: np.ndarray,
    targets: np.ndarray,
    thresholds: np.ndarray,
    *,
    positive: bool,
    most: int = 12,
) -> list[Mistake]:
    """The worst mistakes, worst first: each image once, at most two of a class.

    Args:
        scores, targets: `[n c]`.
        thresholds: `[c]`; classes with NaN are left out.
        positive: the positives furthest below their threshold (false negatives), else the
            negatives furthest above (false positives; unobserved labels count as negative in
            classes without explicit ones).
        most: how many.
    """
    explicit = has_explicit_negative(targets)
    sign = -1 if positive else 1
    found: list[Mistake] = []
    for label in np.flatnonzero(np.isfinite(thresholds)):
        column = targets[:, label]
        wanted = column > 0 if positive else (column < 0 if explicit[label] else column <= 0)
        rows = np.flatnonzero(wanted)
        margin = sign * (scores[rows, label].astype(np.float64) - float(thresholds[label]))
        order = np.argsort(-margin, kind="stable")[:_CANDIDATES]
        found += [
            Mistake(int(rows[i]), int(label), float(margin[i])) for i in order if margin[i] > 0
        ]
    found.sort(key=lambda mistake: -mistake.margin)
    chosen: list[Mistake] = []
    for mistake in found:
        if len(chosen) == most:
            break
        of_class = sum(other.label == mistake.label for other in chosen)
        if of_class < 2 and all(other.row != mistake.row for other in chosen):
            chosen.append(mistake)
    return chosen
