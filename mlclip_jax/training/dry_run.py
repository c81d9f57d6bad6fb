"""A dry run of a configuration: the trainer's own step at full size, as shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from mlclip_jax.data import registry
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.base import LabelInputs, Method
from mlclip_jax.training.build import (
    Backbone,
    Plan,
    batch_shape,
    build_method,
    packaged_tokenizer,
    plan_stage,
    preset,
    random_clip,
)
from mlclip_jax.training.captions import reads_no_images
from mlclip_jax.training.config import StageConfig, TrainConfig, parse_config
from mlclip_jax.training.feature_cache import cached_shape, check_frozen
from mlclip_jax.training.mesh import label_shardings, make_mesh, replicated
from mlclip_jax.training.step import Leaves, State, init_state


def abstract_step(
    config: TrainConfig | Mapping[str, Any],
    *,
    mesh: Mesh | None = None,
    space: LabelSpace | None = None,
) -> list[tuple[Plan, tuple[Any, ...], Any]]:
    """A dry run of every stage at full size: shapes only, no weights, no data.

    It traces the very function that the trainer jits, optimizer and shardings included. The
    packaged vocabulary stands in for the backbone's own, which changes prompt lengths a little,
    and random features for those that labels are clustered by.

    Args:
      config: of the run; the backbone is the preset it names.
      mesh: devices to lay it out for.
      space: labels in place of those of the data.

    Returns:
      For each stage (plan, arguments of the step, outputs of the step), all as shapes;
      `plan.step.lower(*arguments)` compiles it ahead of time.
    """
    config = config if isinstance(config, TrainConfig) else parse_config(config)
    mesh = make_mesh() if mesh is None else mesh
    sizes = preset(config.backbone)
    tokenizer = packaged_tokenizer(sizes.text.context_length)
    if space is None:  # those of training
        space, _ = registry.label_spaces(config.data, name_features=_some_features)
    results = []
    for stage in config.stages:

        def build(stage: StageConfig = stage) -> tuple[Method, LabelInputs]:
            backbone = Backbone(random_clip(config.backbone), tokenizer, "")
            method = build_method(stage, backbone, space, seed=0)
            labels = method.label_inputs(space, tokenizer, multiple_of=mesh.size)
            if method.needs_counts():
                labels = labels.with_counts(np.ones(len(space)), 1)
            return method, labels

        method, labels = nnx.eval_shape(build)
        plan = plan_stage(stage, method, labels, classes=len(space), mesh=mesh, num_examples=10**6)

        def start(
            trainable: Leaves, moving: Leaves, plan: Plan = plan, stage: StageConfig = stage
        ) -> State:
            parts = replace(plan.parts, trainable=trainable, moving=moving)
            return init_state(parts, plan.optimizer, seed=0, ema=stage.ema_decay is not None)

        state = jax.eval_shape(start, plan.parts.trainable, plan.parts.moving)
        batch = batch_shape(method, stage.batch_size, len(space), mesh)
        if stage.cache is not None and not reads_no_images(method):
            check_frozen(stage, plan.parts, batch.images)
            batch = cached_shape(plan.parts, batch, stage.cache)
        arguments = (
            _placed(state, replicated(mesh)),
            _placed(plan.parts.frozen, replicated(mesh)),
            batch,
            _placed(labels, label_shardings(labels, mesh)),
        )
        results.append((plan, arguments, jax.eval_shape(plan.step, *arguments)))
    return results


def _some_features(names: Sequence[str]) -> np.ndarray:
    """Features of nothing in particular: float32 [n 8]."""
    return np.random.default_rng(0).normal(size=(len(names), 8)).astype(np.float32)


def _placed(tree: Any, shardings: Any) -> Any:
    """Shapes with these shardings: one for all leaves, or one for each."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )
