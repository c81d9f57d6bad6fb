"""Losses that score every label as a yes-or-no question of its own."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

Reduction = Literal["mean", "sum", "sum_classes_mean_images"]


def _reduce(loss: Array, where: Array | None, reduction: Reduction) -> Array:
    """[b c] to a scalar over the entries that count."""
    where = jnp.broadcast_to(True if where is None else where, loss.shape)
    total = jnp.where(where, loss, 0).sum()
    if reduction == "sum":
        return total
    count = where.sum() if reduction == "mean" else where.any(-1).sum()
    return total / jnp.maximum(count, 1)


def _as_float32(logits: Array) -> Array:
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def binary_cross_entropy(
    logits: Array,
    targets: Array,
    *,
    where: Array | None = None,
    ignore_unobserved: bool = False,
    reduction: Reduction = "mean",
) -> Array:
    """`-log sigmoid(x)` of positives, `-log sigmoid(-x)` of the rest.

    Args:
        logits: [b c].
        targets: int8 [b c]; 0 counts as negative (assume-negative) unless `ignore_unobserved`.
        where: mask that broadcasts to [b c].
        ignore_unobserved: leave entries with target 0 out of sum and count.
        reduction: over the entries that count.

    Source: the textbook form; assume-negative as in Cole et al., 2021.
    """
    x = _as_float32(logits)
    if ignore_unobserved:
        observed = targets != 0
        where = observed if where is None else where & observed
    return _reduce(jnp.where(targets > 0, _softplus(-x), _softplus(x)), where, reduction)


def _softplus(x: Array) -> Array:
    """`log(1 + exp(x))`, finite with finite gradient for every finite x."""
    return jnp.logaddexp(x, 0)


def asymmetric(
    logits: Array,
    targets: Array,
    *,
    where: Array | None = None,
    gamma_negative: float = 4.0,
    gamma_positive: float = 0.0,
    clip: float = 0.05,
    focal_gradient: bool = False,
    reduction: Reduction = "sum",
) -> Array:
    """Asymmetric loss (ASL): focal weights of their own for positives and negatives.

    With p = sigmoid(x) and q = min(1 - p + clip, 1):
    positives `-(1 - p)^gamma_positive log p`, others `-(1 - q)^gamma_negative log q`.

    Args:
        logits: [b c].
        targets: int8 [b c]; 0 counts as negative.
        where: mask that broadcasts to [b c].
        gamma_negative, gamma_positive: focusing exponents.
        clip: probability margin below which a negative costs nothing.
        focal_gradient: let gradients through the focal weight (the release does not).
        reduction: the release sums; LMPT takes the mean.

    Source: Ridnik et al., ICCV 2021, Eqs. 4-7; logs are floored at 1e-8 as in the release.
    """
    x = _as_float32(logits)
    p = jax.nn.sigmoid(x)
    q = jnp.minimum(1 - p + clip, 1) if clip > 0 else 1 - p
    right = jnp.where(targets > 0, p, q)
    log_right = jnp.log(jnp.maximum(right, 1e-8))
    gamma = jnp.where(targets > 0, gamma_positive, gamma_negative)
    # 0 ** 0 = 1 with a finite gradient: the base is replaced where the exponent is 0.
    base = jnp.where(gamma > 0, jnp.clip(1 - right, 0, 1), 1)
    weight = jnp.where(base > 0, jnp.where(base > 0, base, 1) ** gamma, 0)
    if not focal_gradient:
        weight = jax.lax.stop_gradient(weight)
    return _reduce(-log_right * weight, where, reduction)
