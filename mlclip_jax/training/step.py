"""The training step: a pure function of dictionaries, jitted once with its state donated.

NNX modules build and load a method; here it is taken apart into flat dictionaries keyed by
"/"-joined path, which the step puts together again while it is traced:

  state     = {step, trainable, opt_state, batch_stats, ema, key}      donated and returned
  frozen    parameters that do not train, and BatchNorm statistics that do not move
  batch     images, targets, index, mask                               split over "data"
  labels    LabelInputs                                                classes split over "data"

Frozen leaves and labels are arguments, never closed over: they are not compiled in as constants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from mlclip_jax.clip.arrays import path_string
from mlclip_jax.methods.base import Batch, Progress, image_features
from mlclip_jax.training.mesh import replicated
from mlclip_jax.training.optim import rate_state, update_average
from mlclip_jax.training.schedules import Schedule

# Of the step's key; flips use the numbers of examples, which end below.
_METHODS_OWN = 2**32 - 1

Leaves = dict[str, Any]
State = dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """A method taken apart; every leaf is in exactly one of the three dictionaries.

    Attributes:
      graphdef: structure of the method, without values.
      paths: path of every leaf as NNX has it, by its "/"-joined form.
      trainable: parameters that the method's filter selects.
      frozen: all other parameters, and BatchNorm statistics that training does not touch.
      moving: BatchNorm statistics that the training step updates.
    """

    graphdef: nnx.GraphDef
    paths: Mapping[str, tuple]
    trainable: Leaves
    frozen: Leaves
    moving: Leaves

    def merge(self, leaves: Mapping[str, Any]) -> nnx.Module:
        """The method with these values, one for every path."""
        return nnx.merge(self.graphdef, nest(leaves, self.paths))


def nest(leaves: Mapping[str, Any], paths: Mapping[str, tuple]) -> dict:
    """The nested dictionary that `nnx.merge` takes, from flat leaves."""
    tree: dict = {}
    for name, leaf in leaves.items():
        *parents, last = paths[name]
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def take_apart(method: nnx.Module) -> Parts:
    """The leaves of `method` by its own `trainable` filter; statistics count as frozen at first.

    Raises:
      ValueError: a variable that is neither a parameter nor a BatchNorm statistic.
    """
    graphdef, state = nnx.split(method)
    paths, trainable, frozen = {}, {}, {}
    for path, variable in nnx.to_flat_state(state):
        name = path_string(path)
        paths[name] = path
        is_parameter = isinstance(variable, nnx.Param)
        if not is_parameter and not isinstance(variable, nnx.BatchStat):
            raise ValueError(f"{name} is a {type(variable).__name__}: neither Param nor BatchStat")
        chosen = is_parameter and method.trainable(path, variable)
        (trainable if chosen else frozen)[name] = variable.get_value()
    return Parts(graphdef, paths, trainable, frozen, {})


def forward(
    method: nnx.Module, batch: Batch, labels: Any, progress: Progress
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The four steps of every method in training: (loss, metrics).

    Targets gain columns of zeros for the classes that only pad the label inputs.
    """
    padding = labels.mask.shape[0] - batch.targets.shape[1]
    batch = replace(batch, targets=jnp.pad(batch.targets, ((0, 0), (0, padding))))
    batch, labels, chosen = method.choose_labels(batch, labels, progress)
    features = image_features(method, batch.images, progress=progress)
    label_features = method.encode_labels(labels, image_features=features, progress=progress)
    logits = method.logits(features, label_features, labels, progress=progress)
    loss, parts = method.loss(
        logits, batch, labels, progress, image_features=features, label_features=label_features
    )
    return loss, chosen | parts


def find_moving(parts: Parts, batch: Batch, labels: Any) -> Parts:
    """`parts` with the BatchNorm statistics that a training step writes told apart.

    The forward pass is traced, not run: a statistic that is not written is still the very same
    tracer afterwards.
    """
    moved: list[str] = []

    def trace(leaves: Leaves, batch: Batch, labels: Any) -> jax.Array:
        method = parts.merge(leaves)
        zero = jnp.zeros((), jnp.int32)
        progress = Progress(step=zero, epoch=zero, key=jax.random.key(0))
        loss, _ = forward(method, batch, labels, progress)
        after = statistics(method)
        moved.extend(name for name, value in after.items() if value is not leaves[name])
        return loss

    shape = jax.eval_shape(trace, {**parts.frozen, **parts.trainable}, batch, labels)
    if shape.shape != () or shape.dtype != jnp.float32:
        raise ValueError(f"the loss must be a float32 scalar, not {shape.dtype}{list(shape.shape)}")
    return replace(
        parts,
        frozen={name: leaf for name, leaf in parts.frozen.items() if name not in moved},
        moving={name: parts.frozen[name] for name in moved},
    )


def statistics(method: nnx.Module) -> Leaves:
    """BatchNorm statistics of a method by "/"-joined path."""
    state = nnx.to_flat_state(nnx.state(method, nnx.BatchStat))
    return {path_string(path): variable.get_value() for path, variable in state}


def init_state(
    parts: Parts, optimizer: optax.GradientTransformation, *, seed: int, step: int = 0, ema: bool
) -> State:
    """The state before the first step of a stage.

    Args:
      parts: the method taken apart; its trained leaves are copied, because the step donates them.
      optimizer: the stage's optimizer.
      seed: of the step's random numbers.
      step: global step at which the stage starts.
      ema: keep a moving average of trained parameters and moving statistics.
    """
    return {
        "step": jnp.asarray(step, jnp.int32),
        "trainable": jax.tree.map(jnp.copy, parts.trainable),
        "opt_state": optimizer.init(parts.trainable),
        "batch_stats": jax.tree.map(jnp.copy, parts.moving),
        "ema": jax.tree.map(jnp.copy, {**parts.trainable, **parts.moving}) if ema else {},
        "key": jax.random.key_data(jax.random.key(seed)),
    }


def make_train_step(
    parts: Parts,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    mesh: Mesh,
    ema_decay: float | None,
    steps_per_epoch: int,
    first_step: int = 0,
    augment_flip: bool = False,
) -> Callable[[State, Leaves, Batch, Any], tuple[State, dict[str, jax.Array]]]:
    """The jitted step: (state, frozen, batch, labels) -> (state, metrics); the state is donated.

    Args:
      parts: the method taken apart.
      optimizer, schedule: of the stage, from `make_optimizer`.
      mesh: devices; state and metrics are replicated over it.
      ema_decay: decay of the moving average, None for none.
      steps_per_epoch: for the epoch that losses see.
      first_step: global step at which the stage starts.
      augment_flip: mirror each image with probability one half.

    Metrics (float32 scalars): "loss", the method's own, "grad_norm" before clipping,
    "learning_rate" of the base group, and the bool "finite": loss, gradient, update and moving
    BatchNorm statistics are.
    """

    def step(
        state: State, frozen: Leaves, batch: Batch, labels: Any
    ) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        if augment_flip:
            # Tossed by example, so that its place in the batch does not matter.
            coins = jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(key, i)))(
                batch.index
            )
            flipped = batch.images[:, :, ::-1]
            images = jnp.where(coins[:, None, None, None], flipped, batch.images)
            batch = replace(batch, images=images)
        local = state["step"] - first_step
        own = jax.random.fold_in(key, _METHODS_OWN)
        progress = Progress(step=local, epoch=local // steps_per_epoch, key=own)

        def loss_of(trainable: Leaves) -> tuple[jax.Array, tuple[dict, Leaves]]:
            leaves = {**frozen, **state["batch_stats"], **trainable}
            method = parts.merge(leaves)
            loss, aux = forward(method, batch, labels, progress)
            after = statistics(method)
            return loss, (aux, {name: after[name] for name in parts.moving})

        (loss, (aux, batch_stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(
            state["trainable"]
        )
        rate = rate_state(state["opt_state"])
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["trainable"])
        trainable = optax.apply_updates(state["trainable"], updates)
        ema = state["ema"]
        if ema_decay is not None:
            ema = update_average(ema, {**trainable, **batch_stats}, ema_decay)
        grad_norm = optax.tree.norm(grads)
        metrics = {
            **aux,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": schedule(rate.count) * rate.scale,
            "finite": jnp.isfinite(
                loss + grad_norm + optax.tree.norm(updates) + optax.tree.norm(batch_stats)
            ),
        }
        new = {
            "step": state["step"] + 1,
            "trainable": trainable,
            "opt_state": opt_state,
            "batch_stats": batch_stats,
            "ema": ema,
            "key": state["key"],
        }
        return new, metrics

    everywhere = replicated(mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(everywhere, everywhere))


def all_leaves(state: State, frozen: Leaves, *, ema: bool = False) -> Leaves:
    """Every leaf of the method by path, with raw or averaged weights."""
    trained = state["ema"] if ema else {**state["trainable"], **state["batch_stats"]}
    return {**frozen, **trained}
