"""Label protocols: which images, and which of their labels, training may see.

A protocol is a pure, seeded function of a label matrix int8 [n c] (+1 positive, 0 unobserved,
-1 negative); of the images it may know their names, so the same code serves every data set.
Protocols are written as text and composed with "+", left to right:

    "full"                        everything
    "single_positive"             one random positive of each image, nothing else
    "partial(0.3)"                each entry observed with probability 0.3
    "positives_left(0.2)"         floor(0.2 n) + 1 of the n positives of an image, nothing else
    "few_shot(16)"                16 images of each class; "few_shot(0.1)": a tenth of the images
    "long_tail"                   class counts fall exponentially by a factor of 100
    "seen"                        labels outside the subset "seen" unobserved, images without one
                                  of its labels left out; "restrict('seen')" does the first alone,
    "require_positive('seen')"    the second alone; "require_positive" asks for any label
    "long_tail(50)+single_positive(seed=7)"

and the very draws of released code, with seeds of their own (`protocols.released`):

    "order_by('id')"              images in the order in which that code lists them; or 'name'
    "cole_single_positive"        single positives of Cole et al. and LargeLoss
    "holdout(0.2)"                their split; "holdout(0.2, 'validation')" is its other part
    "cole_few_shot(0.1)"          a tenth of the images, as LargeLoss draws them
    "first(0.1)"                  the first tenth of the images (DualCoOp)
    "sarb_partial(0.3)"           partial labels of SST and SARB
    "pareto_tail"                 VOC-LT; "pareto_tail(max=1200)" for COCO

Evaluation uses "full", whatever training saw.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mlclip_jax.data.protocols.base import Context, Labels, SparseTargets, View
from mlclip_jax.data.protocols.released import (
    ColeFewShot,
    ColeSinglePositive,
    FirstImages,
    Holdout,
    ParetoTail,
    SarbPartial,
)
from mlclip_jax.data.protocols.views import (
    FewShot,
    Full,
    LongTail,
    OnlySubset,
    OrderBy,
    Partial,
    PositivesLeft,
    RequirePositive,
    Restrict,
    SinglePositive,
)
from mlclip_jax.errors import UserError
from mlclip_jax.spec import parse_call, unknown

__all__ = [
    "VIEWS", "ColeFewShot", "ColeSinglePositive", "FewShot", "FirstImages", "Full", "Holdout",
    "Labels", "LongTail", "OnlySubset", "OrderBy", "ParetoTail", "Partial", "PositivesLeft",
    "RequirePositive", "Restrict", "SarbPartial", "SinglePositive", "SparseTargets", "View",
    "apply", "parse",
]  # fmt: skip

VIEWS: dict[str, type[View]] = {
    view.name: view
    for view in (
        Full, SinglePositive, Partial, PositivesLeft, FewShot, LongTail, RequirePositive, Restrict,
        OnlySubset, OrderBy, ColeSinglePositive, Holdout, ColeFewShot, FirstImages, SarbPartial,
        ParetoTail,
    )
}  # fmt: skip
_SHORTHANDS = {"seen": OnlySubset("seen"), "unseen": OnlySubset("unseen")}
# Keeps the draws here apart from those of a data set made from the same small seed.
_STREAM = 0x1AB315


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
    chain: str | Sequence[View],
    targets: np.ndarray | Labels,
    *,
    seed: int = 0,
    subsets: Mapping[str, Sequence[int]] | None = None,
    keys: np.ndarray | None = None,
) -> Labels:
    """Applies views, left to right, to the full labels of a data set.

    Args:
      chain: views as text or parsed.
      targets: int8 [n c] in {+1, 0, -1}; not changed. Or labels of a selection of the images.
      seed: for views that name no seed of their own; every place in the chain draws its own stream.
      subsets: named subsets of the classes (`LabelSpace.subsets`).
      keys: unicode [n], paths of the images of the data set, for views that order by them.

    Returns:
      The labels that remain, with the rows they belong to.

    Raises:
      UserError: a view that cannot be read or applied, or a seed that is no whole number >= 0.
      ValueError: targets of another type.
    """
    labels = targets
    if not isinstance(labels, Labels):
        labels = Labels(targets, np.arange(len(targets), dtype=np.int64))
    if labels.targets.ndim != 2 or labels.targets.dtype != np.int8:
        shape = list(labels.targets.shape)
        raise ValueError(f"targets must be int8 [n c], not {labels.targets.dtype} {shape}")
    for place, view in enumerate(parse(chain) if isinstance(chain, str) else chain):
        own = [_STREAM, seed, place] if view.seed is None else [_STREAM, view.seed]
        if not all(isinstance(s, int | np.integer) and s >= 0 for s in own):
            raise UserError(f"label view {view.name!r}: seed {own[1]!r} is no whole number >= 0")
        if labels.sparse and not view.sparse:
            raise UserError(
                f"label view {view.name!r}: {labels.targets.shape[0]} images with "
                f"{labels.targets.shape[1]} labels are too many; take fewer of either"
            )
        labels = view(labels, Context(np.random.default_rng(own), subsets or {}, keys))
    return labels
