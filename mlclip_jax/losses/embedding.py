"""Losses on features rather than logits: class-specific embedding (LMPT) and distillation.

They are called by the methods that have such features and are not found by name in a config.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from mlclip_jax.losses.common import Reduction, as_float32, prepare, reduce


def l1_distillation(
    student: Array,
    teacher: Array,
    *,
    where: Array | None = None,
    features: Literal["mean", "sum"] = "mean",
) -> Array:
    """`|student - teacher|`, mean or sum over features, mean over images.

    Args:
        student: [b d].
        teacher: [b d]; gets no gradient.
        where: bool [b], False for padded images.
        features: "mean" as MKT's release, "sum" (the L1 norm) as its paper: d times as much.

    Source: He et al., AAAI 2023 (MKT), Eq. 5.
    """
    if features not in ("mean", "sum") or student.shape != teacher.shape or student.ndim != 2:
        raise ValueError(
            f"features={features!r} (mean or sum) of student {list(student.shape)} and teacher "
            f"{list(teacher.shape)}, both [b d]"
        )
    where = jnp.ones(student.shape[:1], bool) if where is None else where
    gap = as_float32(student) - jax.lax.stop_gradient(as_float32(teacher))
    gap = jnp.abs(jnp.where(where[:, None], gap, 0))
    per_image = gap.mean(-1) if features == "mean" else gap.sum(-1)
    return per_image.sum() / jnp.maximum(where.sum(), 1)


def _unit(x: Array) -> Array:
    """Vectors of length 1 along the last axis; zero stays zero, with a finite gradient."""
    x = as_float32(x)
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-16))


def embedding_distances(captions: Array, prompts: Array) -> Array:
    """`1 - cosine` of each caption and each class's prompt: [b c].

    Args:
        captions: text features of the images' captions [b d].
        prompts: text features of the classes' prompts [c d].

    Source: Xia et al., 2024 (LMPT), Sec. 3.2.
    """
    return 1 - jnp.matmul(_unit(captions), _unit(prompts).T, precision="highest")


def token_distances(captions: Array, prompts: Array, *, offset: int) -> Array:
    """`sum_t (1 - cosine)` of caption token t and prompt token t + offset: [b c].

    Args:
        captions: token embeddings of the captions [b t d].
        prompts: token embeddings of the prompts [c t d], the first `offset` of which are left out.
        offset: m of the paper; as many of the captions' last tokens are left out.

    Source: the release of LMPT, which compares input embeddings position by position, padding
    included. No [b c t] array is built.
    """
    captions = _unit(captions[:, : captions.shape[1] - offset])
    prompts = _unit(prompts[:, offset:])
    return captions.shape[1] - jnp.einsum("btd,ctd->bc", captions, prompts, precision="highest")


def _margin_and_weight(
    class_counts: Array | None, where: Array, *, margin: float, gamma: float, dtype: jnp.dtype
) -> tuple[Array, Array]:
    """`margin / n_c^(1/4)` and `n_c^-gamma / sum n^-gamma` over the classes that count, [c].

    Without counts both factors are 1: the weights then add up to c, not to 1.
    """
    if class_counts is None:
        one = jnp.ones(where.shape[1:], dtype)
        return margin * one, one
    counts = jnp.maximum(jnp.asarray(class_counts, dtype), 1)
    inverse = jnp.where(where.any(0), counts**-gamma, 0)
    total = inverse.sum()
    return margin / counts**0.25, inverse / jnp.where(total > 0, total, 1)


def class_specific_embedding(
    distances: Array,
    targets: Array,
    *,
    class_counts: Array | None = None,
    where: Array | None = None,
    margin: float = 1.0,
    gamma: float = 1.0,
    reweight: bool = True,
    reduction: Reduction = "sum_classes_mean_images",
) -> Array:
    """CSE loss of LMPT: captions near the prompts of their classes, away from others.

    Positives `w_c D`, others `w_c max(0, margin / n_c^(1/4) - D)`, with the weights
    w_c = n_c^-gamma / sum n^-gamma.

    Args:
        distances: D, [b c], from `embedding_distances` (or `token_distances`).
        targets: int8 [b c]; 0 counts as negative.
        class_counts: n_c [c]; without them margins and weights are the same for all (Eq. 3).
        where: mask that broadcasts to [b c].
        margin: "eta" in the paper, of a class with one image.
        gamma: exponent of the weights.
        reweight: False leaves the weights out (Eq. 4 alone).
        reduction: over the entries that count; the default is Eq. 7.

    Source: Xia et al., 2024 (LMPT), Eqs. 3-7. Deviations: the release has the opposite sign, see
    `class_specific_embedding_released`; its margins and weights come from the softmax of the
    counts, which is 0 for nearly every class.
    """
    distances, targets, where = prepare(distances, targets, where)
    margins, weight = _margin_and_weight(
        class_counts, where, margin=margin, gamma=gamma, dtype=distances.dtype
    )
    loss = jnp.where(targets > 0, distances, jax.nn.relu(margins - distances))
    return reduce(loss * weight if reweight else loss, where, reduction)


def class_specific_embedding_released(
    distances: Array,
    targets: Array,
    *,
    class_counts: Array | None = None,
    where: Array | None = None,
    margin: float = 0.2,
    gamma: float = 2.0,
    reduction: Reduction = "mean",
) -> Array:
    """CSE loss with the sign of LMPT's release: `w_c max(0, margin / n_c^(1/4) - y D)`, y = +-1.

    Positives are pushed away until they are `margin` apart, negatives drawn in: what the released
    code computes, not what the paper wants. Kept for comparison.

    Args:
        distances: D, [b c], from `token_distances`.
        targets: int8 [b c]; 0 counts as negative.
        class_counts: n_c [c]; without them margins and weights are the same for all.
        where: mask that broadcasts to [b c].
        margin, gamma: as the release's defaults.
        reduction: over the entries that count.

    Source: the release of LMPT. Deviation: its weights are normalised along an axis that does not
    exist, which stops it; here it is that of the classes.
    """
    distances, targets, where = prepare(distances, targets, where)
    margins, weight = _margin_and_weight(
        class_counts, where, margin=margin, gamma=gamma, dtype=distances.dtype
    )
    sign = jnp.where(targets > 0, 1, -1)
    return reduce(weight * jax.nn.relu(margins - sign * distances), where, reduction)
