"""Losses that compare the positives of an image with its negatives."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from mlclip_jax.losses.common import prepare


def ranking(
    logits: Array,
    targets: Array,
    *,
    where: Array | None = None,
    margin: float = 1.0,
    pairs: Literal["mean_violating", "sum"] = "mean_violating",
    reduction: Literal["mean", "sum"] = "mean",
    ignore_unobserved: bool = True,
    skip_without_positives: bool = False,
) -> Array:
    """Ranking loss: `max(0, margin + x_n - x_p)` over pairs of a positive p and a negative n.

    A pair violates if its term is above 0. The pairs of an image are averaged over those that
    violate, their number carrying no gradient, or summed. Memory is linear and time c log c in the
    number of classes: what a pair contributes is `margin + x_n - x_p` or nothing, so that the loss
    needs of each label only in how many violating pairs it is, which a sort tells.

    Args:
        logits: [b c].
        targets: int8 [b c]; 0 is in no pair, or a negative without `ignore_unobserved`.
        where: mask that broadcasts to [b c].
        margin: by which a positive should lead.
        pairs: "mean_violating" as MKT's release; "sum" as its paper and TaI-DPT.
        reduction: over images; MKT's release and TaI-DPT take the mean, MKT's paper the sum.
        ignore_unobserved: leave entries with target 0 out.
        skip_without_positives: leave images without a positive out of the mean, as MKT's trainer
            does; otherwise they count, with 0.

    Source: He et al., AAAI 2023 (MKT), Eq. 4 with its sign corrected, and its release. Deviation:
    no 1e-8 is added to the divisor.
    """
    if pairs not in ("mean_violating", "sum") or reduction not in ("mean", "sum"):
        raise ValueError(
            f"pairs={pairs!r}, reduction={reduction!r}: mean_violating or sum; mean or sum"
        )
    x, targets, where = prepare(logits, targets, where)
    positive = targets > 0
    negative = where & ((targets < 0) if ignore_unobserved else ~positive)
    counts = violating_pairs(jax.lax.stop_gradient(x), positive, negative, margin=margin)
    total = jnp.where(positive, counts, 0).sum(-1).astype(x.dtype)
    weight = jnp.where(positive, -counts, counts) / jnp.maximum(total, 1)[:, None]
    # The weights of an image sum to 0: a shift changes nothing but the rounding of large logits.
    centre = jax.lax.stop_gradient(x).sum(-1) / jnp.maximum(where.sum(-1), 1)
    per_image = jnp.where(total > 0, margin + (weight * (x - centre[:, None])).sum(-1), 0)
    if pairs == "sum":
        per_image = total * per_image
    if reduction == "sum":
        return per_image.sum()
    images = where.any(-1)
    if skip_without_positives:
        images = images & positive.any(-1)
    return per_image.sum() / jnp.maximum(images.sum(), 1)


def violating_pairs(x: Array, positive: Array, negative: Array, *, margin: float) -> Array:
    """In how many pairs with `x_n > x_p - margin` each label is: int32 [b c].

    Args:
        x: logits [b c].
        positive, negative: bool [b c]; labels that are neither are in no pair.
        margin: of the pairs.
    """
    key = jnp.where(positive, x - margin, x)
    order = jnp.argsort(key, axis=-1)
    key = jnp.take_along_axis(key, order, axis=-1)
    positive = jnp.take_along_axis(positive, order, axis=-1)
    negative = jnp.take_along_axis(negative, order, axis=-1)

    # In sorted order, a positive pairs with the negatives above it, a negative with the positives
    # below it. Equal keys do not pair: they are counted at the ends of their run.
    changes = key[:, 1:] != key[:, :-1]
    edge = jnp.ones_like(key[:, :1], bool)
    first = jnp.concatenate([edge, changes], axis=-1)
    last = jnp.concatenate([changes, edge], axis=-1)
    negatives = jnp.cumsum(negative, axis=-1, dtype=jnp.int32)
    up_to = jax.lax.cummin(
        jnp.where(last, negatives, jnp.iinfo(jnp.int32).max), axis=1, reverse=True
    )
    positives = jnp.cumsum(positive, axis=-1, dtype=jnp.int32) - positive
    below = jax.lax.cummax(jnp.where(first, positives, 0), axis=1)
    counts = jnp.where(positive, negatives[:, -1:] - up_to, jnp.where(negative, below, 0))

    def put_back(order: Array, counts: Array) -> Array:
        return jnp.zeros_like(counts).at[order].set(counts, unique_indices=True)

    return jax.vmap(put_back)(order, counts)  # image by image, so that devices share them
