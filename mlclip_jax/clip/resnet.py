"""CLIP's ModifiedResNet tower: three-convolution stem, anti-aliased strides, attention pool.

Source: He et al., 2016, with the changes of Radford et al., 2021, section 2.4. Everything NHWC.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from mlclip_jax.clip.config import ResNetConfig
from mlclip_jax.clip.transformer import Linear
from mlclip_jax.clip.vit import ImageFeatures


class Conv(nnx.Module):
    """Convolution without bias, kernel [k k i o], padded by k // 2 on every side."""

    def __init__(
        self, inputs: int, outputs: int, size: int, *, stride: int = 1, rngs: nnx.Rngs
    ) -> None:
        init = nnx.initializers.he_normal()
        self.kernel = nnx.Param(init(rngs.params(), (size, size, inputs, outputs)))
        self.stride = stride

    def __call__(self, x: Array) -> Array:
        """[b h w i] -> [b h/stride w/stride o]."""
        pad = self.kernel.shape[0] // 2
        return lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            (self.stride, self.stride),
            [(pad, pad), (pad, pad)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class BatchNorm(nnx.Module):
    """Batch normalisation in float32 with PyTorch's running statistics.

    eps 1e-5; running = 0.9 running + 0.1 batch, with the unbiased batch variance. Under a
    sharded batch the statistics are those of the whole batch.
    """

    def __init__(self, width: int) -> None:
        self.scale = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,)))
        self.mean = nnx.BatchStat(jnp.zeros((width,)))
        self.var = nnx.BatchStat(jnp.ones((width,)))

    def __call__(self, x: Array, *, train: bool | Array) -> Array:
        """[b h w i] -> [b h w i]; `train` (may be traced): by the batch's statistics, recorded."""
        mean, var = self.mean[...], self.var[...]
        if train is not False:
            y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            batch_mean = y.mean((0, 1, 2))
            batch_var = jnp.square(y - batch_mean).mean((0, 1, 2))
            n = x.shape[0] * x.shape[1] * x.shape[2]
            moved_mean = 0.9 * mean + 0.1 * lax.stop_gradient(batch_mean)
            moved_var = 0.9 * var + 0.1 * lax.stop_gradient(batch_var) * (n / (n - 1))
            self.mean[...] = jnp.where(train, moved_mean, mean)
            self.var[...] = jnp.where(train, moved_var, var)
            mean, var = jnp.where(train, batch_mean, mean), jnp.where(train, batch_var, var)
        gain = self.scale[...] * lax.rsqrt(var + 1e-5)
        return (x * gain + (self.bias[...] - mean * gain)).astype(x.dtype)


def avg_pool(x: Array, size: int) -> Array:
    """Non-overlapping mean over size x size cells: [b h w i] -> [b h/size w/size i]."""
    # A sum of strided slices: XLA's CPU compiler (jaxlib 0.11.2) returns garbage for a reduction
    # fused behind a bfloat16 convolution.
    h, w = x.shape[1] // size * size, x.shape[2] // size * size
    f32 = jnp.promote_types(x.dtype, jnp.float32)
    cells = [x[:, i:h:size, j:w:size].astype(f32) for i in range(size) for j in range(size)]
    return (sum(cells) / size**2).astype(x.dtype)


class Bottleneck(nnx.Module):
    """1x1, 3x3, 1x1 with a mean pool in place of strides, on both paths."""

    def __init__(self, inputs: int, width: int, stride: int, *, rngs: nnx.Rngs) -> None:
        self.conv1 = Conv(inputs, width, 1, rngs=rngs)
        self.bn1 = BatchNorm(width)
        self.conv2 = Conv(width, width, 3, rngs=rngs)
        self.bn2 = BatchNorm(width)
        self.conv3 = Conv(width, 4 * width, 1, rngs=rngs)
        self.bn3 = BatchNorm(4 * width)
        self.stride = stride
        self.has_shortcut = stride > 1 or inputs != 4 * width
        if self.has_shortcut:
            self.downsample_conv = Conv(inputs, 4 * width, 1, rngs=rngs)
            self.downsample_bn = BatchNorm(4 * width)

    def __call__(self, x: Array, *, train: bool | Array) -> Array:
        """[b h w i] -> [b h/stride w/stride 4*width]."""
        y = jax.nn.relu(self.bn1(self.conv1(x), train=train))
        y = jax.nn.relu(self.bn2(self.conv2(y), train=train))
        if self.stride > 1:
            y, x = avg_pool(y, self.stride), avg_pool(x, self.stride)
        y = self.bn3(self.conv3(y), train=train)
        if self.has_shortcut:
            x = self.downsample_bn(self.downsample_conv(x), train=train)
        return jax.nn.relu(x + y)


class AttentionPool(nnx.Module):
    """Attention of the mean token over the final map, projected to the joint space."""

    def __init__(
        self, width: int, heads: int, grid: int, embed_dim: int, *, rngs: nnx.Rngs
    ) -> None:
        init = nnx.initializers.normal(width**-0.5)
        self.position_embedding = nnx.Param(init(rngs.params(), (1 + grid**2, width)))
        self.q = Linear(width, width, rngs=rngs)
        self.k = Linear(width, width, rngs=rngs)
        self.v = Linear(width, width, rngs=rngs)
        self.out = Linear(width, embed_dim, rngs=rngs)
        self.heads = heads

    def with_mean(self, x: Array, *, positions: bool = True) -> Array:
        """Mean token first, positions added unless told otherwise: [b p w] -> [b 1+p w]."""
        x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
        return x + self.position_embedding[...].astype(x.dtype) if positions else x

    def __call__(self, x: Array, *, positions: bool = True) -> Array:
        """[b p w] -> [b d]."""
        x = self.with_mean(x, positions=positions)
        q, k, v = (
            y.reshape(*y.shape[:2], self.heads, -1)
            for y in (self.q(x[:, :1]), self.k(x), self.v(x))
        )
        y = jax.nn.dot_product_attention(q, k, v, implementation="xla")
        return self.out(y.reshape(x.shape[0], -1))

    def project_cells(self, x: Array) -> Array:
        """Each cell by itself into the joint space: [b p w] -> [b p d].

        Source: the dense features of TaI-DPT, and, of cells `with_mean`, of DualCoOp.
        """
        return self.out(self.v(x))


class ModifiedResNet(nnx.Module):
    """The tower. BatchNorm statistics are fixed unless a call says `train_bn`."""

    def __init__(
        self, config: ResNetConfig, embed_dim: int, *, remat: bool = False, rngs: nnx.Rngs
    ) -> None:
        w = config.width
        self.conv1 = Conv(3, w // 2, 3, stride=2, rngs=rngs)
        self.bn1 = BatchNorm(w // 2)
        self.conv2 = Conv(w // 2, w // 2, 3, rngs=rngs)
        self.bn2 = BatchNorm(w // 2)
        self.conv3 = Conv(w // 2, w, 3, rngs=rngs)
        self.bn3 = BatchNorm(w)
        inputs = w
        for stage, depth in enumerate(config.layers):
            width = w * 2**stage
            blocks = []
            for j in range(depth):
                stride = 2 if stage > 0 and j == 0 else 1
                blocks.append(Bottleneck(inputs, width, stride, rngs=rngs))
                inputs = 4 * width
            setattr(self, f"layer{stage + 1}", nnx.List(blocks))
        self.attention_pool = AttentionPool(
            config.output_width, config.heads, config.grid, embed_dim, rngs=rngs
        )
        self.remat = remat

    def feature_map(self, images: Array, *, train_bn: bool | Array = False) -> Array:
        """[b h w 3] normalised pixels -> final map [b h/32 w/32 w]."""
        x = images
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = jax.nn.relu(bn(conv(x), train=train_bn))
        x = avg_pool(x, 2)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = _checkpointed(block, x, train_bn) if self.remat else block(x, train=train_bn)
        return x

    def cells(self, images: Array, *, train_bn: bool | Array = False) -> Array:
        """The final map cell by cell, row-major: [b h w 3] normalised pixels -> [b p w]."""
        x = self.feature_map(images, train_bn=train_bn)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def __call__(
        self, images: Array, *, tokens: bool = False, train_bn: bool | Array = False
    ) -> ImageFeatures:
        """[b h w 3] normalised pixels -> features; cell tokens only where asked for."""
        x = self.cells(images, train_bn=train_bn)
        pool = self.attention_pool
        return ImageFeatures(pool(x), pool.project_cells(x) if tokens else None)


def _checkpointed(block: Bottleneck, x: Array, train: bool | Array) -> Array:
    """Rematerialised block: statistics leave the checkpoint as values, not as side effects."""
    graphdef, params, stats = nnx.split(block, nnx.Param, nnx.BatchStat)

    @jax.checkpoint
    def run(params: nnx.State, stats: nnx.State, x: Array) -> tuple[Array, nnx.State]:
        module = nnx.merge(graphdef, params, stats)
        y = module(x, train=train)
        return y, nnx.state(module, nnx.BatchStat)

    y, stats = run(params, stats, x)
    nnx.update(block, stats)
    return y
