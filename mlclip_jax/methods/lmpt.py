"""LMPT: prompts tuned with a class-specific embedding loss on captions, for long tails.

    context [k w] or [c k w] + names -> text tower -> label features o [c d]   (Eq. 1)
    image [b h w 3] -> image tower -> [b d];  logits = scale * cosine          (Eq. 2, no softmax)
    captions t [b d], text features computed once;  D = 1 - cos(t, o)  [b c]   (Eq. 3)
    loss = lambda * classification(logits) + (1 - lambda) * embedding(D)       (Eqs. 6-11)

Source: Xia et al., ALVR 2024, Tables 1-3; released code richard-peng-xia/LMPT. Both towers are
frozen. The model is CoOp's, and with lambda = 1 so is the training: the rows of Table 3 are this
method without one setting after the other, those of Table 2 its `loss`.

Deviations of `variant="paper"` (the default) from what the paper prints: lambda L_cls +
(1 - lambda) L_cse, where its Eq. 11 has the bracket elsewhere; sums over the classes of an image,
where its Algorithm 1 keeps the last class only; the distribution-balanced loss is its authors'
unless `loss` says "distribution_balanced(variant='paper')" (Eqs. 8-10 as printed).

`variant="released"` is the authors' code with its two crashes mended and nothing else: embeddings
of the caption's and the prompt's input tokens, caption token i beside prompt token i + 2, padding
included; positives pushed away and negatives drawn in; margin 0.2, weights with gamma 2, class
counts themselves (their softmax is 0 for most classes, which gives infinite margins and no
weights); mean over classes; captions cut after 75 characters. The rest of the release is settings,
for which see configs/lmpt: its loss, schedule, pixel statistics and BatchNorm in training mode.

Ours in both: float32, true lengths of names, an image without caption adds nothing to the embedding
loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array

from mlclip_jax import losses
from mlclip_jax.clip import CLIP, ImageFeatures
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.base import Batch, Captions, LabelInputs, Progress
from mlclip_jax.methods.coop import CoOp, CoOpConfig
from mlclip_jax.modules.prompts import Encoder


@dataclass(frozen=True)
class LMPTConfig(CoOpConfig):
    """Settings of LMPT, beside CoOp's.

    variant: "paper" or "released", see the module's docstring.
    classification_weight: lambda; 1 trains without captions.
    level: captions and prompts are compared as "sentence" features, or "token" by token; None is
        the variant's own.
    token_offset: by tokens, m where caption token i is compared with prompt token i + m. The
        release has a setting of its own for it, 2 in its scripts, whatever the context's length.
    class_aware_margin: margins eta / n_c^(1/4) in place of eta (Table 3; "paper" only).
    reweight: weigh classes by n_c^-gamma (Table 3; "paper" only, with class-aware margins).
    margin, gamma: eta and gamma; None is the variant's own.
    reduction: of the embedding loss over the classes of an image, "sum" (Eq. 7 read as it stands;
        "paper" only) or "mean"; None is the variant's own. Without weights, which add up to 1, the
        sum outweighs the classification loss.
    """

    loss: str = "distribution_balanced"
    ctx_init: str = "a photo of a"
    class_specific: bool = True
    variant: Literal["paper", "released"] = "paper"
    classification_weight: float = 0.5
    level: Literal["sentence", "token"] | None = None
    token_offset: int = 2
    class_aware_margin: bool = True
    reweight: bool = True
    margin: float | None = None
    gamma: float | None = None
    reduction: Literal["sum", "mean"] | None = None


class LMPT(CoOp):
    """Prompt tuning with class-specific embedding loss."""

    Config = LMPTConfig
    config: LMPTConfig

    def __init__(
        self,
        config: LMPTConfig,
        clip: CLIP,
        *,
        space: LabelSpace,
        encoder: Encoder,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, clip, space=space, encoder=encoder, rngs=rngs)
        if not 0 <= config.classification_weight <= 1:
            raise UserError(
                "method.classification_weight, the lambda of LMPT, lies in [0, 1], not at "
                f"{config.classification_weight}"
            )
        ablated = not (config.class_aware_margin and config.reweight)
        if config.variant == "released" and ablated:
            raise UserError(
                "the released variant has both margins and weights by class: method.variant='paper'"
                " goes without class_aware_margin or reweight"
            )
        if config.variant == "released" and config.reduction == "sum":
            raise UserError("the released variant is a mean over the classes: leave reduction out")
        if not 0 <= config.token_offset < clip.config.text.context_length:
            raise UserError(
                f"method.token_offset is {config.token_offset} and prompts have "
                f"{clip.config.text.context_length} tokens: fewer, and none below 0"
            )
        if config.reweight and not config.class_aware_margin:
            raise UserError(
                "method.reweight goes with class_aware_margin, as in Table 3: set reweight=False"
            )

    @property
    def level(self) -> str:
        """What is compared: "sentence" or "token"."""
        own = {"paper": "sentence", "released": "token"}[self.config.variant]
        return self.config.level or own

    def captions(self) -> Captions | None:
        """Tokens or features of the captions, unless lambda is 1."""
        if self.config.classification_weight == 1:
            return None
        read = "tokens" if self.level == "token" else "features"
        return Captions(read, max_characters=75 if self.config.variant == "released" else None)

    def needs_counts(self) -> bool:
        """Whether classification or embedding loss asks for class counts."""
        embedding = self.config.classification_weight < 1 and self.config.class_aware_margin
        return embedding or super().needs_counts()

    def distances(self, batch: Batch, labels: LabelInputs, label_features: Array) -> Array:
        """D, 1 - cosine of each image's caption and each class's prompt: float32 [b c].

        By tokens the sum of it over positions: caption token i and prompt token i + `token_offset`.
        """
        if self.level == "sentence":
            return losses.embedding_distances(batch.caption_features, label_features)
        text, prompts = self.clip.text, labels.prompts[0]
        context = self.context(labels.index)
        prefix = jnp.broadcast_to(prompts.prefix, (labels.num_classes, prompts.prefix.shape[0]))
        ids = jnp.concatenate([prefix, prompts.own], axis=1)
        length = text.config.context_length
        ids, captions = (
            jnp.pad(x, ((0, 0), (0, length - x.shape[1]))) for x in (ids, batch.caption_tokens)
        )
        embedded = text.embed(captions), text.embed(ids, context)
        return losses.token_distances(*embedded, offset=self.config.token_offset)

    def embedding_loss(self, distances: Array, batch: Batch, labels: LabelInputs) -> Array:
        """The class-specific embedding loss of D [b c], over images that have a caption."""
        config = self.config
        captions = batch.caption_features if self.level == "sentence" else batch.caption_tokens
        present = batch.mask & (captions != 0).any(-1)
        given = {
            key: value
            for key, value in (("margin", config.margin), ("gamma", config.gamma))
            if value is not None
        }
        where = present[:, None] & labels.mask
        if config.variant == "released":
            return losses.class_specific_embedding_released(
                distances, batch.targets, class_counts=labels.class_counts, where=where, **given
            )
        counts = labels.class_counts if config.class_aware_margin else None
        return losses.class_specific_embedding(
            distances,
            batch.targets,
            class_counts=counts,
            where=where,
            reweight=config.reweight,
            reduction="mean" if config.reduction == "mean" else "sum_classes_mean_images",
            **given,
        )

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
        """Eq. 11, and both of its parts."""
        share = self.config.classification_weight
        classification, _ = super().loss(logits, batch, labels, progress)
        if share == 1:
            return classification, {}
        distances = self.distances(batch, labels, label_features)
        embedding = self.embedding_loss(distances, batch, labels)
        parts = {"classification_loss": classification, "embedding_loss": embedding}
        return share * classification + (1 - share) * embedding, parts
