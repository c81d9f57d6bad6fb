"""Scoring a split with a method: labels encoded once, then batches of images.

Works on pure dictionaries of arrays, as the training step does: the caller passes the graph
definition once and, for each evaluation, the leaves to use (raw or averaged weights and BatchNorm
statistics).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
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
from mlclip_jax.modules.pyramid import resize


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
        task_scores: float32 `[n k]` by name of k classes that were scored by themselves too, by
            methods whose logits depend on which labels are scored together.
    """

    metrics: dict[str, float]
    per_class_ap: np.ndarray
    scores: np.ndarray
    targets: np.ndarray
    index: np.ndarray
    label_features: np.ndarray | None = None
    task_scores: Mapping[str, np.ndarray] = field(default_factory=dict)


class Predictor(NamedTuple):
    """The jitted halves of prediction; `state` is a tuple of pure dicts for `nnx.merge`.

    encode_labels(state, labels) -> label features, None where they change with the image;
    logits(state, images uint8 `[b h w 3]` or cached features, label features, labels) -> float32
    `[b c]`;
    task_logits(..., masks bool `[c]` by name) -> those under "", and by name as they are where the
    classes of a mask are scored by themselves, each `[b c]`.
    """

    encode_labels: Callable[[Sequence[Any], LabelInputs], Any]
    logits: Callable[[Sequence[Any], Array, Any, LabelInputs], Array]
    task_logits: Callable[..., dict[str, Array]]


def predict_fn(
    graphdef: nnx.GraphDef, mesh: Mesh | None = None, *, image_size: int | None = None
) -> Predictor:
    """The prediction functions of a method; make them once, they keep what they compiled.

    Args:
        graphdef: of a method split as `nnx.split(method, *filters)`; `state` holds the pure
            dictionaries of these filters in the same order (one, where there was no filter).
        mesh: gathers the label features on every device of it; None: single device.
        image_size: pixels of a side that the method takes, where images come in another size (a
            baseline beside a method that takes larger ones); None: as they come.
    """

    def encode_labels(state: Sequence[Any], labels: LabelInputs) -> Any:
        method = nnx.merge(graphdef, *state)
        return None if method.labels_see_images else method.encode_labels(labels)

    def task_logits(
        state: Sequence[Any],
        images: Array,
        features: Any,
        labels: LabelInputs,
        masks: Mapping[str, Array],
    ) -> dict[str, Array]:
        method = nnx.merge(graphdef, *state)
        if image_size is not None and not isinstance(images, dict):
            images = resize(images, image_size)
        seen = image_features(method, images)
        if method.labels_see_images:
            features = method.encode_labels(labels, image_features=seen)
        tasks = {name: replace(labels, mask=labels.mask & mask) for name, mask in masks.items()}
        return {
            name: method.logits(seen, features, of) for name, of in ({"": labels} | tasks).items()
        }

    def logits(state: Sequence[Any], images: Array, features: Any, labels: LabelInputs) -> Array:
        return task_logits(state, images, features, labels, {})[""]

    encode = jax.jit(encode_labels, out_shardings=everywhere(mesh))
    return Predictor(encode, jax.jit(logits), jax.jit(task_logits))


def evaluate(
    predictor: Predictor,
    states: Mapping[str, Sequence[Any]],
    labels: LabelInputs,
    batches: Iterable[Mapping[str, np.ndarray]],
    space: LabelSpace,
    *,
    mesh: Mesh | None = None,
    tasks: Mapping[str, Sequence[int]] = MappingProxyType({}),
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
        tasks: classes to score by themselves too, by name.
        assume_negative, empty: conventions of the metrics, see `evaluation.metrics`.

    Returns:
        A result for each name.

    Raises:
        ValueError: the split is empty, or an image comes twice.
        UserError: a logit is NaN.
    """
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec("data"))
    features = {name: predictor.encode_labels(state, labels) for name, state in states.items()}
    classes = {"": np.arange(len(space))} | {name: np.array(of) for name, of in tasks.items()}
    masks = {name: np.isin(np.arange(labels.num_classes), of) for name, of in classes.items()}
    masks = jax.device_put({name: masks[name] for name in tasks}, everywhere(mesh))
    predictions = {
        name: {task: Predictions(len(of)) for task, of in classes.items()} for name in states
    }

    def collect(batch: Mapping[str, np.ndarray], logits: Mapping[str, Any]) -> None:
        rows = {"index": batch["index"], "mask": batch["mask"]}
        for name, scores in jax.device_get(logits).items():
            for task, of in classes.items():
                predictions[name][task].append(scores[task][:, of], batch["targets"][:, of], **rows)

    # One batch computes while the results of the one before are fetched: never more in flight.
    waiting = None
    for batch in batches:
        images = jax.device_put(batch["images"], sharding)
        logits = {
            name: predictor.task_logits(state, images, features[name], labels, masks)
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
            summarise(found.pop(""), space, assume_negative=assume_negative, empty=empty),
            label_features=_vectors(features[name], labels, space),
            task_scores={task: of.arrays()[0] for task, of in found.items()},
        )
        for name, found in predictions.items()
    }


def everywhere(mesh: Mesh | None) -> NamedSharding | None:
    """Whole on every device of a mesh; None: a single device."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


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
