"""The vision transformer tower (Dosovitskiy et al., 2021, as CLIP uses it)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mlclip_jax.clip.config import ViTConfig
from mlclip_jax.clip.transformer import Block, LayerNorm, make_blocks


class ImageFeatures(NamedTuple):
    """What an image tower gives: in the joint space, not normalised.

    pooled [b d]; tokens [b p d], patches only, row-major, or None where nobody reads them; mask
    bool [b p], False for tokens that only pad: captions that stand for images have it (TaI-DPT);
    teacher [b d], what another tower gives of the same images, to be distilled from (MKT).
    """

    pooled: Array
    tokens: Array | None = None
    mask: Array | None = None
    teacher: Array | None = None


class PatchEmbed(nnx.Module):
    """Non-overlapping patches times a matrix: kernel [p p 3 w], bias [w] or None."""

    def __init__(self, patch_size: int, width: int, *, bias: bool, rngs: nnx.Rngs) -> None:
        shape = (patch_size, patch_size, 3, width)
        init = nnx.initializers.normal((3 * patch_size**2) ** -0.5)
        self.kernel = nnx.Param(init(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros((width,))) if bias else None

    def __call__(self, images: Array) -> Array:
        """[b h w 3] -> [b p w]."""
        kernel = self.kernel[...].astype(images.dtype)
        side = kernel.shape[0]
        b, h, w, _ = images.shape
        x = images.reshape(b, h // side, side, w // side, side, 3)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // side) * (w // side), -1)
        x = x @ kernel.reshape(-1, kernel.shape[-1])
        return x if self.bias is None else x + self.bias[...].astype(x.dtype)


class VisionTransformer(nnx.Module):
    """Patches and a class token through pre-norm blocks; pooled at the class token."""

    def __init__(
        self, config: ViTConfig, embed_dim: int, *, remat: bool = False, rngs: nnx.Rngs
    ) -> None:
        w = config.width
        init = nnx.initializers.normal(w**-0.5)
        self.patch_embed = PatchEmbed(config.patch_size, w, bias=config.patch_bias, rngs=rngs)
        self.class_embedding = nnx.Param(init(rngs.params(), (w,)))
        self.position_embedding = nnx.Param(init(rngs.params(), (1 + config.grid**2, w)))
        self.norm_pre = LayerNorm(w, eps=config.norm_eps) if config.pre_norm else None
        self.blocks = make_blocks(
            config.layers, w, config.heads, config.mlp_width, config.activation, config.norm_eps,
            rngs=rngs,
        )  # fmt: skip
        self.norm_post = LayerNorm(w, eps=config.norm_eps)
        self.projection = nnx.Param(init(rngs.params(), (w, embed_dim)))
        self.remat = remat

    def embed(self, images: Array) -> Array:
        """[b h w 3] normalised pixels -> [b 1+p w], class token first, positions added."""
        x = self.patch_embed(images)
        token = jnp.broadcast_to(self.class_embedding[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([token.astype(x.dtype), x], axis=1)
        return x + self.position_embedding[...].astype(x.dtype)

    def __call__(self, images: Array, *, tokens: bool = False) -> ImageFeatures:
        """[b h w 3] normalised pixels -> features; patch tokens only where asked for.

        Without tokens the last block runs at the class token alone.
        """
        return self.upper(self.lower(images, 0), 0, tokens=tokens)

    def lower(self, images: Array, blocks: int) -> Array:
        """States after the first blocks: [b h w 3] normalised pixels -> [b 1+p w]."""
        x = self.embed(images)
        x = x if self.norm_pre is None else self.norm_pre(x)
        return self._run(x, list(self.blocks)[:blocks])

    def upper(self, x: Array, first: int, *, tokens: bool) -> ImageFeatures:
        """Features from the states that `lower` gives: the blocks from number `first` on."""
        if tokens:
            y = self.project(self.hidden_states(x, first))
            return ImageFeatures(y[:, 0], y[:, 1:])
        *body, last = list(self.blocks)[first:]
        at = jnp.zeros((x.shape[0],), jnp.int32)
        y = last.read(self._run(x, body), at, causal=False)
        return ImageFeatures(self.project(self.norm_post(y)))

    def hidden_states(self, x: Array, first: int) -> Array:
        """Final states after the last norm, of those that `lower` gives: [b 1+p w] both."""
        return self.norm_post(self._run(x, list(self.blocks)[first:]))

    def project(self, x: Array) -> Array:
        """Final states in the joint space: [... w] -> [... d]."""
        return x @ self.projection[...].astype(x.dtype)

    def _run(self, x: Array, blocks: Sequence[Block]) -> Array:
        for block in blocks:
            x = jax.checkpoint(lambda x, block=block: block(x))(x) if self.remat else block(x)
        return x
