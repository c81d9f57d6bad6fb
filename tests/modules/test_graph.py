"""Graphs and their convolution: the release's splits, Eqs. 5-9 in float64, edge cases."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlclip_jax.modules.graph import GCN, dependency_graph, pad_graph, relation

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("case", range(10))
def test_splits_equal_release(case: int) -> None:
    golden = np.load(GOLDEN / "hspnet.npz")
    similarity, expected = golden[f"split{case}/in"], golden[f"split{case}/out"]
    with jax.enable_x64(True):
        got = dependency_graph(jnp.array(similarity), neighbours=float(golden[f"split{case}/r"]))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    kept = (expected != 0).sum(1)
    assert (
        int(golden[f"split{case}/K"]) == int(0.75 * len(similarity))
        and kept.max() <= kept.min() + 1
    )


def test_relation_is_the_cosine() -> None:
    golden = np.load(GOLDEN / "hspnet.npz")
    got = relation(jnp.array(golden["in/relation_features"], jnp.float32))
    np.testing.assert_allclose(got, golden["in/relation"], rtol=0, atol=1e-6)


def test_graph_follows_the_equations() -> None:
    """Eqs. 6-7 row by row; the diagonal is the largest entry and takes one of the K places."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 4)) + 1.5
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    similarity = x @ x.T
    got = np.asarray(dependency_graph(jnp.array(similarity, jnp.float32), kept=0.5, neighbours=0.3))
    for i, row in enumerate(similarity):
        top = [j for j in np.argsort(-row)[:4] if j != i]
        expected = np.zeros(9)
        expected[top] = 0.3 * row[top] / row[top].sum()
        expected[i] = 0.7
        np.testing.assert_allclose(got[i], expected, atol=1e-6)


@pytest.mark.parametrize("nodes", [1, 2])
def test_nodes_without_neighbours_keep_everything(nodes: int) -> None:
    graph = dependency_graph(jnp.full((nodes, nodes), 0.9) + 0.1 * jnp.eye(nodes))
    np.testing.assert_array_equal(graph, np.eye(nodes))


def test_padding_neither_gives_nor_takes() -> None:
    graph = dependency_graph(relation(jnp.array(np.random.default_rng(1).normal(size=(6, 3)) + 2)))
    padded = np.asarray(pad_graph(graph, 8))
    np.testing.assert_array_equal(padded[:6, :6], graph)
    np.testing.assert_array_equal(padded[6:], np.eye(8)[6:])
    np.testing.assert_array_equal(padded[:, 6:], np.eye(8)[:, 6:])


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_convolution_follows_the_equations(variant: str) -> None:
    gcn = GCN(5, variant=variant, rngs=nnx.Rngs(0))
    assert [kernel.shape for kernel in gcn.kernels] == [(5, 10), (10, 10), (10, 5)]
    for kernel in gcn.kernels:
        bound = kernel.shape[1] ** -0.5
        assert 0.8 * bound < np.abs(kernel[...]).max() <= bound
    rng = np.random.default_rng(2)
    x, graph = rng.normal(size=(7, 5)), rng.random((7, 7))
    h = x
    for layer, kernel in enumerate(gcn.kernels):
        h = graph @ h @ np.asarray(kernel[...], np.float64)
        if variant == "paper" or layer < 2:
            h = np.where(h > 0, h, 0.2 * h)
    expected = x + h if variant == "paper" else 0.9 * h + 0.1 * x
    got = gcn(jnp.array(x, jnp.float32), jnp.array(graph, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
