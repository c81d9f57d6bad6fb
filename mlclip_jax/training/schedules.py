"""Learning-rate schedules: functions of the step within a stage, traced with it.

A schedule maps the zero-based step to the rate that this step uses, in the convention of torch's
schedulers stepped after every optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mlclip_jax.training.config import OptimConfig

Schedule = Callable[[jax.Array], jax.Array]


def constant(value: float) -> Schedule:
    """`value` at every step."""
    return lambda step: jnp.full(jnp.shape(step), value, jnp.float32)


def with_warmup(schedule: Schedule, warmup_steps: int, rate: float | None = None) -> Schedule:
    """Linear rise from 0 to the first rate of `schedule`, which then starts at its own step 0.

    With a `rate` that rate in place of the rise, as Dassl has it (CoOp and what is built on it).
    """
    if warmup_steps == 0:
        return schedule

    def warmed(step: jax.Array) -> jax.Array:
        rising = schedule(jnp.zeros_like(step)) * step / warmup_steps
        rising = rising if rate is None else jnp.full_like(rising, rate)
        return jnp.where(step < warmup_steps, rising, schedule(jnp.maximum(step - warmup_steps, 0)))

    return warmed


def cosine(peak: float, total_steps: int, *, minimum: float = 0.0, hold: int = 1) -> Schedule:
    """Half a cosine from `peak` at step 0 to `minimum` at `total_steps`, constant afterwards.

    With `hold` steps in an epoch the rate moves only from epoch to epoch. After a linear warm-up
    this is also the schedule of MKT, which counts in fractions of an epoch.
    """

    def rate(step: jax.Array) -> jax.Array:
        position = jnp.minimum((step // hold) * hold / max(total_steps, 1), 1.0)
        return minimum + (peak - minimum) * 0.5 * (1.0 + jnp.cos(jnp.pi * position))

    return rate


def _one_cycle(first: float, middle: float, last: float, total_steps: int, pct: float) -> Schedule:
    """Cosine from `first` to `middle` over the share `pct`, then to `last`; clamped at the end."""
    peak_step = pct * total_steps - 1.0
    end_step = total_steps - 1.0

    def ease(start: float, end: float, position: jax.Array) -> jax.Array:
        return end + (start - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(position, 0.0, 1.0)))

    def value(step: jax.Array) -> jax.Array:
        rising = ease(first, middle, step / max(peak_step, 1e-6))
        falling = ease(middle, last, (step - peak_step) / max(end_step - peak_step, 1e-6))
        return jnp.where(step <= peak_step, rising, falling)

    return value


def onecycle(
    peak: float,
    total_steps: int,
    *,
    pct_start: float = 0.2,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> Schedule:
    """torch's OneCycleLR with cosine annealing: peak/div -> peak -> peak/(div * final_div)."""
    first = peak / div_factor
    return _one_cycle(first, peak, first / final_div_factor, total_steps, pct_start)


def onecycle_beta1(
    total_steps: int, *, pct_start: float = 0.2, base: float = 0.85, largest: float = 0.95
) -> Schedule:
    """Adam's beta1 under torch's OneCycleLR with cycle_momentum: .95 -> .85 -> .95."""
    return _one_cycle(largest, base, largest, total_steps, pct_start)


def make_schedule(
    config: OptimConfig, *, total_steps: int, warmup_steps: int, steps_per_epoch: int
) -> Schedule:
    """The schedule that `config` names; "plateau" is constant here and scaled by the optimizer.

    Args:
      config: the stage's optimizer settings.
      total_steps: length the schedule is laid out for, warm-up included.
      warmup_steps: length of the linear warm-up.
      steps_per_epoch: steps in an epoch, for `schedule_unit="epoch"`.
    """
    if config.schedule == "onecycle":
        return onecycle(
            config.learning_rate,
            total_steps,
            pct_start=config.pct_start,
            div_factor=config.div_factor,
            final_div_factor=config.final_div_factor,
        )
    if config.schedule == "cosine":
        hold = steps_per_epoch if config.schedule_unit == "epoch" else 1
        rate = cosine(
            config.learning_rate,
            total_steps - warmup_steps,
            minimum=config.min_learning_rate,
            hold=hold,
        )
    else:
        rate = constant(config.learning_rate)
    return with_warmup(rate, warmup_steps, config.warmup_rate)


def make_beta1(config: OptimConfig, *, total_steps: int) -> Schedule | float:
    """Adam's beta1: cycled under "onecycle" with cycle_momentum, a constant otherwise."""
    if config.schedule == "onecycle" and config.cycle_momentum:
        return onecycle_beta1(total_steps, pct_start=config.pct_start)
    return config.beta1
