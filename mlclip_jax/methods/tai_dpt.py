"""TaI-DPT: prompts learned from captions alone, which stand for images in training.

    caption -> frozen text tower -> h [b d] at its end, H [b t d] at all positions, computed once
    contexts + names -> text tower -> global prompts G, local prompts L  [2 c d]
    x_g = s cos(h, G);  x_l = s sum_t softmax_t(kappa cos(H, L)) cos(H, L)   [b c]
    loss = ranking(x_g) + ranking(x_l)
    image -> v [b d], cells [b p d] in the places of h and H;  logits = (x_g + x_l) / 2

Source: Guo et al., CVPR 2023; released code guozix/TaI-DPT. A caption's labels are the
nouns found in it (`mlclip_jax.labels.nouns`), or those of its image.

Deviations from the release: padding is masked by position, where the release masks token id 0,
which is also the word piece "!"; its unused learned temperatures are left out; nouns are found
without part-of-speech tags and WordNet. With a ResNet, as there, the global feature of an image is
pooled without positions and its cells have none; a ViT has no such form: both are CLIP's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mlclip_jax.clip import CLIP, ImageFeatures, PromptTokens
from mlclip_jax.clip.resnet import ModifiedResNet
from mlclip_jax.errors import UserError
from mlclip_jax.labels import nouns
from mlclip_jax.labels.matching import read_aliases
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.base import (
    Batch,
    CaptionExamples,
    Captions,
    LabelInputs,
    Method,
    MethodConfig,
    Progress,
)
from mlclip_jax.modules.heads import cosine_logits, normalize, patch_products, pool_regions
from mlclip_jax.modules.prompts import Context, Encoder, context_prompts


@dataclass(frozen=True)
class TaIDPTConfig(MethodConfig):
    """Settings of TaI-DPT.

    n_ctx, ctx_init: context vectors of either prompt, as CoOp's.
    local: learn and score with local prompts too; without them it is the paper's TaI.
    caption_labels: "nouns" in the caption, or those of the "images" it describes.
    synonyms: YAML file of further words for labels, beside those that are known.
    templates: sentences about each label that are learned from too, each once and "a photo of a
        {}." nine times, as in the release (with 80 templates of ImageNet); () for captions only.
    text_sharpness, image_sharpness: kappa of captions and of images (4 on NUS-WIDE).
    """

    loss: str = "ranking(pairs='sum', ignore_unobserved=False)"
    logit_scale: float | None = 4.0
    n_ctx: int = 16
    ctx_init: str = ""
    local: bool = True
    caption_labels: Literal["nouns", "images"] = "nouns"
    synonyms: str = ""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    text_sharpness: float = 50.0
    image_sharpness: float = 40.0


class TaIDPT(Method):
    """Texts as images, with double-grained prompts."""

    Config = TaIDPTConfig
    config: TaIDPTConfig
    reads_tokens = True

    def __init__(
        self,
        config: TaIDPTConfig,
        clip: CLIP,
        *,
        space: LabelSpace,
        encoder: Encoder,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, clip, space=space, encoder=encoder, rngs=rngs)
        if config.train_image_encoder:
            raise UserError("tai_dpt sees no images in training: train_image_encoder has no effect")
        if config.batch_norm != "frozen":
            raise UserError("tai_dpt sees no images in training: batch_norm has no effect")
        nouns.check_templates(config.templates)

        def context() -> Context:
            return Context(
                n_ctx=config.n_ctx,
                words=config.ctx_init,
                classes=None,
                table=clip.text.token_embedding[...],
                encoder=encoder,
                rngs=rngs,
            )

        self.global_context = context()
        if config.local:
            self.local_context = context()

    def captions(self) -> Captions:
        """Captions in place of images."""
        return Captions("images")

    def caption_examples(
        self, captions: Sequence[Sequence[str]], targets: np.ndarray, space: LabelSpace
    ) -> CaptionExamples:
        """Each caption of each image with its labels, then sentences made of the labels.

        Captions in which no label is found are left out.
        """
        texts = [text for several in captions for text in several]
        of_image = np.repeat(np.arange(len(captions)), [len(several) for several in captions])
        if self.config.caption_labels == "images":
            found, report = targets[of_image], f"{len(texts):,} captions with their images' labels"
        else:
            file = self.config.synonyms
            aliases = read_aliases(file) if file else None
            found = nouns.label_captions(texts, space, aliases)
            report = nouns.report(found, space)
        kept = np.flatnonzero((found > 0).any(1))
        texts, found = [texts[i] for i in kept], found[kept]
        if self.config.templates:
            sentences, theirs = nouns.template_captions(space, self.config.templates)
            texts, found = [*texts, *sentences], np.concatenate([found, theirs])
        return CaptionExamples(texts, found, report)

    def prompts(self, names: Sequence[str], encoder: Encoder) -> tuple[PromptTokens, ...]:
        """Prompts with the context's ids among them, the same for both contexts."""
        return (context_prompts(self.global_context.vectors.shape[-2], names, encoder),)

    def encode_images(self, images: Array, *, progress: Progress | None = None) -> ImageFeatures:
        """Global feature [b d] and cells (patches) [b p d]; of a ResNet without positions."""
        tower = self.clip.image
        if not isinstance(tower, ModifiedResNet):
            return super().encode_images(images, progress=progress)
        cells = tower.cells(self.clip.prepare(images))
        pool = tower.attention_pool
        return ImageFeatures(pool(cells, positions=False), pool.project_cells(cells))

    def encode_labels(
        self,
        labels: LabelInputs,
        *,
        image_features: ImageFeatures | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Text features of global and local prompts: [2 c d], or [1 c d] without local ones."""
        contexts = [self.global_context()] + ([self.local_context()] if self.config.local else [])
        return jnp.stack([self.clip.encode_prompts(labels.prompts[0], v) for v in contexts])

    def streams(
        self, image_features: ImageFeatures, label_features: Array, labels: LabelInputs
    ) -> dict[str, Array]:
        """x_g and, with local prompts, x_l: float32 [b c] each."""
        pooled, tokens, mask, _ = image_features
        streams = {"global": cosine_logits(pooled, label_features[0], self.scale())}
        if self.config.local:
            local, config = normalize(label_features[1]), self.config
            sharpness = config.image_sharpness if mask is None else config.text_sharpness
            pooled = pool_regions(tokens, local, local, sharpness=sharpness, mask=mask)
            streams["local"] = self.scale() * pooled
        return streams

    def logits(
        self,
        image_features: ImageFeatures,
        label_features: Array,
        labels: LabelInputs,
        *,
        progress: Progress | None = None,
    ) -> Array:
        """The mean of global and local logits: float32 [b c]."""
        streams = self.streams(image_features, label_features, labels)
        return sum(streams.values()) / len(streams)

    def patch_scores(
        self, image_features: ImageFeatures, label_features: Array, labels: LabelInputs
    ) -> Array:
        """Cosines of regions with the local prompts, global ones without: float32 [b c p]."""
        texts = normalize(label_features[-1])
        return self.scale() * patch_products(normalize(image_features.tokens), texts)

    def loss(
        self,
        logits: Array,
        batch: Batch,
        labels: LabelInputs,
        progress: Progress,
        *,
        image_features: ImageFeatures | None = None,
        label_features: Any = None,
    ) -> tuple[Array, dict[str, Array]]:
        """The loss of each stream by itself, added up."""
        streams = self.streams(image_features, label_features, labels).values()
        return sum(super(TaIDPT, self).loss(x, batch, labels, progress)[0] for x in streams), {}
