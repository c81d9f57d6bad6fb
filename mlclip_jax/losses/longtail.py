"""Losses for long-tailed labels: entries weighted by how often classes occur in training.

n_c is the number of training images with label c (`class_counts`, [c]), N the number of training
images (`num_images`). A class without a positive is treated as if it had one.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from mlclip_jax.losses.common import (
    Reduction,
    focal_weight,
    prepare,
    reduce,
    safe_power,
    softplus,
    towards,
)

ClassBalance = Literal["average_w", "average_n", "min_n", "by_class"]


def _counts(class_counts: Array, x: Array) -> Array:
    """[c] in the type of the logits, at least 1."""
    counts = jnp.asarray(class_counts, x.dtype)
    if counts.shape != x.shape[-1:]:
        raise ValueError(
            f"class_counts must be [c] = {list(x.shape[-1:])}, not {list(counts.shape)}"
        )
    return jnp.maximum(counts, 1)


def _weighted(positive: Array, x: Array, weight: Array, gamma: float) -> Array:
    """`weight (1 - p_t)^gamma bce`, [b c]."""
    right = towards(positive, x)
    return weight * softplus(-right) * focal_weight(right, gamma)


def inverse_frequency(
    logits: Array,
    targets: Array,
    *,
    class_counts: Array,
    num_images: Array | int,
    where: Array | None = None,
    power: float = 0.5,
    gamma: float = 0.0,
    reduction: Reduction = "mean",
) -> Array:
    """`(N / n_c)^power (1 - p_t)^gamma bce`: every entry of a rare class weighs more.

    Args:
        logits: [b c].
        targets: int8 [b c]; 0 counts as negative.
        class_counts, num_images: n_c [c] and N.
        where: mask that broadcasts to [b c].
        power: 0.5 the smoothed form (RW), 1 the plain one.
        gamma: focusing exponent; 0 for none.
        reduction: over the entries that count.

    Source: Wu et al., ECCV 2020, the baselines of its release.
    """
    x, targets, where = prepare(logits, targets, where)
    weight = (jnp.asarray(num_images, x.dtype) / _counts(class_counts, x)) ** power
    return reduce(_weighted(targets > 0, x, weight, gamma), where, reduction)


def class_balanced_weights(
    positive: Array, class_counts: Array, *, beta: float = 0.9, mode: ClassBalance = "average_w"
) -> Array:
    """Class-balanced weights, [b c]: `(1 - beta) / (1 - beta^n)`, the inverse effective number.

    Args:
        positive: bool [b c].
        class_counts: float [c], each at least 1.
        beta: in [0, 1).
        mode: "by_class" takes n_c itself; the others give an image one weight: the mean of its
            positives' weights ("average_w"), the weight of the mean ("average_n") or of the
            smallest ("min_n") of their counts. An image without a positive weighs 0.

    Raises:
        ValueError: unknown mode.
    """

    def weigh(n: Array) -> Array:
        if beta == 0:
            return jnp.ones_like(n)
        return -(1 - beta) / jnp.expm1(n * math.log(beta))  # exact for beta near 1 too

    if mode == "by_class":
        return jnp.broadcast_to(weigh(class_counts), positive.shape)
    total = jnp.maximum(positive.sum(-1, keepdims=True), 1)
    if mode == "average_w":
        weight = jnp.where(positive, weigh(class_counts), 0).sum(-1, keepdims=True) / total
    elif mode == "average_n":
        mean = jnp.where(positive, class_counts, 0).sum(-1, keepdims=True) / total
        weight = weigh(jnp.maximum(mean, 1))
    elif mode == "min_n":
        smallest = jnp.where(positive, class_counts, jnp.inf).min(-1, keepdims=True)
        weight = weigh(smallest)
    else:
        raise ValueError(f"unknown mode {mode!r}: average_w, average_n, min_n, by_class")
    weight = jnp.where(positive.any(-1, keepdims=True), weight, 0)
    return jnp.broadcast_to(weight, positive.shape)


def class_balanced(
    logits: Array,
    targets: Array,
    *,
    class_counts: Array,
    where: Array | None = None,
    beta: float = 0.9,
    mode: ClassBalance = "average_w",
    gamma: float = 0.0,
    reduction: Reduction = "mean",
) -> Array:
    """Class-balanced loss (CB): `w (1 - p_t)^gamma bce`, w = (1 - beta) / (1 - beta^n).

    Args:
        logits: [b c].
        targets: int8 [b c]; 0 counts as negative.
        class_counts: n_c [c].
        where: mask that broadcasts to [b c].
        beta: 0.9 as in multi-label work; Cui et al. take 0.999 or 0.9999.
        mode: see `class_balanced_weights`.
        gamma: focusing exponent; 0 for none.
        reduction: over the entries that count.

    Source: Cui et al., CVPR 2019; multi-label modes of Wu et al., ECCV 2020. Deviation: an
    image without a positive weighs 0 where the release divides by zero.
    """
    x, targets, where = prepare(logits, targets, where)
    positive = targets > 0
    weight = class_balanced_weights(positive, _counts(class_counts, x), beta=beta, mode=mode)
    return reduce(_weighted(positive, x, weight, gamma), where, reduction)


def rebalancing_weights(
    positive: Array,
    class_counts: Array,
    *,
    alpha: float = 0.1,
    beta: float = 10.0,
    mu: float = 0.2,
) -> Array:
    """`alpha + sigmoid(beta (r - mu))`, [b c], r_c = (1 / n_c) / sum of 1 / n over the positives.

    r compares how often a class is drawn alone with how often through the image's other labels.

    Args:
        positive: bool [b c].
        class_counts: float [c], each at least 1.
        alpha, beta, mu: of the smoothing map; mu 0.2 on COCO-LT, 0.3 on VOC-LT.

    Without a positive r is infinite, as in the release, and the weight alpha + 1.
    """
    inverse = 1 / class_counts
    drawn = jnp.where(positive, inverse, 0).sum(-1, keepdims=True)
    some = drawn > 0
    ratio = jnp.where(some, inverse / jnp.where(some, drawn, 1), jnp.inf)
    return alpha + jax.nn.sigmoid(beta * (ratio - mu))


def rebalanced(
    logits: Array,
    targets: Array,
    *,
    class_counts: Array,
    where: Array | None = None,
    alpha: float = 0.1,
    beta: float = 10.0,
    mu: float = 0.2,
    reduction: Reduction = "mean",
) -> Array:
    """R-BCE: `r bce`, r the weights that undo co-occurrence, see `rebalancing_weights`.

    Args:
        logits: [b c].
        targets: int8 [b c]; 0 counts as negative.
        class_counts: n_c [c].
        where: mask that broadcasts to [b c].
        alpha, beta, mu: see `rebalancing_weights`.
        reduction: over the entries that count.

    Source: Wu et al., ECCV 2020.
    """
    return rebalanced_focal(
        logits,
        targets,
        class_counts=class_counts,
        where=where,
        alpha=alpha,
        beta=beta,
        mu=mu,
        gamma=0.0,
        balance=1.0,
        reduction=reduction,
    )


def rebalanced_focal(
    logits: Array,
    targets: Array,
    *,
    class_counts: Array,
    where: Array | None = None,
    alpha: float = 0.1,
    beta: float = 10.0,
    mu: float = 0.2,
    gamma: float = 2.0,
    balance: float = 2.0,
    reduction: Reduction = "mean",
) -> Array:
    """R-BCE-Focal: `balance r (1 - p_t)^gamma bce`, see `rebalancing_weights`.

    Args:
        logits: [b c].
        targets: int8 [b c]; 0 counts as negative.
        class_counts: n_c [c].
        where: mask that broadcasts to [b c].
        alpha, beta, mu: see `rebalancing_weights`.
        gamma: focusing exponent.
        balance: factor of the whole; LMPT's copy has 0.5.
        reduction: over the entries that count.

    Source: Wu et al., ECCV 2020, the release.
    """
    x, targets, where = prepare(logits, targets, where)
    positive = targets > 0
    weight = rebalancing_weights(positive, _counts(class_counts, x), alpha=alpha, beta=beta, mu=mu)
    return balance * reduce(_weighted(positive, x, weight, gamma), where, reduction)


def tolerant_logits(
    x: Array,
    positive: Array,
    class_counts: Array,
    num_images: Array | int,
    *,
    bias: float,
    negative_scale: float,
) -> Array:
    """Negative-tolerant logits [b c]: `x + v`, times `negative_scale` for negatives.

    v_c = -bias log(N / n_c - 1), the bias of a classifier that knows only class priors.

    Args:
        x: logits [b c].
        positive: bool [b c].
        class_counts, num_images: n_c [c] and N; n_c is kept half an image away from 0 and N.
        bias: factor of v.
        negative_scale: slope of negatives.
    """
    total = jnp.asarray(num_images, x.dtype)
    odds = jnp.maximum(total - class_counts, 0.5) / jnp.maximum(class_counts, 0.5)
    shifted = x - bias * jnp.log(odds)
    return jnp.where(positive, shifted, negative_scale * shifted)


def distribution_balanced(
    logits: Array,
    targets: Array,
    *,
    class_counts: Array,
    num_images: Array | int,
    where: Array | None = None,
    alpha: float = 0.1,
    beta: float = 10.0,
    mu: float = 0.2,
    bias: float = 0.05,
    negative_scale: float = 2.0,
    gamma: float = 2.0,
    balance: float = 2.0,
    variant: Literal["authors", "lmpt", "paper"] = "authors",
    reduction: Reduction = "mean",
) -> Array:
    """Distribution-balanced loss (DB): rebalanced weights and tolerance of negatives.

    With z = x - bias / s log(N / n_c - 1), s = `negative_scale`, r of `rebalancing_weights`:
    positives `balance r (1 - p)^gamma bce+(z)`, others `balance r / s p^gamma bce-(s z)`, p of the
    same logit as the bce.

    Args:
        logits: [b c].
        targets: int8 [b c]; 0 counts as negative.
        class_counts, num_images: n_c [c] and N.
        where: mask that broadcasts to [b c].
        alpha, beta, mu: see `rebalancing_weights`.
        bias, negative_scale: COCO-LT 0.05 and 2, VOC-LT 0.05 and 5.
        gamma: focusing exponent; 0 with balance=1 is the form without focal weight.
        balance: factor of the whole.
        variant: "authors" as above; "lmpt" and "paper" as below.
        reduction: over the entries that count.

    Source: Wu et al., ECCV 2020, as released. Deviations: the paper does not divide the bias by s;
    the release does, and its numbers rest on that.
    - variant="lmpt", the release of LMPT: the focal weight is one scalar for the batch, from the
      mean BCE of all entries.
    - variant="paper", Eqs. 8-10 of LMPT as printed: r sums 1 / n over all classes, the bias is not
      divided by s, and there is no factor `balance`.
    """
    if variant not in ("authors", "lmpt", "paper"):
        raise ValueError(f"unknown variant {variant!r}: authors, lmpt, paper")
    x, targets, where = prepare(logits, targets, where)
    positive = targets > 0
    counts = _counts(class_counts, x)
    printed = variant == "paper"
    weight = rebalancing_weights(
        where if printed else positive, counts, alpha=alpha, beta=beta, mu=mu
    )
    weight = jnp.where(positive, weight, weight / negative_scale)
    z = tolerant_logits(
        x,
        positive,
        counts,
        num_images,
        bias=bias if printed else bias / negative_scale,
        negative_scale=negative_scale,
    )
    factor = 1.0 if printed else balance
    if variant != "lmpt":
        return factor * reduce(_weighted(positive, z, weight, gamma), where, reduction)
    bce = softplus(-towards(positive, z))
    focal = safe_power(-jnp.expm1(-reduce(bce, where, "mean")), gamma)
    return factor * focal * reduce(weight * bce, where, reduction)
