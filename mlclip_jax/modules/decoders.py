"""Decoders: labels ask an image's tokens, and their answers become logits.

All take queries [1|b c d] (one set for all images, or one for each), tokens [b n d] and the mask of
padded classes [c], and give answers [b c d]. Norms follow the sums; parameters start as torch's do.

- `DualModalDecoder`, of ADDS (Xu et al., 2023, Eq. 5): tokens are refined by what labels found.
- `MLDecoder` (Ridnik et al., WACV 2023, and its released code): no label sees another.
- `StandardDecoder`, of Query2Label (Liu et al., 2021, and its released code): answers start at
  zero, and queries are added wherever answers attend.

Deviation from the released code: attention weights are not dropped out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mlclip_jax.clip.transformer import (
    LayerNorm,
    Linear,
    dot_product_attention,
    start_as_torch,
)
from mlclip_jax.errors import UserError

_EPS = 1e-5  # of the norms, torch's default
#: Filled with the mean attention of each label over the heads, float32 [b c n], layer by layer.
Watch = list[Array]


def torch_linear(inputs: int, outputs: int, *, rngs: nnx.Rngs) -> Linear:
    """A linear layer that starts as torch's: [... inputs] -> [... outputs]."""
    return start_as_torch(Linear(inputs, outputs, rngs=rngs), rngs)


def start_as_xavier(layer: Linear, rngs: nnx.Rngs) -> None:
    """Kernel uniform in +-sqrt(6 / (inputs + outputs)); the bias stays as it is."""
    shape = layer.kernel.shape
    bound = math.sqrt(6 / sum(shape))
    layer.kernel[...] = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)


def dropout(x: Array, rate: float, key: Array | None, number: int) -> Array:
    """`x` with a share `rate` of its values zero and the others scaled up; all without a key.

    Args:
        x: [b c d]; what each of the c draws does not depend on how many there are.
        rate: between 0 and 1.
        key: of the step's random numbers; None outside training.
        number: tells the places of a model apart.
    """
    if key is None or rate == 0:
        return x
    b, c, d = x.shape
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, number), jnp.arange(c))
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, (b, d)), out_axes=1)(keys)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


class CrossAttention(nnx.Module):
    """Multi-head attention of one sequence on another, as torch's `nn.MultiheadAttention`.

    Raises:
        UserError: the heads do not divide the width.
    """

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        if heads < 1 or width % heads:
            raise UserError(f"method.heads is {heads} and does not divide the width {width}")
        self.packed = Linear(width, 3 * width, rngs=rngs)  # columns q, k, v
        start_as_xavier(self.packed, rngs)
        self.out = torch_linear(width, width, rngs=rngs)
        self.out.bias[...] = jnp.zeros(width)
        self.heads = heads

    def __call__(
        self,
        queries: Array,
        keys: Array,
        values: Array | None = None,
        *,
        mask: Array | None = None,
        watch: Watch | None = None,
    ) -> Array:
        """[1|b s d] on [b t d] -> [b s d].

        Args:
            queries: projected once where all images have the same.
            keys, values: of the other sequence; values None: the same.
            mask: bool [t], False for positions that nothing attends to.
            watch: gets the attention.
        """
        width, b = queries.shape[-1], max(len(queries), len(keys))
        q = self._split(self.packed(queries, slice(0, width)), 1)[0]
        if values is None:
            k, v = self._split(self.packed(keys, slice(width, None)), 2)
        else:
            k = self._split(self.packed(keys, slice(width, 2 * width)), 1)[0]
            v = self._split(self.packed(values, slice(2 * width, None)), 1)[0]
        q, k, v = (jnp.broadcast_to(x, (b, *x.shape[1:])) for x in (q, k, v))
        mask = None if mask is None else mask[None, None, None]
        if watch is not None:
            f32 = jnp.promote_types(q.dtype, jnp.float32)
            scores = jnp.einsum("bshe,bthe->bhst", q, k, preferred_element_type=f32)
            scores = scores * q.shape[-1] ** -0.5
            scores = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
            watch.append(jax.nn.softmax(scores, axis=-1).mean(1))
        y = dot_product_attention(q, k, v, mask=mask)
        return self.out(y.reshape(*y.shape[:2], width))

    def _split(self, x: Array, parts: int) -> list[Array]:
        return jnp.split(x.reshape(*x.shape[:-1], parts * self.heads, -1), parts, axis=-2)


class _Layer(nnx.Module):
    """What layers have in common: attention, two linear layers, and as many norms as needed."""

    def __init__(
        self, width: int, heads: int, hidden: int, dropout: float, norms: int, *, rngs: nnx.Rngs
    ) -> None:
        if hidden < 1:
            raise UserError(f"method.hidden is {hidden}: the width between linear layers, above 0")
        if not 0 <= dropout < 1:
            raise UserError(f"method.dropout is {dropout}: a share, at least 0 and below 1")
        self.attention = CrossAttention(width, heads, rngs=rngs)
        self.up = torch_linear(width, hidden, rngs=rngs)
        self.down = torch_linear(hidden, width, rngs=rngs)
        self.norms = nnx.List([LayerNorm(width, eps=_EPS) for _ in range(norms)])
        self.dropout = dropout

    def drop(self, x: Array, key: Array | None, number: int) -> Array:
        return dropout(x, self.dropout, key, number)

    def for_each(self, q: Array, v: Array, key: Array | None) -> Array:
        """Queries for each image where every image drops its own, or as they are."""
        drops = key is not None and self.dropout > 0
        return jnp.broadcast_to(q, (len(v), *q.shape[1:])) if drops else q


class DualModalLayer(_Layer):
    """Eq. 5 of ADDS; the `last` layer of a decoder leaves the tokens as they are."""

    def __init__(
        self, width: int, heads: int, hidden: int, dropout: float, *, last: bool, rngs: nnx.Rngs
    ) -> None:
        super().__init__(width, heads, hidden, dropout, 4 if last else 5, rngs=rngs)
        self.attention2 = None if last else CrossAttention(width, heads, rngs=rngs)

    def __call__(
        self, q: Array, v: Array, mask: Array, *, key: Array | None, watch: Watch | None
    ) -> tuple[Array, Array]:
        """Q [1|b c d], V = K [b n d] -> Q', V'."""
        norm1, norm3, norm5, norm_q, *norm_v = self.norms
        q = self.for_each(q, v, key)
        q1 = norm1(q + self.drop(q, key, 0))
        q2 = self.attention(q1, v, watch=watch)
        q3 = norm3(q2 + q1)
        q4 = self.drop(self.down(jax.nn.relu(self.up(q3))), key, 1)
        q5 = norm5(q4 + q3)
        if self.attention2 is not None:
            v = norm_v[0](self.attention2(v, q5, mask=mask) + v)
        return norm_q(q5 + q), v


class MLDecoderLayer(_Layer):
    """Of ML-Decoder: a Transformer decoder's layer without self-attention."""

    def __init__(
        self, width: int, heads: int, hidden: int, dropout: float, *, last: bool, rngs: nnx.Rngs
    ) -> None:
        super().__init__(width, heads, hidden, dropout, 3, rngs=rngs)

    def __call__(
        self, q: Array, v: Array, mask: Array, *, key: Array | None, watch: Watch | None
    ) -> tuple[Array, Array]:
        """q [1|b c d], tokens [b n d] -> answers, and the tokens as they were."""
        norm1, norm2, norm3 = self.norms
        q = self.for_each(q, v, key)
        q1 = norm1(q + self.drop(q, key, 0))
        q2 = norm2(q1 + self.drop(self.attention(q1, v, watch=watch), key, 1))
        hidden = self.drop(jax.nn.relu(self.up(q2)), key, 2)
        return norm3(q2 + self.drop(self.down(hidden), key, 3)), v


class _Stack(nnx.Module):
    """Layers whose answers are the next layer's queries, and whose tokens are the next one's."""

    layer: Callable[..., nnx.Module]

    def __init__(
        self,
        width: int,
        *,
        layers: int,
        heads: int,
        hidden: int,
        dropout: float,
        remat: bool,
        rngs: nnx.Rngs,
        **own: bool,
    ) -> None:
        if layers < 1:
            raise UserError(f"method.layers is {layers}: a decoder has at least one")
        sizes = (width, heads, hidden, dropout)
        last = [number == layers for number in range(1, layers + 1)]
        self.layers = nnx.List([self.layer(*sizes, last=end, rngs=rngs, **own) for end in last])
        self.remat = remat

    def __call__(
        self,
        queries: Array,
        tokens: Array,
        mask: Array,
        *,
        key: Array | None = None,
        watch: Watch | None = None,
    ) -> Array:
        """Answers of the labels to an image: [1|b c d], [b n d] -> [b c d].

        Args:
            queries: one set for all images, or one for each.
            tokens: of the images.
            mask: bool [c], False for classes that only pad: no image's tokens see them.
            key: of dropout; None outside training.
            watch: gets the attention.
        """
        return self._run((queries.astype(tokens.dtype), tokens), (mask,), key, watch)[0]

    def _run(
        self, state: tuple[Array, ...], rest: tuple[Array, ...], key: Array | None,
        watch: Watch | None,
    ) -> tuple[Array, ...]:  # fmt: skip
        """What the last layer makes of a state; each has the same rest, and a key of its own."""
        for number, layer in enumerate(self.layers):
            own = None if key is None else jax.random.fold_in(key, number)
            run = functools.partial(layer, key=own, watch=watch)
            state = (jax.checkpoint(run) if self.remat and watch is None else run)(*state, *rest)
        return state


class DualModalDecoder(_Stack):
    """Of ADDS: labels query tokens, tokens then query what the labels found."""

    layer = DualModalLayer


class MLDecoder(_Stack):
    """Of ML-Decoder, one layer; stacked as ADDS's Table 5 has it."""

    layer = MLDecoderLayer


class StandardLayer(_Layer):
    """A Transformer decoder's layer: answers attend to each other (or not) and to the tokens."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        dropout: float,
        *,
        last: bool,
        self_attention: bool,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(width, heads, hidden, dropout, 3 if self_attention else 2, rngs=rngs)
        self.self_attention = CrossAttention(width, heads, rngs=rngs) if self_attention else None

    def __call__(
        self,
        t: Array,
        queries: Array,
        keys: Array,
        values: Array,
        mask: Array,
        *,
        key: Array | None,
        watch: Watch | None,
    ) -> tuple[Array]:
        """Answers [1|b c d], queries [1|b c d], keys and values [b n d] -> answers."""
        *first, norm2, norm3 = self.norms
        if self.self_attention is not None:
            at = t + queries
            t = first[0](t + self.drop(self.self_attention(at, at, t, mask=mask), key, 0))
        found = self.attention(t + queries, keys, values, watch=watch)
        t = norm2(t + self.drop(found, key, 1))
        hidden = self.drop(jax.nn.relu(self.up(t)), key, 2)
        return (norm3(t + self.drop(self.down(hidden), key, 3)),)


class StandardDecoder(_Stack):
    """Of Query2Label: answers start at zero, a last norm follows.

    self_attention: whether labels attend to each other; its released code takes that out.
    """

    layer = StandardLayer

    def __init__(self, width: int, *, self_attention: bool = False, **sizes: Any) -> None:
        super().__init__(width, self_attention=self_attention, **sizes)
        self.norm = LayerNorm(width, eps=_EPS)

    def __call__(
        self,
        queries: Array,
        tokens: Array,
        mask: Array,
        *,
        positions: Array | None = None,
        key: Array | None = None,
        watch: Watch | None = None,
    ) -> Array:
        """As `_Stack`; `positions` [n d] are added to the tokens where they are keys."""
        queries = queries.astype(tokens.dtype)
        keys = tokens if positions is None else tokens + positions.astype(tokens.dtype)
        rest = (queries, keys, tokens, mask)
        return self.norm(self._run((jnp.zeros_like(queries),), rest, key, watch)[0])


class EncoderLayer(_Layer):
    """A Transformer encoder's layer with the norms after the sums (Query2Label has one)."""

    def __init__(
        self, width: int, heads: int, hidden: int, dropout: float, *, rngs: nnx.Rngs
    ) -> None:
        super().__init__(width, heads, hidden, dropout, 2, rngs=rngs)

    def __call__(self, x: Array, positions: Array, key: Array | None) -> Array:
        """[b n d], positions [n d] -> [b n d]."""
        norm1, norm2 = self.norms
        at = x + positions.astype(x.dtype)
        x = norm1(x + self.drop(self.attention(at, at, x), key, 0))
        hidden = self.drop(jax.nn.relu(self.up(x)), key, 1)
        return norm2(x + self.drop(self.down(hidden), key, 2))


def sine_positions(grid: int, width: int) -> Array:
    """Positions of a square grid in two dimensions: float32 [grid * grid, width].

    The first half of a vector is of the row, the other of the column: sine and cosine in turn of
    2 pi (i + 1) / grid at frequencies from 1 down to about 1/10,000.

    Source: Query2Label's released code (of Carion et al., ECCV 2020).
    """
    half = width // 2
    at = 2 * math.pi * jnp.arange(1, grid + 1) / (grid + 1e-6)
    angles = at[:, None] / 1e4 ** (2 * (jnp.arange(half) // 2) / half)
    turned = jnp.where(jnp.arange(half) % 2 == 0, jnp.sin(angles), jnp.cos(angles))
    rows, columns = jnp.repeat(turned, grid, axis=0), jnp.tile(turned, (grid, 1))
    return jnp.concatenate([rows, columns], axis=-1)


class SharedProjection(nnx.Module):
    """One linear function of an answer for all labels, so that any label can be scored."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.linear = torch_linear(width, 1, rngs=rngs)

    def __call__(self, answers: Array) -> Array:
        """[b c d] -> float32 [b c]."""
        f32 = jnp.promote_types(answers.dtype, jnp.float32)
        kernel, bias = self.linear.kernel[...][:, 0], self.linear.bias[...]
        return jnp.einsum("bcd,d->bc", answers.astype(f32), kernel, precision="highest") + bias


class GroupProjection(nnx.Module):
    """Logits of c classes from k answers, each with weights of its own for ceil(c / k) classes.

    Class i is number i mod g of answer i div g. k = c gives each class its own answer and weights.

    Source: ML-Decoder's released code; of Query2Label's with k = c.
    """

    def __init__(self, queries: int, width: int, classes: int, *, rngs: nnx.Rngs) -> None:
        share = -(-classes // queries)
        # torch counts the trailing axis of [k d g] as a receptive field.
        std = math.sqrt(2 / ((width + queries) * share))
        start = jax.random.normal(rngs.params(), (queries, width, share))
        self.kernel = nnx.Param(std * start)
        self.bias = nnx.Param(jnp.zeros(classes))

    def __call__(self, answers: Array) -> Array:
        """[b k d] -> float32 [b c]."""
        f32 = jnp.promote_types(answers.dtype, jnp.float32)
        found = jnp.einsum(
            "bkd,kdg->bkg", answers.astype(f32), self.kernel[...], precision="highest"
        )
        return found.reshape(len(answers), -1)[:, : len(self.bias[...])] + self.bias[...]
