"""CoOp for many labels: learned context vectors in place of a template's words.

    context [k w] + names [c s] -> text tower -> label features [c d]
    image [b h w 3] -> image tower -> [b d];  logits = scale * cosine (+ bias)

Source: Zhou et al., IJCV 2022, Eqs. 2-3; the multi-label form with any loss is the baseline of
HSPNet ("SPL", "LargeLoss*", "SPLC*") and of LMPT.

Deviations from the release (which is single-label):
- class-specific context may start from words: each class gets its own copy; the release then
  silently shares one context;
- the number of context vectors that words give is their number of tokens, not of spaces;
- name lengths are those of the tokenizer at every class position;
- float32 context, where the release trains float16 values without loss scaling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
from flax import nnx
from jax import Array

from mlclip_jax.clip import CLIP, ImageFeatures, PromptTokens
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.base import LabelInputs, Method, MethodConfig, Progress
from mlclip_jax.modules.graph import GCN, dependency_graph, pad_graph, relation
from mlclip_jax.modules.prompts import (
    ClassPosition,
    Context,
    Encoder,
    context_prompts,
    template_features,
)


@dataclass(frozen=True)
class CoOpConfig(MethodConfig):
    """Settings of CoOp.

    n_ctx: context vectors k, where they start at random (16 in the paper).
    ctx_init: words to start from instead ("a photo of a"); k is then their number of tokens.
    class_specific: a context for every class (CSC) in place of one for all.
    class_position: where the name stands among the context vectors.
    logit_bias: learn a scalar added to all logits, starting at -0.2 * scale: CLIP's cosines of
        absent labels are far above zero, where the sigmoid saturates.
    label_graph: refine the label features by a graph convolution over label similarities, as
        HSPNet does ("SPL + GCN" of its Table 2, in the released form).
    """

    n_ctx: int = 16
    ctx_init: str = ""
    class_specific: bool = False
    class_position: ClassPosition = "end"
    logit_bias: bool = False
    label_graph: bool = False


class CoOp(Method):
    """Context optimisation."""

    Config = CoOpConfig
    config: CoOpConfig

    def __init__(
        self,
        config: CoOpConfig,
        clip: CLIP,
        *,
        space: LabelSpace,
        encoder: Encoder,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, clip, space=space, encoder=encoder, rngs=rngs)
        self.context = Context(
            n_ctx=config.n_ctx,
            words=config.ctx_init,
            classes=len(space) if config.class_specific else None,
            table=clip.text.token_embedding[...],
            encoder=encoder,
            rngs=rngs,
        )
        # Row i of a class-specific context belongs to class i of this space, and to no other.
        self.own_classes = space.names if config.class_specific else None
        if config.label_graph:
            self.gcn = GCN(clip.config.embed_dim, variant="released", rngs=rngs)
        if config.logit_bias:
            self.bias = nnx.Param(jnp.asarray(-0.2 * self.scale(), jnp.float32))

    def prompts(self, names: Sequence[str], encoder: Encoder) -> tuple[PromptTokens, ...]:
        """Prompts with the context's ids among them."""
        return (
            context_prompts(
                self.context.vectors.shape[-2],
                names,
                encoder,
                position=self.config.class_position,
                class_specific=self.config.class_specific,
            ),
        )

    def label_inputs(
        self, space: LabelSpace, encoder: Encoder, *, multiple_of: int = 1
    ) -> LabelInputs:
        """As every method's; class-specific context fits no other label space.

        Raises:
            UserError: class-specific context and other classes, or the same in another order.
        """
        labels = super().label_inputs(space, encoder, multiple_of=multiple_of)
        if not self.config.label_graph:
            return labels
        features = template_features(self.clip, space.prompt_names, encoder)
        graph = dependency_graph(relation(features))
        return replace(labels, label_graph=pad_graph(graph, labels.num_classes))

    def encode_labels(
        self,
        labels: LabelInputs,
        *,
        image_features: ImageFeatures | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Text features of the learned prompts, through the graph where there is one: [c d]."""
        features = self.clip.encode_prompts(labels.prompts[0], self.context(labels.index))
        return self.gcn(features, labels.label_graph) if self.config.label_graph else features

    def logits(
        self,
        image_features: ImageFeatures,
        label_features: Array,
        labels: LabelInputs,
        *,
        progress: Progress | None = None,
    ) -> Array:
        """Scaled cosine, plus the bias where there is one: float32 [b c]."""
        x = super().logits(image_features, label_features, labels, progress=progress)
        return x + self.bias[...] if self.config.logit_bias else x
