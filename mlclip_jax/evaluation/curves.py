"""Points of the charts: precision-recall, histograms of scores, running means."""

from __future__ import annotations

import numpy as np

from mlclip_jax.evaluation.ranking import blocks, has_explicit_negative

_MICRO_BINS = 4096


def class_curve(
    scores: np.ndarray, positive: np.ndarray, *, points: int = 41
) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision `[points]` of one class, equal scores together.

    Args:
        scores: `[n]` of the entries that count.
        positive: bool `[n]`, at least one of them True.
        points: at even steps of recall, each the highest threshold that reaches it.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    hits = np.cumsum(positive[order])
    last = np.append(ranked[1:] != ranked[:-1], True)
    return _thin(hits[last], np.flatnonzero(last) + 1, points)


def micro_curve(
    scores: np.ndarray, targets: np.ndarray, *, points: int = 81
) -> tuple[np.ndarray, np.ndarray]:
    """The same over all decisions together, at 4,096 thresholds evenly over the scores.

    Empty where there is no positive.
    """
    counts = histograms(scores, targets, bins=_MICRO_BINS)
    negatives, positives = (counts[kind].sum(axis=0)[::-1] for kind in (0, 1))
    hits, chosen = np.cumsum(positives), np.cumsum(positives + negatives)
    if not len(hits) or not hits[-1]:
        return np.zeros(0), np.zeros(0)
    used = positives + negatives > 0
    return _thin(hits[used], chosen[used], points)


def _thin(hits: np.ndarray, chosen: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    total = hits[-1]
    wanted = np.maximum(np.ceil(np.linspace(0, 1, points) * total), 1)
    at = np.unique(np.searchsorted(hits, wanted))
    recall, precision = hits[at] / total, hits[at] / chosen[at]
    return np.concatenate([[0.0], recall]), np.concatenate([precision[:1], precision])


def histograms(
    scores: np.ndarray, targets: np.ndarray, *, bins: int, low: float | None = None,
    high: float | None = None,
) -> np.ndarray:  # fmt: skip
    """int64 `[2 c bins]`: negatives and positives of each class by score.

    Unobserved labels are left out of classes with explicit negatives, else negative. Bins are even
    between `low` and `high` (default: the lowest and highest score); scores beyond are in the
    outermost. For many bins, of all classes together: `[2 1 bins]`.
    """
    num_classes = scores.shape[1]
    together = bins > 256
    low, high = score_range(scores) if low is None or high is None else (low, high)
    width = (high - low) / bins
    rows_of = 1 if together else num_classes
    counts = np.zeros((2, rows_of * bins), np.int64)
    explicit = has_explicit_negative(targets)
    column = np.zeros(num_classes, np.int64) if together else np.arange(num_classes) * bins
    for rows in blocks(*scores.shape):
        part = targets[rows]
        place = np.clip((scores[rows].astype(np.float64) - low) / width, 0, bins - 1)
        place = place.astype(np.int64) + column
        positive = part > 0
        negative = (part < 0) | ((part == 0) & ~explicit)
        for kind, which in enumerate((negative, positive)):
            counts[kind] += np.bincount(place[which], minlength=counts.shape[1])
    return counts.reshape(2, rows_of, bins)


def score_range(scores: np.ndarray) -> tuple[float, float]:
    """Lowest and highest finite score; a little apart where all are equal."""
    finite = scores[np.isfinite(scores)]
    low, high = float(finite.min(initial=np.inf)), float(finite.max(initial=-np.inf))
    if low > high:
        return -0.5, 0.5
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the finite values in a centred window of about a tenth of the run."""
    values = np.asarray(values, np.float64)
    reach = max(1, len(values) // 20)
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    number = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(values))
    first, last = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    number = number[last] - number[first]
    sums = total[last] - total[first]
    return np.divide(sums, number, out=np.full(len(values), np.nan), where=number > 0)
