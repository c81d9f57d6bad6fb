"""CoCoOp, DualCoOp, TaI-DPT and zero-shot CLIP in the most literal form, as references in float64.

Written from the equations of the papers (CoCoOp: Zhou et al., CVPR 2022; DualCoOp: Sun et al.,
NeurIPS 2022; TaI-DPT: Guo et al., CVPR 2023) and sharing nothing with the package: one image and
one class at a time, prompts at their full length. Call under `jax.enable_x64(True)` with float64
arrays; gradients come from `jax.grad`. Targets and masks are concrete arrays; labels are +1
positive, 0 unobserved, -1 negative.

Sizes: b images, c classes, d joint width, w width of a tower, m context tokens, p cells of a
feature map (row by row), r regions, l tokens, h hidden units. A linear map is a kernel [in out]
with a bias [out]. `encode` is the text tower: input embeddings of prompts at full length [n 77 w],
positions not yet added, and the place of each EOT [n] give projected features [n d].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Encode = Callable[[Array, Array], Array]


def normalize(x: Array) -> Array:
    """Of unit length along the last axis."""
    return x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))


def softmax(x: Array) -> Array:
    """By its definition; in float64 the exponentials of all scores here are finite."""
    return jnp.exp(x) / jnp.sum(jnp.exp(x))


def positive_part(x: Array) -> Array:
    """max(0, x), with slope 0 at 0."""
    return jnp.where(x > 0, x, 0)


def linear(x: Array, kernel: Array, bias: Array) -> Array:
    """x [... in] through one affine map."""
    return x @ kernel + bias


# Zero-shot CLIP


def template_ensemble(features: Array) -> Array:
    """[k c d] of k templates -> [c d]: normalised, averaged, normalised again."""
    total = jnp.zeros_like(features[0])
    for of_template in features:
        total = total + normalize(of_template)
    return normalize(total / len(features))


def cosine_logits(image_features: Array, text: Array, scale: float | Array) -> Array:
    """[b d], [c d] -> [b c]: scaled cosines."""
    return scale * normalize(image_features) @ normalize(text).T


def dense_zero_shot(
    image_features: Array,
    cells: Array,
    value_kernel: Array,
    value_bias: Array,
    out_kernel: Array,
    out_bias: Array,
    text: Array,
    scale: float = 100.0,
) -> tuple[Array, Array, Array]:
    """Zero-shot scores of the image, of its cells, and their mean.

    Args:
        image_features: [b d], of the attention pool as usual.
        cells: [b p w], the last feature map.
        text: [c d].

    Returns:
        Global, local and merged logits, each [b c].
    """
    whole = cosine_logits(image_features, text, scale)
    local = []
    for image in cell_features(cells, value_kernel, value_bias, out_kernel, out_bias):
        row = []
        for label in text:
            score = scale * normalize(image) @ normalize(label)
            row.append(jnp.sum(softmax(score) * score))
        local.append(jnp.stack(row))
    local = jnp.stack(local)
    return whole, local, (whole + local) / 2


# Image features of a ResNet tower


def cell_features(
    cells: Array, value_kernel: Array, value_bias: Array, out_kernel: Array, out_bias: Array
) -> Array:
    """[b p w] -> [b p d]: value and output maps of the attention pool, no positions, no mean."""
    return linear(linear(cells, value_kernel, value_bias), out_kernel, out_bias)


def region_features_released(
    cells: Array,
    positions: Array,
    value_kernel: Array,
    value_bias: Array,
    out_kernel: Array,
    out_bias: Array,
) -> Array:
    """DualCoOp's regions: the mean and every cell, each with its position, without attention.

    Args:
        cells: [b p w], the last feature map.
        positions: [1+p w], of the mean and of every cell, already of the map's size.

    Returns:
        [b 1+p d], not normalised.
    """
    images = []
    for image in cells:
        tokens = [jnp.mean(image, axis=0), *image]
        regions = []
        for token, position in zip(tokens, positions, strict=True):
            value = linear(token + position, value_kernel, value_bias)
            regions.append(linear(value, out_kernel, out_bias))
        images.append(jnp.stack(regions))
    return jnp.stack(images)


def attention_pool(
    cells: Array,
    positions: Array | None,
    query_kernel: Array,
    query_bias: Array,
    key_kernel: Array,
    key_bias: Array,
    value_kernel: Array,
    value_bias: Array,
    out_kernel: Array,
    out_bias: Array,
    heads: int,
) -> Array:
    """CLIP's attention pool: the mean asks the mean and all cells.

    Args:
        cells: [b p w], the last feature map.
        positions: [1+p w], or None to leave them out (TaI-DPT's test on images).

    Returns:
        [b d], not normalised.
    """
    images = []
    for image in cells:
        tokens = jnp.concatenate([jnp.mean(image, axis=0)[None], image])
        if positions is not None:
            tokens = tokens + positions
        query = linear(tokens[0], query_kernel, query_bias)
        keys = linear(tokens, key_kernel, key_bias)
        values = linear(tokens, value_kernel, value_bias)
        size = query.shape[0] // heads
        read = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            weights = softmax(keys[:, part] @ query[part] / math.sqrt(size))
            read.append(weights @ values[:, part])
        images.append(linear(jnp.concatenate(read), out_kernel, out_bias))
    return jnp.stack(images)


# Prompts: [SOS][context][name "." EOT, padding]


def full_prompts(sos: Array, context: Array, suffix: Array) -> Array:
    """sos [w], context [m w] or [c m w], suffix [c 76-m w] -> [c 77 w]."""
    prompts = []
    for label, end in enumerate(suffix):
        own = context[label] if context.ndim == 3 else context
        prompts.append(jnp.concatenate([sos[None], own, end]))
    return jnp.stack(prompts)


def class_texts(sos: Array, context: Array, suffix: Array, eot: Array, encode: Encode) -> Array:
    """[c d], not normalised: the text of every class under one context, or under its own."""
    return encode(full_prompts(sos, context, suffix), eot)


# CoCoOp


def meta_net(
    image_feature: Array, kernel1: Array, bias1: Array, kernel2: Array, bias2: Array
) -> Array:
    """[d] -> [w]: the shift of the context under one image."""
    hidden = positive_part(linear(normalize(image_feature), kernel1, bias1))
    return linear(hidden, kernel2, bias2)


def cocoop_logits(
    image_features: Array,
    context: Array,
    kernel1: Array,
    bias1: Array,
    kernel2: Array,
    bias2: Array,
    sos: Array,
    suffix: Array,
    eot: Array,
    scale: float | Array,
    encode: Encode,
) -> Array:
    """Logits of every image under prompts of its own.

    Args:
        image_features: [b d], projected; normalised here.
        context: [m w], shifted as a whole by the image.
        kernel1: [d h], with bias1 [h], kernel2 [h w] and bias2 [w].
        sos: [w].
        suffix: [c 76-m w], name, ".", EOT and padding.
        eot: [c], in the full prompt.
        scale: The factor on the cosine, exp(logit_scale).

    Returns:
        [b c].
    """
    logits = []
    for feature in image_features:
        shift = meta_net(feature, kernel1, bias1, kernel2, bias2)
        shifted = jnp.stack([token + shift for token in context])
        text = class_texts(sos, shifted, suffix, eot, encode)
        logits.append(jnp.stack([scale * normalize(feature) @ normalize(t) for t in text]))
    return jnp.stack(logits)


# DualCoOp


def dual_coop_scores(
    regions: Array,
    positive: Array,
    negative: Array,
    *,
    sharpness: float = 20.0,
    scale: float = 5.0,
) -> tuple[Array, Array]:
    """Scores of the positive and the negative prompts, read where the positive prompt looks.

    Args:
        regions: [b r d].
        positive: [c d].
        negative: [c d].
        sharpness: On the cosines, before the softmax over regions.
        scale: On the weighted sums.

    Returns:
        x_plus and x_minus, both [b c].
    """
    x_plus, x_minus = [], []
    for image in regions:
        row_plus, row_minus = [], []
        for plus, minus in zip(positive, negative, strict=True):
            s_plus = sharpness * normalize(image) @ normalize(plus)
            s_minus = sharpness * normalize(image) @ normalize(minus)
            weights = softmax(s_plus)
            row_plus.append(scale * jnp.sum(weights * s_plus))
            row_minus.append(scale * jnp.sum(weights * s_minus))
        x_plus.append(jnp.stack(row_plus))
        x_minus.append(jnp.stack(row_minus))
    return jnp.stack(x_plus), jnp.stack(x_minus)


def dual_coop_probability(x_plus: Array, x_minus: Array) -> Array:
    """[b c]: the positive prompt's share in the softmax over the two."""
    return jnp.exp(x_plus) / (jnp.exp(x_plus) + jnp.exp(x_minus))


def dual_coop_loss_elements(
    logits: Array,
    targets: np.ndarray,
    *,
    gamma_positive: float = 1.0,
    gamma_negative: float = 2.0,
    clip: float = 0.05,
    eps: float = 1e-6,
) -> Array:
    """[b c]: the asymmetric loss of every label, 0 where it is unobserved.

    Args:
        logits: [b c], x_plus - x_minus.
        targets: [b c], +1, 0, -1.
    """
    rows = []
    for image, labels in zip(logits, np.asarray(targets), strict=True):
        row = []
        for x, label in zip(image, labels, strict=True):
            p = 1 / (1 + jnp.exp(-x))
            q = jnp.minimum(1 - p + clip, 1)
            if label == 1:
                weight = jax.lax.stop_gradient((1 - p) ** gamma_positive)
                row.append(-weight * jnp.log(jnp.maximum(p, eps)))
            elif label == -1:
                weight = jax.lax.stop_gradient((1 - q) ** gamma_negative)
                row.append(-weight * jnp.log(jnp.maximum(q, eps)))
            else:
                row.append(jnp.zeros_like(x))
        rows.append(jnp.stack(row))
    return jnp.stack(rows)


def dual_coop_loss(logits: Array, targets: np.ndarray, **settings: float) -> Array:
    """The sum of the elements, before any weight of the whole loss."""
    return jnp.sum(dual_coop_loss_elements(logits, targets, **settings))


# TaI-DPT


def tai_scores(
    global_features: Array,
    token_features: Array,
    mask: np.ndarray,
    global_prompts: Array,
    local_prompts: Array,
    kappa: float,
    scale: float = 4.0,
) -> tuple[Array, Array]:
    """Scores of a caption, or of an image, as a whole and through its tokens.

    Args:
        global_features: [b d], of the EOT (caption) or of the pool without positions (image).
        token_features: [b l d], of all tokens (caption) or of the cells (image).
        mask: [b l], true for tokens that are there.
        global_prompts: [c d].
        local_prompts: [c d].
        kappa: On the cosines, before the softmax over tokens.
        scale: On the cosines and on their weighted sums.

    Returns:
        Global and local logits, both [b c].
    """
    local = []
    for tokens, there in zip(token_features, np.asarray(mask, bool), strict=True):
        kept = normalize(tokens[np.flatnonzero(there)])
        row = []
        for prompt in local_prompts:
            cosine = kept @ normalize(prompt)
            row.append(scale * jnp.sum(softmax(kappa * cosine) * cosine))
        local.append(jnp.stack(row))
    return cosine_logits(global_features, global_prompts, scale), jnp.stack(local)


def tai_merged(x_global: Array, x_local: Array) -> Array:
    """[b c]: half of each."""
    return x_global / 2 + x_local / 2


def ranking_loss(logits: Array, targets: np.ndarray, margin: float = 1.0) -> Array:
    """Hinge over all pairs of a positive (+1) and a negative (-1) label, mean over images."""
    total = 0.0
    for x, labels in zip(logits, np.asarray(targets), strict=True):
        for i in np.flatnonzero(labels == 1):
            for j in np.flatnonzero(labels == -1):
                total = total + positive_part(margin - x[i] + x[j])
    return total / len(logits)


def tai_loss(x_global: Array, x_local: Array, targets: np.ndarray) -> Array:
    """Ranking of the global and of the local logits, added."""
    return ranking_loss(x_global, targets) + ranking_loss(x_local, targets)


# The schedule the three share


def dassl_rate(epoch: int, lr: float, epochs: int) -> float:
    """Learning rate of an epoch from 0: one epoch at 1e-5, then a cosine that starts at `lr`."""
    if epoch == 0:
        return 1e-5
    return lr / 2 * (1 + math.cos(math.pi * (epoch - 1) / epochs))
