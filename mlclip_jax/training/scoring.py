"""Scoring methods on the splits of a trained run, with its data and labels, on all devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import jax
import numpy as np
from flax import nnx

from mlclip_jax.data import registry
from mlclip_jax.data.pipeline import eval_batches
from mlclip_jax.errors import UserError
from mlclip_jax.evaluation.evaluator import EvalResult, Predictor, evaluate, predict_fn
from mlclip_jax.evaluation.streams import Streams
from mlclip_jax.methods.base import LabelInputs, Method, image_features
from mlclip_jax.training.build import Trained
from mlclip_jax.training.mesh import make_mesh, replicate, shard_labels, split_over_data


class Scorer:
    """Devices, data and labels of a run; what it compiled serves all its splits.

    Args:
      trained: the run; its label space is taken as it is, groups included.
      splits: names of the splits to open.
      batch_size: images scored at once, rounded up to a multiple of the devices.

    Raises:
      UserError: a batch size below 1, an unknown split, or data that cannot be read.
    """

    def __init__(self, trained: Trained, splits: Sequence[str], batch_size: int) -> None:
        if batch_size < 1:
            raise UserError(f"--batch_size must be at least 1, not {batch_size}")
        self.tokenizer = trained.backbone.tokenizer
        self.predictors: dict[Any, Predictor] = {}
        self.mesh = make_mesh()
        self.batch_size = -(-batch_size // self.mesh.size) * self.mesh.size
        self.image_size = trained.method.image_size
        self.data = registry.load(
            trained.config.data,
            image_size=self.image_size,
            splits=tuple(dict.fromkeys(splits)),
            space=trained.space,
        )

    def score(
        self, methods: Mapping[str, Method], split: str, *, subsets: Sequence[str] = ()
    ) -> dict[str, EvalResult]:
        """Results on a split by title, in the order of `methods`.

        Those that differ in their weights only share a pass over the images.

        Args:
          methods: by title.
          split: one of those that were opened.
          subsets: of the label space, for tasks of their labels alone: scored by themselves too
            where a method's logits depend on which labels are scored together.

        Raises:
          UserError: the label space has no such subset.
        """
        tasks = {name: self.data.space.indices(name) for name in subsets}
        passes: dict[Any, dict[str, Any]] = {}
        for title, method in methods.items():
            graphdef, state = nnx.split(method)
            passes.setdefault(graphdef, {})[title] = self._leaves(state)
        found: dict[str, EvalResult] = {}
        for graphdef, states in passes.items():
            one = methods[next(iter(states))]
            workers = self.data.config.num_workers
            found |= evaluate(
                self._predictor(one, graphdef),
                states,
                self._labels(one),
                eval_batches(self.data.evals[split], self.batch_size, num_workers=workers),
                self.data.space,
                mesh=self.mesh,
                tasks=tasks if one.compares_labels else {},
            )
        return {title: found[title] for title in methods}

    def streams(self, method: Method, split: str, images: int = 500) -> Streams | None:
        """What the logits of a split's first images are put together from; None: of one piece.

        Args:
          method: with its weights.
          split: one of those that were opened.
          images: at most so many.
        """
        if type(method).streams is Method.streams:
            return None
        graphdef, state = nnx.split(method)
        leaves, labels = self._leaves(state), self._labels(method)
        features = self._predictor(method, graphdef).encode_labels(leaves, labels)

        @jax.jit
        def run(
            leaves: Sequence[Any], pixels: jax.Array, features: Any, labels: LabelInputs
        ) -> dict[str, jax.Array]:
            method = nnx.merge(graphdef, *leaves)
            return method.streams(image_features(method, pixels), features, labels)

        scores: dict[str, list[np.ndarray]] = {}
        targets, c = [], len(self.data.space)
        batches = eval_batches(self.data.evals[split], self.batch_size)
        for batch in islice(batches, -(-images // self.batch_size)):
            pixels = jax.device_put(batch["images"], split_over_data(self.mesh))
            for name, values in jax.device_get(run(leaves, pixels, features, labels)).items():
                scores.setdefault(name, []).append(values[batch["mask"]][:, :c])
            targets.append(batch["targets"][batch["mask"]])
        joined = {name: np.concatenate(values)[:images] for name, values in scores.items()}
        return Streams(joined, np.concatenate(targets)[:images])

    def _predictor(self, method: Method, graphdef: nnx.GraphDef) -> Predictor:
        """Of a method, whose images may be smaller than those of the run."""
        if graphdef not in self.predictors:
            own = method.image_size if method.image_size != self.image_size else None
            self.predictors[graphdef] = predict_fn(graphdef, self.mesh, image_size=own)
        return self.predictors[graphdef]

    def _leaves(self, state: nnx.State) -> tuple[dict[str, Any]]:
        return (replicate(nnx.to_pure_dict(state), self.mesh),)

    def _labels(self, method: Method) -> LabelInputs:
        labels = method.label_inputs(self.data.space, self.tokenizer, multiple_of=self.mesh.size)
        return shard_labels(labels, self.mesh)
