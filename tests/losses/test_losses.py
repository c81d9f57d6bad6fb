"""Every loss at its edges: extreme logits, masks, one class or ten thousand, names and settings."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from loss_cases import SPECS, inputs

from mlclip_jax import losses
from mlclip_jax.errors import UserError


def sample(b, c, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(3 * rng.normal(size=(b, c)), jnp.float32)
    return x, jnp.asarray(rng.integers(-1, 2, (b, c)), jnp.int8)


@functools.cache
def jitted(spec, classes):
    """(logits, targets, where) -> value and gradient."""
    loss, given = losses.get(spec), inputs(classes)
    return jax.jit(
        jax.value_and_grad(lambda x, targets, where: loss(x, targets, where=where, **given))
    )


def test_every_loss_is_tried():
    assert {spec.partition("(")[0] for spec in SPECS} == set(losses.LOSSES)


EXTREME = [[-1e4, -100, -20, 0, 20, 100, 1e4], [1e4] * 7, [-1e4] * 7, [0] * 7, [-1, 1] * 3 + [1]]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_finite_at_extreme_logits_and_whatever_the_targets(spec, dtype):
    x = jnp.asarray(EXTREME, dtype)
    mixed = jnp.asarray(np.resize([1, 0, -1, 1, 1], x.shape), jnp.int8)
    flat = [jnp.full(x.shape, sign, jnp.int8) for sign in (-1, 0, 1)]
    everything = jnp.ones(x.shape, bool)
    for targets in (*flat, mixed, -mixed):
        for where in (everything, everything.at[:, 1:].set(False)):  # all classes, and one
            value, grad = jitted(spec, 7)(x, targets, where)
            assert value.dtype == jnp.float32 and value.shape == ()
            assert np.isfinite(value)
            assert grad.dtype == x.dtype and np.isfinite(np.asarray(grad, np.float32)).all()


@pytest.mark.parametrize("spec", SPECS)
def test_masked_rows_and_classes_are_as_if_absent(spec):
    x, targets = sample(5, 7)
    where = jnp.asarray(np.arange(5) < 3)[:, None] & jnp.asarray(np.arange(7) < 6)[None]
    function = jitted(spec, 7)
    value, grad = function(jnp.where(where, x, jnp.nan), targets, where)
    small = jitted(spec, 6)(x[:3, :6], targets[:3, :6], jnp.ones((3, 6), bool))
    np.testing.assert_allclose(value, small[0], rtol=2e-6)
    np.testing.assert_allclose(grad[:3, :6], small[1], rtol=2e-5, atol=1e-7)
    assert (np.asarray(grad)[~np.asarray(where)] == 0).all()
    nothing, grad = function(x, targets, jnp.zeros((5, 7), bool))
    assert nothing == 0 and not np.asarray(grad).any()


@pytest.mark.parametrize("spec", SPECS)
def test_ten_thousand_classes(spec):
    x, targets = sample(2, 10_000)
    value, grad = jitted(spec, 10_000)(x, targets, jnp.ones(x.shape, bool))
    assert np.isfinite(value) and np.isfinite(np.asarray(grad)).all() and grad.any()


# Their focal weight carries no gradient, as in the release.
CONSTANT_WEIGHT = ("asymmetric",)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec not in CONSTANT_WEIGHT])
def test_gradient_is_that_of_the_value(spec):
    loss = losses.get(spec)
    with jax.enable_x64(True):
        x, targets = sample(3, 6, seed=1)
        x = jnp.asarray(x, jnp.float64)
        function = jax.jit(jax.value_and_grad(lambda x: loss(x, targets, **inputs(6))))
        direction = np.random.default_rng(2).normal(size=x.shape)
        ahead, behind = (function(x + step * direction)[0] for step in (1e-5, -1e-5))
        slope = (function(x)[1] * direction).sum()
        np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-6)


@pytest.mark.parametrize(
    "spec",
    [
        "large_loss(rate_per_epoch=0.1)",
        "ranking",
        "distribution_balanced(variant='lmpt')",
        "expected_positives(expected=2)",
    ],
)
def test_split_over_devices_is_the_same(spec):
    x, targets = sample(16, 12)
    function, where = jitted(spec, 12), jnp.ones((16, 12), bool)
    value, grad = function(x, targets, where)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    got, got_grad = function(*(jax.device_put(a, rows) for a in (x, targets, where)))
    np.testing.assert_allclose(got, value, rtol=1e-6)
    np.testing.assert_allclose(got_grad, grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "sum", "sum_classes_mean_images"])
def test_reductions(reduction):
    x, targets = sample(4, 5)
    where = np.ones((4, 5), bool)
    where[3] = False
    where[:2, 4] = False
    loss = losses.get(f"focal(reduction={reduction!r})")
    total = losses.focal(x, targets, where=where, reduction="sum")
    share = {"mean": where.sum(), "sum": 1, "sum_classes_mean_images": 3}[reduction]
    np.testing.assert_allclose(loss(x, targets, where=where), total / share, rtol=1e-6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("asymetric", "unknown loss 'asymetric'; did you mean 'asymmetric'"),
        ("asymmetric(gamma=2)", "unknown argument of loss 'asymmetric': 'gamma'"),
        ("asymmetric(2)", "write arguments as key=value"),
        ("asymmetric(where=1)", "unknown argument of loss 'asymmetric': 'where'"),
        ("splc(progress=1)", "unknown argument of loss 'splc': 'progress'"),
        ("asymmetric(clip=open('x'))", "should read"),
        ("focal(reduction='max')", "loss 'focal': reduction is one of 'mean', 'sum'"),
        ("large_loss(mode='keep')", "loss 'large_loss': mode is one of 'reject', 'correct'"),
        ("expected_positives", "write expected_positives(expected=...)"),
    ],
)
def test_wrong_specs_are_named(spec, message):
    with pytest.raises(UserError) as caught:
        losses.get(spec)
    assert message in str(caught.value)


def test_a_loss_gets_what_it_asks_for_and_misses_it_by_name():
    x, targets = sample(2, 3)
    assert losses.get("focal").needs == set()
    assert losses.get("splc(gamma=1)").needs == {"progress"}
    balanced = losses.get("distribution_balanced")
    assert balanced.needs == {"class_counts", "num_images"}
    with pytest.raises(UserError, match="'distribution_balanced' needs num_images"):
        balanced(x, targets, class_counts=np.ones(3), num_images=None)
    with pytest.raises(UserError, match="'splc' needs progress, how far training is"):
        losses.get("splc")(x, targets)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, t: losses.focal(x, t[:1]), "must both be"),
        (lambda x, t: losses.focal(x[0], t[0]), "must both be"),
        (lambda x, t: losses.focal(x, t, reduction="max"), "unknown reduction"),
        (lambda x, t: losses.ranking(x, t, pairs="mean"), "pairs='mean'"),
        (lambda x, t: losses.class_balanced(x, t, class_counts=np.ones(2)), "must be .c. = .3."),
        (
            lambda x, t: losses.class_balanced(x, t, class_counts=np.ones(3), mode="x"),
            "unknown mode",
        ),
        (
            lambda x, t: losses.distribution_balanced(
                x, t, class_counts=np.ones(3), num_images=2, variant="x"
            ),
            "unknown variant",
        ),
        (lambda x, t: losses.large_loss(x, t, progress=None, mode="x"), "unknown mode"),
        (lambda x, t: losses.l1_distillation(x, x[:1]), "both"),
    ],
)
def test_wrong_calls_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*sample(2, 3))
