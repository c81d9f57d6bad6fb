"""MKT: open vocabulary by two streams of image features, distillation and a tuned prompt.

    image -> first blocks, frozen, run once -> student: last blocks -> e_cls [b d], e_patch [b p d]
                                            -> teacher: CLIP's own  -> o_dist [b d]
    (a student from ImageNet is a tower of its own, from the pixels on)
    labels "There is a {label} in the scene" -> text tower -> z [c d]
    global = <z, e_cls>;  local = mean of the k highest <z, e_patch>           [b c]
    s = (local / |local| + global / |global|) / 2, lengths over the labels     (Eq. 3)
    stage "image":  ranking(s) + lambda |o_dist - e_cls|                       (Eqs. 4-6)
    stage "prompt": ranking(s), of which only the template's words train       (Eq. 7)

Source: He et al., AAAI 2023, Tables 1-4; released code sunanhe/MKT. Any labels can be scored
afterwards, without training; scores depend on which are scored together, and a task of some of the
labels is scored by itself.

Deviations of `variant="released"` (the default) from the paper: scores of unit length over the
labels, averaged, in place of the sum of Eq. 3; the violation of a pair is 1 + s_negative -
s_positive (Eq. 4 has the sign the other way round), averaged over the pairs that violate; both
streams share CLIP's projection, where the paper has two linear layers for the local one; the mean
of |o_dist - e_cls| over the features, where the norm of Eq. 5 is d times as much. With
`variant="paper"` these are the paper's, but for the sign.

From the release differ: in the prompt's stage it trains the whole table of token embeddings and
puts the names' own back, so that start and end of text move with the template's words (`tune_ends`)
and the decay shrinks rows that nobody reads; images without a positive label are taken out of a
batch there and masked here; its k is 16 in training and 18 in its inference.py, which takes the
names from the tuned table.

The student starts from CLIP, as in the release; the paper has a ViT-B/16 trained on ImageNet-1k,
which `student` names. It sees the CLIP's pixels, has the sizes of the CLIP's tower, and a
projection that starts at random. The file is read where training starts and never again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mlclip_jax import losses
from mlclip_jax.clip import CLIP, ImageFeatures, PromptTokens
from mlclip_jax.clip.arrays import path_string
from mlclip_jax.clip.config import ViTConfig
from mlclip_jax.clip.plain_vit import plain_config, read_plain
from mlclip_jax.clip.transformer import Linear
from mlclip_jax.clip.vit import VisionTransformer
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace, split_template
from mlclip_jax.labels.word_vectors import read_word_vectors, vector_size
from mlclip_jax.methods.base import Batch, LabelInputs, Method, MethodConfig, Progress
from mlclip_jax.modules.heads import normalize_over_labels, patch_products, products, top_patches
from mlclip_jax.modules.prompts import (
    Context,
    Encoder,
    template_features,
    tuned_prompts,
)

#: What a variant has for settings that are None.
VARIANTS = {
    "released": {
        "loss": "ranking(skip_without_positives=True)",
        "local_head": "shared",
        "score": "normalized",
        "distillation": "mean",
    },
    "paper": {
        "loss": "ranking(pairs='sum', reduction='sum', skip_without_positives=True)",
        "local_head": "mlp",
        "score": "sum",
        "distillation": "sum",
    },
}
#: Parts of a tower before its blocks.
BEFORE_BLOCKS = ("patch_embed", "class_embedding", "position_embedding", "norm_pre")


@dataclass(frozen=True)
class MKTConfig(MethodConfig):
    """Settings of MKT; None is the variant's own.

    tune: what a stage trains, the "image" tower (first) or the "prompt" (second).
    variant: "released" or "paper", see the module's docstring.
    template: of the labels; its words are what the prompt's stage trains.
    tune_ends: train the embeddings of start and end of text too, as the release does.
    train_blocks: last blocks that train, with what follows them (2 of 12 in the release); "all"
        trains the whole tower.
    student: file or folder with a ViT of ImageNet to start from (see `mlclip_jax.clip.plain_vit`);
        none: from the CLIP.
    word_vectors: file of word vectors (GloVe's text form) whose means stand for the labels in
        place of text features (Table 3), without distillation and prompt; the projection then
        starts at random.
    streams: "both", or "local" or "global" alone (Table 4).
    top_k: k of the local stream (Figure 5b).
    local_head: "shared" with the global stream, or an "mlp" of its own, which starts at random.
    score: "normalized" over the labels, or the plain "sum" of Eq. 3.
    distillation_weight: lambda (Figure 5a); 0 trains without teacher (Table 2).
    distillation: "mean" or "sum" over the features.
    """

    loss: str | None = None
    tune: Literal["image", "prompt"] = "image"
    variant: Literal["released", "paper"] = "released"
    template: str = "There is a {} in the scene"
    tune_ends: bool = False
    train_blocks: int | Literal["all"] = 2
    student: str = ""
    word_vectors: str = ""
    streams: Literal["both", "local", "global"] = "both"
    top_k: int = 18
    local_head: Literal["shared", "mlp"] | None = None
    score: Literal["normalized", "sum"] | None = None
    distillation_weight: float = 1.0
    distillation: Literal["mean", "sum"] | None = None


class LocalHead(nnx.Module):
    """Linear-tanh-linear on the states of patches, in place of the projection."""

    def __init__(self, width: int, dim: int, *, rngs: nnx.Rngs) -> None:
        self.linear1 = Linear(width, dim, rngs=rngs)
        self.linear2 = Linear(dim, dim, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[b p w] -> [b p d]."""
        return self.linear2(jnp.tanh(self.linear1(x)))


class MKT(Method):
    """Multi-modal knowledge transfer."""

    Config = MKTConfig
    config: MKTConfig
    files = ("student", "word_vectors")
    reads_tokens = True

    def __init__(
        self,
        config: MKTConfig,
        clip: CLIP,
        *,
        space: LabelSpace,
        encoder: Encoder,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, clip, space=space, encoder=encoder, rngs=rngs)
        self._check(clip)
        self.compares_labels = self.own("score") == "normalized"
        self.score_kind = "relative" if self.compares_labels else "raw"
        sizes = clip.config
        if config.student:
            plain, remat = plain_config(sizes.image), clip.image.remat
            self.student = VisionTransformer(plain, sizes.embed_dim, remat=remat, rngs=rngs)
        else:
            self.student = student_of(clip.image, self.shared, start=self.whole)
        width, dim = self.student.projection.shape
        if config.word_vectors:
            dim = vector_size(config.word_vectors)
            start = nnx.initializers.normal(width**-0.5)
            self.student.projection = nnx.Param(start(rngs.params(), (width, dim)))
        if config.streams != "global" and self.own("local_head") == "mlp":
            self.local_head = LocalHead(width, dim, rngs=rngs)
        table = clip.text.token_embedding[...]
        self.context = Context(
            n_ctx=0,
            words=" ".join(split_template(config.template)),
            classes=None,
            table=table,
            encoder=encoder,
            rngs=rngs,
        )
        if config.tune_ends:
            self.ends = nnx.Param(table[jnp.array([encoder.sot, encoder.eot])])

    def _check(self, clip: CLIP) -> None:
        """Raises unless the settings go with this CLIP."""
        config, sizes = self.config, clip.config.image
        if not isinstance(sizes, ViTConfig):
            raise UserError("mkt pools patches and needs a ViT: take backbone.name='ViT-B/16'")
        if config.train_blocks != "all" and not 1 <= config.train_blocks <= sizes.layers:
            raise UserError(
                f"method.train_blocks is {config.train_blocks} and the image tower has "
                f"{sizes.layers} blocks: between 1 and those, or 'all' for the whole tower"
            )
        if config.streams == "global":
            for name in ("top_k", "local_head"):
                if getattr(config, name) != getattr(MKTConfig, name):
                    raise UserError(f"method.{name} has no effect where streams='global'")
        elif not 1 <= config.top_k <= sizes.grid**2:
            raise UserError(
                f"method.top_k is {config.top_k} and images have {sizes.grid**2} patches: between "
                "1 and those"
            )
        if not config.distillation_weight >= 0:
            raise UserError(
                "method.distillation_weight, the lambda of MKT, must be 0 or more, not "
                f"{config.distillation_weight:g}"
            )
        before, after = split_template(config.template)
        if not (before + after).strip():
            raise UserError(
                f"method.template is {config.template!r}: it needs words beside the label, which "
                "are what the prompt's stage trains"
            )
        if before[-1:].isalnum() or after[:1].isalnum():
            raise UserError(
                f"method.template is {config.template!r}: it needs a blank between the label and "
                "each word, whose embeddings the prompt's stage trains"
            )
        if config.word_vectors and (config.distillation_weight or config.tune == "prompt"):
            raise UserError(
                "method.word_vectors has no teacher and no prompt: set distillation_weight=0 and "
                "tune='image'"
            )
        for name in ("logit_scale", "train_image_encoder"):
            if getattr(config, name):
                raise UserError(f"method.{name} has no effect on mkt: see tune and score")

    @property
    def whole(self) -> bool:
        """Whether the student is a whole tower, and shares nothing with its teacher."""
        return bool(self.config.student) or self.config.train_blocks == "all"

    @property
    def fixed(self) -> int:
        """First blocks that do not train, nor what is before them."""
        blocks = self.config.train_blocks
        return 0 if blocks == "all" else self.clip.config.image.layers - blocks

    @property
    def shared(self) -> int:
        """First blocks that student and teacher share."""
        return 0 if self.whole else self.fixed

    @property
    def image_tower(self) -> VisionTransformer:
        """The student."""
        return self.student

    def own(self, name: str) -> str:
        """A setting, or what the variant has for it."""
        value = getattr(self.config, name)
        return VARIANTS[self.config.variant][name] if value is None else value

    @property
    def loss_name(self) -> str:
        """The ranking loss of the variant, or another that is set."""
        return self.own("loss")

    def prompts(self, names: Sequence[str], encoder: Encoder) -> tuple[PromptTokens, ...]:
        """The template with its words' places; none where the image tower trains."""
        if self.config.tune == "image":
            return ()
        ends = self.config.tune_ends
        return (tuned_prompts(self.config.template, names, encoder, ends=ends),)

    def label_inputs(
        self, space: LabelSpace, encoder: Encoder, *, multiple_of: int = 1
    ) -> LabelInputs:
        """As every method's; text features of the template where the image tower trains."""
        labels = super().label_inputs(space, encoder, multiple_of=multiple_of)
        if self.config.tune == "prompt":
            return labels
        if self.config.word_vectors:
            vectors = read_word_vectors(self.config.word_vectors, space.prompt_names)
            return replace(labels, features=jnp.asarray(vectors, jnp.float32)[labels.index])
        features = template_features(self.clip, space.prompt_names, encoder, self.config.template)
        return replace(labels, features=features[labels.index])

    def encode_images(self, images: Array, *, progress: Progress | None = None) -> ImageFeatures:
        """The student's e_cls [b d] and e_patch [b p d]; in the image stage the teacher's too.

        Without a local stream training has no e_patch, which maps read.
        """
        tower, pixels = self.clip.image, self.clip.prepare(images)
        distils = progress is not None and self._distils()
        if self.whole:
            x = self.student.lower(pixels, 0)
            below = tower.lower(pixels, 0) if distils else None
        else:
            x = below = tower.lower(pixels, self.shared)
        if progress is not None and self.config.streams == "global":
            found = self.student.upper(x, 0, tokens=False)
        else:
            states = self.student.hidden_states(x, 0)
            local = getattr(self, "local_head", self.student.project)
            found = ImageFeatures(self.student.project(states[:, 0]), local(states[:, 1:]))
        if distils:
            teacher = tower.upper(below, self.shared, tokens=False).pooled
            found = found._replace(teacher=teacher)
        return found

    def _distils(self) -> bool:
        return self.config.tune == "image" and self.config.distillation_weight > 0

    def encode_labels(
        self,
        labels: LabelInputs,
        *,
        image_features: ImageFeatures | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """z, not normalised: [c d]; computed once where the prompt does not train."""
        if self.config.tune == "image":
            return labels.features
        context = self.context()
        if self.config.tune_ends:
            context = jnp.concatenate([context, self.ends[...]])
        return self.clip.encode_prompts(labels.prompts[0], context)

    def scores(self, image_features: ImageFeatures, label_features: Array) -> dict[str, Array]:
        """The streams before they are joined: float32 [b c] each."""
        found = {}
        if self.config.streams != "global":
            found["local"] = top_patches(image_features.tokens, label_features, self.config.top_k)
        if self.config.streams != "local":
            found["global"] = products(image_features.pooled, label_features)
        return found

    def streams(
        self, image_features: ImageFeatures, label_features: Array, labels: LabelInputs
    ) -> dict[str, Array]:
        """Both streams as they are joined (Figure 4): float32 [b c] each."""
        streams = self.scores(image_features, label_features)
        if self.own("score") == "sum":
            return streams
        return {name: normalize_over_labels(x, labels.mask) for name, x in streams.items()}

    def logits(
        self,
        image_features: ImageFeatures,
        label_features: Array,
        labels: LabelInputs,
        *,
        progress: Progress | None = None,
    ) -> Array:
        """Eq. 3: float32 [b c]."""
        streams = self.streams(image_features, label_features, labels)
        total = sum(streams.values())
        return total if self.own("score") == "sum" else total / len(streams)

    def patch_scores(
        self, image_features: ImageFeatures, label_features: Array, labels: LabelInputs
    ) -> Array:
        """<z, e_patch>, what the local stream takes the highest of: float32 [b c p]."""
        return patch_products(image_features.tokens, label_features)

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
        """Eq. 6, and both of its parts; Eq. 7 in the prompt's stage."""
        ranking, _ = super().loss(logits, batch, labels, progress)
        if not self._distils():
            return ranking, {}
        distillation = losses.l1_distillation(
            image_features.pooled,
            image_features.teacher,
            where=batch.mask & (batch.targets > 0).any(-1),
            features=self.own("distillation"),
        )
        parts = {"ranking_loss": ranking, "distillation_loss": distillation}
        return ranking + self.config.distillation_weight * distillation, parts

    def trainable(self, path: tuple[Any, ...], variable: nnx.Variable) -> bool:
        """The student and the local head, or the words of the template."""
        name = path_string(path)
        if not isinstance(variable, nnx.Param):
            return False
        if self.config.tune == "prompt":
            return name.startswith(("context/", "ends"))
        fixed: tuple[str, ...] = ()
        if self.whole and self.config.train_blocks != "all":
            parts = (*BEFORE_BLOCKS, *(f"blocks/{i}/" for i in range(self.fixed)))
            fixed = tuple(f"student/{part}" for part in parts)
        return name.startswith(("student/", "local_head/")) and not name.startswith(fixed)

    def starting_leaves(self, known: Collection[str]) -> Mapping[str, np.ndarray]:
        """The student's weights from its file, unless an earlier stage has trained them."""
        if not self.config.student or "student/class_embedding" in known:
            return {}
        found = read_plain(self.config.student, self.student)
        return {f"student/{path}": value for path, value in found.items()}


def student_of(tower: VisionTransformer, first: int, *, start: bool) -> VisionTransformer:
    """A copy of a tower from a block on; with its patch embedding only where it is the `start`."""
    student = nnx.clone(tower)
    student.blocks = nnx.List(list(student.blocks)[first:])
    if not start:
        for name in BEFORE_BLOCKS:
            delattr(student, name)
    return student
