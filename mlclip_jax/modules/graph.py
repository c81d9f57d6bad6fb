"""Graphs over labels or groups, and the graph convolution that refines their features.

Source: Wang et al., ACM MM 2023 (HSPNet), section 3.2, Eqs. 5-9.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mlclip_jax.modules.heads import normalize

Variant = Literal["released", "paper"]

#: Share of each row that is kept, and weight of the neighbours together (release; paper: not said).
KEPT, NEIGHBOURS = 0.75, 0.2


def relation(features: Array) -> Array:
    """Cosine similarities (Eq. 5): [n d] -> float32 [n n]."""
    unit = normalize(features)
    return jnp.einsum("id,jd->ij", unit, unit, precision="highest")


def dependency_graph(
    similarity: Array, *, kept: float = KEPT, neighbours: float = NEIGHBOURS
) -> Array:
    """Top-K of each row, re-weighted (Eqs. 6-7): [n n] -> [n n], rows sum to 1.

    Row i says what node i takes from node j. As in the release, K = int(kept * n) entries are
    kept and the diagonal competes for one of the places.

    Args:
        similarity: of all pairs.
        kept: share of each row that is kept.
        neighbours: r, the weight of all neighbours together; 1 - r stays with the node itself. A
            node without kept neighbours keeps all (Eq. 7 would divide by 0). CLIP's similarities
            of names are positive; negative ones are weighted as Eq. 7 is written.
    """
    n = similarity.shape[0]
    own = jnp.eye(n, dtype=bool)
    _, top = jax.lax.top_k(similarity, int(kept * n))
    chosen = jnp.zeros((n, n), bool).at[jnp.arange(n)[:, None], top].set(True)
    others = jnp.where(chosen & ~own, similarity, 0)
    total = others.sum(-1, keepdims=True)
    alone = total == 0
    share = jnp.where(alone, 0, neighbours / jnp.where(alone, 1, total))
    return others * share + own * jnp.where(alone, 1, 1 - neighbours)


def pad_graph(graph: Array, nodes: int) -> Array:
    """`graph` [n n] with further nodes that neither give nor take: [nodes nodes]."""
    n = graph.shape[0]
    more = nodes - n
    return jnp.pad(graph, ((0, more), (0, more))) + jnp.diag((jnp.arange(nodes) >= n) * 1.0)


class GCN(nnx.Module):
    """Three graph convolutions d -> 2d -> 2d -> d and a residual (Eqs. 8-9).

    released: LeakyReLU(0.2) after the first two; `gamma * H_L + (1 - gamma) * H_0`, gamma learned
        from 0.9 on.
    paper: LeakyReLU(0.2) after each; `H_0 + H_L`.

    Kernels [i o] start uniform in +-1/sqrt(o), as the release's do.
    """

    def __init__(self, width: int, *, variant: Variant, rngs: nnx.Rngs) -> None:
        sizes = (width, 2 * width, 2 * width, width)
        self.kernels = nnx.List(
            nnx.Param(_uniform(rngs.params(), (i, o), o**-0.5)) for i, o in pairwise(sizes)
        )
        self.variant = variant
        if variant == "released":
            self.gamma = nnx.Param(jnp.asarray(0.9, jnp.float32))

    def __call__(self, features: Array, graph: Array) -> Array:
        """Refined features in float32 whatever their type: [n d], [n n] -> [n d]."""
        features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        h, last = features, len(self.kernels) - 1
        for layer, kernel in enumerate(self.kernels):
            h = jnp.matmul(h, kernel[...], precision="highest")
            h = jnp.matmul(graph, h, precision="highest")
            if layer < last or self.variant == "paper":
                h = jax.nn.leaky_relu(h, 0.2)
        if self.variant == "paper":
            return features + h
        gamma = self.gamma[...]
        return gamma * h + (1 - gamma) * features


def _uniform(key: Array, shape: tuple[int, ...], bound: float) -> Array:
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
