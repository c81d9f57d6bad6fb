"""The optimizer of a stage as one optax chain over the flat dictionary of trainable leaves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mlclip_jax.errors import UserError
from mlclip_jax.training.config import OptimConfig
from mlclip_jax.training.schedules import Schedule, make_beta1, make_schedule


class RateState(NamedTuple):
    """Learning-rate state: steps taken, and what "plateau" keeps between evaluations."""

    count: jax.Array  # int32
    scale: jax.Array  # float32, product of all reductions
    best: jax.Array  # float32, best metric so far
    stale: jax.Array  # int32, evaluations since `best`


class CycledAdamState(NamedTuple):
    """Moments of Adam with a scheduled beta1."""

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates


def learning_rate_groups(
    paths: list[str], groups: tuple[tuple[str, float], ...]
) -> dict[str, tuple[str, float]]:
    """Learning-rate group and multiplier of every trainable leaf: the first pattern found wins.

    Raises:
      UserError: a pattern that decides for no leaf (a typing error, or hidden by an earlier one),
        or one that is no regular expression.
    """
    assigned = dict.fromkeys(paths, ("base", 1.0))
    free = set(paths)
    for pattern, multiplier in groups:
        try:
            hits = {path for path in free if re.search(pattern, path)}
        except re.error as error:
            problem = f"optim.groups: {pattern!r} is no regular expression ({error})"
            raise UserError(problem) from None
        if not hits:
            raise UserError(
                f"optim.groups: {pattern!r} matches no trainable parameter that an earlier pattern "
                f"left; trainable: {', '.join(sorted(paths)[:8])}{', ...' * (len(paths) > 8)}"
            )
        assigned.update(dict.fromkeys(hits, (pattern, multiplier)))
        free -= hits
    return assigned


def scale_by_cycled_adam(beta1: Schedule, beta2: float, eps: float) -> optax.GradientTransformation:
    """Adam whose beta1 follows a schedule.

    As in torch, the bias correction of a step uses that step's beta1 to the power of the step
    count, not the product of the values used so far.
    """

    def init(params: optax.Params) -> CycledAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return CycledAdamState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(
        grads: optax.Updates, state: CycledAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, CycledAdamState]:
        del params
        b1 = beta1(state.count)
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state.nu, grads)
        correct1, correct2 = 1 - b1**count, 1 - beta2**count
        updates = jax.tree.map(lambda m, v: (m / correct1) / (jnp.sqrt(v / correct2) + eps), mu, nu)
        return updates, CycledAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def scale_by_rate(
    schedule: Schedule, multipliers: Mapping[str, float]
) -> optax.GradientTransformation:
    """Times minus the rate of each leaf: schedule(count) * plateau's scale * multiplier."""

    def init(params: optax.Params) -> RateState:
        del params
        return RateState(
            count=jnp.zeros((), jnp.int32),
            scale=jnp.ones((), jnp.float32),
            best=jnp.full((), -jnp.inf, jnp.float32),
            stale=jnp.zeros((), jnp.int32),
        )

    def update(
        grads: optax.Updates, state: RateState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, RateState]:
        del params
        rate = schedule(state.count) * state.scale
        updates = {
            path: (-rate * multipliers[path]).astype(grad.dtype) * grad
            for path, grad in grads.items()
        }
        return updates, state._replace(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def make_optimizer(
    config: OptimConfig,
    params: Mapping[str, Any],
    *,
    total_steps: int,
    warmup_steps: int = 0,
    steps_per_epoch: int = 1,
) -> tuple[optax.GradientTransformation, Schedule]:
    """The optimizer of one stage and its base learning-rate schedule.

    Args:
      config: optimizer settings.
      params: trainable leaves by "/"-joined path (arrays or their shapes).
      total_steps: length the schedule is laid out for.
      warmup_steps: length of the linear warm-up.
      steps_per_epoch: steps in an epoch.

    Raises:
      UserError: a learning-rate group that matches nothing.
    """
    groups = learning_rate_groups(list(params), config.groups)
    multipliers = {path: multiplier for path, (_, multiplier) in groups.items()}
    decayed = {path: leaf.ndim >= 2 for path, leaf in params.items()}
    schedule = make_schedule(
        config, total_steps=total_steps, warmup_steps=warmup_steps, steps_per_epoch=steps_per_epoch
    )
    decay = []
    if config.weight_decay:
        decay = [optax.add_decayed_weights(config.weight_decay, mask=decayed)]
    chain = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    if config.name == "sgd":
        chain += [*decay, optax.trace(config.momentum)] if config.momentum else decay
    else:
        beta1 = make_beta1(config, total_steps=total_steps)
        if callable(beta1):
            adam = scale_by_cycled_adam(beta1, config.beta2, config.eps)
        else:
            adam = optax.scale_by_adam(beta1, config.beta2, config.eps)
        chain += [*decay, adam] if config.name == "adam" else [adam, *decay]
    return optax.chain(*chain, scale_by_rate(schedule, multipliers)), schedule


def update_average(average: Any, values: Any, decay: float) -> Any:
    """Exponential moving average: decay * average + (1 - decay) * values, leaf by leaf."""
    return jax.tree.map(
        lambda a, v: (decay * a + (1.0 - decay) * v).astype(a.dtype), average, values
    )


def _is_rate(node: Any) -> bool:
    return isinstance(node, RateState)


def rate_state(opt_state: Any) -> RateState:
    """The learning-rate state inside an optimizer state of `make_optimizer`."""
    return next(node for node in jax.tree.leaves(opt_state, is_leaf=_is_rate) if _is_rate(node))


def reduce_on_plateau(opt_state: Any, metric: float, config: OptimConfig) -> Any:
    """`opt_state` after one evaluation under torch's ReduceLROnPlateau (mode max).

    The metric is better when it exceeds the best by a share of 1e-4; after more than
    `plateau_patience` evaluations that are not, the rate is multiplied by `plateau_factor`, not
    below `min_learning_rate`.
    """
    old = rate_state(opt_state)
    best, stale, scale = float(old.best), int(old.stale), float(old.scale)
    # For a negative best the threshold has to move towards zero to mean "better".
    if metric > best + 1e-4 * abs(best) or best == -float("inf"):
        best, stale = metric, 0
    else:
        stale += 1
    if stale > config.plateau_patience:
        floor = config.min_learning_rate / config.learning_rate
        scale, stale = max(scale * config.plateau_factor, floor), 0

    def like(value: float, leaf: jax.Array) -> jax.Array:
        return jax.device_put(jnp.asarray(value, leaf.dtype), leaf.sharding)

    new = old._replace(
        best=like(best, old.best), stale=like(stale, old.stale), scale=like(scale, old.scale)
    )
    return jax.tree.map(lambda node: new if _is_rate(node) else node, opt_state, is_leaf=_is_rate)
