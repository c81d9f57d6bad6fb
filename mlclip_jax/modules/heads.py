"""Heads: image features and label features into logits."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from mlclip_jax.modules.prompts import normalize


def cosine_logits(image_features: Array, label_features: Array, scale: Array | float) -> Array:
    """`scale * cos(image, label)`: [b d], [c d] -> float32 [b c].

    Source: CLIP (Radford et al., 2021, Figure 3), where scale = exp(logit_scale).
    """
    v, t = normalize(image_features), normalize(label_features)
    return scale * jnp.einsum("bd,cd->bc", v, t)
