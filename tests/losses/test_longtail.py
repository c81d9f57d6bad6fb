"""Losses for long tails against worked examples, and their rules."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import value_and_grad

from mlclip_jax import losses

X = np.array([[2, -1, 0.5, -3], [-0.5, 1.5, -1.25, 0.25]])
Y = np.array([[1, 0, 0, 1], [0, 1, 1, 0]], np.int8)
COUNTS = np.array([100.0, 50, 20, 5])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("class_balanced", 0.136243), ("rebalanced", 0.888496), ("rebalanced_focal", 1.157155)],
)
def test_worked_examples(spec, expected):
    value, _ = value_and_grad(lambda x: losses.get(spec)(x, Y, class_counts=COUNTS), X)
    np.testing.assert_allclose(value, expected, atol=6e-7)


def test_weights():
    got = losses.class_balanced_weights(jnp.asarray(Y > 0), jnp.asarray(COUNTS))
    np.testing.assert_allclose(got[:, 0], [0.172098, 0.107179], atol=6e-7)
    got = losses.rebalancing_weights(jnp.asarray(Y > 0), jnp.asarray(COUNTS))
    expected = [
        [0.278901, 0.359683, 0.694103, 1.099460],
        [0.460907, 0.802063, 1.094193, 1.100000],
    ]
    np.testing.assert_allclose(got, expected, atol=6e-7)


def test_weights_of_one_positive_and_of_none():
    positive = jnp.asarray([[False, True, False, False], [False] * 4])
    got = losses.rebalancing_weights(positive, jnp.asarray(COUNTS))
    np.testing.assert_allclose(got[0, 1], 0.1 + 1 / (1 + np.exp(-8)), rtol=1e-6)  # r = 1
    np.testing.assert_allclose(got[1], 1.1, rtol=1e-6)
    for mode in ("average_w", "average_n", "min_n"):
        got = losses.class_balanced_weights(positive, jnp.asarray(COUNTS), mode=mode)
        np.testing.assert_allclose(got[0], 0.1 / (1 - 0.9**50), rtol=1e-6)
        assert (np.asarray(got[1]) == 0).all()


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 0.999999])
def test_class_balanced_weights_are_exact_near_one(beta):
    positive = jnp.ones((1, 4), bool)
    got = losses.class_balanced_weights(
        positive, jnp.asarray(COUNTS, jnp.float32), beta=beta, mode="by_class"
    )
    np.testing.assert_allclose(got[0], (1 - beta) / (1 - beta**COUNTS), rtol=1e-6)


@pytest.mark.parametrize("spec", ["distribution_balanced", "inverse_frequency", "class_balanced"])
def test_classes_that_never_or_always_occur_are_finite(spec):
    counts = np.array([0, 0, 10, 10], np.int32)
    loss = losses.get(spec)
    value, grad = value_and_grad(lambda x: loss(x, Y, class_counts=counts, num_images=10), X)
    assert np.isfinite(value) and np.isfinite(grad).all() and grad.any()


def test_distribution_balanced_reduces_to_its_parts():
    plain = losses.get(
        "distribution_balanced(bias=0, negative_scale=1, gamma=0, balance=1, alpha=0.1)"
    )
    x = jnp.asarray(X, jnp.float32)
    np.testing.assert_allclose(
        plain(x, Y, class_counts=COUNTS, num_images=1000),
        losses.rebalanced(x, Y, class_counts=COUNTS),
        rtol=1e-6,
    )
