"""CLIP-FT: the image tower fine-tuned on seen labels, whose text features stay fixed.

    labels "There is a {label} in the scene" -> text tower, once -> t [c d]
    image [b h w 3] -> image tower -> v [b d];  s = <v, t>;  logits = s / |s| over the labels

Source: the baseline of He et al., AAAI 2023 (MKT), Table 1, of which the paper says that CLIP is
fine-tuned on seen labels with the ranking loss, and nothing more: there is no code. This is MKT's
first stage without its local stream and without distillation, so that the difference is those two.
Any labels can be scored afterwards; logits depend on which are scored together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from flax import nnx
from jax import Array

from mlclip_jax.clip import CLIP, ImageFeatures
from mlclip_jax.clip.arrays import path_string
from mlclip_jax.clip.config import ViTConfig
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.base import LabelInputs, Method, MethodConfig, Progress
from mlclip_jax.modules.heads import normalize_over_labels, patch_products, products
from mlclip_jax.modules.prompts import Encoder, template_features


@dataclass(frozen=True)
class CLIPFTConfig(MethodConfig):
    """Settings of CLIP-FT.

    template: of the label features.
    train_blocks: last blocks of a ViT that train, with what follows them (2 of 12 in MKT's
        release); "all" trains the whole tower, and is the only choice for a ResNet.
    """

    loss: str = "ranking(skip_without_positives=True)"
    train_image_encoder: bool = True
    template: str = "There is a {} in the scene"
    train_blocks: int | Literal["all"] = 2


class CLIPFT(Method):
    """CLIP fine-tuned with a ranking loss."""

    Config = CLIPFTConfig
    config: CLIPFTConfig
    compares_labels = True
    score_kind = "relative"

    def __init__(
        self,
        config: CLIPFTConfig,
        clip: CLIP,
        *,
        space: LabelSpace,
        encoder: Encoder,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, clip, space=space, encoder=encoder, rngs=rngs)
        if config.logit_scale is not None:
            raise UserError("clip_ft's scores have unit length: logit_scale has no effect")
        sizes = clip.config.image
        blocks = sizes.layers if isinstance(sizes, ViTConfig) else 0
        if config.train_blocks != "all" and not 0 <= config.train_blocks <= blocks:
            raise UserError(
                f"method.train_blocks is {config.train_blocks} and the image tower has {blocks} "
                "blocks to choose from: fewer, or 'all' for the whole tower"
            )

    def label_inputs(
        self, space: LabelSpace, encoder: Encoder, *, multiple_of: int = 1
    ) -> LabelInputs:
        """As every method's, with the labels' text features."""
        labels = super().label_inputs(space, encoder, multiple_of=multiple_of)
        features = template_features(self.clip, space.prompt_names, encoder, self.config.template)
        return replace(labels, features=features[labels.index])

    def encode_labels(
        self,
        labels: LabelInputs,
        *,
        image_features: ImageFeatures | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Text features as they are: float32 [c d]."""
        return labels.features

    def logits(
        self,
        image_features: ImageFeatures,
        label_features: Array,
        labels: LabelInputs,
        *,
        progress: Progress | None = None,
    ) -> Array:
        """Scores of unit length over the labels: float32 [b c]."""
        return normalize_over_labels(products(image_features.pooled, label_features), labels.mask)

    def patch_scores(
        self, image_features: ImageFeatures, label_features: Array, labels: LabelInputs
    ) -> Array:
        """Inner products, whose lengths over the labels would differ from patch to patch."""
        return patch_products(image_features.tokens, label_features)

    def trainable(self, path: tuple[Any, ...], variable: nnx.Variable) -> bool:
        """The image tower from the first of the `train_blocks` on."""
        if self.config.train_blocks == "all" or not super().trainable(path, variable):
            return super().trainable(path, variable)
        first = self.clip.config.image.layers - self.config.train_blocks
        _, _, part, number, *_ = (*path_string(path).split("/"), "", "")
        return part in ("norm_post", "projection") or (part == "blocks" and int(number) >= first)
