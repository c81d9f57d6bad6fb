"""Scoring a split with a method: labels encoded once, then batches of images.

Works on pure dictionaries of arrays, as the training step does: the caller passes the graph
definition once and, for each evaluation, the leaves to use (raw or averaged weights and BatchNorm
statistics).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlclip_jax.evaluation.metrics import (
    Predictions,
    average_precision,
    mean_average_precision,
)
from mlclip_jax.evaluation.views import class_sets
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.base import LabelInputs, image_features


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found.

    Attributes:
        metrics: fractions by name: "mAP", and "mAP/<group>" and "mAP/<subset>" where the label
            space has groups and subsets.
        per_class_ap: float64 `[c]`, NaN for classes without positives.
        scores: float32 logits `[n c]`, in the order of `index`.
        targets: int8 `[n c]` in {+1, 0, -1}.
        index: int64 `[n]`, position of each image in its source.
        label_features: float32 `[c d]`; None for a method with another form than one vector for
            each class (several sets of prompts, features that depend on the image).
    """

    metrics: dict[str, float]
    per_class_ap: np.ndarray
    scores: np.ndarray
    targets: np.ndarray
    index: np.ndarray
    label_features: np.ndarray | None = None


class Predictor(NamedTuple):
    """The two jitted halves of prediction; `state` is a tuple of pure dicts for `nnx.merge`.

    encode_labels(state, labels) -> label features, None where they change with the image;
    logits(state, images uint8 `[b h w 3]` or cached features, label features, labels) -> float32
    `[b c]`.
    """

    encode_labels: Callable[[Sequence[Any], LabelInputs], Any]
    logits: Callable[[Sequence[Any], Array, Any, LabelInputs], Array]


def predict_fn(graphdef: nnx.GraphDef, mesh: Mesh | None = None) -> Predictor:
    """The prediction functions of a method; make them once, they keep what they compiled.

    Args:
        graphdef: of a method split as `nnx.split(method, *filters)`; `state` holds the pure
            dictionaries of these filters in the same order (one, where there was no filter).
        mesh: gathers the label features on every device of it; None: single device.
    """

    def encode_labels(state: Sequence[Any], labels: LabelInputs) -> Any:
        method = nnx.merge(graphdef, *state)
        return None if method.labels_see_images else method.encode_labels(labels)

    def logits(state: Sequence[Any], images: Array, features: Any, labels: LabelInputs) -> Array:
        method = nnx.merge(graphdef, *state)
        seen = image_features(method, images)
        if method.labels_see_images:
            features = method.encode_labels(labels, image_features=seen)
        return method.logits(seen, features, labels)

    if mesh is None:
        return Predictor(jax.jit(encode_labels), jax.jit(logits))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return Predictor(jax.jit(encode_labels, out_shardings=everywhere), jax.jit(logits))


def evaluate(
    predictor: Predictor,
    states: Mapping[str, Sequence[Any]],
    labels: LabelInputs,
    batches: Iterable[Mapping[str, np.ndarray]],
    space: LabelSpace,
    *,
    mesh: Mesh | None = None,
    assume_negative: bool | None = None,
    empty: Literal["skip", "zero"] = "skip",
) -> dict[str, EvalResult]:
    """Score every image of a split, with one set of weights or several in a single pass.

    Args:
        predictor: from `predict_fn`, with the same `mesh`.
        states: leaves of the method by a name of the caller's ("raw", "ema"), each as pure
            dictionaries, see `predict_fn`.
        labels: the method's inputs for `space`; classes may be padded beyond `len(space)`, and
            placed so that every device encodes a share of them.
        batches: host batches with "images" uint8 `[b h w 3]`, "targets" `[b c]`, "index" `[b]` and
            "mask" `[b]`, of one size (a multiple of the mesh), the last one padded.
        space: the labels scored.
        mesh: spreads the images over its "data" axis.
        assume_negative, empty: conventions of the metrics, see `evaluation.metrics`.

    Returns:
        A result for each name.

    Raises:
        ValueError: the split is empty, or an image comes twice.
        UserError: a logit is NaN.
    """
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec("data"))
    features = {name: predictor.encode_labels(state, labels) for name, state in states.items()}
    predictions = {name: Predictions(len(space)) for name in states}

    def collect(batch: Mapping[str, np.ndarray], logits: Mapping[str, Array]) -> None:
        for name, scores in jax.device_get(logits).items():
            predictions[name].append(
                scores, batch["targets"], index=batch["index"], mask=batch["mask"]
            )

    # One batch computes while the results of the one before are fetched: never more in flight.
    waiting = None
    for batch in batches:
        images = jax.device_put(batch["images"], sharding)
        logits = {
            name: predictor.logits(state, images, features[name], labels)
            for name, state in states.items()
        }
        if waiting is not None:
            collect(*waiting)
        waiting = batch, logits
    if waiting is None:
        raise ValueError("nothing to evaluate: the split holds no images")
    collect(*waiting)
    return {
        name: replace(
            summarise(found, space, assume_negative=assume_negative, empty=empty),
            label_features=_vectors(features[name], labels, space),
        )
        for name, found in predictions.items()
    }


def _vectors(features: Any, labels: LabelInputs, space: LabelSpace) -> np.ndarray | None:
    """Label features without padded classes, float32 `[c d]`; None where they have another form."""
    if not isinstance(features, Array) or features.ndim != 2:
        return None
    if features.shape[0] != labels.num_classes:
        return None
    return np.asarray(features)[: len(space)].astype(np.float32)


def metric_classes(space: LabelSpace) -> dict[str, tuple[int, ...]]:
    """The classes that each metric averages over: "mAP" all, "mAP/<subset or group>" its own.

    A group that is also a subset is there once, under the subset's name.
    """
    everything = {"mAP": tuple(range(len(space)))}
    return everything | {f"mAP/{name}": members for name, members in class_sets(space).items()}


def summarise(
    predictions: Predictions,
    space: LabelSpace,
    *,
    assume_negative: bool | None = None,
    empty: Literal["skip", "zero"] = "skip",
) -> EvalResult:
    """The metrics of gathered predictions, over all classes and by group and subset."""
    scores, targets, index = predictions.arrays()
    per_class = average_precision(scores, targets, assume_negative=assume_negative)
    metrics = {
        name: mean_average_precision(per_class[list(members)], empty=empty)
        for name, members in metric_classes(space).items()
    }
    return EvalResult(metrics, per_class, scores, targets, index)
