"""Linear probe: one linear layer on CLIP's image features, no text in training.

    image -> image tower, frozen -> v [b d];  logits = v W^T + bias  [b c]

Source: Radford et al., 2021, section 3.2; for many labels with any loss the FC layer of LMPT's
Figure 4. The features are not normalised (`normalize`: their length, about 10 for the published
CLIPs, then no longer decides how strong the decay of W is).

Deviations: trained by the configured optimizer, where Radford et al. fit a logistic regression with
L-BFGS; W may start from the labels' text features, as `fine_tune` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array

from mlclip_jax.clip import CLIP, ImageFeatures
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.base import LabelInputs, Method, MethodConfig, Progress
from mlclip_jax.modules.heads import normalize, products
from mlclip_jax.modules.prompts import Encoder, template_features


@dataclass(frozen=True)
class LinearProbeConfig(MethodConfig):
    """Settings of the linear probe.

    normalize: image features of unit length.
    start: of W: "zero", or "text" for scale * text features of unit length, which with normalised
        image features are zero-shot CLIP's logits; the bias then starts at -0.2 * scale, as CLIP's
        cosines of absent labels are far above zero.
    template: of the text features.
    logit_scale: of the text features that W starts from.
    """

    normalize: bool = False
    start: Literal["zero", "text"] = "zero"
    template: str = "a photo of a {}."


class LinearProbe(Method):
    """A linear layer on frozen features."""

    Config = LinearProbeConfig
    config: LinearProbeConfig

    def __init__(
        self,
        config: LinearProbeConfig,
        clip: CLIP,
        *,
        space: LabelSpace,
        encoder: Encoder,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, clip, space=space, encoder=encoder, rngs=rngs)
        if config.start == "zero" and config.logit_scale is not None:
            raise UserError(
                "a linear probe that starts from zero has no cosine: logit_scale has no effect"
            )
        kernel, bias = jnp.zeros((len(space), clip.config.embed_dim)), jnp.zeros((len(space),))
        if config.start == "text":
            texts = template_features(clip, space.prompt_names, encoder, config.template)
            kernel, bias = self.scale() * normalize(texts), bias - 0.2 * self.scale()
        self.kernel, self.bias = nnx.Param(kernel), nnx.Param(bias)
        self.own_classes = space.names

    def encode_labels(
        self,
        labels: LabelInputs,
        *,
        image_features: ImageFeatures | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Rows of W: float32 [c d]."""
        return self.kernel[...][labels.index]

    def logits(
        self,
        image_features: ImageFeatures,
        label_features: Array,
        labels: LabelInputs,
        *,
        progress: Progress | None = None,
    ) -> Array:
        """v W^T + bias: float32 [b c]."""
        v = image_features.pooled
        x = products(normalize(v) if self.config.normalize else v, label_features)
        return x + self.bias[...][labels.index]
