"""The references against numbers computed by hand, closed forms and the release of DualCoOp."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from references import prompt_methods as reference

REGIONS = np.array([[1, 0], [0.6, 0.8], [0, 1], [-1, 0.5]])
POSITIVE = np.array([[0.8, 0.6], [0.6, 0.8]])
NEGATIVE = np.array([[0.79, 0.62], [0.66, 0.75]])
TARGETS = np.array([[1, -1, 0], [-1, 1, 0]], np.int8)
LOGITS = np.array([[1.2, -0.7, 0.3], [-2, 0.4, 1]])


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def arrays(*values):
    return [jnp.asarray(value, jnp.float64) for value in values]


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return arrays(*(rng.normal(size=shape) for shape in shapes))


def printed(got, expected):
    """Equal to all six decimals that were printed."""
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def same(got, expected, bar=1e-12):
    """max |a - b| / max |b| at most `bar`."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= bar * np.abs(expected).max()


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def shares(x):
    return np.exp(x) / np.exp(x).sum()


# Zero-shot CLIP


def test_template_ensemble_normalises_first():
    (features,) = arrays([[[3, 4], [1, 0]], [[0, 2], [1, 1]]])
    text = reference.template_ensemble(features)
    printed(text, [[0.316228, 0.948683], [0.923880, 0.382683]])
    printed(reference.cosine_logits(*arrays([[1, 2]]), text, 100), [[98.994949, 75.545395]])


def test_dense_zero_shot_equals_its_equation():
    whole, cells, text = normal(0, (2, 3), (2, 4, 5), (3, 3))
    maps = normal(1, (5, 5), (5,), (5, 3), (3,))
    got = reference.dense_zero_shot(whole, cells, *maps, text)
    expected = np.zeros((2, 3))
    for b, c in np.ndindex(2, 3):
        score = np.zeros(4)
        for i in range(4):
            feature = (np.asarray(cells[b, i]) @ maps[0] + maps[1]) @ maps[2] + maps[3]
            score[i] = 100 * unit(feature) @ unit(np.asarray(text[c]))
        expected[b, c] = sum(np.exp(s) / np.exp(score).sum() * s for s in score)
    same(got[1], expected)
    same(got[0], 100 * unit(np.asarray(whole)) @ unit(np.asarray(text)).T)
    same(got[2], 0.5 * got[0] + 0.5 * got[1])


def test_dense_zero_shot_of_equal_cells_is_the_cosine():
    whole, cell, text = normal(2, (2, 3), (2, 1, 3), (4, 3))
    maps = arrays(np.eye(3), np.zeros(3), np.eye(3), np.zeros(3))
    _, local, _ = reference.dense_zero_shot(whole, jnp.repeat(cell, 5, axis=1), *maps, text)
    same(local, reference.cosine_logits(cell[:, 0], text, 100))


# Image features of a ResNet tower


def test_regions_by_hand():
    """Mean [2 4] first; positions before the maps; [x y] -> [x+1, 2y] -> x + 1 - 2y + 0.5."""
    cells, positions = arrays([[[1, 3], [3, 5]]], [[0.5, 0], [0, 1], [-1, 0]])
    maps = arrays([[1, 0], [0, 2]], [1, 0], [[1], [-1]], [0.5])
    got = reference.region_features_released(cells, positions, *maps)
    printed(got, [[[2.5 + 1.5 - 8], [1 + 1.5 - 8], [2 + 1.5 - 10]]])
    printed(reference.cell_features(cells, *maps), [[[1 + 1.5 - 6], [3 + 1.5 - 10]]])


def test_attention_pool_without_query_is_the_mean_of_the_regions():
    cells, positions = normal(3, (2, 6, 8), (7, 8))
    query, key, value = normal(4, (8, 8), (8, 8), (8, 8))
    query_bias, key_bias, value_bias, out, out_bias = normal(5, (8,), (8,), (8,), (8, 4), (4,))
    rest = (key, key_bias, value, value_bias, out, out_bias)
    got = reference.attention_pool(cells, positions, 0 * query, 0 * query_bias, *rest, heads=2)
    regions = reference.region_features_released(cells, positions, *rest[2:])
    same(got, regions.mean(axis=1))
    asked = reference.attention_pool(cells, positions, query, query_bias, *rest, heads=2)
    assert np.abs(asked - got).max() > 0.1
    without = reference.attention_pool(cells, None, query, query_bias, *rest, heads=2)
    zeros = reference.attention_pool(cells, 0 * positions, query, query_bias, *rest, heads=2)
    same(without, zeros)


def test_attention_pool_equals_its_equation():
    """Heads read contiguous parts, scaled by the root of a head's width."""
    cells, positions = normal(6, (2, 6, 8), (7, 8))
    maps = normal(7, (8, 8), (8,), (8, 8), (8,), (8, 8), (8,), (8, 4), (4,))
    got = reference.attention_pool(cells, positions, *maps, heads=4)
    wq, bq, wk, bk, wv, bv, wo, bo = map(np.asarray, maps)
    x = np.concatenate([np.mean(cells, axis=1, keepdims=True), cells], axis=1) + positions
    q, k, v = ((x @ w + b).reshape(2, 7, 4, 2) for w, b in ((wq, bq), (wk, bk), (wv, bv)))
    score = np.einsum("bhe,bthe->bht", q[:, 0], k) / np.sqrt(2)
    weights = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
    same(got, np.einsum("bht,bthe->bhe", weights, v).reshape(2, 8) @ wo + bo)


# CoCoOp


def toy_encoder(width, out, seed=8):
    """Depends on every position up to the EOT, on their order, and not linearly."""
    mix, project = normal(seed, (77, width), (width, out))

    def encode(embeddings, eot):
        assert embeddings.shape[1:] == (77, width)
        seen = np.arange(77)[None, :, None] <= np.asarray(eot)[:, None, None]
        return jnp.tanh(jnp.sum(seen * mix * jnp.tanh(embeddings), axis=1)) @ project

    return encode


META = ([[1], [-1], [0.5], [0]], [0.1], [[0.2, -0.4, 0.3]], [0, 0.1, -0.1])


def test_meta_net():
    features, *meta = arrays([[3, 0, 4, 0], [0, 3, 0, 4]], *META)
    shifts = jnp.stack([reference.meta_net(feature, *meta) for feature in features])
    printed(shifts, [[0.22, -0.34, 0.23], [0, 0.1, -0.1]])


def test_cocoop_prompts():
    """The shift of an image moves every token of its context, and nothing else of its prompts."""
    features, context, *meta = arrays(
        [[3, 0, 4, 0], [0, 3, 0, 4]], [[1, 2, 3], [0.5, 0, -0.5]], *META
    )
    sos, suffix = normal(9, (3,), (5, 74, 3))
    eot = np.arange(4, 9)
    seen = []

    def encode(embeddings, ends):
        np.testing.assert_array_equal(ends, eot)
        seen.append(embeddings)
        return jnp.ones((5, 4)) * jnp.asarray([1.0, 0, 0, 0])

    got = reference.cocoop_logits(features, context, *meta, sos, suffix, eot, 10.0, encode)
    printed(got, [[6] * 5, [0] * 5])
    prompts = jnp.stack(seen)
    assert prompts.shape == (2, 5, 77, 3)
    shifted = [[[1.22, 1.66, 3.23], [0.72, -0.34, -0.27]], [[1, 2.1, 2.9], [0.5, 0.1, -0.6]]]
    for label in range(5):
        printed(prompts[:, label, 1:3], shifted)
    np.testing.assert_array_equal(prompts[:, :, 0], jnp.broadcast_to(sos, (2, 5, 3)))
    np.testing.assert_array_equal(prompts[:, :, 3:], jnp.broadcast_to(suffix, (2, 5, 74, 3)))


@pytest.fixture
def cocoop():
    features, context = normal(10, (2, 8), (4, 6))
    meta = normal(11, (8, 2), (2,), (2, 6), (6,))
    sos, suffix = normal(12, (6,), (3, 72, 6))
    rest = (sos, suffix, np.array([7, 10, 8]))
    return features, context, meta, rest, toy_encoder(6, 8)


def test_cocoop_without_shift_is_coop(cocoop):
    features, context, (kernel1, bias1, kernel2, bias2), rest, encode = cocoop
    off = (kernel1, bias1, 0 * kernel2, 0 * bias2)
    got = reference.cocoop_logits(features, context, *off, *rest, 10.0, encode)
    sos, suffix, eot = rest
    text = reference.class_texts(sos, context, suffix, eot, encode)
    same(got, reference.cosine_logits(features, text, 10.0))


def test_cocoop_treats_every_image_alone(cocoop):
    """And sees only the direction of its feature."""
    features, context, meta, rest, encode = cocoop

    def logits(images):
        return reference.cocoop_logits(images, context, *meta, *rest, 10.0, encode)

    same(logits(features[::-1]), logits(features)[::-1])
    same(logits(7 * features), logits(features))


def test_cocoop_gradient(cocoop):
    """Along random directions against central differences, through the shift and the context."""
    features, context, meta, rest, encode = cocoop

    @jax.jit
    def loss(features, context, *meta):
        logits = reference.cocoop_logits(features, context, *meta, *rest, 10.0, encode)
        return jnp.sum(jnp.sin(logits))

    inputs = (features, context, *meta)
    grads = jax.jit(jax.grad(loss, argnums=range(6)))(*inputs)
    for k, (x, grad) in enumerate(zip(inputs, grads, strict=True)):
        (direction,) = normal(20 + k, x.shape)
        ends = [loss(*inputs[:k], x + step * direction, *inputs[k + 1 :]) for step in (1e-5, -1e-5)]
        slope = jnp.sum(grad * direction)
        assert abs(slope) > 1e-3
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-6)


def test_own_contexts_that_are_equal_are_the_shared_one(cocoop):
    _, context, _, (sos, suffix, eot), encode = cocoop
    shared = reference.class_texts(sos, context, suffix, eot, encode)
    own = jnp.stack([context] * 3)
    np.testing.assert_array_equal(reference.class_texts(sos, own, suffix, eot, encode), shared)
    own = own.at[2].add(1)
    changed = np.abs(reference.class_texts(sos, own, suffix, eot, encode) - shared).max(axis=1) > 0
    np.testing.assert_array_equal(changed, np.arange(3) == 2)


# DualCoOp


def test_dual_coop_scores():
    regions, positive, negative = arrays(REGIONS[None], POSITIVE, NEGATIVE)
    plus, minus = reference.dual_coop_scores(regions, positive, negative)
    printed(plus, [[95.347992, 99.627221]])
    printed(minus, [[95.863874, 99.240943]])
    printed(plus - minus, [[-0.515882, 0.386278]])
    p = reference.dual_coop_probability(plus, minus)
    printed(p, [[0.373816, 0.595386]])
    same(p, jax.nn.sigmoid(plus - minus))


def test_dual_coop_weights_come_from_the_positive_prompt():
    """x_minus with the weights that the table prints."""
    weights = [[0.039138, 0.960146, 0.000717, 0], [0.000329, 0.981690, 0.017980, 0]]
    cosines = unit(NEGATIVE) @ unit(REGIONS).T
    got = reference.dual_coop_scores(*arrays(REGIONS[None], POSITIVE, NEGATIVE))
    np.testing.assert_allclose(got[1][0], 100 * np.sum(weights * cosines, axis=1), atol=2e-4)


def test_dual_coop_with_equal_prompts_is_undecided():
    """No score, and no gradient through the text that both share."""
    regions, text = normal(13, (2, 5, 4), (3, 4))
    plus, minus = reference.dual_coop_scores(regions, text, text)
    assert not np.any(plus - minus)
    np.testing.assert_allclose(reference.dual_coop_probability(plus, minus), 0.5)

    def loss(positive, negative):
        plus, minus = reference.dual_coop_scores(regions, positive, negative)
        return reference.dual_coop_loss(plus - minus, TARGETS)

    positive, negative = jax.jit(jax.grad(loss, argnums=(0, 1)))(text, text)
    assert np.any(positive)
    same(positive, -negative)


def test_dual_coop_ignores_opposite_and_repeated_regions():
    regions, positive, negative = arrays(REGIONS[None, :3], POSITIVE, NEGATIVE)
    same(
        reference.dual_coop_scores(jnp.tile(regions, (1, 2, 1)), positive, negative),
        reference.dual_coop_scores(regions, positive, negative),
    )
    for label in range(2):
        own = (positive[label : label + 1], negative[label : label + 1])
        more = jnp.concatenate([regions, -own[0][None]], axis=1)
        same(
            reference.dual_coop_scores(more, *own), reference.dual_coop_scores(regions, *own), 1e-6
        )


def test_dual_coop_loss():
    (logits,) = arrays(LOGITS)
    elements = reference.dual_coop_loss_elements(logits, TARGETS)
    printed(elements, [[0.060943, 0.026289, 0], [0.000343, 0.205879, 0]])
    printed(reference.dual_coop_loss(logits, TARGETS), 0.293455)


def test_dual_coop_loss_gradient():
    """The weight is a constant; a negative below the clip and an unobserved label get nothing."""
    (logits,) = arrays([*LOGITS, [-4, 3, 0]])
    targets = np.array([*TARGETS, [-1, -1, 0]])
    grad = jax.grad(reference.dual_coop_loss)(logits, targets)
    expected = np.zeros((3, 3))
    for b, c in np.ndindex(3, 3):
        p = 1 / (1 + math.exp(-logits[b, c]))
        q = 1 - p + 0.05
        if targets[b, c] == 1:
            expected[b, c] = -(1 - p) * (1 - p)
        elif targets[b, c] == -1 and q < 1:
            expected[b, c] = (1 - q) ** 2 / q * p * (1 - p)
    assert expected[2, 0] == 0 < expected[2, 1]
    same(grad, expected)


def test_dual_coop_loss_equals_release():
    """Its labels are 1, 0 and -1 for unknown; its pairs are negative, positive."""
    golden = np.load(Path(__file__).parents[1] / "golden" / "losses.npz")
    theirs = golden["in/labels_with_ignore"]
    targets = np.select([theirs == 1, theirs == 0], [1, -1], 0)
    assert set(np.unique(targets)) == {-1, 0, 1}
    value, grad = jax.value_and_grad(
        lambda pair: reference.dual_coop_loss(pair[:, 1] - pair[:, 0], targets)
    )(jnp.asarray(golden["in/logits_pair"]))
    same(value, golden["out/DualCoOp_ASL_gn2_gp1_clip0.05"], 1e-6)
    same(grad, golden["grad/DualCoOp_ASL_gn2_gp1_clip0.05"], 1e-6)


# TaI-DPT


def test_tai_scores():
    whole, tokens, text = arrays([[1, 2]], REGIONS[None], POSITIVE)
    mask = np.array([[1, 1, 1, 0]])
    x_global, x_local = reference.tai_scores(whole, tokens, mask, 3 * text, text, kappa=50)
    printed(x_local, [[3.839785, 3.999964]])
    printed(x_global, [[4 * 2 / math.sqrt(5), 4 * 2.2 / math.sqrt(5)]])
    merged = reference.tai_merged(x_global, x_local)
    printed(merged, [[(3.577709 + 3.839785) / 2, (3.935480 + 3.999964) / 2]])


def test_tai_never_sees_masked_tokens():
    whole, tokens, text = normal(14, (2, 4), (2, 6, 4), (3, 4))
    mask = np.array([[1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 1]], bool)
    got = reference.tai_scores(whole, tokens, mask, text, text, 5.0)[1]
    other = jnp.where(mask[:, :, None], tokens, 1e3)
    np.testing.assert_array_equal(reference.tai_scores(whole, other, mask, text, text, 5.0)[1], got)
    for b, c in np.ndindex(2, 3):
        cosine = unit(np.asarray(tokens[b])[mask[b]]) @ unit(np.asarray(text[c]))
        assert got[b, c] == pytest.approx(4 * (shares(5 * cosine) @ cosine), rel=1e-12)


def test_ranking_loss():
    (logits,) = arrays([[1, 0.4, -0.2, 0.3], [0.1, 0.9, 0.8, -0.5]])
    targets = np.array([[1, -1, -1, 1], [-1, 1, -1, -1]])
    for image, expected in enumerate((2.0, 1.1)):
        part = slice(image, image + 1)
        printed(reference.ranking_loss(logits[part], targets[part]), expected)
    printed(reference.ranking_loss(logits, targets), 1.55)
    same(reference.tai_loss(logits, logits, targets), 3.1)
    # Without class 2, image 0 loses 0.5 and image 1 its 0.9; unobserved labels are in no pair.
    targets[:, 2] = 0
    printed(reference.ranking_loss(logits, targets), (1.5 + 0.2) / 2)


# The schedule the three share


def test_dassl_rate():
    epochs = (0, 1, 2, 25, 49)
    got = np.array([reference.dassl_rate(epoch, 0.002, 50) for epoch in epochs])
    expected = [1e-5, 2e-3, 1.998027e-3, 1.062791e-3, 7.885299e-6]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
