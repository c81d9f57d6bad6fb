"""The mean of the k highest values: against sorting, its gradient, ties, and devices."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mlclip_jax.modules.heads import top_mean
from mlclip_jax.training.mesh import make_mesh

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 2, 7, 16])
def test_value_and_gradient(dtype, k):
    with jax.enable_x64(dtype == np.float64):
        x = RNG.normal(size=(3, 5, 16)).astype(dtype)
        x[0], x[1, 0], x[2, 0, 3] = -np.abs(x[0]), np.abs(x[1, 0]), 0.0
        x[2, 1] *= 1e-30
        weights = jnp.asarray(RNG.normal(size=(3, 5)), dtype)
        run = jax.jit(jax.value_and_grad(lambda x: (weights * top_mean(x, k)).sum()))
        value, gradient = run(jnp.asarray(x))
        expected = np.sort(x, -1)[..., -k:].mean(-1)
        rtol = 1e-5 if dtype == np.float32 else 1e-13
        np.testing.assert_allclose(top_mean(jnp.asarray(x), k), expected, rtol=rtol, atol=rtol / 10)
        np.testing.assert_allclose(value, (weights * expected).sum(), rtol=10 * rtol)
        highest = x >= np.sort(x, -1)[..., -k, None]
        slope = np.asarray(weights)[..., None] * highest / k
        assert gradient.dtype == dtype
        np.testing.assert_allclose(gradient, slope, rtol=rtol)


def test_ties_share_the_gradient():
    x = jnp.array([3.0, 1.0, 1.0, 1.0, -2.0])
    value, gradient = jax.value_and_grad(lambda x: top_mean(x, 2))(x)
    assert value == 2
    np.testing.assert_allclose(gradient, [0.5, 1 / 6, 1 / 6, 1 / 6, 0], rtol=1e-6)
    assert np.isnan(top_mean(jnp.array([0.0, jnp.nan, 1.0]), 2))


def test_devices_share_the_work():
    mesh = make_mesh()
    x = jax.device_put(
        RNG.normal(size=(16, 24, 64)).astype(np.float32),
        NamedSharding(mesh, PartitionSpec("data")),
    )
    run = jax.jit(jax.value_and_grad(lambda x: jnp.square(top_mean(x, 6)).sum()))
    text = run.lower(x).compile().as_text()
    found = re.findall(r"= \S+ (all-gather|all-to-all|all-reduce)\(", text)
    assert found == ["all-reduce"]  # of the sum alone
