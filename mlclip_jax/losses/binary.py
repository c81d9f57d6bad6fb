"""Losses that score every label as a yes-or-no question of its own."""

from __future__ import annotations

import math

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


def binary_cross_entropy(
    logits: Array,
    targets: Array,
    *,
    where: Array | None = None,
    ignore_unobserved: bool = False,
    reduction: Reduction = "mean",
) -> Array:
    """`-log sigmoid(x)` of positives, `-log sigmoid(-x)` of the rest.

    The multi-label soft margin loss is the same function.

    Args:
        logits: [b c].
        targets: int8 [b c]; 0 counts as negative (assume-negative) unless `ignore_unobserved`.
        where: mask that broadcasts to [b c].
        ignore_unobserved: leave entries with target 0 out of sum and count.
        reduction: over the entries that count.

    Source: the textbook form; assume-negative as in Cole et al., 2021.
    """
    x, targets, where = prepare(logits, targets, where, ignore_unobserved=ignore_unobserved)
    return reduce(softplus(-towards(targets > 0, x)), where, reduction)


def focal(
    logits: Array,
    targets: Array,
    *,
    where: Array | None = None,
    gamma: float = 2.0,
    alpha: float | None = None,
    ignore_unobserved: bool = False,
    reduction: Reduction = "mean",
) -> Array:
    """Focal loss: `-alpha_t (1 - p_t)^gamma log p_t`, p_t the probability of the right answer.

    Args:
        logits: [b c].
        targets: int8 [b c]; 0 counts as negative unless `ignore_unobserved`.
        where: mask that broadcasts to [b c].
        gamma: focusing exponent.
        alpha: weight of positives, 1 - alpha of the rest; None weighs both with 1.
        ignore_unobserved: leave entries with target 0 out of sum and count.
        reduction: over the entries that count.

    Source: Lin et al., ICCV 2017, Eqs. 4-5 (there summed and divided by the number of anchors).
    """
    x, targets, where = prepare(logits, targets, where, ignore_unobserved=ignore_unobserved)
    right = towards(targets > 0, x)
    loss = softplus(-right) * focal_weight(right, gamma)
    if alpha is not None:
        loss = loss * jnp.where(targets > 0, alpha, 1 - alpha)
    return reduce(loss, where, reduction)


def asymmetric(
    logits: Array,
    targets: Array,
    *,
    where: Array | None = None,
    gamma_negative: float = 4.0,
    gamma_positive: float = 0.0,
    clip: float = 0.05,
    focal_gradient: bool = False,
    ignore_unobserved: bool = False,
    reduction: Reduction = "sum",
) -> Array:
    """Asymmetric loss (ASL): focal weights of their own for positives and negatives.

    With p = sigmoid(x) and q = min(1 - p + clip, 1):
    positives `-(1 - p)^gamma_positive log p`, others `-(1 - q)^gamma_negative log q`.

    On the difference of a positive and a negative prompt's logits, with `ignore_unobserved`, it is
    the loss of DualCoOp.

    Args:
        logits: [b c].
        targets: int8 [b c]; 0 counts as negative unless `ignore_unobserved`.
        where: mask that broadcasts to [b c].
        gamma_negative, gamma_positive: focusing exponents.
        clip: probability margin below which a negative costs nothing.
        focal_gradient: let gradients through the focal weight (the release does not).
        ignore_unobserved: leave entries with target 0 out of sum and count.
        reduction: the release sums; LMPT takes the mean.

    Source: Ridnik et al., ICCV 2021, Eqs. 4-7; logs are floored at 1e-8 as in the release.
    """
    x, targets, where = prepare(logits, targets, where, ignore_unobserved=ignore_unobserved)
    positive = targets > 0
    p, not_p = jax.nn.sigmoid(x), jax.nn.sigmoid(-x)  # 1 - p would round to 0 from x = 17 on
    q = jnp.minimum(not_p + clip, 1) if clip > 0 else not_p
    log_right = jnp.where(positive, -softplus(-x), jnp.log(jnp.maximum(q, 1e-8)))
    log_right = jnp.maximum(log_right, math.log(1e-8))
    wrong = jnp.where(positive, not_p, jnp.maximum(p - clip, 0) if clip > 0 else p)
    weight = safe_power(wrong, jnp.where(positive, gamma_positive, gamma_negative))
    if not focal_gradient:
        weight = jax.lax.stop_gradient(weight)
    return reduce(-log_right * weight, where, reduction)


def asymmetric_softmax(
    logits: Array,
    targets: Array,
    *,
    where: Array | None = None,
    gamma_negative: float = 4.0,
    gamma_positive: float = 0.0,
    smoothing: float = 0.1,
) -> Array:
    """Asymmetric loss for images of one label: softmax over the classes instead of c sigmoids.

    With p = softmax(x), y = 1 for the positive and 0 elsewhere, y' = (1 - smoothing) y +
    smoothing / c: `-sum_c y' (1 - p)^gamma_positive log p` where y = 1 and
    `-sum_c y' p^gamma_negative log p` elsewhere; mean over images.

    Args:
        logits: [b c].
        targets: int8 [b c], one +1 in each row; 0 counts as negative.
        where: mask that broadcasts to [b c]; masked classes are no part of the softmax.
        gamma_negative, gamma_positive: focusing exponents.
        smoothing: label smoothing.

    Source: the release of Ridnik et al., ICCV 2021, for single labels; its weight has a gradient.
    """
    x, targets, where = prepare(logits, targets, where)
    log_p = jax.nn.log_softmax(jnp.where(where, x, jnp.finfo(x.dtype).min / 2), axis=-1)
    log_p = jnp.where(where, log_p, 0)
    positive = targets > 0
    p = jnp.exp(log_p)
    weight = jnp.where(
        positive,
        safe_power(jnp.where(positive, 1 - p, 1), gamma_positive),
        jnp.exp(gamma_negative * log_p),
    )
    classes = jnp.maximum(where.sum(-1, keepdims=True), 1)
    smoothed = positive * (1 - smoothing) + smoothing / classes
    return reduce(-smoothed * weight * log_p, where, "sum_classes_mean_images")
