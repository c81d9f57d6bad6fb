"""Losses on features: masks, edges and both levels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlclip_jax import losses

RNG = np.random.default_rng(0)
CAPTIONS = jnp.asarray(RNG.normal(size=(5, 8)), jnp.float32)
PROMPTS = jnp.asarray(RNG.normal(size=(7, 8)), jnp.float32)
TARGETS = jnp.asarray(RNG.integers(-1, 2, (5, 7)), jnp.int8)
COUNTS = np.array([50, 40, 30, 20, 10, 5, 1], np.int32)

CSE = (losses.class_specific_embedding, losses.class_specific_embedding_released)


@pytest.mark.parametrize("loss", CSE)
def test_masked_rows_and_classes_are_as_if_absent(loss):
    where = jnp.asarray(np.arange(5) < 3)[:, None] & jnp.asarray(np.arange(7) < 6)[None]

    @jax.jit
    def value(prompts, captions, targets, counts, where=None):
        distances = losses.embedding_distances(captions, prompts)
        return loss(distances, targets, class_counts=counts, where=where)

    got, grad = jax.value_and_grad(value)(PROMPTS, CAPTIONS, TARGETS, COUNTS, where)
    expected, expected_grad = jax.value_and_grad(value)(
        PROMPTS[:6], CAPTIONS[:3], TARGETS[:3, :6], COUNTS[:6]
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    np.testing.assert_allclose(grad[:6], expected_grad, rtol=1e-5, atol=1e-8)
    assert not np.asarray(grad[6]).any()
    assert value(PROMPTS, CAPTIONS, TARGETS, COUNTS, where & False) == 0


@pytest.mark.parametrize("loss", CSE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_and_large_features_are_finite(loss, dtype):
    captions = jnp.asarray([[0.0] * 8, [1e4] * 8, [1e-6] * 8], dtype)
    prompts = jnp.asarray(PROMPTS, dtype).at[0].set(0)

    @jax.jit
    def value(prompts):
        distances = losses.embedding_distances(captions, prompts)
        return loss(distances, TARGETS[:3], class_counts=COUNTS)

    got, grad = jax.value_and_grad(value)(prompts)
    assert got.dtype == jnp.float32 and np.isfinite(got)
    assert np.isfinite(np.asarray(grad, np.float32)).all()


def test_paper_and_release_pull_opposite_ways():
    distance = jnp.asarray([[0.05]])
    positive = jnp.asarray([[1]], jnp.int8)
    paper, released = (jax.grad(loss)(distance, positive) for loss in CSE)
    assert paper > 0 > released


def test_token_distances_need_no_array_of_positions():
    captions = RNG.normal(size=(3, 9, 8))
    prompts = RNG.normal(size=(4, 9, 8))
    got = losses.token_distances(jnp.asarray(captions), jnp.asarray(prompts), offset=2)
    a, b = captions[:, None, :7], prompts[None, :, 2:]
    cosine = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    np.testing.assert_allclose(got, (1 - cosine).sum(-1), rtol=1e-5)


def test_distillation_masks_rows_and_spares_the_teacher():
    student, teacher = CAPTIONS, CAPTIONS[::-1]
    where = jnp.asarray([True, True, False, False, False])
    got, (grad, none) = jax.value_and_grad(losses.l1_distillation, argnums=(0, 1))(
        jnp.where(where[:, None], student, jnp.nan), teacher, where=where
    )
    expected = np.abs(np.asarray(student)[:2] - np.asarray(teacher)[:2]).mean()
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert not np.asarray(none).any() and not np.asarray(grad[2:]).any()
    assert losses.l1_distillation(student, teacher, where=where & False) == 0
    summed = losses.l1_distillation(student, teacher, features="sum")
    np.testing.assert_allclose(summed, 8 * losses.l1_distillation(student, teacher), rtol=1e-6)
