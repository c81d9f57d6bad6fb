"""The very draws of released code: the same images and labels from the same seed.

They use the generators that code used, `numpy.random.RandomState` and Python's `random`, whose
streams are fixed for good, and depend on the order of the images: `OrderBy` puts them into it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from mlclip_jax.data.protocols.base import Context, Labels, check_share
from mlclip_jax.errors import UserError


@dataclass(frozen=True)
class ColeSinglePositive:
    """Single positives of Cole et al. (2021), which LargeLoss (Kim et al., 2022) takes over.

    Their code shuffles the positives of an image and keeps the first; then it shuffles its
    negatives too and keeps none, which moves the stream on.
    """

    name: ClassVar[str] = "cole_single_positive"
    sparse: ClassVar[bool] = False
    seed: int = 1200

    def __call__(self, labels: Labels, context: Context) -> Labels:
        rng = np.random.RandomState(self.seed)
        chosen = np.zeros(labels.targets.shape, bool)
        for row, positive in enumerate(labels.targets > 0):
            candidates, others = np.flatnonzero(positive), np.flatnonzero(~positive)
            rng.shuffle(candidates)
            chosen[row, candidates[:1]] = True
            rng.shuffle(others)
        return labels.observe(chosen)


@dataclass(frozen=True)
class Holdout:
    """One part of a random split: round(share n) images validate, the others train (Cole et al.).

    Rows keep their order.
    """

    share: float = 0.2
    part: Literal["train", "validation"] = "train"
    name: ClassVar[str] = "holdout"
    sparse: ClassVar[bool] = True
    seed: int = 1200

    def __post_init__(self) -> None:
        check_share(self.name, self.share)
        if self.part not in ("train", "validation"):
            raise UserError(f"holdout: the part is 'train' or 'validation', not {self.part!r}")

    def __call__(self, labels: Labels, context: Context) -> Labels:
        count = len(labels.index)
        order = np.random.RandomState(self.seed).permutation(count)
        cut = count - round(self.share * count)
        return labels.take(np.sort(order[:cut] if self.part == "train" else order[cut:]))


@dataclass(frozen=True)
class ColeFewShot:
    """round(share n) random images, in their order; LargeLoss draws them after the split."""

    share: float
    name: ClassVar[str] = "cole_few_shot"
    sparse: ClassVar[bool] = True
    seed: int = 999

    def __post_init__(self) -> None:
        check_share(self.name, self.share)

    def __call__(self, labels: Labels, context: Context) -> Labels:
        order = np.random.RandomState(self.seed).permutation(len(labels.index))
        return labels.take(np.sort(order[: self.count(len(order))]))

    def count(self, images: int) -> int:
        """How many of the images are taken, at least one."""
        return max(1, round(self.share * images))


@dataclass(frozen=True)
class FirstImages:
    """The first int(share n) images, as DualCoOp (Sun et al., 2022) takes them."""

    share: float
    name: ClassVar[str] = "first"
    sparse: ClassVar[bool] = True
    seed: int | None = None

    def __post_init__(self) -> None:
        check_share(self.name, self.share)

    def __call__(self, labels: Labels, context: Context) -> Labels:
        return labels.take(np.arange(max(1, int(self.share * len(labels.index)))))


@dataclass(frozen=True)
class SarbPartial:
    """Each entry observed with probability `share`, as SST and SARB (Pu et al., 2022) draw it.

    One stream for all shares: what a smaller one observes, a larger one does too.
    """

    share: float
    name: ClassVar[str] = "sarb_partial"
    sparse: ClassVar[bool] = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_share(self.name, self.share)

    def __call__(self, labels: Labels, context: Context) -> Labels:
        draw = np.random.RandomState(self.seed).random_sample(labels.targets.shape)
        return labels.observe(draw < self.share)


@dataclass(frozen=True)
class ParetoTail:
    """The long tail of Wu et al. (2020), from which VOC-LT and COCO-LT come.

    Classes are ranked by how much of the other classes' images they are in, the sum over i of
    P(class | i). Down the ranks, random images are added or taken away until the class has as many
    as the reference of its rank, a Pareto density with exponent `b` that falls from `max` to 1.
    VOC-LT is `b=6, max=800, seed=0` of VOC2012 trainval, difficult objects included: the official
    1,142 images, in the official order.
    """

    b: float = 6.0
    max: int = 800
    name: ClassVar[str] = "pareto_tail"
    sparse: ClassVar[bool] = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.b <= 0 or self.max < 1:
            raise UserError(f"pareto_tail({self.b}, {self.max}): b > 0 and max >= 1 are needed")

    def reference(self, classes: int) -> np.ndarray:
        """How many images the class of each rank is to have: int64 [c]."""
        x = np.linspace(1.0, 0.01 ** (-1 / self.b), classes)  # quantiles 0 and 0.99
        return (x ** -(self.b + 1) * (self.max - 1) + 1).astype(np.int64)

    def __call__(self, labels: Labels, context: Context) -> Labels:
        positive = labels.targets > 0
        counts = positive.sum(0)
        if not counts.any():
            raise UserError("pareto_tail: no image has a positive label")
        together = positive.T.astype(np.float64) @ positive
        mass = (together / np.maximum(counts, 1)[:, None]).sum(0)
        members = [np.flatnonzero(column).tolist() for column in positive.T]
        # Sets, and draws from tuples of them: their order, which is CPython's, is part of the
        # recipe. The generator is Python's, for the same reason.
        rng = random.Random(self.seed)
        chosen: set[int] = set()
        chosen_of = [set() for _ in members]
        for wanted, label in zip(
            self.reference(len(members)).tolist(), np.argsort(-mass, kind="stable"), strict=True
        ):
            missing = wanted - len(chosen_of[label])
            if missing > 0:
                pool = tuple(set(members[label]) - chosen_of[label])
                for row in rng.sample(pool, min(missing, len(pool))):
                    chosen.add(row)
                    for other in np.flatnonzero(positive[row]):
                        chosen_of[other].add(row)
            else:
                for row in rng.sample(tuple(chosen_of[label]), -missing):
                    chosen.remove(row)
                    for other in np.flatnonzero(positive[row]):
                        chosen_of[other].remove(row)
        return labels.take(np.fromiter(chosen, np.int64, len(chosen)))
