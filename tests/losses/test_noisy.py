"""Losses for missing labels against worked examples, and their rules."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import value_and_grad

from mlclip_jax import losses
from mlclip_jax.losses import Progress
from mlclip_jax.losses.noisy import kth_largest

X = np.array([[2, -1, 0.5, -3], [-0.5, 1.5, -1.25, 0.25]])
Z = np.array([[1, 0, 0, 0], [0, 0, 1, 0]], np.int8)
KNOWN = np.array([[1, -1, 0, 0], [0, -1, 1, -1]], np.int8)


def epoch(e):
    return {"progress": Progress(step=0, epoch=e)}


@pytest.mark.parametrize(
    ("spec", "e", "expected"),
    [
        ("assume_negative", 0, 0.745777),
        ("weak_assume_negative", 0, 0.384330),
        ("weak_assume_negative(reduction='sum')", 0, 3.074642),
        ("label_smoothing", 0, 0.783277),
        ("label_smoothing(unobserved_only=True)", 0, 0.773902),
        ("label_smoothing(smoothing=0.05)", 0, 0.764527),
        ("large_loss(rate_per_epoch=0.2)", 1, 0.411340),
        ("large_loss(rate_per_epoch=0.2, mode='correct')", 1, 0.495777),
        ("large_loss(rate_per_epoch=0.1)", 3, 0.308098),
        ("large_loss(rate_per_epoch=0.1, mode='correct')", 3, 0.464527),
        ("large_loss(rate_per_epoch=0.2)", 0, 0.745777),
        ("entropy_maximization", 0, 0.162867),
        ("entropy_maximization(alpha=0.2)", 0, 0.122127),
        ("focal", 0, 0.346915),
        ("hill", 0, 3.290903),
        ("splc", 1, 2.371699),
    ],
)
def test_worked_examples(spec, e, expected):
    value, _ = value_and_grad(lambda x: losses.get(spec)(x, Z, **epoch(e)), X)
    np.testing.assert_allclose(value, expected, atol=6e-7)


def test_elements_of_assume_negative():
    expected = [
        [0.126928, 0.313262, 0.974077, 0.048587],
        [0.474077, 1.701413, 1.501929, 0.825939],
    ]
    one = jnp.eye(X.size, dtype=bool).reshape(-1, *X.shape)
    each = jax.vmap(lambda where: losses.binary_cross_entropy(jnp.asarray(X), Z, where=where))(one)
    np.testing.assert_allclose(each.reshape(X.shape), expected, atol=6e-7)


def test_gradient_of_entropy_maximization():
    _, grad = value_and_grad(lambda x: losses.entropy_maximization(x, Z), X)
    expected = [
        [-0.014900, -0.002458, 0.001469, -0.001694],
        [-0.001469, 0.002796, -0.097162, 0.000769],
    ]
    np.testing.assert_allclose(grad, expected, atol=6e-7)
    _, grad = value_and_grad(lambda x: losses.entropy_maximization(x, Z), np.zeros_like(X))
    assert (grad[Z == 0] == 0).all() and (grad[Z > 0] != 0).all()


@pytest.mark.parametrize(
    ("settings", "images", "mean"),
    [
        ({}, [0.354903, 2.127964], 1.241434),
        ({"alpha": 1, "beta": 0, "gamma": -1}, [0.220095, 1.343094], 0.781594),
    ],
)
def test_partial_binary_cross_entropy(settings, images, mean):
    def loss(x, rows=slice(None)):
        return losses.partial_binary_cross_entropy(x[rows], KNOWN[rows], **settings)

    np.testing.assert_allclose(value_and_grad(loss, X)[0], mean, atol=6e-7)
    for k, expected in enumerate(images):
        got, _ = value_and_grad(lambda x, k=k: loss(x, slice(k, k + 1)), X)
        np.testing.assert_allclose(got, expected, atol=6e-7)


def test_partial_of_all_known_labels_is_binary_cross_entropy():
    known = np.where(Z > 0, 1, -1).astype(np.int8)
    np.testing.assert_allclose(
        losses.partial_binary_cross_entropy(jnp.asarray(X), known),
        losses.binary_cross_entropy(jnp.asarray(X), known),
        rtol=1e-6,
    )


def test_expected_positives():
    loss = losses.get("expected_positives(expected=1.5)")
    value, _ = value_and_grad(lambda x: loss(x, Z), X)
    positives = np.logaddexp(0, -X)[Z > 0].sum() / X.size
    np.testing.assert_allclose(value - positives, 0.009990, atol=6e-7)


def test_weak_assume_negative_of_two_classes_is_assume_negative():
    x, z = jnp.asarray(X[:, :2]), Z[:, :2]
    got, expected = losses.weak_assume_negative(x, z), losses.binary_cross_entropy(x, z)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_known_negatives_are_plain_negatives():
    known = np.where(Z > 0, 1, -1).astype(np.int8)
    expected = losses.binary_cross_entropy(jnp.asarray(X), known)
    for spec in (
        "weak_assume_negative",
        "label_smoothing(unobserved_only=True)",
        "entropy_maximization",
        "large_loss(rate_per_epoch=0.5)",
    ):
        np.testing.assert_allclose(
            losses.get(spec)(jnp.asarray(X), known, **epoch(2)), expected, rtol=1e-6
        )
    x, at = jnp.asarray(X), epoch(5)
    np.testing.assert_allclose(
        losses.splc(x, known, **at), losses.splc(x, known, change_epoch=9, **at), rtol=1e-6
    )
    assert losses.splc(x, Z, **at) < losses.splc(x, Z, change_epoch=9, **at)


def test_tied_large_losses_are_all_modified():
    x = jnp.asarray([[3.0, 3.0, 3.0, 0.0]])
    z = jnp.asarray([[1, 0, 0, 0]], jnp.int8)
    got = losses.large_loss(x, z, rate_per_epoch=0.25, **epoch(1))
    np.testing.assert_allclose(got, (np.log1p(np.exp(-3)) + np.log(2)) / 4, rtol=1e-6)


def test_large_loss_beyond_all_unobserved_modifies_them_only():
    x, z = jnp.asarray(X), jnp.asarray(Z)
    got = losses.large_loss(x, z, rate_per_epoch=0.4, **epoch(50))
    np.testing.assert_allclose(got, np.logaddexp(0, -X)[Z > 0].sum() / 8, rtol=1e-6)
    sure = jnp.full((2, 4), -1e4)  # nothing to correct: every assumed negative is certain
    none = losses.large_loss(sure, z * 0, mode="correct", rate_per_epoch=1.0, **epoch(1))
    assert none == 0


@pytest.mark.parametrize("entries", [10, 70, 1000])
def test_large_loss_counts_whole_shares_exactly(entries):
    x = jnp.linspace(-3, 3, entries)[None]
    z = jnp.zeros((1, entries), jnp.int8)

    @jax.jit
    def rejected(share, e):
        loss = jax.grad(lambda x: losses.large_loss(x, z, rate_per_epoch=share, **epoch(e)))
        return (loss(x) == 0).sum()

    for e in range(11):
        assert rejected(0.1, e) == entries * e // 10
        assert rejected(0.05, 2 * e) == entries * e // 10


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kth_largest(dtype):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        values = rng.exponential(size=(30, 7)).astype(dtype)
        values[:5] = values[5:10]
        values[10:15] = 0
        ordered = np.sort(values.ravel())[::-1]
        find = jax.jit(kth_largest)
        for k in (1, 2, 69, 70, 71, 175, 176, 210):
            assert find(values, k) == ordered[k - 1]
