"""A trained method as a plain classifier: image tower and matrix, no text tower, no prompts.

    images [b h w 3] -> image tower -> [b d];  logits = unit(image) @ matrix^T + bias

Label features that do not depend on the image are constants once training is over. Where logits
are `scale * cosine(image, label) + bias`, scale and label features fold into `matrix` [c d], and
prompts, graphs and text tower cost nothing any more.

Source: Wang et al., ACM MM 2023 (HSPNet), section 3.3.

On disk a classifier is a folder of `model.safetensors`, every leaf under its own path, and
`classifier.json`: sizes, pixel statistics, preprocessing, label space, and what it was made of.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mlclip_jax import __version__
from mlclip_jax.clip import CLIP, ImageFeatures, ResNetConfig, ViTConfig
from mlclip_jax.clip.arrays import check_shapes, open_safetensors, path_string
from mlclip_jax.clip.config_files import read_json
from mlclip_jax.clip.resnet import ModifiedResNet
from mlclip_jax.clip.vit import VisionTransformer
from mlclip_jax.data.transforms import Preprocess
from mlclip_jax.errors import UserError, make_folder
from mlclip_jax.fields import from_mapping
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.base import LabelInputs, Method, Progress, padded_index
from mlclip_jax.modules.heads import normalize, products
from mlclip_jax.modules.prompts import Encoder

if TYPE_CHECKING:
    from mlclip_jax.training.build import Trained

WEIGHTS, DESCRIPTION = "model.safetensors", "classifier.json"


@dataclass(frozen=True)
class Origin:
    """What a classifier was made of.

    method, backbone: their names; digest: SHA-256 of the backbone's files before training; step
    and weights: of the checkpoint; version: of this package when it was made.
    """

    method: str
    backbone: str
    digest: str
    step: int
    weights: Literal["raw", "ema"]
    version: str = __version__

    @classmethod
    def of(cls, trained: Trained) -> Origin:
        """Of a trained method."""
        meta = trained.meta
        return cls(
            method=trained.config.stages[meta["stage"]].method["name"],
            backbone=meta["backbone"]["name"],
            digest=meta["backbone"]["digest"],
            step=trained.step,
            weights=meta["weights"],
        )


@dataclass(frozen=True)
class ClassifierConfig:
    """Sizes of the image tower and the joint width d = `embed_dim`, statistics of pixels in
    [0, 1], compute dtype, how images are brought to size, and where it all came from."""

    embed_dim: int
    image: ViTConfig | ResNetConfig
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    dtype: Literal["float32", "bfloat16"]
    preprocess: Preprocess
    origin: Origin


@dataclass(frozen=True)
class _Description:
    """The content of `classifier.json`; labels as `LabelSpace.to_json`."""

    config: ClassifierConfig
    labels: dict[str, Any]
    format: Literal["mlclip_jax classifier 1"] = "mlclip_jax classifier 1"


class Classifier(nnx.Module):
    """Image tower and matrix; evaluation and `Tagger` take it as they take a method.

    Args:
        config: sizes and origin.
        space: the c labels, which unlike a method's cannot change.
        image: the tower, BatchNorm statistics included.
        matrix: float32 [c d].
        bias: float32 [c].
    """

    def __init__(
        self,
        config: ClassifierConfig,
        space: LabelSpace,
        image: VisionTransformer | ModifiedResNet,
        matrix: Array,
        bias: Array,
    ) -> None:
        self.config = config
        self.space = space
        self.dtype = jnp.dtype(config.dtype)
        self.image = image
        self.matrix = nnx.Param(matrix)
        self.bias = nnx.Param(bias)

    reads_tokens = False
    labels_see_images = False
    compares_labels = False

    # CLIP's own: they read the tower, its config and the dtype, which are here under CLIP's names.
    normalize = CLIP.normalize
    prepare = CLIP.prepare
    encode_images = CLIP.encode_images
    patch_scores = Method.patch_scores

    @property
    def clip(self) -> Classifier:
        """What of a CLIP there is: the image tower, under the names it has there."""
        return self

    @property
    def image_size(self) -> int:
        """Pixels of a side of the images it takes."""
        return self.config.image.image_size

    @property
    def image_tower(self) -> VisionTransformer | ModifiedResNet:
        """The tower that the image features come from."""
        return self.image

    @property
    def score_kind(self) -> Literal["sigmoid", "softmax"]:
        """What a user is shown of a logit, as of the method that it was made of."""
        return "softmax" if self.config.origin.method == "zero_shot" else "sigmoid"

    def scale(self) -> Array:
        """The factor of the cosine: float32 []."""
        return jnp.linalg.norm(self.matrix[0])

    def label_inputs(
        self, space: LabelSpace, encoder: Encoder | None = None, *, multiple_of: int = 1
    ) -> LabelInputs:
        """Row and mask of each class, padded to a multiple (host arrays); no prompts.

        Raises:
            UserError: other labels, or the same in another order.
        """
        if space.names != self.space.names:
            raise UserError(
                f"the classifier knows the {len(self.space)} labels of {self.space.name!r} in "
                f"their order, not the {len(space)} of {space.name!r}: fold the method anew"
            )
        return LabelInputs((), *padded_index(len(space), multiple_of))

    def encode_labels(
        self,
        labels: LabelInputs,
        *,
        image_features: ImageFeatures | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Rows of the matrix: float32 [c d]."""
        return self.matrix[...][labels.index]

    def logits(
        self,
        image_features: ImageFeatures,
        label_features: Array,
        labels: LabelInputs,
        *,
        progress: Progress | None = None,
    ) -> Array:
        """float32 [b c]."""
        x = products(normalize(image_features.pooled), label_features)
        return x + self.bias[...][labels.index]


# --- folding ----------------------------------------------------------------------------------


def fold(
    method: Method,
    space: LabelSpace,
    encoder: Encoder,
    origin: Origin,
    *,
    preprocess: Preprocess | None = None,
) -> Classifier:
    """The classifier that gives the logits of `method` for the labels of `space`.

    Nothing is asked of the method but its verbs: the logits of no image feature are the bias,
    those of the d unit vectors the matrix, and further features must agree with both.

    Args:
        method: with the weights to keep.
        space: labels to fold in.
        encoder: tokenizer for their prompts.
        origin: written along.
        preprocess: of the images, written along; None: CLIP's own, at the tower's size.

    Raises:
        UserError: the logits are not of this form, or not finite.
    """
    if method.reads_tokens or type(method).encode_images is not Method.encode_images:
        raise _unfit(origin, "it reads more of an image than CLIP's pooled feature")
    if method.labels_see_images:
        raise _unfit(origin, "its label features depend on the image")
    width = method.clip.config.embed_dim
    basis = np.eye(width, dtype=np.float32)
    others = 3 * np.random.default_rng(0).normal(size=(8, width)).astype(np.float32)
    pooled = np.concatenate([np.zeros_like(basis[:1]), basis, others])
    x = np.asarray(_logits(method, method.label_inputs(space, encoder), pooled))
    if not np.isfinite(x).all():
        raise _unfit(origin, "its label features depend on the image, or are not finite")
    bias, matrix = x[0], (x[1 : width + 1] - x[0]).T
    unit = others / np.linalg.norm(others, axis=1, keepdims=True)
    if np.abs(unit @ matrix.T + bias - x[width + 1 :]).max() > 1e-4 * np.abs(x).max():
        raise _unfit(origin, "its logits are no cosines with label features")

    clip = method.clip
    config = ClassifierConfig(
        embed_dim=width,
        image=clip.config.image,
        image_mean=clip.config.image_mean,
        image_std=clip.config.image_std,
        dtype=clip.dtype.name,
        preprocess=preprocess or Preprocess(clip.config.image.image_size),
        origin=origin,
    )
    tower = nnx.clone(clip.image)
    return Classifier(config, space, tower, jnp.asarray(matrix), jnp.asarray(bias))


def _logits(method: Method, labels: LabelInputs, pooled: np.ndarray) -> Array:
    """Logits of image features [b d]; NaN where label features depend on the image."""
    graphdef, state = nnx.split(method)

    def encode(state: nnx.State, labels: LabelInputs) -> Array:
        unseen = jnp.full(pooled.shape, jnp.nan)
        unseen = ImageFeatures(unseen, unseen[:, None])
        return nnx.merge(graphdef, state).encode_labels(labels, image_features=unseen)

    def logits(state: nnx.State, labels: LabelInputs, features: Array) -> Array:
        return nnx.merge(graphdef, state).logits(ImageFeatures(pooled), features, labels)

    # Two programs as in evaluation: bfloat16 would be rounded in other places in one.
    return jax.jit(logits)(state, labels, jax.jit(encode)(state, labels))


def _unfit(origin: Origin, reason: str) -> UserError:
    return UserError(
        f"{origin.method} does not fold into a classifier: {reason}; serve it from its workdir"
    )


# --- on disk ----------------------------------------------------------------------------------


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary name for the block to make a folder under: it becomes `folder` when all is done.

    Raises:
        UserError: `folder` exists.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another place, or remove it first")
    make_folder(folder.parent)
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        yield part
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def save(classifier: Classifier, folder: str | Path) -> None:
    """Writes a classifier to a folder, which appears when it is whole.

    Raises:
        UserError: the folder exists.
    """
    from safetensors.numpy import save_file

    described = asdict(_Description(classifier.config, classifier.space.to_json()))
    state = nnx.to_flat_state(nnx.state(classifier))
    leaves = {path_string(path): np.array(leaf.get_value(), order="C") for path, leaf in state}
    with new_folder(Path(folder)) as part:
        part.mkdir()
        save_file(leaves, str(part / WEIGHTS))
        text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
        (part / DESCRIPTION).write_text(text, encoding="utf-8")


def load(folder: str | Path) -> Classifier:
    """The classifier in a folder.

    Raises:
        UserError: there is none, or a file is damaged or does not belong to it.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{folder} holds no classifier (no {DESCRIPTION}): mlclip export makes one")
    try:
        described = from_mapping(_Description, read_json(path))
        space = LabelSpace.from_json(described.labels)
    except (TypeError, ValueError) as error:  # UserError among them
        raise UserError(f"{path} describes no classifier ({error}); export it again") from error
    arrays = open_safetensors((folder / WEIGHTS,))
    graphdef, state = nnx.split(nnx.eval_shape(lambda: _blank(described.config, space)))
    flat = nnx.to_flat_state(state)
    expected = {path_string(at): leaf.get_value().shape for at, leaf in flat}
    check_shapes(expected, arrays.shapes, str(folder))
    filled = [
        (at, leaf.replace(jnp.asarray(arrays.read(path_string(at)), jnp.float32)))
        for at, leaf in flat
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _blank(config: ClassifierConfig, space: LabelSpace) -> Classifier:
    kind = VisionTransformer if isinstance(config.image, ViTConfig) else ModifiedResNet
    image = kind(config.image, config.embed_dim, rngs=nnx.Rngs(0))
    matrix, bias = jnp.zeros((len(space), config.embed_dim)), jnp.zeros(len(space))
    return Classifier(config, space, image, matrix, bias)
