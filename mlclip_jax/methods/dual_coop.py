"""DualCoOp: a positive and a negative prompt for each label, compared with the image's regions.

    contexts V+, V- [k w] or [c k w] + names -> text tower -> T+, T- [2 c d]
    image -> regions F [b r d];  w = softmax over regions of 20 cos(F, T+)   [b r c]
    logits = 100 sum_r w (cos(F, T+) - cos(F, T-)) [b c], p = sigmoid(logits)

Source: Sun et al., NeurIPS 2022; released code sunxm2357/DualCoOp. The difference of both scores
is exact: the release takes the softmax of the two. Its loss is `loss`'s default: asymmetric, of
known labels only, and multiplied by 0.03 (COCO with half of the labels), of which the learning rate
of the configs is mindful.

Regions of a ResNet are its mean token and cells, positions added, through the attention pool's
value and output projections. The release has no form for a ViT: regions are then the class token
and the patches.

Deviations from the release: class-specific contexts that start from words have a copy of their own
for each class; all labels are encoded in every step, where its zero-shot variant draws 100; logs
are floored at 1e-8, not 1e-6; float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from mlclip_jax.clip import CLIP, ImageFeatures, PromptTokens
from mlclip_jax.clip.arrays import path_string
from mlclip_jax.clip.resnet import ModifiedResNet
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.base import LabelInputs, Method, MethodConfig, Progress
from mlclip_jax.modules.heads import normalize, patch_products, pool_regions
from mlclip_jax.modules.prompts import Context, Encoder, context_prompts

_SHARPNESS = 20.0  # of the softmax over regions
_SCALE = 100.0  # of the cosines; five times the sharpness in the release


@dataclass(frozen=True)
class DualCoOpConfig(MethodConfig):
    """Settings of DualCoOp.

    n_ctx, ctx_init: context vectors of either prompt, as CoOp's (64 in its zero-shot form).
    class_specific: contexts for every class; one for all where few labels are known.
    logit_scale: None is the release's 100.
    """

    loss: str = "asymmetric(gamma_negative=2.0, gamma_positive=1.0, ignore_unobserved=True)"
    n_ctx: int = 16
    ctx_init: str = ""
    class_specific: bool = True


class DualCoOp(Method):
    """Dual context optimisation."""

    Config = DualCoOpConfig
    config: DualCoOpConfig
    reads_tokens = True

    def __init__(
        self,
        config: DualCoOpConfig,
        clip: CLIP,
        *,
        space: LabelSpace,
        encoder: Encoder,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, clip, space=space, encoder=encoder, rngs=rngs)

        def context() -> Context:
            return Context(
                n_ctx=config.n_ctx,
                words=config.ctx_init,
                classes=len(space) if config.class_specific else None,
                table=clip.text.token_embedding[...],
                encoder=encoder,
                rngs=rngs,
            )

        self.positive, self.negative = context(), context()
        self.own_classes = space.names if config.class_specific else None

    def prompts(self, names: Sequence[str], encoder: Encoder) -> tuple[PromptTokens, ...]:
        """Prompts with the context's ids among them, the same for both contexts."""
        k = self.positive.vectors.shape[-2]
        specific = self.config.class_specific
        return (context_prompts(k, names, encoder, class_specific=specific),)

    def encode_images(self, images: Array, *, progress: Progress | None = None) -> ImageFeatures:
        """Regions: the mean (class) token as `pooled` [b d], cells (patches) as tokens [b p d]."""
        tower = self.clip.image
        if not isinstance(tower, ModifiedResNet):
            return super().encode_images(images, progress=progress)
        cells = tower.cells(self.clip.prepare(images), train_bn=self.trains_batch_norm(progress))
        pool = tower.attention_pool
        regions = pool.project_cells(pool.with_mean(cells))
        return ImageFeatures(regions[:, 0], regions[:, 1:])

    def encode_labels(
        self,
        labels: LabelInputs,
        *,
        image_features: ImageFeatures | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Text features of positive and negative prompts: [2 c d]."""
        contexts = (self.positive(labels.index), self.negative(labels.index))
        return jnp.stack([self.clip.encode_prompts(labels.prompts[0], v) for v in contexts])

    def scale(self) -> Array | float:
        """Of the cosines: the release's 100, whatever the CLIP's temperature."""
        return _SCALE if self.config.logit_scale is None else self.config.logit_scale

    def logits(
        self,
        image_features: ImageFeatures,
        label_features: Array,
        labels: LabelInputs,
        *,
        progress: Progress | None = None,
    ) -> Array:
        """The positive score minus the negative one: float32 [b c]."""
        pooled, tokens, *_ = image_features
        regions = jnp.concatenate([pooled[:, None], tokens], axis=1)
        positive, negative = normalize(label_features)
        return self.scale() * pool_regions(
            regions, positive, positive - negative, sharpness=_SHARPNESS
        )

    def patch_scores(
        self, image_features: ImageFeatures, label_features: Array, labels: LabelInputs
    ) -> Array:
        """The positive cosine of each region minus the negative one, scaled: float32 [b c p]."""
        positive, negative = normalize(label_features)
        difference = positive - negative
        return self.scale() * patch_products(normalize(image_features.tokens), difference)

    def trainable(self, path: tuple[Any, ...], variable: nnx.Variable) -> bool:
        """Both contexts; of an image tower that trains, what regions are made of."""
        name = path_string(path)
        unread = name.startswith(("clip/image/attention_pool/q/", "clip/image/attention_pool/k/"))
        return not unread and super().trainable(path, variable)
