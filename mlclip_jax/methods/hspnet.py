"""HSPNet: hierarchical prompts and graphs for single-positive and partial labels.

    groups  "a photo of a {group}." -> text tower -> g [g d] -> GCN -> g*           (Eqs. 2, 8)
    context s = Meta(g*) [g k w], the same for all labels of a group                (Eq. 3)
    labels  [s of its group]["{label}."] -> text tower -> t [c d] -> GCN -> t*      (Eqs. 4, 9)
    image   [b h w 3] -> image tower -> [b d];  logits = scale * cosine(image, t*)  (Eq. 10)

Source: Wang et al., ACM MM 2023, Tables 1-8; released code jameslahm/HSPNet. The text tower is
frozen, so g and the graphs (cosine similarities of zero-shot features, Eqs. 5-7) are computed once,
as label inputs. The image tower trains. Groups are the label space's taxonomy; for one whose groups
have no telling names (clusters, "HSPNet-cluster") g is the mean of the labels' text features.

Deviations of the release, `variant="released"` (the default: its logs are the paper's Table 1),
from the paper's equations, `variant="paper"`:
- one GCN for both levels, with a learned gate as residual and no activation after its last layer;
  paper: one for each level, `H_0 + H_L`, an activation after every layer;
- the logits' scale is 10; paper: CLIP's learned temperature;
- the meta network reads the refined group features, as the paper's text says; its Eq. 3 has the
  unrefined ones. Both variants read the refined.
Ours from the release, in both variants: parameters that never get a gradient there (the parents'
context, the temperature) are no parameters here; the graphs come from the CLIP in use, where the
release reads files made by a script that is not published; the last incomplete batch of an epoch
is dropped. The paper does not say the GCN's depth and width, K, r, k or BatchNorm's mode: those are
the release's. The w of Table 5, which the paper indexes by label and likens to CoOp's, is one for
all labels here.

Graphs and K come from the labels that are scored: a label's features change with those beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mlclip_jax.clip import CLIP, ImageFeatures, PromptTokens, Segment
from mlclip_jax.clip.arrays import path_string
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.base import LabelInputs, Method, MethodConfig, Progress
from mlclip_jax.modules.graph import GCN, Variant, dependency_graph, pad_graph, relation
from mlclip_jax.modules.prompts import (
    Context,
    Encoder,
    GroupMetaNetwork,
    context_prompts,
    template_features,
)


@dataclass(frozen=True)
class HSPNetConfig(MethodConfig):
    """Settings of HSPNet.

    variant: "released" or "paper", see the module's docstring.
    n_ctx: context vectors k from the meta network, and as many shared ones where there are any.
    prompt: what stands before a label's name (Table 5): "group" the group's context s, "concat"
        [s, w] with a context w shared by all labels, "add" s + w, "shared" w alone (no groups).
    group_graph, label_graph: refine the features of groups and of labels (Tables 2 and 6: neither
        is HCP).
    logit_scale: None is the variant's own.
    """

    loss: str = "splc"
    train_image_encoder: bool = True
    batch_norm: Literal["frozen", "train", "frozen_first_epoch"] = "frozen_first_epoch"
    variant: Variant = "released"
    n_ctx: int = 4
    prompt: Literal["group", "concat", "add", "shared"] = "group"
    group_graph: bool = True
    label_graph: bool = True


class HSPNet(Method):
    """Hierarchical semantic prompt network."""

    Config = HSPNetConfig
    config: HSPNetConfig

    def __init__(
        self,
        config: HSPNetConfig,
        clip: CLIP,
        *,
        space: LabelSpace,
        encoder: Encoder,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, clip, space=space, encoder=encoder, rngs=rngs)
        if config.n_ctx < 1:
            raise UserError(f"hspnet needs n_ctx >= 1, not {config.n_ctx}")
        table, dim = clip.text.token_embedding[...], clip.config.embed_dim
        grouped = config.prompt != "shared"
        if grouped:
            self.meta = GroupMetaNetwork(dim, config.n_ctx, table.shape[-1], rngs=rngs)
        if config.prompt != "group":
            self.context = Context(
                n_ctx=config.n_ctx, words="", classes=None, table=table, encoder=encoder, rngs=rngs
            )
        one_for_both = config.variant == "released"
        if config.label_graph or (one_for_both and grouped and config.group_graph):
            self.gcn = GCN(dim, variant=config.variant, rngs=rngs)
        if not one_for_both and grouped and config.group_graph:
            self.group_gcn = GCN(dim, variant=config.variant, rngs=rngs)

    def prompts(self, names: Sequence[str], encoder: Encoder) -> tuple[PromptTokens, ...]:
        """Start of text and places for the context before "{label}."."""
        slots = self.config.n_ctx * (2 if self.config.prompt == "concat" else 1)
        return (context_prompts(slots, names, encoder),)

    def label_inputs(
        self, space: LabelSpace, encoder: Encoder, *, multiple_of: int = 1
    ) -> LabelInputs:
        """As every method's, with group features and graphs from the frozen text tower.

        Raises:
            UserError: the labels have no groups, or a prompt is too long.
        """
        labels = super().label_inputs(space, encoder, multiple_of=multiple_of)
        features = template_features(self.clip, space.prompt_names, encoder)  # [c d]
        if self.config.label_graph:
            graph = pad_graph(dependency_graph(relation(features)), labels.num_classes)
            labels = replace(labels, label_graph=graph)
        if self.config.prompt == "shared":
            return labels
        if space.taxonomy is None:
            raise UserError(
                f"hspnet needs groups, and the labels {space.name!r} have none: give 'cluster' or "
                "a YAML file of groups, as config.data.taxonomy in training, --taxonomy in tagging"
            )
        if space.taxonomy.named:
            names = space.taxonomy.group_prompt_names
            groups = template_features(self.clip, names, encoder)
        else:
            member = np.arange(len(space.taxonomy))[:, None] == np.array(space.taxonomy.group_of)
            groups = (member / member.sum(1, keepdims=True)).astype(np.float32) @ features
        labels = replace(labels, group_features=groups)
        if self.config.group_graph:
            labels = replace(labels, group_graph=dependency_graph(relation(groups)))
        return labels

    def group_contexts(self, labels: LabelInputs) -> Array:
        """Context vectors before the names: [g k w], or [1 k w] where no group has its own."""
        prompt = self.config.prompt
        if prompt == "shared":
            return self.context()[None]
        groups = labels.group_features
        if self.config.group_graph:
            gcn = self.gcn if self.config.variant == "released" else self.group_gcn
            groups = gcn(groups, labels.group_graph)
        contexts = self.meta(groups)
        if prompt == "concat":
            shared = jnp.broadcast_to(self.context(), contexts.shape)
            return jnp.concatenate([contexts, shared], axis=1)
        return contexts + self.context() if prompt == "add" else contexts

    def encode_labels(
        self,
        labels: LabelInputs,
        *,
        image_features: ImageFeatures | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Label features t* [c d]; a group's context is encoded once for all its labels."""
        text, dtype = self.clip.text, self.clip.dtype
        prompts = labels.prompts[0]
        start = text.embed(prompts.prefix[None, :1])
        names = text.embed(prompts.own)
        group = None if self.config.prompt == "shared" else labels.group
        segments = (
            Segment(start.astype(dtype)),
            Segment(self.group_contexts(labels).astype(dtype)),
            Segment(names.astype(dtype), group),
        )
        features = text.encode(segments, prompts.eot)
        return self.gcn(features, labels.label_graph) if self.config.label_graph else features

    def scale(self) -> Array | float:
        """10 in the release; CLIP's temperature in the paper."""
        if self.config.logit_scale is None and self.config.variant == "released":
            return 10.0
        return super().scale()

    def trainable(self, path: tuple[Any, ...], variable: nnx.Variable) -> bool:
        """Image tower, meta network, graphs and context; the paper's temperature."""
        learned = self.config.variant == "paper" and self.config.logit_scale is None
        if learned and path_string(path) == "clip/logit_scale":
            return True
        return super().trainable(path, variable)
