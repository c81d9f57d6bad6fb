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
from mlclip_jax.methods.base import Method, image_features
from mlclip_jax.training.build import Trained
from mlclip_jax.training.mesh import make_mesh, replicate, shard_labels


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
        self.data = registry.load(
            trained.config.data,
            image_size=trained.method.clip.config.image.image_size,
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
        space, mesh = self.data.space, self.mesh
        tasks = {name: space.indices(name) for name in subsets}
        passes: dict[Any, dict[str, Any]] = {}
        for title, method in methods.items():
            graphdef, state = nnx.split(method)
            leaves = (replicate(nnx.to_pure_dict(state), mesh),)
            passes.setdefault(graphdef, {})[title] = leaves
        found: dict[str, EvalResult] = {}
        for graphdef, states in passes.items():
            one = methods[next(iter(states))]
            labels = one.label_inputs(space, self.tokenizer, multiple_of=mesh.size)
            if graphdef not in self.predictors:
                self.predictors[graphdef] = predict_fn(graphdef, mesh)
            workers = self.data.config.num_workers
            found |= evaluate(
                self.predictors[graphdef],
                states,
                shard_labels(labels, mesh),
                eval_batches(self.data.evals[split], self.batch_size, num_workers=workers),
                space,
                mesh=mesh,
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
        graphdef, state = nnx.split(method)
        labels = method.label_inputs(self.data.space, self.tokenizer)

        @jax.jit
        def run(state: Any, labels: Any, pixels: jax.Array) -> dict[str, jax.Array]:
            method = nnx.merge(graphdef, state)
            if method.labels_see_images:
                return {}
            seen = image_features(method, pixels)
            return method.streams(seen, method.encode_labels(labels), labels)

        scores: dict[str, list[np.ndarray]] = {}
        targets = []
        batches = eval_batches(self.data.evals[split], self.batch_size)
        for batch in islice(batches, -(-images // self.batch_size)):
            found = jax.device_get(run(state, labels, batch["images"]))
            if not found:
                return None
            mask, c = batch["mask"], len(self.data.space)
            for name, values in found.items():
                scores.setdefault(name, []).append(values[mask][:, :c])
            targets.append(batch["targets"][mask])
        joined = {name: np.concatenate(values) for name, values in scores.items()}
        return Streams(joined, np.concatenate(targets))
