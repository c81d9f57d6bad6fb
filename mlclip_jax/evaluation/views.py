"""What a task of a protocol looks at: some images and some classes of the scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from mlclip_jax.evaluation import ranking
from mlclip_jax.labels.space import LabelSpace


@dataclass(frozen=True)
class Task:
    """What is scored.

    Attributes:
        name: put before the names of the figures ("ZSL/mAP"); "" for none.
        classes: the name of a subset of the label space, or "all".
        images: "all", or those "with_positive" among the classes.
    """

    name: str = ""
    classes: str = "all"
    images: Literal["all", "with_positive"] = "all"


class View:
    """The images and classes of a task, handed out in blocks: nothing is copied as a whole."""

    def __init__(
        self,
        scores: np.ndarray,
        targets: np.ndarray,
        space: LabelSpace,
        task: Task,
        softmax: bool,
        own_scores: np.ndarray | None = None,
    ) -> None:
        self.scores = scores if own_scores is None else own_scores
        self.targets, self.softmax = targets, softmax
        self.all_classes = task.classes == "all"
        self.classes = np.arange(len(space))
        if not self.all_classes:
            self.classes = np.array(space.indices(task.classes))
        #: Columns of the scores, which may be of these classes alone.
        self.columns = self.classes if own_scores is None else np.arange(len(self.classes))
        self.images = np.arange(len(targets))
        if task.images == "with_positive":
            kept = [
                (_take(targets, self.images[rows], self.classes) > 0).any(axis=1)
                for rows in ranking.blocks(*targets.shape)
            ]
            self.images = np.flatnonzero(np.concatenate([np.zeros(0, bool), *kept]))
        classes = f"{len(self.classes)} classes"
        self.words = classes if self.all_classes else f"{classes} ({task.classes})"
        self.words += f", {len(self.images)} images"
        if task.images == "with_positive":
            self.words += " with a positive among them"

    def column_blocks(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """(position among the classes, scores `[n w]`, targets `[n w]`) of some classes at once."""
        # Several of the blocks that average precision works on, so that all threads have some.
        for columns in ranking.blocks(len(self.classes), len(self.images) // 4):
            scores = _take(self.scores, self.images, self.columns[columns])
            if self.softmax:
                scores = self._subtract(scores, self._log_normaliser)
            yield columns, scores, _take(self.targets, self.images, self.classes[columns])

    def row_blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(scores `[m c]`, targets `[m c]`) of some images at once."""
        for rows in ranking.blocks(len(self.images), len(self.classes)):
            scores = _take(self.scores, self.images[rows], self.columns)
            if self.softmax:
                scores = self._subtract(scores, self._log_normaliser[rows])
            yield scores, _take(self.targets, self.images[rows], self.classes)

    @cached_property
    def _log_normaliser(self) -> np.ndarray:
        """float64 [n]: log of the sum over the classes of exp(logit)."""
        result = np.empty(len(self.images))
        for rows in ranking.blocks(len(self.images), len(self.classes)):
            part = _take(self.scores, self.images[rows], self.columns).astype(np.float64)
            top = part.max(axis=1, keepdims=True)
            result[rows] = top[:, 0] + np.log(np.exp(part - top).sum(axis=1))
        return result

    @staticmethod
    def _subtract(scores: np.ndarray, normaliser: np.ndarray) -> np.ndarray:
        return (scores.astype(np.float64) - normaliser[:, None]).astype(np.float32)


def _take(array: np.ndarray, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """A view where images and classes are a range of the array's, else a copy."""
    rows, columns = _as_range(images), _as_range(classes)
    if rows is None and columns is None:
        return array[np.ix_(images, classes)]
    return array[images if rows is None else rows, classes if columns is None else columns]


def _as_range(indices: np.ndarray) -> slice | None:
    """The slice of step 1 that selects the same, if there is one."""
    if len(indices) and (np.diff(indices) == 1).all():
        return slice(int(indices[0]), int(indices[-1]) + 1)
    return None


def class_sets(space: LabelSpace) -> dict[str, tuple[int, ...]]:
    """Subsets and groups of a label space, by name; a group that is also a subset is there once."""
    sets = dict(space.subsets)
    if space.taxonomy is not None:
        groups = {name: space.taxonomy.members(name) for name in space.taxonomy.group_names}
        named = set(sets.values())
        sets |= {name: members for name, members in groups.items() if members not in named}
    return sets
