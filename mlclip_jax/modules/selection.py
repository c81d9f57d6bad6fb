"""Selective language supervision: a step sees its positive labels and a draw of the others.

With P the labels that are positive in the batch and c in all, a step takes P and
min(ratio |P|, c - |P|) of the others at random. Shapes stay the same from step to step: there are
so many places, of which a step may leave some empty.

Source: Xu et al., 2023 (ADDS), Eq. 6.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def select_labels(
    targets: Array, mask: Array, places: int, ratio: float, key: Array
) -> tuple[Array, Array, Array]:
    """Draws the labels of a step, the same whatever the devices and the padding.

    Args:
        targets: int8 [b c], +1 positive, of the whole batch.
        mask: bool [c], False for classes that only pad.
        places: k, at most c.
        ratio: negatives for each positive, alpha.
        key: of the random numbers.

    Returns:
        Rows of the labels int32 [k], positives first; which of them are taken bool [k]; the number
        of positives that found no place, int32.
    """
    positive = (targets > 0).any(0) & mask
    count = positive.sum()
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(mask)))
    order = jax.vmap(jax.random.uniform)(keys)
    order = jnp.where(positive, order - 1, jnp.where(mask, order, 2))
    _, rows = jax.lax.top_k(-order, places)
    wanted = count + jnp.minimum(jnp.floor(ratio * count).astype(count.dtype), mask.sum() - count)
    return rows, jnp.arange(places) < wanted, jnp.maximum(count - places, 0)
