"""CoCoOp for many labels: the context shifts with the image.

    h(v) = W2 relu(W1 v + b1) + b2  [b w],  v the image feature of unit length
    context V_m + h(v) [b k w] + names -> text tower -> label features [b c d]
    logits = scale * cosine(image, label features of that image) [b c]

Source: Zhou et al., CVPR 2022, and released code KaiyangZhou/CoOp; a row of LMPT's Table 1. Start
of text and context are encoded once for each image, names in each of the b c prompts:
`backbone.class_chunk` bounds the memory of these.

Deviations from the release: any loss for many labels in place of softmax cross-entropy, and any
batch size (it takes images one by one for want of memory); weight decay leaves the biases b alone,
as everywhere here; float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mlclip_jax.clip import CLIP, ImageFeatures, PromptTokens, Segment
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.base import LabelInputs, Method, MethodConfig, Progress
from mlclip_jax.modules.heads import normalize
from mlclip_jax.modules.prompts import Context, Encoder, MetaNetwork, context_prompts


@dataclass(frozen=True)
class CoCoOpConfig(MethodConfig):
    """Settings of CoCoOp.

    n_ctx, ctx_init: context vectors as CoOp's.
    reduction: W1 has joint width / reduction outputs.
    """

    n_ctx: int = 4
    ctx_init: str = "a photo of a"
    reduction: int = 16


class CoCoOp(Method):
    """Conditional context optimisation."""

    Config = CoCoOpConfig
    config: CoCoOpConfig
    labels_see_images = True

    def __init__(
        self,
        config: CoCoOpConfig,
        clip: CLIP,
        *,
        space: LabelSpace,
        encoder: Encoder,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, clip, space=space, encoder=encoder, rngs=rngs)
        dim, table = clip.config.embed_dim, clip.text.token_embedding[...]
        if not 1 <= config.reduction <= dim:
            raise UserError(f"method.reduction lies between 1 and {dim}, not at {config.reduction}")
        self.context = Context(
            n_ctx=config.n_ctx,
            words=config.ctx_init,
            classes=None,
            table=table,
            encoder=encoder,
            rngs=rngs,
        )
        self.meta = MetaNetwork(dim, dim // config.reduction, table.shape[-1], rngs=rngs)

    def prompts(self, names: Sequence[str], encoder: Encoder) -> tuple[PromptTokens, ...]:
        """Start of text and places for the context before "{label}."."""
        return (context_prompts(self.context.vectors.shape[-2], names, encoder),)

    def encode_labels(
        self,
        labels: LabelInputs,
        *,
        image_features: ImageFeatures | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Label features as each image has them: [b c d]."""
        text, dtype, prompts = self.clip.text, self.clip.dtype, labels.prompts[0]
        shift = self.meta(normalize(image_features.pooled))  # [b w]
        context = self.context() + shift[:, None]  # [b k w]
        names = text.embed(prompts.own)  # [c s w]
        b, (c, s, w) = context.shape[0], names.shape
        names = jnp.broadcast_to(names.astype(dtype), (b, c, s, w)).reshape(b * c, s, w)
        segments = (
            Segment(text.embed(prompts.prefix[None, :1]).astype(dtype)),
            Segment(context.astype(dtype)),
            Segment(names, jnp.repeat(jnp.arange(b), c)),
        )
        return text.encode(segments, jnp.tile(prompts.eot, b)).reshape(b, c, -1)

    def logits(
        self,
        image_features: ImageFeatures,
        label_features: Array,
        labels: LabelInputs,
        *,
        progress: Progress | None = None,
    ) -> Array:
        """Cosine of each image with its own label features: float32 [b c]."""
        v, t = normalize(image_features.pooled), normalize(label_features)
        return self.scale() * jnp.einsum("bd,bcd->bc", v, t, precision=jax.lax.Precision.HIGHEST)
