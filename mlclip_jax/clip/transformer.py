"""The transformer that both towers share: LayerNorm, attention, MLP, pre-norm block.

Source: Vaswani et al., 2017; pre-norm blocks and QuickGELU as in CLIP (Radford et al., 2021).
Parameters are float32; matrix products run in `dtype`; norms and softmax are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mlclip_jax.clip.config import Activation

#: Keys and values [n t h e] of positions that several rows may share (n = 1: all of them).
KeyValue = tuple[Array, Array]


def quick_gelu(x: Array) -> Array:
    """`x * sigmoid(1.702 x)`, the activation of OpenAI's weights."""
    return x * jax.nn.sigmoid(1.702 * x)


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": _gelu}


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis in float32, returned in the input's dtype."""

    def __init__(self, width: int, *, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,)))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """[... w] -> [... w]."""
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class Linear(nnx.Module):
    """`x @ kernel [i o] + bias`, float32 parameters applied in the input's dtype."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(inputs**-0.5)
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((outputs,)))

    def __call__(self, x: Array, columns: slice = slice(None)) -> Array:
        """[... i] -> [... o], or only the given columns of the output."""
        kernel, bias = self.kernel[...][:, columns], self.bias[...][columns]
        return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


def start_as_torch(layer: Linear, rngs: nnx.Rngs) -> Linear:
    """A linear layer with torch's starting values: kernel, bias uniform in +-1/sqrt(inputs)."""
    bound = layer.kernel.shape[0] ** -0.5
    for value in (layer.kernel, layer.bias):
        value[...] = jax.random.uniform(rngs.params(), value.shape, jnp.float32, -bound, bound)
    return layer


def _flash_attention_runs(dtype: jnp.dtype, head_dim: int) -> bool:
    """Whether cuDNN's fused kernel takes this: half types on NVIDIA GPUs from Ampere on."""
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))  # AMD's are no numbers
    nvidia = device.platform == "gpu" and capability.replace(".", "", 1).isdigit()
    fits = dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128
    return nvidia and float(capability) >= 8 and fits


def dot_product_attention(
    q: Array, k: Array, v: Array, *, causal: bool = False, mask: Array | None = None
) -> Array:
    """Softmax attention; the softmax is float32 in every implementation.

    Args:
        q: queries [n s h e].
        k, v: keys and values [n t h e].
        causal: a position sees those up to its own.
        mask: bool [1|n 1|h 1|s t], which positions are seen; without one kernels may be fused.
    """
    fused = mask is None and _flash_attention_runs(q.dtype, q.shape[-1])
    kernel = "cudnn" if fused else "xla"
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation=kernel)


class Attention(nnx.Module):
    """Multi-head self-attention with packed projections (columns q, k, v)."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.qkv = Linear(width, 3 * width, rngs=rngs)
        self.out = Linear(width, width, rngs=rngs)
        self.heads = heads

    def _split(self, x: Array, parts: int) -> list[Array]:
        return jnp.split(x.reshape(*x.shape[:-1], parts * self.heads, -1), parts, axis=-2)

    def __call__(self, x: Array, *, causal: bool) -> Array:
        """[n t w] -> [n t w], every position attending."""
        q, k, v = self._split(self.qkv(x), 3)
        y = dot_product_attention(q, k, v, causal=causal)
        return self.out(y.reshape(x.shape))

    def project(self, x: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values, each [n t h e], of [n t w]."""
        q, k, v = self._split(self.qkv(x), 3)
        return q, k, v

    def project_keys_values(self, x: Array) -> KeyValue:
        """Keys and values only, each [n t h e]."""
        k, v = self._split(self.qkv(x, slice(x.shape[-1], None)), 2)
        return k, v

    def project_queries(self, x: Array) -> Array:
        """Queries only, [n t h e]."""
        (q,) = self._split(self.qkv(x, slice(0, x.shape[-1])), 1)
        return q

    def attend(self, q: Array, own: KeyValue, mask: Array, context: Sequence[KeyValue]) -> Array:
        """Attention of each row over shared positions before it and over its own.

        Args:
            q: queries [n s h e].
            own: the row's own keys and values [n t h e].
            mask: [n|1 s t], which own positions each query sees.
            context: keys and values of earlier positions, [n t' h e], or [1 t' h e] where all
                rows share them: they are then used in place, never copied per row.

        Returns:
            [n s w].
        """
        parts = [*context, own]
        scores = [_scores(q, k) for k, _ in parts]
        scores[-1] = jnp.where(mask[:, None], scores[-1], -jnp.inf)
        weights = jax.nn.softmax(q.shape[-1] ** -0.5 * jnp.concatenate(scores, -1), axis=-1)
        edges = list(accumulate(k.shape[1] for k, _ in parts))[:-1]
        weights = jnp.split(weights.astype(q.dtype), edges, axis=-1)
        y = sum(_mix(w, v) for w, (_, v) in zip(weights, parts, strict=True))
        return self.out(y.reshape(*q.shape[:2], -1))


def _scores(q: Array, k: Array) -> Array:
    """Dot products in float32: [n s h e], [n|1 t h e] -> [n h s t]."""
    f32 = jnp.promote_types(q.dtype, jnp.float32)
    if k.shape[0] == 1:
        return jnp.einsum("nshe,the->nhst", q, k[0], preferred_element_type=f32)
    return jnp.einsum("nshe,nthe->nhst", q, k, preferred_element_type=f32)


def _mix(weights: Array, v: Array) -> Array:
    """Weighted values: [n h s t], [n|1 t h e] -> [n s h e]."""
    if v.shape[0] == 1:
        return jnp.einsum("nhst,the->nshe", weights, v[0])
    return jnp.einsum("nhst,nthe->nshe", weights, v)


class MLP(nnx.Module):
    """Two linear layers with CLIP's activation between them."""

    def __init__(self, width: int, hidden: int, activation: Activation, *, rngs: nnx.Rngs) -> None:
        self.up = Linear(width, hidden, rngs=rngs)
        self.down = Linear(hidden, width, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        """[... w] -> [... w]."""
        return self.down(_ACTIVATIONS[self.activation](self.up(x)))


class Block(nnx.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(
        self, width: int, heads: int, mlp_width: int, activation: Activation, eps: float,
        *, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.norm1 = LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads, rngs=rngs)
        self.norm2 = LayerNorm(width, eps=eps)
        self.mlp = MLP(width, mlp_width, activation, rngs=rngs)

    def __call__(self, x: Array, *, causal: bool = False) -> Array:
        """[n t w] -> [n t w]."""
        x = x + self.attention(self.norm1(x), causal=causal)
        return x + self.mlp(self.norm2(x))

    def keys_values(self, x: Array) -> KeyValue:
        """What later positions need of [n t w] in this block."""
        return self.attention.project_keys_values(self.norm1(x))

    def extend(self, x: Array, context: Sequence[KeyValue]) -> tuple[Array, KeyValue]:
        """Causal block over [n s w] after `context`; also its own keys and values."""
        q, k, v = self.attention.project(self.norm1(x))
        mask = jnp.tril(jnp.ones((1, x.shape[1], x.shape[1]), bool))
        x = x + self.attention.attend(q, (k, v), mask, context)
        return x + self.mlp(self.norm2(x)), (k, v)

    def read(self, x: Array, at: Array, *, causal: bool, context: Sequence[KeyValue] = ()) -> Array:
        """The block's output at one position of each row only: [n s w], at [n] -> [n w].

        Used for the last block of a tower that is pooled at one position: the other positions
        contribute keys and values and nothing else.
        """
        h = self.norm1(x)
        pick = at[:, None, None]
        q = self.attention.project_queries(jnp.take_along_axis(h, pick, axis=1))
        seen = jnp.arange(x.shape[1]) <= pick if causal else jnp.ones((1, 1, x.shape[1]), bool)
        y = self.attention.attend(q, self.attention.project_keys_values(h), seen, context)
        y = (jnp.take_along_axis(x, pick, axis=1) + y)[:, 0]
        return y + self.mlp(self.norm2(y))


def make_blocks(
    layers: int, width: int, heads: int, mlp_width: int, activation: Activation, eps: float,
    *, rngs: nnx.Rngs,
) -> nnx.List[Block]:  # fmt: skip
    """A tower's blocks, as a list so that filters and layer-wise rates can name them."""
    return nnx.List(
        [Block(width, heads, mlp_width, activation, eps, rngs=rngs) for _ in range(layers)]
    )
