"""Selective language supervision: the golden's counts, who is chosen, the same on all devices."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references.decoders import selected_count

from mlclip_jax.modules.selection import select_labels
from mlclip_jax.training.mesh import make_mesh, split_over_data

GOLDEN = Path(__file__).parents[1] / "golden"


def draw(classes: int, positives: int, places: int, *, key: int = 0, padding: int = 0) -> tuple:
    """Some positives of images of a batch of 64, spread over the classes."""
    rng = np.random.default_rng(1)
    targets = rng.integers(-1, 1, (64, classes)).astype(np.int8)
    which = rng.permutation(classes)[:positives]
    targets[rng.integers(0, 64, positives), which] = 1
    targets = np.pad(targets, ((0, 0), (0, padding)), constant_values=1)  # never counts
    mask = jnp.arange(classes + padding) < classes
    found = select_labels(jnp.asarray(targets), mask, places, 3.0, jax.random.key(key))
    return *(np.asarray(x) for x in found), np.sort(which)


@pytest.mark.parametrize(("classes", "positives"), [(1000, 37), (80, 40), (21841, 900)])
def test_as_many_as_in_the_golden(classes, positives):
    with np.load(GOLDEN / "adds.npz") as file:
        expected = int(file[f"sls/k{classes}_pos{positives}_alpha3_n_selected"])
    rows, taken, left_out, which = draw(classes, positives, min(4000, classes), padding=7)
    assert taken.sum() == expected == selected_count(positives, classes, 3) and left_out == 0
    chosen = rows[taken]
    assert len(set(chosen.tolist())) == expected and chosen.max() < classes
    np.testing.assert_array_equal(np.sort(chosen[:positives]), which)  # the positives come first


def test_negatives_are_drawn_evenly():
    counts = np.zeros(40)
    for key in range(300):
        rows, taken, _, which = draw(40, 5, 20, key=key)
        counts[rows[taken]] += 1
    assert (counts[which] == 300).all()
    others = np.delete(counts, which)
    expected, spread = 300 * 15 / 35, (300 * 15 / 35 * 20 / 35) ** 0.5
    assert np.abs(others - expected).max() < 4 * spread


def test_positives_without_a_place_are_counted():
    rows, taken, left_out, which = draw(100, 30, 20)
    assert taken.all() and left_out == 10 and set(rows) <= set(which)
    rows, taken, left_out, _ = draw(100, 0, 20)
    assert not taken.any() and left_out == 0


def test_padding_changes_no_draw():
    plain, padded = draw(100, 5, 60), draw(100, 5, 60, padding=4)
    np.testing.assert_array_equal(plain[0][plain[1]], padded[0][padded[1]])


def test_the_draw_is_the_same_on_all_devices():
    rng = np.random.default_rng(0)
    targets = jnp.asarray(np.where(rng.random((16, 100)) < 0.02, 1, -1).astype(np.int8))
    mask, key = jnp.arange(100) < 97, jax.random.key(5)
    run = jax.jit(lambda t, m: select_labels(t, m, 60, 3.0, key))
    one = run(targets, mask)
    sharded = jax.device_put(targets, split_over_data(make_mesh()))
    eight = run(sharded, mask)
    assert len(sharded.sharding.device_set) == 8
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_array_equal(a, b)
