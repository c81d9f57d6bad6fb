"""The mergeable state behind every metric: scores and targets gathered batch by batch."""

from __future__ import annotations

import numpy as np

from mlclip_jax.errors import UserError


class Predictions:
    """Scores and targets gathered by batch; hosts and parts of a split merge in any order.

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
        index = np.concatenate([np.zeros(0, np.int64), *(part for *_, part in self._chunks)])
        known = index[index >= 0]
        if len(np.unique(known)) != len(known):
            raise ValueError("an image was scored twice: the indices of the rows are not distinct")
        if len(self._chunks) == 1 and (index[1:] >= index[:-1]).all():
            return self._chunks[0]
        order = np.argsort(index, kind="stable")
        place = np.empty(len(index), np.int64)
        place[order] = np.arange(len(index))
        scores = np.empty((len(index), self.num_classes), np.float32)
        targets = np.empty(scores.shape, np.int8)
        # A batch is dropped once copied, so that its memory serves the batches after it.
        batches, self._chunks = self._chunks[::-1], []
        while batches:
            part_scores, part_targets, part_index = batches.pop()
            rows, place = place[: len(part_index)], place[len(part_index) :]
            scores[rows], targets[rows] = part_scores, part_targets
        self._chunks = [(scores, targets, index[order])]
        return self._chunks[0]

    def __len__(self) -> int:
        return sum(len(scores) for scores, _, _ in self._chunks)
