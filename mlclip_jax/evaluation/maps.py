"""Where in an image a label's score comes from: maps of labels, and how often they point right.

- "patches": the score of each patch (a ResNet's cell) with the label, see `Method.patch_scores`; of
  decoders (ADDS) the attention of the label, its mean over the layers.
- "contrast": the same less its mean over all labels. Labels' text features have much in common,
  and patches that agree with that say nothing of any one label.
- "grad_cam": what enters the attention of the image tower's last block after its first norm, at the
  patches, A [p w] (a ResNet's final map), weighted by the mean gradient of the label's logit:
  map = relu(sum_k w_k A_k), w_k = mean over patches of d logit / d A_k.

Source: Selvaraju et al., ICCV 2017, Eqs. 1-2, for Grad-CAM, in Figure 7 of He et al., AAAI 2023
(MKT); Li et al., 2023 (CLIP Surgery), for the mean over labels. The pointing game is Zhang et
al.'s, ECCV 2016, without its margin around objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mlclip_jax.clip import ImageFeatures, ResNetConfig, ViTConfig
from mlclip_jax.clip.resnet import ModifiedResNet
from mlclip_jax.clip.vit import VisionTransformer
from mlclip_jax.errors import UserError
from mlclip_jax.methods.base import LabelInputs, Method
from mlclip_jax.spec import unknown

Kind = Literal["contrast", "patches", "grad_cam"]
#: x0, y0, x1, y1 in pixels, the last two exclusive.
Box = tuple[int, int, int, int]


def map_fn(graphdef: nnx.GraphDef, kind: Kind) -> Callable[..., Array]:
    """The jitted maps of a method; make it once, it keeps what it compiled.

    Its arguments are those of `grad_cam`, with `state` (a tuple of pure dictionaries for
    `nnx.merge`, as `predict_fn` takes it) in the place of the method.

    Args:
        graphdef: of the method.
        kind: of the maps.

    Raises:
        UserError: there are no such maps.
    """
    if kind not in get_args(Kind):
        raise unknown("kind of maps", kind, get_args(Kind))
    maps = {"contrast": contrast_maps, "patches": patch_maps, "grad_cam": grad_cam}[kind]

    def of(state: Sequence[Any], *args: Any) -> Array:
        return maps(nnx.merge(graphdef, *state), *args)

    return jax.jit(of)


def patch_maps(
    method: Method, images: Array, features: Any, labels: LabelInputs, chosen: Array
) -> Array:
    """Scores of the patches with the chosen labels: float32 [b k h w].

    Arguments as of `grad_cam`.
    """
    return _grid(_chosen(_patch_scores(method, images, features, labels), chosen))


def contrast_maps(
    method: Method, images: Array, features: Any, labels: LabelInputs, chosen: Array
) -> Array:
    """The same less the mean over all labels: float32 [b k h w], zeros of a single label."""
    scores = _patch_scores(method, images, features, labels)
    mean = scores.mean(1, keepdims=True, where=labels.mask[:, None])
    return _grid(_chosen(scores, chosen) - mean)


def grad_cam(
    method: Method, images: Array, features: Any, labels: LabelInputs, chosen: Array
) -> Array:
    """Grad-CAM of the chosen labels' logits: float32 [b k h w], not negative.

    One forward pass, and a backward pass through the last block for each of the k labels.

    Args:
        method: or a classifier made of one.
        images: uint8 [b h w 3].
        features: what `encode_labels` gives; None where label features see the image.
        labels: the method's inputs.
        chosen: int32 [b k], classes of each image.

    Raises:
        UserError: the tower sees crops of the image.
    """
    if method.image_size != method.clip.config.image.image_size:
        raise UserError(
            "Grad-CAM needs an image tower that sees the image as a whole, and this method shows "
            "it crops: take the map 'contrast' or 'patches'"
        )
    graphdef, state = nnx.split(method)

    def logits(added: Array) -> tuple[Array, Array]:
        """Logits of the chosen labels [b k], with something added to the states; the states."""
        method = nnx.merge(graphdef, state)
        tap = _tap(method.image_tower, added)
        seen = method.encode_images(images)
        found = method.logits(seen, _label_features(method, seen, features, labels), labels)
        return _chosen(found, chosen), tap.states[...]

    zeros = jnp.zeros(_states_shape(method.clip.config.image, len(images)), method.clip.dtype)
    found, pull, states = jax.vjp(logits, zeros, has_aux=True)
    f32 = jnp.promote_types(states.dtype, jnp.float32)
    states = _patches(states).astype(f32)

    def of(label: Array) -> Array:
        (gradient,) = pull(jnp.broadcast_to(label, found.shape))
        weights = _patches(gradient).astype(f32).mean(1)
        return jax.nn.relu(jnp.einsum("bpw,bw->bp", states, weights, precision="highest"))

    labels_in_turn = jnp.eye(found.shape[1], dtype=found.dtype)
    return _grid(jax.lax.map(of, labels_in_turn).swapaxes(0, 1))


def _patch_scores(method: Method, images: Array, features: Any, labels: LabelInputs) -> Array:
    """[b c p]; CLIP's own patches where the method reads none."""
    reads = method.reads_tokens
    seen = method.encode_images(images) if reads else method.clip.encode_images(images, tokens=True)
    return method.patch_scores(seen, _label_features(method, seen, features, labels), labels)


def _label_features(method: Method, seen: ImageFeatures, features: Any, labels: LabelInputs) -> Any:
    return method.encode_labels(labels, image_features=seen) if features is None else features


def _chosen(scores: Array, chosen: Array) -> Array:
    """[b c ...] and [b k] -> [b k ...]."""
    return jnp.take_along_axis(scores, chosen.reshape(*chosen.shape, *[1] * (scores.ndim - 2)), 1)


class _Tap(nnx.Module):
    """A layer with something added to what it gives, which it keeps."""

    def __init__(self, layer: nnx.Module, added: Array) -> None:
        self.layer = layer
        self.added = nnx.Variable(added)
        self.states = nnx.Variable(jnp.zeros_like(added))

    def __call__(self, x: Array, **how: Any) -> Array:
        x = self.layer(x, **how) + self.added[...]
        self.states[...] = x
        return x


def _tap(tower: VisionTransformer | ModifiedResNet, added: Array) -> _Tap:
    """Puts a tap behind the first norm of a ViT's last block, or behind a ResNet's last block."""
    tower.remat = False  # what a tap keeps would not come out of a block that is recomputed
    if isinstance(tower, VisionTransformer):
        last = tower.blocks[-1]
        last.norm1 = _Tap(last.norm1, added)
        return last.norm1
    tower.layer4[-1] = _Tap(tower.layer4[-1], added)
    return tower.layer4[-1]


def _states_shape(sizes: ViTConfig | ResNetConfig, b: int) -> tuple[int, ...]:
    """Of what is tapped."""
    if isinstance(sizes, ViTConfig):
        return b, 1 + sizes.grid**2, sizes.width
    return b, sizes.grid, sizes.grid, sizes.output_width


def _patches(states: Array) -> Array:
    """Without the class token: [b 1+p w], of a ResNet [b h w c] -> [b p w]."""
    return states[:, 1:] if states.ndim == 3 else states.reshape(len(states), -1, states.shape[-1])


def _grid(maps: Array) -> Array:
    """[b k p] -> [b k h w]; images are square."""
    side = math.isqrt(maps.shape[-1])
    return maps.reshape(*maps.shape[:-1], side, side)


def upsample(maps: np.ndarray, size: int) -> np.ndarray:
    """Maps in the size of the image, linear between the patches' centres: [... h w] -> [... s s]"""
    shape = (*maps.shape[:-2], size, size)
    return np.asarray(jax.image.resize(jnp.asarray(maps), shape, "bilinear"))


class Pointing(NamedTuple):
    """The pointing game: shares in [0, 1], float64 [k] each.

    hits: of the map's highest point that lies in a box: 1 or 0, between where several points are
    highest. chance: of the image that the boxes cover, what a point at random hits.
    """

    hits: np.ndarray
    chance: np.ndarray


def pointing_game(maps: np.ndarray, boxes: Sequence[Sequence[Box]]) -> Pointing:
    """Whether the highest point of each map lies in one of its label's boxes.

    Args:
        maps: [k h w] in the size of the image.
        boxes: of each of the k labels, in pixels.

    Raises:
        ValueError: other numbers of maps and labels.
    """
    inside = np.zeros(maps.shape, bool)
    for mask, own in zip(inside, boxes, strict=True):
        for x0, y0, x1, y1 in own:
            mask[y0:y1, x0:x1] = True
    highest = maps == maps.max((1, 2), keepdims=True)
    return Pointing((highest & inside).sum((1, 2)) / highest.sum((1, 2)), inside.mean((1, 2)))
