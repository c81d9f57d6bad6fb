"""Scoring methods on the splits of a trained run, with its data and labels, on all devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from mlclip_jax.data import registry
from mlclip_jax.data.pipeline import eval_batches
from mlclip_jax.errors import UserError
from mlclip_jax.evaluation.evaluator import EvalResult, Predictor, evaluate, predict_fn
from mlclip_jax.methods.base import Method
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
