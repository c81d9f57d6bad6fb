"""Query2Label: learned queries of the classes, and a standard Transformer on the image's map.

    image -> image tower -> patches [b p d] + sine positions -> an encoder's layer
    queries E [c d], learned; answers start at zero -> two decoder's layers, a norm -> t [b c d]
    logits_c = <t_c, W_c> + b_c

Source: Liu et al., 2021, and its released code, which leaves out the decoder's self-attention that
the paper draws (`self_attention=True` puts it in). The loss is the release's asymmetric one.

Deviations: the tower is CLIP's and, unless `train_image_encoder` is set, frozen; the width is its
joint one, with heads of 64 and four times as many hidden values, where the release has 2048 for a
ResNet's map; decay is of matrices alone; the release multiplies the mean of the loss by 1000, which
its AdamW does not see but for its epsilon; attention weights are not dropped out.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mlclip_jax.clip import CLIP, ImageFeatures
from mlclip_jax.clip.transformer import Linear
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.base import LabelInputs, Method, MethodConfig, Progress
from mlclip_jax.modules.decoders import (
    EncoderLayer,
    GroupProjection,
    StandardDecoder,
    Watch,
    sine_positions,
    start_as_xavier,
)
from mlclip_jax.modules.prompts import Encoder


@dataclass(frozen=True)
class Query2LabelConfig(MethodConfig):
    """Settings of Query2Label.

    layers: of the decoder; the encoder has one.
    self_attention: let the classes' answers attend to each other.
    heads, hidden: None takes those that go with the width.
    dropout: share of values.
    """

    loss: str = "asymmetric(gamma_negative=2.0, clip=0.0, reduction='mean')"
    layers: int = 2
    self_attention: bool = False
    heads: int | None = None
    hidden: int | None = None
    dropout: float = 0.1


class Query2Label(Method):
    """Learned queries in a standard Transformer."""

    Config = Query2LabelConfig
    config: Query2LabelConfig
    reads_tokens = True

    def __init__(
        self,
        config: Query2LabelConfig,
        clip: CLIP,
        *,
        space: LabelSpace,
        encoder: Encoder,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, clip, space=space, encoder=encoder, rngs=rngs)
        if config.logit_scale is not None:
            raise UserError("query2label has no cosine: method.logit_scale has no effect")
        width, classes = clip.config.embed_dim, len(space)
        sizes = {
            "heads": max(width // 64, 1) if config.heads is None else config.heads,
            "hidden": 4 * width if config.hidden is None else config.hidden,
            "dropout": config.dropout,
        }
        self.encoder = EncoderLayer(width, **sizes, rngs=rngs)
        self.decoder = StandardDecoder(
            width,
            layers=config.layers,
            self_attention=config.self_attention,
            remat=clip.image.remat,
            **sizes,
            rngs=rngs,
        )
        for part in (self.encoder, self.decoder):  # the release's start
            for _, module in nnx.iter_modules(part):
                if isinstance(module, Linear):
                    start_as_xavier(module, rngs)
        self.queries = nnx.Param(jax.random.normal(rngs.params(), (classes, width)))
        self.projection = GroupProjection(classes, width, classes, rngs=rngs)
        for value in (self.projection.kernel, self.projection.bias):
            bound = width**-0.5
            value[...] = jax.random.uniform(rngs.params(), value.shape, minval=-bound, maxval=bound)
        self.own_classes = space.names

    def encode_labels(
        self,
        labels: LabelInputs,
        *,
        image_features: ImageFeatures | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """The queries of the classes, without padding: float32 [c d]."""
        return self.queries[...]

    def _decode(
        self, image_features: ImageFeatures, queries: Array, key: Array | None, watch: Watch | None
    ) -> Array:
        """Answers [b c d]."""
        tokens = image_features.tokens
        positions = sine_positions(self.clip.config.image.grid, tokens.shape[-1])
        keys = (None, None) if key is None else jax.random.split(key)
        memory = self.encoder(tokens, positions, keys[0])
        everyone = jnp.ones(len(queries), bool)
        return self.decoder(
            queries[None], memory, everyone, positions=positions, key=keys[1], watch=watch
        )

    def logits(
        self,
        image_features: ImageFeatures,
        label_features: Array,
        labels: LabelInputs,
        *,
        progress: Progress | None = None,
    ) -> Array:
        """A linear function of each class's answer: float32 [b c]."""
        key = None if progress is None else progress.key
        answers = self._decode(image_features, label_features, key, None)
        return self.projection(answers)[:, labels.index]

    def patch_scores(
        self, image_features: ImageFeatures, label_features: Array, labels: LabelInputs
    ) -> Array:
        """Attention of the classes, mean over the layers: float32 [b c p]."""
        attention: Watch = []
        self._decode(image_features, label_features, None, attention)
        return (sum(attention) / len(attention))[:, labels.index]
