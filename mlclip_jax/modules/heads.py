"""Heads: image features and label features into logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def normalize(x: Array) -> Array:
    """Unit length along the last axis, in float32; a zero vector stays zero."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.square(x).sum(-1, keepdims=True)
    return x * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def cosine_logits(image_features: Array, label_features: Array, scale: Array | float) -> Array:
    """`scale * cos(image, label)`: [b d], [c d] -> float32 [b c].

    Source: CLIP (Radford et al., 2021, Figure 3), where scale = exp(logit_scale).
    """
    v, t = normalize(image_features), normalize(label_features)
    # float32 in earnest: accelerators multiply float32 in fewer bits unless told otherwise.
    return scale * jnp.einsum("bd,cd->bc", v, t, precision="highest")
