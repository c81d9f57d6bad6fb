"""Protocols in their plain form, drawn with numpy's generators: pure, seeded, for any data set."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from mlclip_jax.data.protocols.base import Context, Labels, check_share
from mlclip_jax.errors import UserError


@dataclass(frozen=True)
class Full:
    """Every label as it is."""

    name: ClassVar[str] = "full"
    sparse: ClassVar[bool] = True
    seed: int | None = None

    def __call__(self, labels: Labels, context: Context) -> Labels:
        return labels


@dataclass(frozen=True)
class SinglePositive:
    """One positive of each image, drawn uniformly; all else unobserved (Cole et al., 2021).

    Images without a positive keep their row, with nothing observed.
    """

    name: ClassVar[str] = "single_positive"
    sparse: ClassVar[bool] = False
    seed: int | None = None

    def __call__(self, labels: Labels, context: Context) -> Labels:
        positive = labels.targets > 0
        draw = np.where(positive, context.rng.random(positive.shape), -1.0)
        chosen = np.arange(positive.shape[1]) == draw.argmax(1)[:, None]
        return labels.observe(chosen & positive)


@dataclass(frozen=True)
class Partial:
    """Each entry, positive or negative, stays observed with probability `share`."""

    share: float
    name: ClassVar[str] = "partial"
    sparse: ClassVar[bool] = False
    seed: int | None = None

    def __post_init__(self) -> None:
        check_share(self.name, self.share)

    def __call__(self, labels: Labels, context: Context) -> Labels:
        return labels.observe(context.rng.random(labels.targets.shape) < self.share)


@dataclass(frozen=True)
class FewShot:
    """A few images: `amount` of each class (an integer), or a share of all (a fraction < 1).

    By class: images are taken in random order, rarest class first, until each class has at least
    `amount` positives or no more images; images taken for one class count for the others. Rows stay
    in their original order.
    """

    amount: int | float
    name: ClassVar[str] = "few_shot"
    sparse: ClassVar[bool] = False
    seed: int | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.amount, int)
        if isinstance(self.amount, bool) or self.amount <= 0 or (not whole and self.amount >= 1):
            raise UserError(
                f"few_shot({self.amount}): give a whole number of images a class, "
                "or a fraction of the images between 0 and 1"
            )

    def __call__(self, labels: Labels, context: Context) -> Labels:
        order = context.rng.permutation(len(labels.index))
        if not isinstance(self.amount, int):
            count = max(1, round(self.amount * len(order)))
            return labels.take(np.sort(order[:count]))
        positive = labels.targets > 0
        chosen = np.zeros(len(order), bool)
        for label in np.argsort(positive.sum(0), kind="stable"):
            missing = self.amount - int(positive[chosen, label].sum())
            if missing > 0:
                candidates = order[positive[order, label] & ~chosen[order]]
                chosen[candidates[:missing]] = True
        if not chosen.any():
            raise UserError(f"few_shot({self.amount}): no image has a positive label")
        return labels.take(np.flatnonzero(chosen))


@dataclass(frozen=True)
class LongTail:
    """Leaves out images so that class counts fall off exponentially.

    Classes are ranked by frequency, most frequent first (ties: by index); the class of rank r of c
    may keep at most `max * imbalance^(-r / (c - 1))` positives, max being the largest count, and at
    least one. Images are taken in random order, for the rarest class first: one is left out if any
    of its labels is full. No class goes over its limit; as images have several labels, frequent
    classes may stay below theirs. Images without a positive are left out. Rows stay in their
    original order.
    """

    imbalance: float = 100.0
    name: ClassVar[str] = "long_tail"
    sparse: ClassVar[bool] = False
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.imbalance < 1:
            raise UserError(f"long_tail({self.imbalance}): the imbalance must be at least 1")

    def limits(self, counts: np.ndarray) -> np.ndarray:
        """How many positives each class may keep, given how many it has: int64 [c] -> [c]."""
        rank = np.empty(len(counts), np.int64)
        rank[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
        curve = float(self.imbalance) ** (-rank / max(len(counts) - 1, 1))
        return np.minimum(np.maximum(np.round(counts.max() * curve), 1), counts).astype(np.int64)

    def __call__(self, labels: Labels, context: Context) -> Labels:
        positive = labels.targets > 0
        counts = positive.sum(0)
        if not counts.any():
            raise UserError("long_tail: no image has a positive label")
        room = self.limits(counts)
        order = context.rng.permutation(len(positive))
        chosen = np.zeros(len(positive), bool)
        for label in np.argsort(counts, kind="stable"):
            for row in order[positive[order, label] & ~chosen[order]]:
                if room[label] == 0:
                    break
                if (room[positive[row]] > 0).all():
                    chosen[row] = True
                    room[positive[row]] -= 1
        return labels.take(np.flatnonzero(chosen))


@dataclass(frozen=True)
class PositivesLeft:
    """floor(share n) + 1 of the n positives of an image, drawn uniformly, and nothing else.

    The rule of the lists of SPLC (Zhang et al., 2021): 40 % of COCO's labels are left for the share
    0.2, 75 % for 0.5. An image with one positive keeps it.
    """

    share: float
    name: ClassVar[str] = "positives_left"
    sparse: ClassVar[bool] = False
    seed: int | None = None

    def __post_init__(self) -> None:
        check_share(self.name, self.share)

    def __call__(self, labels: Labels, context: Context) -> Labels:
        positive = labels.targets > 0
        draw = np.where(positive, context.rng.random(positive.shape), 2.0)
        rank = draw.argsort(1).argsort(1)
        kept = np.floor(positive.sum(1) * self.share) + 1
        return labels.observe(positive & (rank < kept[:, None]))


@dataclass(frozen=True)
class RequirePositive:
    """Images without a positive, in a named subset of the classes or at all, are left out."""

    subset: str | None = None
    name: ClassVar[str] = "require_positive"
    sparse: ClassVar[bool] = True
    seed: int | None = None

    def __call__(self, labels: Labels, context: Context) -> Labels:
        classes = None if self.subset is None else context.classes(self.subset)
        if labels.sparse:
            found = labels.targets.has_positive(classes)
        else:
            found = (labels.targets[:, slice(None) if classes is None else classes] > 0).any(1)
        rows = np.flatnonzero(found)
        if not len(rows):
            where = f" in the subset {self.subset!r}" if self.subset else ""
            raise UserError(f"no image has a positive label{where}")
        return labels.take(rows)


@dataclass(frozen=True)
class Restrict:
    """Labels outside a named subset are unobserved; every image stays."""

    subset: str
    name: ClassVar[str] = "restrict"
    sparse: ClassVar[bool] = False
    seed: int | None = None

    def __call__(self, labels: Labels, context: Context) -> Labels:
        inside = np.zeros(labels.targets.shape[1], bool)
        inside[context.classes(self.subset)] = True
        return labels.observe(np.broadcast_to(inside, labels.targets.shape))


@dataclass(frozen=True)
class OnlySubset:
    """`Restrict`, then `RequirePositive`: only the subset's labels, and images that have one.

    Written "seen" or "unseen" for the subsets of these names, "subset('name')" for others.
    """

    subset: str
    name: ClassVar[str] = "subset"
    sparse: ClassVar[bool] = False
    seed: int | None = None

    def __call__(self, labels: Labels, context: Context) -> Labels:
        labels = Restrict(self.subset)(labels, context)
        return RequirePositive(self.subset)(labels, context)


@dataclass(frozen=True)
class OrderBy:
    """Sorts the images: released code draws in the order in which it lists them.

    By "name", the path; or by "id", the last number in the file's name, without leading zeros and
    sorted as a string (COCO: "10" before "9").
    """

    by: Literal["name", "id"]
    name: ClassVar[str] = "order_by"
    sparse: ClassVar[bool] = True
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.by not in ("name", "id"):
            raise UserError(f"order_by({self.by!r}): images are ordered by 'name' or by 'id'")

    def __call__(self, labels: Labels, context: Context) -> Labels:
        if context.keys is None:
            raise UserError("order_by: these images have no names to be ordered by")
        keys = context.keys[labels.index].tolist()
        if self.by == "id":
            keys = [self._id(key) for key in keys]
        return labels.take(np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64))

    @staticmethod
    def _id(key: str) -> str:
        numbers = re.findall(r"\d+", key.rpartition("/")[2].rpartition(".")[0])
        if not numbers:
            raise UserError(f"order_by('id'): the name of {key!r} has no number")
        return numbers[-1].lstrip("0")
