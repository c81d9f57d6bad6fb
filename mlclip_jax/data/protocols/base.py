"""What a protocol works on: a label matrix, and which images its rows are."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from mlclip_jax.data.manifest import Rows
from mlclip_jax.errors import UserError

_CHUNK = 1 << 16


class SparseTargets:
    """Targets too many for an array (Open Images: 65 GB), made a row at a time.

    Behaves as an array int8 [m c] where rows are taken and one is looked at.

    Args:
      positives: of each image.
      negatives: of each image; None where every other label is negative.
      classes: c.
    """

    dtype = np.dtype(np.int8)
    ndim = 2

    def __init__(self, positives: Rows, negatives: Rows | None, classes: int) -> None:
        self.positives, self.negatives, self.classes = positives, negatives, classes

    @property
    def shape(self) -> tuple[int, int]:
        """(m, c)."""
        return len(self.positives), self.classes

    def __len__(self) -> int:
        """m."""
        return len(self.positives)

    def __getitem__(self, rows: int | np.ndarray) -> np.ndarray | SparseTargets:
        """Row i, int8 [c], or the targets of several rows."""
        if np.ndim(rows):
            negatives = None if self.negatives is None else self.negatives.take(rows)
            return SparseTargets(self.positives.take(rows), negatives, self.classes)
        row = np.full(self.classes, -1 if self.negatives is None else 0, np.int8)
        if self.negatives is not None:
            row[self.negatives.row(rows)] = -1
        row[self.positives.row(rows)] = 1
        return row

    def dense(self) -> np.ndarray:
        """int8 [m c]."""
        out = np.full(self.shape, -1 if self.negatives is None else 0, np.int8)
        if self.negatives is not None:
            out[self.negatives.pairs()] = -1
        out[self.positives.pairs()] = 1
        return out

    def arrays(self) -> list[np.ndarray]:
        """All that the targets are made from."""
        rows = [part for part in (self.positives, self.negatives) if part is not None]
        return [array for part in rows for array in (part.offsets, part.values)]

    def class_counts(self) -> np.ndarray:
        """Positives of each class, int64 [c]."""
        return np.bincount(self.positives.values, minlength=self.classes)

    def has_positive(self, classes: Sequence[int] | None = None) -> np.ndarray:
        """bool [m]: whether an image has a positive, among some of the classes or at all."""
        rows, labels = self.positives.pairs()
        found = np.zeros(len(self), bool)
        found[rows if classes is None else rows[np.isin(labels, classes)]] = True
        return found


@dataclass(frozen=True)
class Labels:
    """Labels of a selection of a data set.

    Attributes:
      targets: int8 [m c], +1 positive, 0 unobserved, -1 negative.
      index: int64 [m], the row of the data set that each row is.
    """

    targets: np.ndarray | SparseTargets
    index: np.ndarray

    @property
    def sparse(self) -> bool:
        """Whether the targets are too many for an array."""
        return isinstance(self.targets, SparseTargets)

    def take(self, rows: np.ndarray) -> Labels:
        """Some of the rows, in the order given."""
        return Labels(self.targets[rows], self.index[rows])

    def observe(self, mask: np.ndarray) -> Labels:
        """The same rows with targets 0 wherever `mask` bool [m c] is False."""
        return dataclasses.replace(
            self, targets=np.where(mask, self.targets, 0).astype(np.int8, copy=False)
        )

    def fingerprint(self, keys: np.ndarray) -> str:
        """SHA-256 (hex) of the images and their labels, in order.

        Args:
          keys: unicode [n], of all images of the data set.
        """
        digest = hashlib.sha256(f"{self.targets.shape}\n".encode())
        for start in range(0, len(self.index), _CHUNK):
            part = keys[self.index[start : start + _CHUNK]]
            digest.update("".join(f"{key}\n" for key in part.tolist()).encode())
        for array in self.targets.arrays() if self.sparse else [self.targets]:
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Context:
    """What a view may look at besides labels.

    Attributes:
      rng: randomness of this place in the chain.
      subsets: named subsets of the classes.
      keys: unicode [n], paths of the images of the data set; None where there are none.
    """

    rng: np.random.Generator
    subsets: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    keys: np.ndarray | None = None

    def classes(self, subset: str) -> list[int]:
        """Class numbers of a subset.

        Raises:
          UserError: there is no such subset.
        """
        if subset not in self.subsets:
            known = ", ".join(self.subsets) or "none"
            raise UserError(f"the label space has no subset {subset!r}; it has: {known}")
        return list(self.subsets[subset])


class View(Protocol):
    """One protocol with its parameters. `seed` None takes the seed that `apply` is given."""

    name: ClassVar[str]
    sparse: ClassVar[bool]  # works on SparseTargets too
    seed: int | None

    def __call__(self, labels: Labels, context: Context) -> Labels:
        """Applies the protocol."""


def check_share(name: str, value: float) -> None:
    """Raises UserError unless 0 < `value` <= 1."""
    if not 0 < value <= 1:
        raise UserError(f"{name}({value}): the probability must be above 0 and at most 1")
