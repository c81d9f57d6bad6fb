"""Zero-shot CLIP: the label is the text that lies closest to the image.

    labels [c t] x templates -> text tower -> unit length, mean over templates -> [c d]
    image [b h w 3] -> image tower -> [b d];  logits = exp(logit_scale) * cosine

Source: Radford et al., 2021, section 3.1.4. Each template's features are normalised before the
mean, and the mean again, as in the released prompt-ensembling notebook. Nothing trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax import Array

from mlclip_jax.clip import CLIP, ImageFeatures, PromptTokens
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.base import LabelInputs, Method, MethodConfig, Progress
from mlclip_jax.modules.heads import normalize
from mlclip_jax.modules.prompts import Encoder, template_prompts


@dataclass(frozen=True)
class ZeroShotConfig(MethodConfig):
    """templates: one or several, each with one "{}" where the label goes."""

    templates: tuple[str, ...] = ("a photo of a {}.",)


class ZeroShot(Method):
    """Prompt templates through frozen towers."""

    Config = ZeroShotConfig
    config: ZeroShotConfig
    score_kind = "softmax"

    def __init__(
        self,
        config: ZeroShotConfig,
        clip: CLIP,
        *,
        space: LabelSpace,
        encoder: Encoder,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, clip, space=space, encoder=encoder, rngs=rngs)
        if not config.templates:
            raise UserError('zero_shot needs at least one template, such as "a photo of a {}."')

    def prompts(self, names: Sequence[str], encoder: Encoder) -> tuple[PromptTokens, ...]:
        """One set of prompts for each template."""
        return tuple(template_prompts(t, names, encoder) for t in self.config.templates)

    def encode_labels(
        self,
        labels: LabelInputs,
        *,
        image_features: ImageFeatures | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Mean over templates of unit-length text features: float32 [c d]."""
        features = [normalize(self.clip.encode_prompts(p)) for p in labels.prompts]
        return normalize(jnp.mean(jnp.stack(features), axis=0))
