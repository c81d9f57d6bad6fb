"""Average precision and its means. Conventions: see `mlclip_jax.evaluation.metrics`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np

# What is copied at once, whatever the number of classes: 4 M entries, 32 classes for each thread.
BLOCK_ENTRIES = 1 << 22
_MOST_CLASSES = 32
_TRANSPOSED_ROWS = 512
_THREADS = min(8, os.cpu_count() or 1)


def average_precision(
    scores: np.ndarray,
    targets: np.ndarray,
    *,
    assume_negative: bool | None = None,
    ties: Literal["stable", "grouped"] = "stable",
) -> np.ndarray:
    """Average precision of every class: mean over its positives of the precision at their rank.

    O(n log n) a class; a few classes at a time are copied (20 MiB for each of at most 8 threads).

    Args:
        scores: `[n c]`, compared as float32 (any increasing function of them gives the same).
        targets: `[n c]` in {+1, 0, -1}.
        assume_negative: what 0 counts as, see `evaluation.metrics`.
        ties: "stable" ranks equal scores in row order (ASL, ML-Decoder, HSPNet, MKT); "grouped"
            takes the precision at the end of each run of equal scores (scikit-learn, LMPT).

    Returns:
        float64 `[c]`, NaN for classes without positives.

    Raises:
        ValueError: shapes disagree, or a score is NaN.
    """
    check_shapes(scores, targets)
    num_images, num_classes = targets.shape
    result = np.full(num_classes, np.nan)
    if num_images == 0 or num_classes == 0:
        return result
    rows = np.arange(num_images, dtype=np.uint64) << np.uint64(1)

    def fill(columns: slice) -> None:
        work = _Workspace(rows)
        part_scores = _transposed(scores[:, columns], np.float32)
        part_targets = _transposed(targets[:, columns], np.int8)
        result[columns] = [
            _one_class(*pair, assume_negative, ties == "grouped", work)
            for pair in zip(part_scores, part_targets, strict=True)
        ]

    chunks = list(blocks(num_classes, num_images, most=_MOST_CLASSES))
    if len(chunks) == 1:
        fill(chunks[0])
    else:
        # NumPy's sorting and arithmetic run outside the interpreter's lock.
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(fill, chunks))
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


def weighted_mean_average_precision(per_class_ap: np.ndarray, positives: np.ndarray) -> float:
    """Mean of per-class AP weighted by the number of positives (WmAP of MKT on Open Images).

    Args:
        per_class_ap: `[c]`, NaN for classes without positives.
        positives: `[c]`, positives of each class in the images scored (`count_positives`).

    Returns:
        NaN when there is no positive.
    """
    present = positives > 0
    if not present.any():
        return float("nan")
    return float(np.average(per_class_ap[present], weights=positives[present]))


def frequency_groups(
    train_counts: np.ndarray, *, rule: Literal["released", "paper"] = "released"
) -> dict[str, np.ndarray]:
    """Classes by their number of training positives: indices of "head", "medium", "tail".

    Args:
        train_counts: `[c]`, positives of each class in the training set.
        rule: "released" (LMPT's and DB loss's code): head >= 100, medium 20 to 99, tail < 20;
            "paper" (LMPT's text): head > 100, medium 20 to 100, tail < 20.
    """
    counts = np.asarray(train_counts)
    head = counts >= 100 if rule == "released" else counts > 100
    tail = counts < 20
    groups = {"head": head, "medium": ~(head | tail), "tail": tail}
    return {name: np.flatnonzero(chosen) for name, chosen in groups.items()}


def count_positives(targets: np.ndarray) -> np.ndarray:
    """int64 `[c]`: positives of each class of targets `[n c]`."""
    total = np.zeros(targets.shape[1], np.int64)
    for rows in blocks(*targets.shape):
        total += (targets[rows] > 0).sum(axis=0)
    return total


def has_explicit_negative(targets: np.ndarray) -> np.ndarray:
    """bool `[c]`: which classes of targets `[n c]` have a -1 somewhere."""
    found = np.zeros(targets.shape[1], bool)
    for rows in blocks(*targets.shape):
        found |= (targets[rows] < 0).any(axis=0)
    return found


def descending_keys(scores: np.ndarray) -> np.ndarray:
    """uint32, same shape as the float32 `scores`: the higher the score the smaller the key.

    Equal scores have equal keys; scores must not be NaN.
    """
    # Adding 0 turns -0 into +0, which must tie.
    bits = (scores + np.float32(0)).view(np.int32)
    # Positive floats order as their bits do, negative ones the other way round.
    return (bits ^ (~(bits >> 31) & np.int32(0x7FFFFFFF))).view(np.uint32)


def blocks(length: int, width: int, *, most: int | None = None) -> Iterator[slice]:
    """Slices that cut `length` into pieces of about `BLOCK_ENTRIES` entries of `width` each."""
    size = max(1, BLOCK_ENTRIES // max(1, width))
    size = size if most is None else min(size, most)
    for start in range(0, length, size):
        yield slice(start, start + size)


def check_shapes(scores: np.ndarray, targets: np.ndarray) -> None:
    """Raises ValueError unless both are `[n c]`."""
    if scores.ndim != 2 or scores.shape != targets.shape:
        raise ValueError(f"scores {scores.shape} and targets {targets.shape} must both be [n c]")


class _Workspace:
    """Buffers of one thread: fresh pages from the system would cost more than the sorting."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows  # uint64 [n], twice the row number
        self.keys, self.spare = np.empty_like(rows), np.empty_like(rows)
        self.bits, self.sign = np.empty(len(rows), np.int32), np.empty(len(rows), np.int32)
        self.flag = np.empty(len(rows), bool)


def _one_class(
    scores: np.ndarray,
    targets: np.ndarray,
    assume_negative: bool | None,
    grouped: bool,
    work: _Workspace,
) -> float:
    """AP of float32 scores `[n]` and int8 targets `[n]`.

    Sorts one uint64 an image: `descending_keys` in the high half, then the row, then the positive
    bit. That makes a plain (vectorised) sort stable and carries the target along: several times
    faster than a stable argsort and a gather.
    """
    if np.isnan(scores, out=work.flag).any():
        raise ValueError("a score is NaN, which has no rank")
    # descending_keys, into the buffers.
    bits, sign, keys = work.bits, work.sign, work.keys
    np.add(scores, np.float32(0), out=bits.view(np.float32))
    np.right_shift(bits, 31, out=sign)
    np.invert(sign, out=sign)
    np.bitwise_and(sign, np.int32(0x7FFFFFFF), out=sign)
    np.bitwise_xor(bits, sign, out=bits)
    np.left_shift(bits.view(np.uint32), np.uint64(32), out=keys)
    np.bitwise_or(keys, work.rows, out=keys)
    np.bitwise_or(keys, np.greater(targets, 0, out=work.flag), out=keys)
    if assume_negative is False or (assume_negative is None and targets.min() < 0):
        keys = keys[targets != 0]
    keys.sort()
    spare, flag = work.spare[: len(keys)], work.flag[: len(keys)]
    np.not_equal(np.bitwise_and(keys, np.uint64(1), out=spare), 0, out=flag)
    at = np.flatnonzero(flag)
    if len(at) == 0:
        return np.nan
    if not grouped:
        return float((np.arange(1, len(at) + 1) / (at + 1)).mean())
    values = np.right_shift(keys, np.uint64(32), out=spare)
    found = values[at]
    above = np.searchsorted(values, found, side="right")
    return float((np.searchsorted(found, found, side="right") / above).mean())


def _transposed(part: np.ndarray, dtype: type) -> np.ndarray:
    """A C-ordered copy of `part.T`, made in tiles that stay in the cache."""
    result = np.empty(part.shape[::-1], dtype)
    for start in range(0, len(part), _TRANSPOSED_ROWS):
        rows = slice(start, start + _TRANSPOSED_ROWS)
        result[:, rows] = part[rows].T
    return result
