"""What every method is: four verbs over one CLIP, and a filter that says what trains.

images --encode_images--> ImageFeatures  pooled [b d], tokens [b p d]
labels --encode_labels--> label features [c d]
(image features, label features) --logits--> [b c]
(logits, targets) --loss--> scalar
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from flax import nnx
from jax import Array

from mlclip_jax import losses
from mlclip_jax.clip import CLIP, CLIPConfig, ImageFeatures, PromptTokens
from mlclip_jax.clip.arrays import path_string
from mlclip_jax.clip.resnet import ModifiedResNet
from mlclip_jax.clip.vit import VisionTransformer
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.losses import Progress
from mlclip_jax.modules.heads import cosine_logits
from mlclip_jax.modules.prompts import Encoder


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One batch on the device.

    images uint8 [b h w 3], or cached features by name (see `image_features`); targets
    int8 [b c] (+1 positive, 0 unobserved, -1 negative); index int32 [b], the examples' rows in
    their source; mask bool [b], False for the padding of an evaluation's last batch;
    caption_tokens int32 [b t] or caption_features [b d] where the method reads captions, zeros for
    an image without any.
    """

    images: Array | dict[str, Array]
    targets: Array
    index: Array
    mask: Array
    caption_tokens: Array | None = None
    caption_features: Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LabelInputs:
    """A label space as arrays; an argument of the step, never part of a model.

    prompts: one set of tokens for each template; index int32 [c], each class's row in its label
    space; mask bool [c], False for classes that only pad c to a multiple of the devices (they
    repeat class 0); group int32 [c], where the space has a taxonomy; class_counts float32 [c] and
    num_images float32 [], positives of each class and images in training, for losses that ask.
    features float32 [c d]: text features of prompts in which nothing trains, computed once.
    For methods with graphs (`mlclip_jax.modules.graph`): label_graph float32 [c c], group_graph
    float32 [g g], group_features float32 [g d].
    """

    prompts: tuple[PromptTokens, ...]
    index: Array
    mask: Array
    group: Array | None = None
    class_counts: Array | None = None
    num_images: Array | None = None
    features: Array | None = None
    label_graph: Array | None = None
    group_graph: Array | None = None
    group_features: Array | None = None

    @property
    def num_classes(self) -> int:
        """c, padding included."""
        return self.mask.shape[0]

    def take(self, rows: Array, taken: Array) -> LabelInputs:
        """Some of the classes: rows int32 [k], of which bool [k] says whether they count.

        Graphs and features of groups stay whole.
        """

        def of(leaf: Array) -> Array:
            return jax.numpy.asarray(leaf)[rows]

        names = ("index", "group", "class_counts", "features")
        some = {name: leaf for name in names if (leaf := getattr(self, name)) is not None}
        prompts = tuple(PromptTokens(p.prefix, of(p.own), of(p.eot)) for p in self.prompts)
        return replace(self, prompts=prompts, mask=of(self.mask) & taken, **jax.tree.map(of, some))

    def with_counts(self, counts: np.ndarray, num_images: int) -> LabelInputs:
        """The same with the positives of each class in training, [c] without padding."""
        return replace(
            self,
            class_counts=counts.astype(np.float32)[np.asarray(self.index)],
            num_images=np.asarray(num_images, np.float32),
        )


@dataclass(frozen=True)
class Captions:
    """How a method reads captions in training (`mlclip_jax.training.captions`).

    Attributes:
        read: "tokens" puts their ids into the batch, "features" their text features, computed
            once, and "images" trains on captions in place of images.
        max_characters: cut them before they are tokenised; None: only at the tower's context.
    """

    read: Literal["tokens", "features", "images"]
    max_characters: int | None = None


@dataclass(frozen=True)
class CaptionExamples:
    """Captions to train on: m texts, their targets int8 [m c], and what there is to say of them."""

    texts: Sequence[str]
    targets: np.ndarray
    report: str


def padded_index(classes: int, multiple_of: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and mask of each class after padding with class 0: int32 [c], bool [c]."""
    total = -(-classes // multiple_of) * multiple_of
    index = np.zeros((total,), np.int32)
    index[:classes] = np.arange(classes)
    return index, np.arange(total) < classes


@dataclass(frozen=True)
class MethodConfig:
    """Settings that every method has.

    loss: by name, with its settings: `"asymmetric(gamma_negative=2)"`.
    logit_scale: fixed temperature of the cosine; None takes the CLIP's own.
    train_image_encoder: train the image tower too.
    batch_norm: statistics of a ResNet's BatchNorm while training: "frozen" keeps the CLIP's,
        "train" uses and records the batch's, "frozen_first_epoch" does so from the second epoch
        on. A ViT has none.
    """

    loss: str = "binary_cross_entropy"
    logit_scale: float | None = None
    train_image_encoder: bool = False
    batch_norm: Literal["frozen", "train", "frozen_first_epoch"] = "frozen"


class Method(nnx.Module):
    """Base of all methods: CLIP's own image features, cosine logits, a loss by name.

    A method is one file in `mlclip_jax/methods`, found by its module's name; it holds one
    subclass of this, whose `Config` is the frozen dataclass of its settings. The trainer calls
    the verbs below and nothing else.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    #: Settings that name files; a run keeps their full paths.
    files: ClassVar[tuple[str, ...]] = ()
    #: Whether the head reads patch tokens; if not, they are never computed.
    reads_tokens: ClassVar[bool] = False
    #: Whether label features change with the image (CoCoOp), and are [b c d].
    labels_see_images: ClassVar[bool] = False
    #: Whether a logit depends on which labels are scored together (MKT): evaluation then scores the
    #: labels of a task by themselves.
    compares_labels: bool = False
    #: What a user is shown of a logit: its sigmoid, a softmax over the labels, or the logit itself,
    #: "relative" where it means something among the labels of an image alone, else "raw".
    score_kind: Literal["sigmoid", "softmax", "relative", "raw"] = "sigmoid"
    #: The classes that parameters of each class belong to; None: any labels can be scored.
    own_classes: tuple[str, ...] | None = None

    def __init__(
        self,
        config: MethodConfig,
        clip: CLIP,
        *,
        space: LabelSpace,
        encoder: Encoder,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        losses.get(self.loss_name)  # an unknown loss is an error now, not at the first step
        self.clip = clip

    @property
    def loss_name(self) -> str:
        """The loss by name, with its settings."""
        return self.config.loss

    @classmethod
    def image_size_of(cls, config: MethodConfig, clip: CLIPConfig) -> int:
        """Pixels of a side of the images that a method takes, known before it is made."""
        return clip.image.image_size

    @property
    def image_size(self) -> int:
        """Pixels of a side of the images it takes."""
        return self.image_size_of(self.config, self.clip.config)

    def image_settings(self) -> str:
        """The settings that image features depend on, which tell cached ones apart."""
        own = type(self).encode_images is not Method.encode_images
        return repr(self.config) if own else ""

    @property
    def image_tower(self) -> VisionTransformer | ModifiedResNet:
        """The tower that the image features come from."""
        return self.clip.image

    def prompts(self, names: Sequence[str], encoder: Encoder) -> tuple[PromptTokens, ...]:
        """Tokenised prompts of these names (host arrays); none where nothing is to be encoded."""
        return ()

    def label_inputs(
        self, space: LabelSpace, encoder: Encoder, *, multiple_of: int = 1
    ) -> LabelInputs:
        """The label space as arrays, classes padded to a multiple of the devices.

        Raises:
            UserError: a prompt too long for the text tower; parameters of each class, and other
                classes than theirs, or the same in another order; or one label, where scores
                compare labels.
        """
        self.check_classes(space)
        if self.score_kind == "relative" and len(space) == 1:
            raise UserError("the method compares labels and there is one: give two or more")
        index, mask = padded_index(len(space), multiple_of)
        names = [space.prompt_names[i] for i in index]
        group = None
        if space.taxonomy is not None:
            group = np.asarray(space.taxonomy.group_of, np.int32)[index]
        return LabelInputs(self.prompts(names, encoder), index, mask, group)

    def check_classes(self, space: LabelSpace) -> None:
        """Raises unless the labels are those that parameters of each class belong to.

        Raises:
            UserError: they are others, or the same in another order.
        """
        if self.own_classes not in (None, space.names):
            raise UserError(
                f"the parameters of each class were made for {len(self.own_classes)} classes and "
                f"mean nothing for the {len(space)} of {space.name!r}, which are others or in "
                "another order; to score other labels train a method, or this one with "
                "settings, that has no parameters of classes"
            )

    def encode_images(self, images: Array, *, progress: Progress | None = None) -> ImageFeatures:
        """uint8 [b h w 3] -> features in the joint space; `progress` of training, None outside."""
        train_bn = self.trains_batch_norm(progress)
        return self.clip.encode_images(images, tokens=self.reads_tokens, train_bn=train_bn)

    def trains_batch_norm(self, progress: Progress | None) -> bool | Array:
        """Whether BatchNorm reads and records the batch's statistics now, by `batch_norm`."""
        if progress is None or self.config.batch_norm == "frozen":
            return False
        return self.config.batch_norm == "train" or progress.epoch > 0

    def choose_labels(
        self, batch: Batch, labels: LabelInputs, progress: Progress
    ) -> tuple[Batch, LabelInputs, dict[str, Array]]:
        """The labels that a training step sees: batch, labels, and scalars to log; here all."""
        return batch, labels, {}

    def encode_labels(
        self,
        labels: LabelInputs,
        *,
        image_features: ImageFeatures | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Label features [c d]; methods whose prompts see the image read `image_features`."""
        raise TypeError(f"{type(self).__name__} defines no label features")

    def scale(self) -> Array | float:
        """The factor of the cosine."""
        if self.config.logit_scale is not None:
            return self.config.logit_scale
        return jax.numpy.exp(self.clip.logit_scale[...])

    def logits(
        self,
        image_features: ImageFeatures,
        label_features: Array,
        labels: LabelInputs,
        *,
        progress: Progress | None = None,
    ) -> Array:
        """float32 [b c]; padded classes are columns like others, masked by who reads them.

        Args:
            image_features, label_features, labels: what is compared, and what is padding.
            progress: of training, for heads with random numbers; None outside.
        """
        return cosine_logits(image_features.pooled, label_features, self.scale())

    def streams(
        self, image_features: ImageFeatures, label_features: Array, labels: LabelInputs
    ) -> dict[str, Array]:
        """What the logits are put together from, by name, float32 [b c] each; {}: of one piece."""
        return {}

    def patch_scores(
        self, image_features: ImageFeatures, label_features: Any, labels: LabelInputs
    ) -> Array:
        """The score of each patch with each label, for maps: float32 [b c p].

        Of methods that pool CLIP's own features: the logits of a patch in the image's place.
        """

        def of(patch: Array) -> Array:
            return self.logits(ImageFeatures(patch), label_features, labels)

        return jax.vmap(of, in_axes=1, out_axes=2)(image_features.tokens)

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
        """The scalar to minimise, and further scalars to log.

        Args:
            logits: float32 [b c].
            batch, labels: targets, masks and counts.
            progress: of training.
            image_features, label_features: what the logits were made of, for losses on features.
        """
        loss = losses.get(self.loss_name)(
            logits,
            batch.targets,
            where=batch.mask[:, None] & labels.mask[None],
            progress=progress,
            class_counts=labels.class_counts,
            num_images=labels.num_images,
        )
        return loss, {}

    def captions(self) -> Captions | None:
        """How training reads captions; None: not at all."""
        return None

    def caption_examples(
        self, captions: Sequence[Sequence[str]], targets: np.ndarray, space: LabelSpace
    ) -> CaptionExamples:
        """What training sees where captions stand for images.

        Args:
            captions: those of each training image [n].
            targets: int8 [n c] of the images.
            space: the c labels.
        """
        raise TypeError(f"{type(self).__name__} trains on images")

    def starting_leaves(self, known: Collection[str]) -> Mapping[str, np.ndarray]:
        """Values by path that training starts from and that are in other files than the CLIP's.

        They are no business of the constructor: where a trained method is built again, a checkpoint
        has the values, and the file may be gone.

        Args:
            known: paths that an earlier stage has given values.

        Raises:
            UserError: a file is missing or does not fit.
        """
        return {}

    def needs_counts(self) -> bool:
        """Whether the loss asks for the class counts of the training labels."""
        return not losses.get(self.loss_name).needs.isdisjoint({"class_counts", "num_images"})

    def trainable(self, path: tuple[Any, ...], variable: nnx.Variable) -> bool:
        """Whether the parameter at this path is trained: the method's own, the image tower's."""
        name = path_string(path)
        wanted = self.config.train_image_encoder and name.startswith("clip/image/")
        return isinstance(variable, nnx.Param) and (wanted or not name.startswith("clip/"))


def image_features(
    method: Any, images: Array | dict[str, Array], **progress: Progress
) -> ImageFeatures:
    """A method's features of pixels, or those that were computed before, in its CLIP's dtype.

    Args:
        method: a `Method`; for pixels, anything with `encode_images`.
        images: uint8 [b h w 3]; or "pooled" [b d] and perhaps "tokens" [b p d] as a feature cache
            stores them, int8 with "pooled_scale" [b 1] and "tokens_scale" [b p 1]; of captions
            also "mask" bool [b p], or "ids" int32 [b t] alone, which are encoded here.
        progress: of training, by this name.
    """
    if not isinstance(images, dict):
        return method.encode_images(images, **progress)
    if "ids" in images:
        return method.clip.encode_captions(images["ids"])

    def restore(name: str) -> Array | None:
        values, scale = images.get(name), images.get(f"{name}_scale")
        values = values if scale is None else values.astype(scale.dtype) * scale
        return None if values is None else values.astype(method.clip.dtype)

    return ImageFeatures(restore("pooled"), restore("tokens"), images.get("mask"))
