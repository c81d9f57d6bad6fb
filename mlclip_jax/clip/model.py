"""CLIP: an image tower, a text tower and a temperature (Radford et al., 2021)."""

from __future__ import annotations

import math

import jax.numpy as jnp
from flax import nnx
from jax import Array

from mlclip_jax.clip.config import CLIPConfig, ViTConfig
from mlclip_jax.clip.resnet import ModifiedResNet
from mlclip_jax.clip.text import PromptTokens, TextTower
from mlclip_jax.clip.vit import ImageFeatures, VisionTransformer


class CLIP(nnx.Module):
    """Both towers. Parameters are float32; matrix products run in `dtype`.

    Args:
        config: sizes; `mlclip_jax.clip.PRESETS` has the published ones.
        dtype: compute dtype, float32 or bfloat16 (float64 for references).
        remat: recompute blocks in the backward pass instead of keeping their activations.
        class_chunk: most prompts that the text tower encodes at a time (see `TextTower.encode`);
            None encodes all at once.
        rngs: for the random initial values; weights come from `mlclip_jax.clip.weights`.
    """

    def __init__(
        self,
        config: CLIPConfig,
        *,
        dtype: jnp.dtype = jnp.float32,
        remat: bool = False,
        class_chunk: int | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        tower = VisionTransformer if isinstance(config.image, ViTConfig) else ModifiedResNet
        self.image = tower(config.image, config.embed_dim, remat=remat, rngs=rngs)
        self.text = TextTower(
            config.text, config.embed_dim, remat=remat, class_chunk=class_chunk, rngs=rngs
        )
        self.logit_scale = nnx.Param(jnp.asarray(math.log(1 / 0.07), jnp.float32))
        self.config = config
        self.dtype = jnp.dtype(dtype)

    def normalize(self, images: Array) -> Array:
        """Pixels as the image tower wants them: uint8 [b h w 3] -> `dtype` [b h w 3].

        Floating-point images are taken as normalised already.
        """
        if images.dtype == jnp.uint8:
            mean, std = jnp.asarray(self.config.image_mean), jnp.asarray(self.config.image_std)
            images = images * (1 / (255 * std)) - mean / std
        return images.astype(self.dtype)

    def encode_images(
        self, images: Array, *, tokens: bool = False, train_bn: bool | Array = False
    ) -> ImageFeatures:
        """Image features in the joint space, not normalised.

        Args:
            images: uint8 [b h w 3] pixels, or floating point if already normalised.
            tokens: also return the patch (cell) features [b p d].
            train_bn: ResNets only: use the batch's statistics and update the running ones (may be
                a traced bool).

        Raises:
            ValueError: images of another size than the tower's positions are for.
        """
        images = self.prepare(images)
        if isinstance(self.image, ModifiedResNet):
            return self.image(images, tokens=tokens, train_bn=train_bn)
        return self.image(images, tokens=tokens)

    def prepare(self, images: Array) -> Array:
        """Images of the tower's size, normalised: [b h w 3] -> `dtype` [b h w 3].

        Raises:
            ValueError: images of another size than the tower's positions are for.
        """
        size = self.config.image.image_size
        if images.shape[1:] != (size, size, 3):
            raise ValueError(
                f"the image tower takes [b {size} {size} 3], not {list(images.shape)}; preprocess "
                "the images to that size, or load the CLIP with image_size=..."
            )
        return self.normalize(images)

    def encode_text(self, ids: Array) -> Array:
        """Text features of token ids: int32 [c t] -> [c d], not normalised."""
        return self.text(ids, dtype=self.dtype)

    def encode_captions(self, ids: Array) -> ImageFeatures:
        """Captions as if they were images: token ids int32 [n t] -> features, not normalised.

        `pooled` is the text feature, `tokens` those of all positions, `mask` False after EOT.

        Source: Guo et al., CVPR 2023 (TaI-DPT), and its released code.
        """
        return ImageFeatures(*self.text.encode_tokens(ids, dtype=self.dtype))

    def encode_prompts(self, prompts: PromptTokens, context: Array | None = None) -> Array:
        """Text features of prompts with a shared prefix: -> [c d]; see `TextTower`."""
        return self.text.encode_prompts(prompts, context, dtype=self.dtype)
