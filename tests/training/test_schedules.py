"""Schedules and optimizer trajectories against arrays computed with torch."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from references.prompt_methods import dassl_rate

from mlclip_jax.errors import UserError
from mlclip_jax.training.config import OptimConfig
from mlclip_jax.training.optim import (
    learning_rate_groups,
    make_optimizer,
    rate_state,
    reduce_on_plateau,
    update_average,
)
from mlclip_jax.training.schedules import make_beta1, make_schedule

GOLDEN = Path(__file__).parents[1] / "golden" / "schedules.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return {key: arrays[key] for key in arrays.files}


def deviation(actual, expected):
    """Largest absolute difference over the largest expected magnitude."""
    return np.max(np.abs(np.asarray(actual, np.float64) - expected)) / np.max(np.abs(expected))


def rates(config, steps, *, total, warmup=0, per_epoch=1):
    schedule = make_schedule(
        config, total_steps=total, warmup_steps=warmup, steps_per_epoch=per_epoch
    )
    return np.asarray(jax.vmap(schedule)(jnp.arange(steps)))


def test_onecycle(golden):
    total = int(golden["onecycle/steps_per_epoch"] * golden["onecycle/epochs"])
    for column, peak in enumerate(golden["onecycle/max_lr"]):
        config = OptimConfig(learning_rate=float(peak), schedule="onecycle")
        actual = rates(config, total, total=total)
        assert deviation(actual, golden["onecycle/lr"][:, column]) < 2e-6
        beta1 = np.asarray(jax.vmap(make_beta1(config, total_steps=total))(jnp.arange(total)))
        assert deviation(beta1, golden["onecycle/beta1"][:, column]) < 2e-6


def test_onecycle_of_forty_epochs(golden):
    expected = golden["onecycle40x5_max3e-4/lr_beta1"]
    config = OptimConfig(learning_rate=3e-4, schedule="onecycle")
    assert deviation(rates(config, 200, total=200), expected[:, 0]) < 2e-6
    beta1 = np.asarray(jax.vmap(make_beta1(config, total_steps=200))(jnp.arange(200)))
    assert deviation(beta1, expected[:, 1]) < 2e-6


def test_onecycle_without_momentum_keeps_beta1():
    config = OptimConfig(schedule="onecycle", cycle_momentum=False, beta1=0.8)
    assert make_beta1(config, total_steps=10) == 0.8


def test_cosine_with_warmup_is_the_schedule_of_mkt(golden):
    fractions = golden["mkt_stage1/epoch_fraction"]
    per_epoch = round(1 / (fractions[1] - fractions[0]))
    config = OptimConfig(learning_rate=1e-3, min_learning_rate=1e-6)
    base = rates(config, len(fractions), total=20 * per_epoch, warmup=2 * per_epoch)
    for column, scale in enumerate((0.65**2, 0.65, 1.0)):
        expected = golden["mkt_stage1/lr_layer11_layer12_head"][:, column]
        assert deviation(base * scale, expected) < 2e-6

    fractions = golden["mkt_stage2/epoch_fraction"]
    per_epoch = round(1 / (fractions[1] - fractions[0]))
    config = OptimConfig(learning_rate=1e-3, min_learning_rate=1e-8)
    base = rates(config, len(fractions), total=4 * per_epoch)
    assert deviation(base, golden["mkt_stage2/lr"]) < 2e-6


def test_cosine_per_epoch_holds_the_rate(golden):
    config = OptimConfig(learning_rate=5e-4, schedule_unit="epoch")
    actual = rates(config, 90, total=90, per_epoch=3)
    assert deviation(actual[::3], golden["cosine30_per_epoch/lr"]) < 2e-6
    np.testing.assert_array_equal(actual[0::3], actual[2::3])


def test_constant_warmup_and_cosine_of_dassl():
    """The optimizer of CoOp's code: baselines' table T17 and the reference, 3 steps an epoch."""
    config = OptimConfig(
        learning_rate=2e-3,
        schedule="cosine",
        schedule_unit="epoch",
        warmup="1 epochs",
        warmup_rate=1e-5,
    )
    actual = rates(config, 150, total=51 * 3, warmup=3, per_epoch=3)[::3]
    assert deviation(actual, [dassl_rate(epoch, 2e-3, 50) for epoch in range(50)]) < 2e-6
    printed = {0: 1e-5, 1: 2e-3, 2: 1.998027e-3, 25: 1.062791e-3, 49: 7.885299e-6}
    for epoch, rate in printed.items():
        assert actual[epoch] == pytest.approx(rate, rel=1e-5)


def test_constant_and_warmup():
    config = OptimConfig(learning_rate=0.5, schedule="constant")
    actual = rates(config, 6, total=6, warmup=4)
    np.testing.assert_allclose(actual, [0.0, 0.125, 0.25, 0.375, 0.5, 0.5])


def test_rate_stays_at_the_end_beyond_the_schedule():
    for schedule in ("cosine", "onecycle"):
        config = OptimConfig(learning_rate=1.0, schedule=schedule, min_learning_rate=0.1)
        actual = rates(config, 30, total=20)
        np.testing.assert_array_equal(actual[21:], actual[20])


def test_plateau(golden):
    config = OptimConfig(
        learning_rate=5e-4, schedule="plateau", min_learning_rate=1e-7, plateau_patience=5
    )
    params = {"w": jnp.zeros((1, 1))}
    optimizer, schedule = make_optimizer(config, params, total_steps=30)
    state = optimizer.init(params)
    used = []
    for metric in golden["plateau/metric_per_epoch"]:
        used.append(float(schedule(0) * rate_state(state).scale))
        state = reduce_on_plateau(state, float(metric), config)
    assert deviation(used, golden["plateau/lr_used_in_epoch"]) < 1e-6
    # The scale reaches the update itself.
    updates, _ = optimizer.update({"w": jnp.ones((1, 1))}, optimizer.init(params), params)
    scaled, _ = optimizer.update(
        {"w": jnp.ones((1, 1))},
        reduce_scale(optimizer.init(params), config),
        params,
    )
    np.testing.assert_allclose(scaled["w"], 0.1 * updates["w"], rtol=1e-6)


def reduce_scale(state, config):
    """The optimizer state after one good and six stale evaluations."""
    for _ in range(7):
        state = reduce_on_plateau(state, 0.5, config)
    return state


TRAJECTORIES = {
    "opt/adam_l2_1e-2_lr1e-2": OptimConfig(
        name="adam", learning_rate=1e-2, schedule="constant", weight_decay=1e-2
    ),
    "opt/adam_l2_1e-2_onecycle_max1e-1_total30_pct0.2": OptimConfig(
        name="adam", learning_rate=1e-1, schedule="onecycle", weight_decay=1e-2
    ),
    "opt/adamw_wd0.05_lr1e-2": OptimConfig(
        name="adamw", learning_rate=1e-2, schedule="constant", weight_decay=0.05
    ),
    "opt/sgd_m0.9_wd1e-2_lr1e-2": OptimConfig(
        name="sgd", learning_rate=1e-2, schedule="constant", weight_decay=1e-2
    ),
}


@pytest.mark.parametrize("name", sorted(TRAJECTORIES))
def test_optimizer_trajectory(golden, name):
    # Two dimensions, because parameters of fewer are not decayed.
    params = {"w": jnp.asarray(golden["opt/theta0"], jnp.float32)[None]}
    optimizer, _ = make_optimizer(TRAJECTORIES[name], params, total_steps=30)
    state = optimizer.init(params)
    average = jax.tree.map(jnp.copy, params)
    trajectory, averages = [], []
    for grad in golden["opt/grads"]:
        grads = {"w": jnp.asarray(grad, jnp.float32)[None]}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        average = update_average(average, params, 0.9)
        trajectory.append(params["w"][0])
        averages.append(average["w"][0])
    assert deviation(trajectory, golden[name]) < 1e-5
    if name.startswith("opt/sgd"):
        assert deviation(averages, golden["opt/ema_decay0.9_of_sgd"]) < 2e-6


def test_average_decays_of_hspnet(golden):
    # decay = 0.82 ** (1 / steps per epoch), the numbers of steps that the release has.
    for name, steps in (
        ("coco", 641),
        ("nus", 931),
        ("voc", 45),
        ("cub_bs96", 63),
        ("cub_bs128", 47),
    ):
        assert abs(0.82 ** (1 / steps) - golden[f"ema/decay_{name}"]) < 1e-12


def test_decay_spares_vectors_and_scalars():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2), "s": jnp.ones(())}
    zero = jax.tree.map(jnp.zeros_like, params)

    def moved(**fields):
        config = OptimConfig(
            name="adamw", learning_rate=1.0, schedule="constant", weight_decay=0.5, **fields
        )
        optimizer, _ = make_optimizer(config, params, total_steps=1)
        updates, _ = optimizer.update(zero, optimizer.init(params), params)
        return {name for name, update in updates.items() if np.any(update)}

    assert moved() == {"w"}


def test_clipping_bounds_the_gradient():
    params = {"w": jnp.zeros((2, 2))}
    config = OptimConfig(
        name="sgd", momentum=0.0, learning_rate=1.0, schedule="constant", clip_norm=0.5
    )
    optimizer, _ = make_optimizer(config, params, total_steps=1)
    updates, _ = optimizer.update({"w": jnp.full((2, 2), 3.0)}, optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.5, rtol=1e-6)


def test_groups_scale_the_rate():
    params = {"gcn/w": jnp.zeros((1, 1)), "head/w": jnp.zeros((1, 1))}
    config = OptimConfig(
        name="sgd", momentum=0.0, learning_rate=1.0, schedule="constant", groups=(("^gcn/", 5.0),)
    )
    optimizer, _ = make_optimizer(config, params, total_steps=1)
    updates, _ = optimizer.update(
        jax.tree.map(jnp.ones_like, params), optimizer.init(params), params
    )
    assert float(updates["gcn/w"][0, 0]) == -5.0
    assert float(updates["head/w"][0, 0]) == -1.0


def test_group_that_matches_nothing_is_named():
    with pytest.raises(UserError, match=r"'\^gnc/' matches no trainable parameter"):
        learning_rate_groups(["gcn/w"], (("^gnc/", 5.0),))
    with pytest.raises(UserError, match="'gcn' matches no trainable parameter"):
        learning_rate_groups(["gcn/w"], (("w", 5.0), ("gcn", 2.0)))
    with pytest.raises(UserError, match="no regular expression"):
        learning_rate_groups(["gcn/w"], (("(", 5.0),))


def test_first_group_wins():
    assigned = learning_rate_groups(["a/1", "a/2", "b"], (("a/1", 0.1), ("a/", 0.5)))
    assert assigned == {"a/1": ("a/1", 0.1), "a/2": ("a/", 0.5), "b": ("base", 1.0)}
