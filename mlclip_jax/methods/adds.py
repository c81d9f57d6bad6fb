"""ADDS: labels and tokens of a frozen CLIP, fused by a dual-modal decoder.

    labels, two templates -> text tower, once -> unit length, mean -> Q [c d]
    image -> pyramid of crops -> image tower -> class and patch tokens V [b n d]
    layer: Q5 = what Q finds in V; Q' = norm(Q5 + Q); V' = norm(V + what V finds in Q5)
    last Q' [b c d] -> one linear function for all labels -> logits [b c]

Source: Xu et al., 2023, Eq. 5 for the layer (`mlclip_jax.modules.decoders`), Eq. 6 for
`selected_labels` (`modules.selection`), Pyramid-Forwarding for `image_size` (`modules.pyramid`).
There is no released code. Where the text is silent, as in ML-Decoder's, whose recipe it follows:
8 heads, hidden width 2048, dropout 0.1 where Eq. 5 has it, asymmetric loss.

Readings: the query of the next layer is Q', as the text says before it says that Q' is put out in
the last layer only; tokens are all tokens behind the last norm in the joint space; neither input is
normalised (`normalize_inputs` does what Eq. 4 writes for an ideal function).

With several layers a label's logit depends on which labels are scored together, as tokens see what
all of them found: labels of a task are scored by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mlclip_jax.clip import CLIP, CLIPConfig, ImageFeatures
from mlclip_jax.clip.arrays import path_string
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.base import Batch, LabelInputs, Method, MethodConfig, Progress
from mlclip_jax.modules.decoders import (
    DualModalDecoder,
    MLDecoder,
    SharedProjection,
    StandardDecoder,
    Watch,
)
from mlclip_jax.modules.heads import normalize
from mlclip_jax.modules.prompts import Encoder, template_features
from mlclip_jax.modules.pyramid import Pyramid
from mlclip_jax.modules.selection import select_labels

_DECODERS = {
    "dual_modal": DualModalDecoder,
    "ml_decoder": MLDecoder,
    "standard": StandardDecoder,
}
_CROPS, _LABELS, _DROPOUT = range(3)  # what random numbers of a step are for


@dataclass(frozen=True)
class ADDSConfig(MethodConfig):
    """Settings of ADDS.

    templates: whose text features are averaged.
    label_embedding: "text", or a "random" vector for each class (Table 6).
    decoder: "dual_modal", "ml_decoder" (Tables 5 and 6), or a "standard" Transformer decoder
        without self-attention.
    layers: of the decoder (Table 5).
    heads, hidden: of its attention, and width between its linear layers.
    dropout: share of values.
    normalize_inputs: tokens and label features of unit length.
    image_size: pixels of a side of the images, which the tower sees as a pyramid of crops; None:
        the tower's own. For interpolated positions in place of crops set `backbone.image_size`.
    levels: of the pyramid, from 0 (Table 7); None: all.
    drop_crops: share of the crops above level 0 that are left out at random: in each step others of
        each image, in evaluation and serving always the same.
    selected_labels: places for the labels of a step, of which positives and a draw of the others
        take some or all; None: a step sees all labels. (1 + negative_ratio) * batch_size holds
        every choice where images have one label.
    negative_ratio: labels that are drawn for each positive one, alpha; of selected labels.
    """

    loss: str = "asymmetric"
    templates: tuple[str, ...] = ("This photo contains {}", "This is a {} photo")
    label_embedding: Literal["text", "random"] = "text"
    decoder: Literal["dual_modal", "ml_decoder", "standard"] = "dual_modal"
    layers: int = 6
    heads: int = 8
    hidden: int = 2048
    dropout: float = 0.1
    normalize_inputs: bool = False
    image_size: int | None = None
    levels: tuple[int, ...] | None = None
    drop_crops: float = 0.0
    selected_labels: int | None = None
    negative_ratio: float = 3.0


class ADDS(Method):
    """Aligned dual modality classifier."""

    Config = ADDSConfig
    config: ADDSConfig
    reads_tokens = True

    def __init__(
        self,
        config: ADDSConfig,
        clip: CLIP,
        *,
        space: LabelSpace,
        encoder: Encoder,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, clip, space=space, encoder=encoder, rngs=rngs)
        if not config.templates:
            raise UserError('adds needs at least one template, such as "This photo contains {}"')
        if config.logit_scale is not None:
            raise UserError("adds has no cosine: method.logit_scale has no effect")
        if config.selected_labels is not None and config.selected_labels < 1:
            raise UserError(f"method.selected_labels is {config.selected_labels}: at least 1")
        if config.negative_ratio < 0:
            raise UserError(f"method.negative_ratio is {config.negative_ratio}: 0 or more")
        width, base = clip.config.embed_dim, clip.config.image.image_size
        size = self.image_size_of(config, clip.config)
        self.pyramid = Pyramid(base, size, config.levels, config.drop_crops)
        if config.drop_crops and self.pyramid.kept == len(self.pyramid.crops):
            raise UserError(
                f"method.drop_crops is {config.drop_crops} and leaves out none of the "
                f"{len(self.pyramid.crops)} crops of an image: set it to 0, or a larger image_size"
            )
        self.decoder = _DECODERS[config.decoder](
            width,
            layers=config.layers,
            heads=config.heads,
            hidden=config.hidden,
            dropout=config.dropout,
            remat=clip.image.remat,
            rngs=rngs,
        )
        self.projection = SharedProjection(width, rngs=rngs)
        self.compares_labels = config.decoder == "dual_modal" and config.layers > 1
        if config.label_embedding == "random":
            self.embedding = nnx.Param(jax.random.normal(rngs.params(), (len(space), width)))
            self.own_classes = space.names

    @classmethod
    def image_size_of(cls, config: ADDSConfig, clip: CLIPConfig) -> int:
        """Pixels of a side of an image."""
        return clip.image.image_size if config.image_size is None else config.image_size

    def image_settings(self) -> str:
        """Which crops there are."""
        return repr(self.pyramid)

    def label_inputs(
        self, space: LabelSpace, encoder: Encoder, *, multiple_of: int = 1
    ) -> LabelInputs:
        """As every method's, with the labels' text features: float32 [c d]."""
        labels = super().label_inputs(space, encoder, multiple_of=multiple_of)
        if self.config.label_embedding == "random":
            return labels
        texts = [
            normalize(template_features(self.clip, space.prompt_names, encoder, template))
            for template in self.config.templates
        ]
        return replace(labels, features=(sum(texts) / len(texts))[labels.index])

    def choose_labels(
        self, batch: Batch, labels: LabelInputs, progress: Progress
    ) -> tuple[Batch, LabelInputs, dict[str, Array]]:
        """Positives of the batch and a draw of the others, where there are places for some only."""
        if self.config.selected_labels is None:
            return batch, labels, {}
        places = min(self.config.selected_labels, labels.num_classes)
        key, ratio = _key(progress, _LABELS), self.config.negative_ratio
        targets = jnp.where(batch.mask[:, None], batch.targets, 0)
        rows, taken, left_out = select_labels(targets, labels.mask, places, ratio, key)
        chosen = replace(batch, targets=batch.targets[:, rows]), labels.take(rows, taken)
        f32 = jnp.float32
        return *chosen, {"labels": taken.sum(dtype=f32), "positives_left_out": left_out.astype(f32)}

    def encode_images(self, images: Array, *, progress: Progress | None = None) -> ImageFeatures:
        """Tokens of all crops: the first one as `pooled` [b d], the others as tokens [b n-1 d]."""
        train_bn = self.trains_batch_norm(progress)

        def tower(crops: Array) -> Array:
            pooled, tokens, *_ = self.clip.encode_images(crops, tokens=True, train_bn=train_bn)
            return jnp.concatenate([pooled[:, None], tokens], axis=1)

        x = self.pyramid.encode(images, tower, _key(progress, _CROPS))
        return ImageFeatures(x[:, 0], x[:, 1:])

    def encode_labels(
        self,
        labels: LabelInputs,
        *,
        image_features: ImageFeatures | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """The first queries: float32 [c d]."""
        if self.config.label_embedding == "random":
            return self.embedding[...][labels.index]
        return labels.features

    def _decode(
        self,
        image_features: ImageFeatures,
        label_features: Array,
        labels: LabelInputs,
        **how: Array | Watch | None,
    ) -> Array:
        """The labels' answers: [b c d]."""
        pooled, tokens, *_ = image_features
        tokens, queries = jnp.concatenate([pooled[:, None], tokens], axis=1), label_features
        if self.config.normalize_inputs:
            tokens, queries = normalize(tokens).astype(tokens.dtype), normalize(queries)
        return self.decoder(queries[None], tokens, labels.mask, **how)

    def logits(
        self,
        image_features: ImageFeatures,
        label_features: Array,
        labels: LabelInputs,
        *,
        progress: Progress | None = None,
    ) -> Array:
        """A linear function of the answers: float32 [b c]."""
        how = {"key": _key(progress, _DROPOUT)}
        return self.projection(self._decode(image_features, label_features, labels, **how))

    def patch_scores(
        self, image_features: ImageFeatures, label_features: Array, labels: LabelInputs
    ) -> Array:
        """Attention of the labels, mean over the layers, as a map of the image: float32 [b c p].

        Raises:
            UserError: some crops are left out.
        """
        if self.pyramid.drop:
            raise UserError("there are no maps where crops are left out: set method.drop_crops=0")
        attention: Watch = []
        self._decode(image_features, label_features, labels, watch=attention)
        mean = sum(attention) / len(attention)
        found = self.pyramid.spread(mean, self.clip.config.image.grid)
        return found.reshape(*found.shape[:2], -1)

    def trainable(self, path: tuple[Any, ...], variable: nnx.Variable) -> bool:
        """Decoder and projection; the image tower where it is to train."""
        return path_string(path) != "embedding" and super().trainable(path, variable)


def _key(progress: Progress | None, number: int) -> Array | None:
    """Of the step's random numbers, one of several; None outside training."""
    if progress is None or progress.key is None:
        return None
    return jax.random.fold_in(progress.key, number)
