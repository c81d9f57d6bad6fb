"""Losses for labels that are partly missing: unobserved entries may be positives.

Here z stands for an observed positive, u for an unobserved entry (target 0), bce+ for
`-log sigmoid(x)` and bce- for `-log sigmoid(-x)`. A target of -1 is a known negative: it costs what
the loss takes for a negative (bce- in most), and is never corrected or weighted down as missing;
`hill`, and `label_smoothing` by default, treat 0 the same. Plain assume-negative training is
`binary_cross_entropy`.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from mlclip_jax.losses.common import (
    Progress,
    Reduction,
    focal_weight,
    prepare,
    reduce,
    softplus,
    towards,
)


def weak_assume_negative(
    logits: Array,
    targets: Array,
    *,
    where: Array | None = None,
    reduction: Reduction = "mean",
) -> Array:
    """WAN: `z bce+ + u bce- / (c - 1)`, one positive weighs like all assumed negatives together.

    Args:
        logits: [b c].
        targets: int8 [b c]; 0 is a negative of weight 1 / (c - 1), -1 one of weight 1.
        where: mask that broadcasts to [b c]; c is the number of classes of the image that count.
        reduction: over the entries that count.

    Source: Cole et al., CVPR 2021. Deviation: stable logs in place of log(p + 1e-5).
    """
    x, targets, where = prepare(logits, targets, where)
    weak = 1 / jnp.maximum(where.sum(-1, keepdims=True) - 1, 1)
    loss = softplus(-towards(targets > 0, x)) * jnp.where(targets == 0, weak, 1)
    return reduce(loss, where, reduction)


def label_smoothing(
    logits: Array,
    targets: Array,
    *,
    where: Array | None = None,
    smoothing: float = 0.1,
    unobserved_only: bool = False,
    reduction: Reduction = "mean",
) -> Array:
    """BCE where each target gives a share to the other answer.

    Positives `(1 - smoothing) bce+ + smoothing bce-`, the rest the other way round.

    Args:
        logits: [b c].
        targets: int8 [b c]; 0 counts as negative.
        where: mask that broadcasts to [b c].
        smoothing: share of the other answer; papers that print `smoothing / 2` mean half of it.
        unobserved_only: smooth assumed negatives only (N-LS); observed labels stay hard.
        reduction: over the entries that count.

    Source: Cole et al., CVPR 2021 (AN-LS). Deviation: stable logs in place of log(p + 1e-5).
    """
    x, targets, where = prepare(logits, targets, where)
    right = towards(targets > 0, x)
    share = jnp.where((targets == 0) | (not unobserved_only), smoothing, 0)
    return reduce((1 - share) * softplus(-right) + share * softplus(right), where, reduction)


def entropy_maximization(
    logits: Array,
    targets: Array,
    *,
    where: Array | None = None,
    alpha: float = 0.1,
    reduction: Reduction = "mean",
) -> Array:
    """EM: `z bce+ - u alpha H(p)`, H(p) = -p log p - (1 - p) log(1 - p).

    Unobserved entries are neither positive nor negative; their uncertainty is rewarded. The
    gradient of their term, `alpha x p (1 - p)`, is 0 at x = 0 and far from it.

    Args:
        logits: [b c].
        targets: int8 [b c]; 0 is unknown, -1 costs bce-.
        where: mask that broadcasts to [b c].
        alpha: weight of the entropy (VOC 0.2, COCO and NUS 0.1, CUB 0.01 in the release).
        reduction: over the entries that count.

    Source: Zhou et al., ECCV 2022 ("Acknowledging the unknown"). Deviations: stable logs in place
    of log(p + 1e-5); its asymmetric pseudo-labels need targets that persist and are not offered.
    """
    x, targets, where = prepare(logits, targets, where)
    size = jnp.abs(x)
    entropy = softplus(-size) + size * jax.nn.sigmoid(-size)
    known = softplus(-towards(targets > 0, x))
    return reduce(jnp.where(targets == 0, -alpha * entropy, known), where, reduction)


def expected_positives(
    logits: Array,
    targets: Array,
    *,
    expected: float,
    where: Array | None = None,
) -> Array:
    """EPR: `mean(z bce+) + ((mean_b sum_c p - expected) / c)^2`.

    The mean number of positives that is predicted for an image is pulled to the expected one.

    Args:
        logits: [b c].
        targets: int8 [b c]; 0 enters through the count alone, -1 costs bce-.
        expected: positives of an average image (VOC 1.5, COCO 2.9, NUS 1.9, CUB 31.4).
        where: mask that broadcasts to [b c]; c is the mean number of classes that count.

    Source: Cole et al., CVPR 2021, reduced as in the release. Deviation: stable logs.
    """
    x, targets, where = prepare(logits, targets, where)
    known = softplus(-towards(targets > 0, x))
    images = jnp.maximum(where.any(-1).sum(), 1)
    classes = jnp.maximum(where.sum() / images, 1)
    predicted = jnp.where(where, jax.nn.sigmoid(x), 0).sum() / images
    gap = jnp.where(where.any(), (predicted - expected) / classes, 0)
    return reduce(jnp.where(targets == 0, 0, known), where, "mean") + gap**2


def partial_binary_cross_entropy(
    logits: Array,
    targets: Array,
    *,
    where: Array | None = None,
    alpha: float = -4.45,
    beta: float = 5.45,
    gamma: float = 1.0,
) -> Array:
    """BCE of known labels, normalised by how many of them an image has.

    With r the known share of an image's c labels: `g(r) / c * sum_known bce`,
    g(r) = alpha r^gamma + beta; mean over images. alpha=1, beta=0, gamma=-1 is the mean over known
    labels; with all labels known and the default, plain BCE.

    Args:
        logits: [b c].
        targets: int8 [b c]; 0 is unknown and takes no part.
        where: mask that broadcasts to [b c]; c is the number of classes of the image that count.
        alpha, beta, gamma: of g; the default has g(0.1) = 5 and g(1) = 1.

    Source: Durand et al., CVPR 2019. An image without known labels costs 0 and counts.
    """
    x, targets, where = prepare(logits, targets, where)
    known = (targets != 0).sum(-1, keepdims=True)
    classes = jnp.maximum(where.sum(-1, keepdims=True), 1)
    share = jnp.maximum(known, 1).astype(x.dtype) / classes
    weight = (alpha * share**gamma + beta) / classes
    loss = jnp.where(targets == 0, 0, softplus(-towards(targets > 0, x)))
    return reduce(loss * weight, where, "sum_classes_mean_images")


def hill(
    logits: Array,
    targets: Array,
    *,
    where: Array | None = None,
    scale: float = 1.5,
    margin: float = 1.0,
    gamma: float = 2.0,
    reduction: Reduction = "sum",
) -> Array:
    """Hill loss: a negative that scores high is trusted less, because it may be missing.

    With p = sigmoid(x), p_m = sigmoid(x - margin): positives `-(1 - p_m)^gamma log p_m`, others
    `(scale - p) p^2`, whose gradient vanishes again as p nears 1.

    Args:
        logits: [b c].
        targets: int8 [b c]; 0 counts as negative, and so does -1.
        where: mask that broadcasts to [b c].
        scale: "lambda" in the paper.
        margin: subtracted from the logits of positives.
        gamma: focusing exponent of positives.
        reduction: over the entries that count; the release sums.

    Source: Zhang et al., 2021 ("Simple and robust loss design"), and its release.
    """
    x, targets, where = prepare(logits, targets, where)
    p = jax.nn.sigmoid(x)
    shifted = x - margin
    loss = jnp.where(
        targets > 0, softplus(-shifted) * focal_weight(shifted, gamma), (scale - p) * p**2
    )
    return reduce(loss, where, reduction)


def splc(
    logits: Array,
    targets: Array,
    *,
    progress: Progress,
    where: Array | None = None,
    threshold: float = 0.6,
    change_epoch: int = 1,
    margin: float = 1.0,
    gamma: float = 2.0,
    reduction: Reduction = "sum",
) -> Array:
    """SPLC: self-paced correction of missing labels, over a focal loss with margin.

    With x_m = x - margin for observed positives and x elsewhere, from epoch `change_epoch` on an
    unobserved label with sigmoid(x_m) > threshold counts as positive. Then, with p of x_m:
    positives `-(1 - p)^gamma log p`, others `-p^gamma log(1 - p)`.

    Args:
        logits: [b c].
        targets: int8 [b c]; 0 is negative until corrected, -1 is never corrected.
        progress: its epoch is read.
        where: mask that broadcasts to [b c].
        threshold: "tau" in the release.
        change_epoch: first epoch, from 0, in which labels are corrected.
        margin: subtracted from the logits of observed positives.
        gamma: focusing exponent.
        reduction: over the entries that count; the release sums.

    Source: Zhang et al., 2021 ("Simple and robust loss design"); defaults of HSPNet's release.
    """
    x, targets, where = prepare(logits, targets, where)
    x = jnp.where(targets > 0, x - margin, x)
    found = (targets == 0) & (jax.nn.sigmoid(x) > threshold)
    positive = (targets > 0) | (found & (jnp.asarray(progress.epoch) >= change_epoch))
    right = towards(positive, x)
    return reduce(softplus(-right) * focal_weight(right, gamma), where, reduction)


def large_loss(
    logits: Array,
    targets: Array,
    *,
    progress: Progress,
    where: Array | None = None,
    mode: Literal["reject", "correct"] = "reject",
    rate_per_epoch: float = 0.002,
    reduction: Reduction = "mean",
) -> Array:
    """LargeLoss: assumed negatives with the largest losses of the batch are taken for missing.

    In epoch e, from 0, of the n entries of the batch the k = ceil(n e rate_per_epoch) largest
    losses of unobserved ones set a threshold; entries at or above it cost 0 ("reject", LL-R) or
    bce+ ("correct", LL-Ct: for this step only). All else is assume-negative BCE.

    Args:
        logits: [b c].
        targets: int8 [b c]; 0 is a negative that may be modified, -1 one that may not.
        progress: its epoch is read.
        where: mask that broadcasts to [b c]; n is the number of entries that count.
        mode: what happens to modified entries.
        rate_per_epoch: growth of the share of the batch that is modified (0.002 = 0.2 %).
        reduction: over the entries that count, rejected ones included.

    Source: Kim et al., CVPR 2022. Deviations: the permanent correction (LL-Cp) needs
    targets that persist and is not offered; if fewer than k losses are above 0, all of them are
    modified and no others.
    """
    if mode not in ("reject", "correct"):
        raise ValueError(f"unknown mode {mode!r}: reject, correct")
    x, targets, where = prepare(logits, targets, where)
    loss = softplus(-towards(targets > 0, x))
    unobserved = (targets == 0) & where
    candidates = jax.lax.stop_gradient(jnp.where(unobserved, loss, 0))
    share = jnp.asarray(progress.epoch, x.dtype) * rate_per_epoch
    # A hair less than the product, so that rounding never lifts it over a whole number.
    count = jnp.ceil(where.sum() * jnp.minimum(share, 1) * (1 - 1e-6)).astype(jnp.int32)
    largest = (candidates >= kth_largest(candidates, count)) & (candidates > 0) & (count > 0)
    return reduce(
        jnp.where(largest, 0 if mode == "reject" else softplus(-x), loss), where, reduction
    )


def kth_largest(values: Array, k: Array) -> Array:
    """The k-th largest of non-negative floats, k >= 1 a traced int32 scalar.

    The bits of a non-negative float are ordered as it is; the answer's are found one after
    another by counting. Exact, without a sort, and over a batch that is split over devices only
    counts travel.
    """
    bits = jnp.finfo(values.dtype).bits
    integer = jnp.dtype(f"int{bits}")
    ordered = jax.lax.bitcast_convert_type(values, integer)

    def add_bit(i: Array, found: Array) -> Array:
        candidate = found | (jnp.ones((), integer) << (bits - 2 - i).astype(integer))
        return jnp.where((ordered >= candidate).sum() >= k, candidate, found)

    found = jax.lax.fori_loop(0, bits - 1, add_bit, jnp.zeros((), integer))
    return jax.lax.bitcast_convert_type(found, values.dtype)
