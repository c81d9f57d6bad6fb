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
def all_losses(classes, specs=SPECS):
    """(logits, targets, where) -> value and gradient of every loss; one compilation for all."""
    bound = {spec: losses.get(spec) for spec in specs}

    def one(loss, x, targets, where):
        given = inputs(classes)
        return jax.value_and_grad(lambda x: loss(x, targets, where=where, **given))(x)

    return jax.jit(
        lambda x, targets, where: {spec: one(f, x, targets, where) for spec, f in bound.items()}
    )


def test_every_loss_is_tried():
    assert {spec.partition("(")[0] for spec in SPECS} == set(losses.LOSSES)


EXTREME = [[-1e4, -100, -20, 0, 20, 100, 1e4], [1e4] * 7, [-1e4] * 7, [0] * 7, [-1, 1] * 3 + [1]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_finite_at_extreme_logits_and_whatever_the_targets(dtype):
    x = jnp.asarray(EXTREME, dtype)
    mixed = np.resize(np.array([1, 0, -1, 1, 1], np.int8), x.shape)
    flat = [np.full(x.shape, sign, np.int8) for sign in (-1, 0, 1)]
    first = np.arange(7) == 0
    for targets in (*flat, mixed, -mixed):
        for where in (np.ones(x.shape, bool), np.broadcast_to(first, x.shape)):  # or one class
            for spec, (value, grad) in all_losses(7)(x, targets, where).items():
                assert value.dtype == jnp.float32 and value.shape == (), spec
                assert np.isfinite(value), spec
                assert grad.dtype == x.dtype, spec
                assert np.isfinite(np.asarray(grad, np.float32)).all(), spec


def test_masked_rows_and_classes_are_as_if_absent():
    x, targets = sample(5, 7)
    where = (np.arange(5) < 3)[:, None] & (np.arange(7) < 6)
    got = all_losses(7)(jnp.where(where, x, jnp.nan), targets, where)
    small = all_losses(6)(x[:3, :6], targets[:3, :6], np.ones((3, 6), bool))
    nothing = all_losses(7)(x, targets, np.zeros((5, 7), bool))
    for spec, (value, grad) in got.items():
        np.testing.assert_allclose(value, small[spec][0], rtol=2e-6, err_msg=spec)
        expected = small[spec][1]
        np.testing.assert_allclose(grad[:3, :6], expected, rtol=2e-5, atol=1e-7, err_msg=spec)
        assert (np.asarray(grad)[~where] == 0).all(), spec
        assert nothing[spec][0] == 0 and not np.asarray(nothing[spec][1]).any(), spec


@pytest.mark.parametrize("classes", [1, 10_000])
def test_one_class_and_ten_thousand(classes):
    x, targets = sample(2, classes)
    for spec, (value, grad) in all_losses(classes)(x, targets, np.ones(x.shape, bool)).items():
        assert np.isfinite(value) and np.isfinite(np.asarray(grad)).all(), spec
        assert grad.any() or classes == 1, spec


def test_gradient_is_that_of_the_value():
    # Plain "asymmetric" is no derivative: its focal weight is a constant, as in the release.
    specs = tuple(spec for spec in SPECS if spec != "asymmetric")
    with jax.enable_x64(True):
        x, targets = sample(3, 6, seed=1)
        x = jnp.asarray(x, jnp.float64)
        step = 1e-5 * np.random.default_rng(2).normal(size=x.shape)
        here, ahead, behind = (
            all_losses(6, specs)(x + d, targets, np.ones(x.shape, bool)) for d in (0, step, -step)
        )
        for spec in specs:
            slope = 2 * (here[spec][1] * step).sum()
            difference = ahead[spec][0] - behind[spec][0]
            assert here[spec][0].dtype == jnp.float64
            np.testing.assert_allclose(slope, difference, rtol=1e-6, err_msg=spec)


def test_split_over_devices_is_the_same():
    specs = (
        "large_loss(rate_per_epoch=0.1)",
        "ranking",
        "distribution_balanced(variant='lmpt')",
        "expected_positives(expected=2)",
    )
    arguments = (*sample(16, 12), jnp.ones((16, 12), bool))
    expected = all_losses(12, specs)(*arguments)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    got = all_losses(12, specs)(*(jax.device_put(a, rows) for a in arguments))
    for spec in specs:
        np.testing.assert_allclose(got[spec][0], expected[spec][0], rtol=1e-6, err_msg=spec)
        np.testing.assert_allclose(
            got[spec][1], expected[spec][1], rtol=1e-5, atol=1e-8, err_msg=spec
        )


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
