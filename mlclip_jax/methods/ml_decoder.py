"""ML-Decoder: a decoder's layer without self-attention on the tokens of an image.

    image -> image tower -> tokens F [b n d];  U = relu(F W_e + b_e)
    queries: k fixed random vectors, or a vector for each label: relu(text W_w + b_w)
    one layer -> answers [b k d] -> logits [b c]: each answer's own ceil(c / k) linear functions, or
    one for all labels, so that others can be scored

Source: Ridnik et al., WACV 2023, and its released code. Queries of k <= 100 vectors mean that up to
100 classes have one each. With `queries="labels"` it is their zero-shot form, where CLIP's text
features stand for their word vectors.

Deviations: the tower is CLIP's and, unless `train_image_encoder` is set, frozen; all widths are
CLIP's joint one, where theirs is 768; attention weights are not dropped out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mlclip_jax.clip import CLIP, ImageFeatures
from mlclip_jax.clip.arrays import path_string
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.base import LabelInputs, Method, MethodConfig, Progress
from mlclip_jax.modules.decoders import (
    GroupProjection,
    MLDecoder,
    SharedProjection,
    Watch,
    torch_linear,
)
from mlclip_jax.modules.prompts import Encoder, template_features


@dataclass(frozen=True)
class MLDecoderConfig(MethodConfig):
    """Settings of ML-Decoder.

    queries: "fixed" random ones, or of the "labels" (zero-shot).
    groups: number of fixed queries, at most one for each class; None: up to 100.
    template: of the labels' text features.
    layers, heads, hidden, dropout: of the decoder.
    """

    loss: str = "asymmetric"
    queries: Literal["fixed", "labels"] = "fixed"
    groups: int | None = None
    template: str = "a photo of a {}."
    layers: int = 1
    heads: int = 8
    hidden: int = 2048
    dropout: float = 0.1


class MLDecoderMethod(Method):
    """A decoder's layer on CLIP's tokens."""

    Config = MLDecoderConfig
    config: MLDecoderConfig
    reads_tokens = True

    def __init__(
        self,
        config: MLDecoderConfig,
        clip: CLIP,
        *,
        space: LabelSpace,
        encoder: Encoder,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, clip, space=space, encoder=encoder, rngs=rngs)
        if config.logit_scale is not None:
            raise UserError("ml_decoder has no cosine: method.logit_scale has no effect")
        width, classes = clip.config.embed_dim, len(space)
        self.embed = torch_linear(width, width, rngs=rngs)
        self.decoder = MLDecoder(
            width,
            layers=config.layers,
            heads=config.heads,
            hidden=config.hidden,
            dropout=config.dropout,
            remat=clip.image.remat,
            rngs=rngs,
        )
        if config.queries == "labels":
            if config.groups is not None:
                raise UserError("method.groups has no effect on queries of labels: leave it out")
            self.embed_labels = torch_linear(width, width, rngs=rngs)
            self.projection = SharedProjection(width, rngs=rngs)
            start = (2 / (width + 1)) ** 0.5 * jax.random.normal(rngs.params(), (width, 1))
            self.projection.linear.kernel[...] = start
            self.projection.linear.bias[...] = jnp.zeros(1)
            return
        groups = 100 if config.groups is None else config.groups
        if groups < 1:
            raise UserError(f"method.groups is {groups}: at least 1")
        groups = min(groups, classes)
        self.queries = nnx.Param(jax.random.normal(rngs.params(), (groups, width)))
        self.projection = GroupProjection(groups, width, classes, rngs=rngs)
        self.own_classes = space.names

    def label_inputs(
        self, space: LabelSpace, encoder: Encoder, *, multiple_of: int = 1
    ) -> LabelInputs:
        """As every method's; with text features where they are the queries."""
        labels = super().label_inputs(space, encoder, multiple_of=multiple_of)
        if self.config.queries == "fixed":
            return labels
        texts = template_features(self.clip, space.prompt_names, encoder, self.config.template)
        return replace(labels, features=texts[labels.index])

    def encode_labels(
        self,
        labels: LabelInputs,
        *,
        image_features: ImageFeatures | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """The queries: float32 [k d], or one for each label [c d]."""
        if self.config.queries == "fixed":
            return self.queries[...]
        return jax.nn.relu(self.embed_labels(labels.features))

    def _decode(
        self, image_features: ImageFeatures, queries: Array, **how: Array | Watch | None
    ) -> Array:
        """Answers [b k d]."""
        pooled, tokens, *_ = image_features
        tokens = jax.nn.relu(self.embed(jnp.concatenate([pooled[:, None], tokens], axis=1)))
        everyone = jnp.ones(len(queries), bool)  # no query sees another
        return self.decoder(queries[None], tokens, everyone, **how)

    def logits(
        self,
        image_features: ImageFeatures,
        label_features: Array,
        labels: LabelInputs,
        *,
        progress: Progress | None = None,
    ) -> Array:
        """Linear functions of the answers: float32 [b c]."""
        key = None if progress is None else progress.key
        found = self.projection(self._decode(image_features, label_features, key=key))
        return found if self.config.queries == "labels" else found[:, labels.index]

    def patch_scores(
        self, image_features: ImageFeatures, label_features: Array, labels: LabelInputs
    ) -> Array:
        """Attention, mean over the layers: float32 [b c p]; classes of one query have the same."""
        attention: Watch = []
        self._decode(image_features, label_features, watch=attention)
        found = (sum(attention) / len(attention))[..., 1:]
        if self.config.queries == "labels":
            return found
        return found[:, labels.index // self.projection.kernel.shape[-1]]

    def trainable(self, path: tuple[Any, ...], variable: nnx.Variable) -> bool:
        """All but the fixed queries; the image tower where it is to train."""
        return path_string(path) != "queries" and super().trainable(path, variable)
