"""Precision, recall and F1 of yes/no decisions. Conventions: `mlclip_jax.evaluation.metrics`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from mlclip_jax.evaluation.ranking import (
    blocks,
    check_shapes,
    descending_keys,
    has_explicit_negative,
)


@dataclass(frozen=True)
class DecisionCounts:
    """What precision and recall are made of; counts of different images add up with `+`.

    Attributes:
        hits: int64 `[c]`, positives that were chosen.
        chosen: int64 `[c]`, entries that were chosen.
        present: int64 `[c]`, positives.
    """

    hits: np.ndarray
    chosen: np.ndarray
    present: np.ndarray

    def __add__(self, other: DecisionCounts) -> DecisionCounts:
        return DecisionCounts(
            self.hits + other.hits, self.chosen + other.chosen, self.present + other.present
        )

    def figures(self) -> dict[str, float]:
        """Class-wise and overall precision, recall and F1.

        Returns:
            CP, CR: mean over classes of precision and recall (0 where the denominator is 0);
            CF1: mean over classes of F1 (the code of ASL, HSPNet, LMPT); CF1_harmonic: harmonic
            mean of CP and CR (the definition of ML-GCN and most papers' text); OP, OR, OF1: over
            all decisions together (micro). At top-K with `assume_negative=True` these three are
            precision, recall and F1 at K: OP = hits / (K n).
        """
        hits, chosen, present = (
            x.astype(np.float64) for x in (self.hits, self.chosen, self.present)
        )
        precision, recall = _ratio(hits, chosen), _ratio(hits, present)
        overall_precision = _ratio(hits.sum(), chosen.sum())
        overall_recall = _ratio(hits.sum(), present.sum())
        figures = {
            "CP": precision.mean(),
            "CR": recall.mean(),
            "CF1": _harmonic(precision, recall).mean(),
            "CF1_harmonic": _harmonic(precision.mean(), recall.mean()),
            "OP": overall_precision,
            "OR": overall_recall,
            "OF1": _harmonic(overall_precision, overall_recall),
        }
        return {name: float(value) for name, value in figures.items()}


def count_decisions(
    scores: np.ndarray,
    targets: np.ndarray,
    *,
    threshold: float | np.ndarray | None = None,
    k: int | None = None,
    assume_negative: bool | None = None,
) -> DecisionCounts:
    """Decide every entry and count.

    Args:
        scores: `[n c]`.
        targets: `[n c]` in {+1, 0, -1}.
        threshold: chosen are scores strictly above it; one number, or one a class `[c]`.
        k: chosen are the k highest of each image, see `top_k`. With a threshold, those of them
            above it.
        assume_negative: what 0 counts as, see `evaluation.metrics`. Counts that are to be added
            want True or False: None decides from the targets of this call.

    Raises:
        ValueError: shapes disagree, neither threshold nor k is given, or k is not in 1..c.
    """
    check_shapes(scores, targets)
    if threshold is None and k is None:
        raise ValueError("decisions need a threshold, a k, or both")
    num_classes = targets.shape[1]
    if assume_negative is None:
        leaves_out = has_explicit_negative(targets)
    else:
        leaves_out = np.full(num_classes, not assume_negative)
    hits, chosen, present = (np.zeros(num_classes, np.int64) for _ in range(3))
    for rows in blocks(*targets.shape):
        part = targets[rows]
        if k is None:
            decided = scores[rows] > np.asarray(threshold, np.float64)
        else:
            decided = np.zeros(part.shape, bool)
            np.put_along_axis(decided, _top_k_block(scores[rows], k), True, axis=1)
            if threshold is not None:
                decided &= scores[rows] > np.asarray(threshold, np.float64)
        decided &= (part != 0) | ~leaves_out
        positive = part > 0
        chosen += decided.sum(axis=0)
        present += positive.sum(axis=0)
        hits += (decided & positive).sum(axis=0)
    return DecisionCounts(hits, chosen, present)


def precision_recall_f1(
    scores: np.ndarray,
    targets: np.ndarray,
    *,
    threshold: float | np.ndarray | None = None,
    k: int | None = None,
    assume_negative: bool | None = None,
) -> dict[str, float]:
    """CP, CR, CF1, CF1_harmonic, OP, OR and OF1 at a threshold, at top-K, or at both.

    Arguments as for `count_decisions`, names as in `DecisionCounts.figures`.
    """
    counts = count_decisions(
        scores, targets, threshold=threshold, k=k, assume_negative=assume_negative
    )
    return counts.figures()


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """int64 `[n k]`: classes of the k highest scores of each image `[n c]`, best first.

    Scores are compared as float32; equal ones go to the lower class.

    Raises:
        ValueError: k is not in 1..c.
    """
    result = np.empty((len(scores), k), np.int64)
    for rows in blocks(*scores.shape):
        result[rows] = _top_k_block(scores[rows], k)
    return result


def best_f1_threshold(
    scores: np.ndarray, targets: np.ndarray, *, assume_negative: bool | None = None
) -> float:
    """The threshold with the highest overall F1 (OF1) of `scores > threshold`.

    Choose it on validation data: on the images that are reported it flatters. Memory: the distinct
    scores of positives, and one block of entries.

    Returns:
        A number of the scores' precision: the middle between the lowest score above it and the
        highest below it, as far as the precision allows.

    Raises:
        ValueError: there is no positive to find, or shapes disagree.
    """
    check_shapes(scores, targets)
    if assume_negative is None:
        leaves_out = has_explicit_negative(targets)
    else:
        leaves_out = np.full(targets.shape[1], not assume_negative)

    def parts() -> Iterator[np.ndarray]:
        for rows in blocks(*targets.shape):
            yield scores[rows][(targets[rows] != 0) | ~leaves_out]

    positive = [scores[rows][targets[rows] > 0] for rows in blocks(*targets.shape)]
    return _best_threshold(np.concatenate([scores[:0, 0], *positive]), parts)


def best_f1_thresholds(
    scores: np.ndarray, targets: np.ndarray, *, assume_negative: bool | None = None
) -> np.ndarray:
    """`best_f1_threshold` of every class by itself: `[c]`, NaN for classes without positives."""
    check_shapes(scores, targets)
    result = np.full(targets.shape[1], np.nan, scores.dtype)
    for i, (column, target) in enumerate(zip(scores.T, targets.T, strict=True)):
        positive = column[target > 0]
        if len(positive):
            known = assume_negative is False or (assume_negative is None and (target < 0).any())
            counted = [column[target != 0] if known else column]
            result[i] = _best_threshold(positive, lambda counted=counted: counted)
    return result


def _best_threshold(positive: np.ndarray, parts: Callable[[], Iterable[np.ndarray]]) -> float:
    """The best threshold from the scores of positives and, in parts, of all entries that count.

    Only cuts right below a positive can be best: lowering a cut past negatives adds no hit.
    """
    if not len(positive):
        raise ValueError("no threshold can be chosen: no class has a positive")
    positive = np.sort(positive)
    cuts = np.unique(positive)
    chosen = np.zeros(len(cuts), np.int64)  # how many scores reach each cut
    for values in parts():
        values = np.sort(values)
        chosen += len(values) - np.searchsorted(values, cuts)
    hits = len(positive) - np.searchsorted(positive, cuts)
    f1 = 2 * hits / (chosen + len(positive))
    cut = cuts[len(cuts) - 1 - int(np.argmax(f1[::-1]))]  # of equals the highest
    below = [values[values < cut].max(initial=-np.inf) for values in parts()]
    highest = cut.dtype.type(max(below))
    if np.isneginf(highest):
        highest = cut - 1 if cut - 1 < cut else np.nextafter(cut, highest)
    # Halved first: the sum may overflow. Neighbours have no middle, there the lower one parts them.
    middle = cut.dtype.type(highest / 2 + cut / 2)
    return float(middle if highest < middle < cut else highest)


def _top_k_block(scores: np.ndarray, k: int) -> np.ndarray:
    num_classes = scores.shape[1]
    if not 1 <= k <= num_classes:
        raise ValueError(f"k must be between 1 and the number of classes {num_classes}, not {k}")
    keys = descending_keys(np.asarray(scores, np.float32)).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(num_classes, dtype=np.uint64)
    keys.partition(k - 1, axis=1)
    best = np.sort(keys[:, :k], axis=1)
    return (best & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    numerator, denominator = np.asarray(numerator), np.asarray(denominator)
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator > 0)


def _harmonic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _ratio(2 * np.asarray(a) * b, np.asarray(a) + b)
