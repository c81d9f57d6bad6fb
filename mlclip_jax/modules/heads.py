"""Heads: image features and label features into logits."""

from __future__ import annotations

import functools

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
    return scale * products(normalize(image_features), normalize(label_features))


def pool_regions(
    regions: Array,
    attend: Array,
    read: Array,
    *,
    sharpness: Array | float,
    mask: Array | None = None,
) -> Array:
    """`sum_i softmax_i(sharpness cos(F_i, attend_c)) <F_i / |F_i|, read_c>`: float32 [b c].

    Args:
        regions: F, image tokens [b p d].
        attend: [c d], label features whose similarity weighs the regions of an image.
        read: [c d], what the weighted similarity is with; not normalised here.
        sharpness: of the softmax over regions, an inverse temperature.
        mask: bool [b p], False for regions that do not count.

    Source: Sun et al., NeurIPS 2022 (DualCoOp), class-specific region feature aggregation; Guo et
    al., CVPR 2023 (TaI-DPT), local scores; their released code.
    """
    f = normalize(regions)
    scores = sharpness * jnp.einsum("bpd,cd->bpc", f, normalize(attend), precision="highest")
    if mask is not None:
        scores = jnp.where(mask[..., None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=1)
    similarity = jnp.einsum("bpd,cd->bpc", f, read, precision="highest")
    return (weights * similarity).sum(1)


def top_patches(tokens: Array, label_features: Array, k: int) -> Array:
    """Mean of the k highest inner products of a label with the patches: float32 [b c].

    Args:
        tokens: patches [b p d].
        label_features: [c d].
        k: at most p.

    Source: He et al., AAAI 2023 (MKT), Eq. 3, second term, and its released code.
    """
    return top_mean(patch_products(tokens, label_features), k)


def products(image_features: Array, label_features: Array) -> Array:
    """Inner products of images with labels: [b d], [c d] -> float32 [b c]."""
    f32 = jnp.promote_types(label_features.dtype, jnp.float32)
    v, labels = image_features.astype(f32), label_features.astype(f32)
    # float32 in earnest: accelerators multiply float32 in fewer bits unless told otherwise.
    return jnp.einsum("bd,cd->bc", v, labels, precision="highest")


def patch_products(tokens: Array, label_features: Array) -> Array:
    """Inner products of labels with patches: [b p d], [c d] -> float32 [b c p]."""
    f32 = jnp.promote_types(label_features.dtype, jnp.float32)
    tokens, labels = tokens.astype(f32), label_features.astype(f32)
    return jnp.einsum("bpd,cd->bcp", tokens, labels, precision="highest")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def top_mean(x: Array, k: int) -> Array:
    """Mean of the k highest values along the last axis: float [... p] -> [...].

    Without sorting: devices that share the other axes share the work, where a top-k operation
    would gather everything on each. The gradient of values that tie at the limit is shared.

    Args:
        x: float32 or float64.
        k: between 1 and p.
    """
    return _top_mean(x, k)[0]


def _top_mean(x: Array, k: int) -> tuple[Array, tuple[Array, Array]]:
    limit = _kth_highest(x, k)
    above = ~(x <= limit[..., None])  # NaN too, which is not to be lost
    rest = (k - above.sum(-1)) * limit
    return (jnp.where(above, x, 0).sum(-1) + rest) / k, (x, limit)


def _top_mean_gradient(k: int, kept: tuple[Array, Array], upstream: Array) -> tuple[Array]:
    x, limit = kept
    above, at = x > limit[..., None], x == limit[..., None]
    share = (k - above.sum(-1, keepdims=True)) / at.sum(-1, keepdims=True)
    weights = jnp.where(above, 1, jnp.where(at, share, 0)).astype(x.dtype)
    return (upstream[..., None] * weights / k,)


top_mean.defvjp(_top_mean, _top_mean_gradient)


def _kth_highest(x: Array, k: int) -> Array:
    """The k-th highest value along the last axis, bit by bit from the highest: [... p] -> [...].

    Integers of the same bits, the lower ones of negative numbers turned, are ordered as floats are.
    """
    ints = {4: jnp.int32, 8: jnp.int64}[x.dtype.itemsize]
    low, high = jnp.iinfo(ints).min, jnp.iinfo(ints).max
    bits = jax.lax.bitcast_convert_type(x, ints)
    keys = jnp.where(bits < 0, bits ^ high, bits)

    def narrow(i: Array, found: Array) -> Array:
        """`found` with the next bit set, if still k keys are no lower."""
        more = found + (jnp.ones((), ints) << (8 * x.dtype.itemsize - 2 - i).astype(ints))
        return jnp.where((keys >= more[..., None]).sum(-1) >= k, more, found)

    found = jnp.where((keys >= 0).sum(-1) >= k, jnp.zeros((), ints), jnp.asarray(low, ints))
    found = jax.lax.fori_loop(0, 8 * x.dtype.itemsize - 1, narrow, found)
    return jax.lax.bitcast_convert_type(jnp.where(found < 0, found ^ high, found), x.dtype)


def normalize_over_labels(scores: Array, mask: Array) -> Array:
    """Scores of unit length over the labels of an image: [b c] -> float32 [b c].

    Args:
        scores: [b c].
        mask: bool [c], False for padded classes, which are no part of the length and get 0.

    Source: the release of MKT (He et al., AAAI 2023).
    """
    return normalize(jnp.where(mask, scores, 0))
