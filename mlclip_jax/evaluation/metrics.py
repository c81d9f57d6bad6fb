"""Multi-label metrics on the host, exact over batches, hosts and padding.

`Predictions` gathers scores and targets batch by batch and merges with other gatherings; the
functions below it compute figures from whole arrays in float64.

Targets are int8 `[n c]`: +1 positive, 0 unobserved, -1 negative. What a 0 counts as is the
`assume_negative` argument of every function here:

- `True`: a negative (benchmarks with complete labels, whose files say 1 and 0);
- `False`: nothing, the entry is left out;
- `None` (default): left out in a class that has an explicit -1 somewhere, else a negative.

All figures are fractions between 0 and 1; tables print them as percentages.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from mlclip_jax.errors import UserError

# Rows times classes sorted at once: bounds the working memory whatever the number of classes.
_CHUNK_ENTRIES = 1 << 22


class Predictions:
    """Scores and targets gathered by batch: the mergeable state behind every metric.

    Rows come out sorted by `index` (the position of the image in its source), so that figures do
    not depend on the order of batches or merges. Rows without an index keep their order of arrival.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._chunks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def append(
        self,
        scores: np.ndarray,
        targets: np.ndarray,
        *,
        index: np.ndarray | None = None,
        mask: np.ndarray | None = None,
    ) -> None:
        """Add one batch.

        Args:
            scores: `[b c]`, kept as float32. More than `num_classes` columns (classes padded to a
                multiple of the devices) are cut.
            targets: `[b c]` in {+1, 0, -1}.
            index: int `[b]`, position of each image in its source; -1 or None: unknown.
            mask: bool `[b]`, False for rows that pad the batch; they are dropped.

        Raises:
            ValueError: shapes disagree.
            UserError: a score that counts is NaN.
        """
        scores = np.asarray(scores)[:, : self.num_classes].astype(np.float32, copy=False)
        targets = np.asarray(targets)[:, : self.num_classes].astype(np.int8, copy=False)
        expected = (len(scores), self.num_classes)
        if scores.shape != expected or targets.shape != expected:
            raise ValueError(
                f"scores {scores.shape} and targets {targets.shape} must both be {expected}"
            )
        index = np.full(len(scores), -1) if index is None else np.asarray(index)
        if mask is not None:
            keep = np.asarray(mask, bool)
            scores, targets, index = scores[keep], targets[keep], index[keep]
        if np.isnan(scores).any():
            raise UserError(
                "a score is NaN: the weights that gave it have diverged; use an earlier checkpoint "
                "or train again in another workdir, with a lower optim.learning_rate or with "
                "optim.clip_norm"
            )
        self._chunks.append((scores.copy(), targets.copy(), index.astype(np.int64)))

    def merge(self, other: Predictions) -> Predictions:
        """A new gathering with the rows of both; neither argument changes."""
        if other.num_classes != self.num_classes:
            raise ValueError(f"cannot merge {self.num_classes} with {other.num_classes} classes")
        merged = Predictions(self.num_classes)
        merged._chunks = self._chunks + other._chunks
        return merged

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(scores float32 `[n c]`, targets int8 `[n c]`, index int64 `[n]`), sorted by index.

        Raises:
            ValueError: two rows carry the same index (an image was scored twice).
        """
        if not self._chunks:
            shape = (0, self.num_classes)
            return np.zeros(shape, np.float32), np.zeros(shape, np.int8), np.zeros(0, np.int64)
        scores, targets, index = (
            np.concatenate(parts) for parts in zip(*self._chunks, strict=True)
        )
        known = index[index >= 0]
        if len(np.unique(known)) != len(known):
            raise ValueError("an image was scored twice: the indices of the rows are not distinct")
        order = np.argsort(index, kind="stable")
        scores, targets, index = scores[order], targets[order], index[order]
        self._chunks = [(scores, targets, index)]
        return scores, targets, index

    def __len__(self) -> int:
        return sum(len(scores) for scores, _, _ in self._chunks)


def counted(targets: np.ndarray, assume_negative: bool | None = None) -> np.ndarray:
    """Bool `[n c]`: which entries count, under the convention for unobserved targets above."""
    if assume_negative is True:
        return np.ones(targets.shape, bool)
    known = targets != 0
    if assume_negative is None:
        known |= ~(targets < 0).any(axis=0)
    return known


def average_precision(
    scores: np.ndarray,
    targets: np.ndarray,
    *,
    assume_negative: bool | None = None,
    ties: Literal["stable", "grouped"] = "stable",
) -> np.ndarray:
    """Average precision of every class: mean over its positives of the precision at their rank.

    Args:
        scores: `[n c]`, compared as float32 (any increasing function of them gives the same).
        targets: `[n c]` in {+1, 0, -1}.
        assume_negative: what 0 counts as, see the module.
        ties: "stable" ranks equal scores in row order (ASL, ML-Decoder, HSPNet, MKT); "grouped"
            takes the precision at the end of each run of equal scores (scikit-learn, LMPT).

    Returns:
        float64 `[c]`, NaN for classes without positives.
    """
    num_images, num_classes = targets.shape
    result = np.full(num_classes, np.nan)
    if num_images == 0:
        return result
    ranks = np.arange(1, num_images + 1, dtype=np.float64)
    for columns in _class_chunks(num_images, num_classes):
        part = targets[:, columns]
        keys = _sort_keys(scores[:, columns].T, part.T, counted(part, assume_negative).T)
        positive = (keys & 1).astype(bool)
        precision = np.cumsum(positive, axis=1) / ranks
        if ties == "grouped":
            precision = np.take_along_axis(precision, _end_of_run(keys >> 32), axis=1)
        number = positive.sum(axis=1)
        total = np.where(positive, precision, 0.0).sum(axis=1)
        result[columns] = np.divide(
            total, number, out=np.full(len(number), np.nan), where=number > 0
        )
    return result


def mean_average_precision(
    per_class_ap: np.ndarray, *, empty: Literal["skip", "zero"] = "skip"
) -> float:
    """Mean of per-class AP, where classes without positives (NaN) are skipped or count as 0.

    NaN when no class is left to average.
    """
    if empty == "zero":
        per_class_ap = np.nan_to_num(per_class_ap, nan=0.0)
    present = per_class_ap[~np.isnan(per_class_ap)]
    return float(present.mean()) if len(present) else float("nan")


def top_k_decisions(scores: np.ndarray, k: int) -> np.ndarray:
    """Bool `[n c]`: the `k` highest scores of each image; equal scores go to the lower class."""
    order = np.argsort(-np.asarray(scores, np.float32), axis=1, kind="stable")[:, :k]
    decisions = np.zeros(scores.shape, bool)
    np.put_along_axis(decisions, order, True, axis=1)
    return decisions


def precision_recall_f1(
    decisions: np.ndarray, targets: np.ndarray, *, assume_negative: bool | None = None
) -> dict[str, float]:
    """Class-wise and overall precision, recall and F1 of yes/no decisions.

    Args:
        decisions: bool `[n c]`, for example `scores > threshold` or `top_k_decisions(scores, 3)`.
        targets: `[n c]` in {+1, 0, -1}.
        assume_negative: what 0 counts as, see the module.

    Returns:
        CP, CR: mean over classes of precision and recall (0 where the denominator is 0);
        CF1: mean over classes of F1; CF1_harmonic: harmonic mean of CP and CR (the definition of
        ML-GCN); OP, OR, OF1: over all decisions together.
    """
    count = counted(targets, assume_negative)
    positive = targets > 0
    hits = (decisions & positive & count).sum(axis=0).astype(np.float64)
    chosen = (decisions & count).sum(axis=0).astype(np.float64)
    present = positive.sum(axis=0).astype(np.float64)
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


def best_f1_threshold(
    scores: np.ndarray, targets: np.ndarray, *, assume_negative: bool | None = None
) -> float:
    """The threshold with the highest overall F1 (OF1) of `scores > threshold`.

    Choose it on validation data: on the images that are reported it flatters.

    Raises:
        ValueError: there is no positive to find.
    """
    count = counted(targets, assume_negative)
    values, positive = np.asarray(scores, np.float64)[count], (targets > 0)[count]
    if not positive.any():
        raise ValueError("no threshold can be chosen: no class has a positive")
    order = np.argsort(-values, kind="stable")
    values, hits = values[order], np.cumsum(positive[order])
    f1 = 2 * hits / (np.arange(1, len(values) + 1) + hits[-1])
    last = np.append(values[1:] != values[:-1], True)  # a threshold cannot part equal scores
    best = int(np.argmax(np.where(last, f1, -1)))
    below = values[best + 1] if best + 1 < len(values) else values[best] - 1
    return float((values[best] + below) / 2)


def _sort_keys(scores: np.ndarray, targets: np.ndarray, count: np.ndarray) -> np.ndarray:
    """uint64 `[c n]` in rank order: score in the high half, then row, then the positive bit.

    Packing everything into one integer makes a plain sort stable and carries the target along:
    several times faster than a stable argsort and a gather.
    """
    # Adding 0 turns -0 into +0, which must tie.
    bits = (np.ascontiguousarray(scores, np.float32) + np.float32(0)).view(np.uint32)
    ascending = bits ^ np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
    rows = np.arange(scores.shape[1], dtype=np.uint64) << np.uint64(1)
    keys = (~ascending).astype(np.uint64) << np.uint64(32)
    keys |= rows | (targets > 0).astype(np.uint64)
    keys[~count] = np.uint64(0xFFFFFFFFFFFFFFFE)  # after every score, and not a positive
    keys.sort(axis=1)
    return keys


def _end_of_run(values: np.ndarray) -> np.ndarray:
    """For each position of `[c n]`, the last position of the run of equal values it is in."""
    length = values.shape[1]
    last = np.ones(values.shape, bool)
    last[:, :-1] = values[:, 1:] != values[:, :-1]
    ends = np.where(last, np.arange(length), length)
    return np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]


def _class_chunks(num_images: int, num_classes: int) -> Iterator[slice]:
    size = max(1, _CHUNK_ENTRIES // num_images)
    for start in range(0, num_classes, size):
        yield slice(start, start + size)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    numerator, denominator = np.asarray(numerator), np.asarray(denominator)
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator > 0)


def _harmonic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _ratio(2 * np.asarray(a) * b, np.asarray(a) + b)
