"""LMPT's losses in the most literal form, as references in float64.

Written from Xia et al., 2024 (Eqs. 3-7 and 11) and from what is on record of its release, one
image and one class at a time, sharing nothing with the package. Conventions and sizes are those of
`references.prompt_methods`; call under `jax.enable_x64(True)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from references.prompt_methods import normalize, positive_part


def sentence_distance(caption: Array, prompt: Array) -> Array:
    """1 - cosine of two text features [d]."""
    return 1 - jnp.sum(normalize(caption) * normalize(prompt))


def token_distance(caption: Array, prompt: Array, m: int) -> Array:
    """Caption token t against prompt token t + m, 1 - cosine added up: both [l w]."""
    pairs = normalize(caption[: len(caption) - m]) * normalize(prompt[m:])
    return len(pairs) - jnp.sum(pairs)


def margins(counts: Sequence[float], eta: float) -> list[float]:
    """Eq. 4: the rarer the class, the wider."""
    return [eta / n**0.25 for n in counts]


def weights(counts: Sequence[float], gamma: float) -> list[float]:
    """Eq. 5: the rarer the class, the heavier; they add up to 1."""
    return [(1 / n) ** gamma / sum((1 / k) ** gamma for k in counts) for n in counts]


def embedding_loss(
    distances: Array,
    targets: np.ndarray,
    margin: Sequence[float],
    weight: Sequence[float],
    described: Sequence[bool],
) -> Array:
    """Eqs. 6-7: [b c] distances and targets -> summed over classes, mean over described images."""
    total = 0.0
    for k in np.flatnonzero(described):
        for i in range(len(margin)):
            near, far = distances[k, i], positive_part(margin[i] - distances[k, i])
            total = total + weight[i] * (near if targets[k, i] == 1 else far)
    return total / sum(described)


def embedding_loss_released(
    distances: Array,
    targets: np.ndarray,
    margin: Sequence[float],
    weight: Sequence[float],
    described: Sequence[bool],
) -> Array:
    """The release's sign: positives away, others in; mean over described images and classes."""
    total = 0.0
    for k in np.flatnonzero(described):
        for i in range(len(margin)):
            sign = 1 if targets[k, i] == 1 else -1
            total = total + weight[i] * positive_part(margin[i] - sign * distances[k, i])
    return total / (sum(described) * len(margin))


def total_loss(classification: Array, embedding: Array, share: float) -> Array:
    """Eq. 11 as the release has it."""
    return share * classification + (1 - share) * embedding
