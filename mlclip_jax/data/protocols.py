"""Label protocols: which images, and which of their labels, training may see.

A protocol is a pure, seeded function of a label matrix int8 [n c] (+1 positive, 0 unobserved,
-1 negative); it knows nothing of the images, so the same code serves every data set. Protocols are
written as text and composed with "+", left to right:

    "full"                        everything
    "single_positive"             one random positive of each image, nothing else
    "partial(0.3)"                each entry observed with probability 0.3
    "few_shot(16)"                16 images of each class; "few_shot(0.1)": a tenth of the images
    "long_tail"                   class counts fall exponentially by a factor of 100
    "seen"                        labels outside the subset "seen" unobserved
    "long_tail(50)+single_positive(seed=7)"

Evaluation uses "full", whatever training saw.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from mlclip_jax.errors import UserError
from mlclip_jax.spec import parse_call, unknown

# Keeps the draws here apart from those of a data set made from the same small seed.
_STREAM = 0x1AB315


@dataclass(frozen=True)
class Labels:
    """Labels of a selection of a data set.

    Attributes:
      targets: int8 [m c], +1 positive, 0 unobserved, -1 negative.
      index: int64 [m], the row of the data set that each row is.
    """

    targets: np.ndarray
    index: np.ndarray

    def take(self, rows: np.ndarray) -> Labels:
        """Some of the rows, in the order given."""
        return Labels(self.targets[rows], self.index[rows])

    def observe(self, mask: np.ndarray) -> Labels:
        """The same rows with targets 0 wherever `mask` bool [m c] is False."""
        return Labels(np.where(mask, self.targets, 0).astype(np.int8), self.index)


class View(Protocol):
    """One protocol with its parameters. `seed` None takes the seed that `apply` is given."""

    name: ClassVar[str]
    seed: int | None

    def __call__(
        self, labels: Labels, rng: np.random.Generator, subsets: Mapping[str, Sequence[int]]
    ) -> Labels:
        """Applies the protocol; all randomness comes from `rng`."""


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UserError(f"{name}({value}): the probability must be above 0 and at most 1")


@dataclass(frozen=True)
class Full:
    """Every label as it is."""

    name: ClassVar[str] = "full"
    seed: int | None = None

    def __call__(
        self, labels: Labels, rng: np.random.Generator, subsets: Mapping[str, Sequence[int]]
    ) -> Labels:
        return labels


@dataclass(frozen=True)
class SinglePositive:
    """One positive of each image, drawn uniformly; all else unobserved (Cole et al., 2021).

    Images without a positive keep their row, with nothing observed.
    """

    name: ClassVar[str] = "single_positive"
    seed: int | None = None

    def __call__(
        self, labels: Labels, rng: np.random.Generator, subsets: Mapping[str, Sequence[int]]
    ) -> Labels:
        positive = labels.targets > 0
        draw = np.where(positive, rng.random(positive.shape), -1.0)
        chosen = np.arange(positive.shape[1]) == draw.argmax(1)[:, None]
        return labels.observe(chosen & positive)


@dataclass(frozen=True)
class Partial:
    """Each entry, positive or negative, stays observed with probability `share`."""

    share: float
    name: ClassVar[str] = "partial"
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_share(self.name, self.share)

    def __call__(
        self, labels: Labels, rng: np.random.Generator, subsets: Mapping[str, Sequence[int]]
    ) -> Labels:
        return labels.observe(rng.random(labels.targets.shape) < self.share)


@dataclass(frozen=True)
class FewShot:
    """A few images: `amount` of each class (an integer), or a share of all (a fraction < 1).

    By class: images are taken in random order, rarest class first, until each class has at least
    `amount` positives or no more images; images taken for one class count for the others. Rows stay
    in their original order.
    """

    amount: int | float
    name: ClassVar[str] = "few_shot"
    seed: int | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.amount, int)
        if isinstance(self.amount, bool) or self.amount <= 0 or (not whole and self.amount >= 1):
            raise UserError(
                f"few_shot({self.amount}): give a whole number of images a class, "
                "or a fraction of the images between 0 and 1"
            )

    def __call__(
        self, labels: Labels, rng: np.random.Generator, subsets: Mapping[str, Sequence[int]]
    ) -> Labels:
        order = rng.permutation(len(labels.index))
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

    def __call__(
        self, labels: Labels, rng: np.random.Generator, subsets: Mapping[str, Sequence[int]]
    ) -> Labels:
        positive = labels.targets > 0
        counts = positive.sum(0)
        if not counts.any():
            raise UserError("long_tail: no image has a positive label")
        room = self.limits(counts)
        order = rng.permutation(len(positive))
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
class OnlySubset:
    """Labels outside a named subset are unobserved; images without a positive in it are left out.

    Written "seen" or "unseen" for the subsets of these names, "subset('name')" for others.
    """

    subset: str
    name: ClassVar[str] = "subset"
    seed: int | None = None

    def __call__(
        self, labels: Labels, rng: np.random.Generator, subsets: Mapping[str, Sequence[int]]
    ) -> Labels:
        if self.subset not in subsets:
            known = ", ".join(subsets) or "none"
            raise UserError(f"the label space has no subset {self.subset!r}; it has: {known}")
        inside = np.zeros(labels.targets.shape[1], bool)
        inside[list(subsets[self.subset])] = True
        labels = labels.observe(np.broadcast_to(inside, labels.targets.shape))
        rows = np.flatnonzero((labels.targets > 0).any(1))
        if not len(rows):
            raise UserError(f"no image has a positive label in the subset {self.subset!r}")
        return labels.take(rows)


VIEWS: dict[str, type[View]] = {
    view.name: view for view in (Full, SinglePositive, Partial, FewShot, LongTail, OnlySubset)
}
_SHORTHANDS = {"seen": OnlySubset("seen"), "unseen": OnlySubset("unseen")}


def parse(text: str) -> tuple[View, ...]:
    """Reads "name", "name(1, key=2)" or several of these joined by "+".

    Raises:
      UserError: unknown name (with near ones), bad syntax, or parameters a view does not take.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise UserError(f"cannot read the label view {text!r}: {error.msg}") from error
    return tuple(_views(tree, text))


def _views(node: ast.expr, text: str) -> list[View]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _views(node.left, text) + _views(node.right, text)
    name, arguments, keywords = parse_call(ast.unparse(node), what="label view")
    if name in _SHORTHANDS and not (arguments or keywords):
        return [_SHORTHANDS[name]]
    if name not in VIEWS:
        raise unknown("label view", name, [*VIEWS, *_SHORTHANDS])
    try:
        return [VIEWS[name](*arguments, **keywords)]
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        parameters = ", ".join(f.name for f in dataclasses.fields(VIEWS[name]))
        raise UserError(f"label view {name!r} takes ({parameters}), not {text!r}") from error


def apply(
    views: str | Sequence[View],
    targets: np.ndarray,
    *,
    seed: int = 0,
    subsets: Mapping[str, Sequence[int]] | None = None,
) -> Labels:
    """Applies views, left to right, to the full labels of a data set.

    Args:
      views: as text or parsed.
      targets: int8 [n c] in {+1, 0, -1}; not changed.
      seed: for views that name no seed of their own; every place in the chain draws its own stream.
      subsets: named subsets of the classes (`LabelSpace.subsets`).

    Returns:
      The labels that remain, with the rows they belong to.

    Raises:
      UserError: a view that cannot be read or applied, or a seed that is no whole number >= 0.
      ValueError: targets of another type.
    """
    if targets.ndim != 2 or targets.dtype != np.int8:
        raise ValueError(f"targets must be int8 [n c], not {targets.dtype} {list(targets.shape)}")
    labels = Labels(targets, np.arange(len(targets), dtype=np.int64))
    for place, view in enumerate(parse(views) if isinstance(views, str) else views):
        own = [_STREAM, seed, place] if view.seed is None else [_STREAM, view.seed]
        if not all(isinstance(s, int | np.integer) and s >= 0 for s in own):
            raise UserError(f"label view {view.name!r}: seed {own[1]!r} is no whole number >= 0")
        labels = view(labels, np.random.default_rng(own), subsets or {})
    return labels
