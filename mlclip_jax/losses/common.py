"""What all losses share: preparing their inputs, stable pieces, the reduction to a scalar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

Reduction = Literal["mean", "sum", "sum_classes_mean_images"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Progress:
    """How far training is: int32 scalars, zero-based; and the key of the step's random numbers."""

    step: Array | int
    epoch: Array | int
    key: Array | None = None


def prepare(
    logits: Array, targets: Array, where: Array | None, *, ignore_unobserved: bool = False
) -> tuple[Array, Array, Array]:
    """Logits, targets and mask as the losses compute with them, all [b c].

    Args:
        logits: [b c], any float type.
        targets: [b c], +1 positive, 0 unobserved, -1 negative.
        where: mask that broadcasts to [b c], or None for all.
        ignore_unobserved: take unobserved entries out of the mask.

    Returns:
        Logits in float32 or wider, 0 where masked, so that nothing there (not even NaN) reaches
        value or gradient; targets, 0 where masked; the mask, bool.

    Raises:
        ValueError: shapes that do not agree.
    """
    if logits.ndim != 2 or logits.shape != targets.shape:
        raise ValueError(
            f"logits and targets must both be [b c], not {list(logits.shape)} and "
            f"{list(targets.shape)}"
        )
    x = as_float32(logits)
    where = jnp.broadcast_to(True if where is None else where, x.shape)
    if ignore_unobserved:
        where = where & (targets != 0)
    return jnp.where(where, x, 0), jnp.where(where, targets, 0), where


def reduce(loss: Array, where: Array, reduction: Reduction) -> Array:
    """[b c] to a scalar over the entries that count; 0 if there are none.

    Args:
        loss: [b c].
        where: bool [b c].
        reduction: "mean" over entries, "sum" over entries, or "sum_classes_mean_images": sum over
            the classes of an image, mean over images that have an entry that counts.

    Raises:
        ValueError: unknown reduction.
    """
    total = jnp.where(where, loss, 0).sum()
    if reduction == "sum":
        return total
    if reduction == "mean":
        count = where.sum()
    elif reduction == "sum_classes_mean_images":
        count = where.any(-1).sum()
    else:
        raise ValueError(f"unknown reduction {reduction!r}: mean, sum, sum_classes_mean_images")
    return total / jnp.maximum(count, 1)


def as_float32(x: Array) -> Array:
    """float32, or float64 where it was that already."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def softplus(x: Array) -> Array:
    """`log(1 + exp(x))`, finite with finite gradient for every finite x."""
    return jnp.logaddexp(x, 0)


def towards(positive: Array, x: Array) -> Array:
    """Logit of the right answer: x of positives, -x of the rest; `sigmoid` of it is p_t."""
    return jnp.where(positive, x, -x)


def focal_weight(right: Array, gamma: float) -> Array:
    """`(1 - p_t)^gamma` from the logit of the right answer, smooth for every gamma >= 0."""
    return jnp.exp(-gamma * softplus(right))


def safe_power(base: Array, exponent: Array | float) -> Array:
    """`base ** exponent` for base, exponent >= 0: 0 ** 0 = 1, gradient 0 where the base is 0."""
    exponent = jnp.broadcast_to(exponent, base.shape)
    inside = (base > 0) & (exponent > 0)
    power = jnp.where(inside, base, 1) ** exponent
    return jnp.where(inside | (exponent == 0), power, 0)
