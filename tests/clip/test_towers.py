"""Towers: what a call may leave out changes nothing; compute types; BatchNorm modes."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mlclip_jax.clip import CLIP, PRESETS, PromptTokens, ResNetConfig
from mlclip_jax.errors import UserError

MINIS = ("clip-mini", "clip-mini-rn")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", MINIS)
def test_pooled_features_do_not_depend_on_tokens(name: str, images: np.ndarray) -> None:
    clip = CLIP(PRESETS[name], rngs=nnx.Rngs(0))
    encode = jax.jit(clip.encode_images, static_argnames="tokens")
    with_tokens = encode(jnp.array(images), tokens=True)
    without = encode(jnp.array(images))
    assert without.tokens is None
    assert with_tokens.tokens.shape == (4, {"clip-mini": 64, "clip-mini-rn": 4}[name], 64)
    np.testing.assert_allclose(without.pooled, with_tokens.pooled, atol=3e-6)


@pytest.mark.parametrize("name", MINIS)
def test_uint8_pixels_are_normalised_on_the_way_in(name: str, images: np.ndarray) -> None:
    clip = CLIP(PRESETS[name], rngs=nnx.Rngs(0))
    mean, std = np.array(clip.config.image_mean), np.array(clip.config.image_std)
    by_hand = ((images / 255 - mean) / std).astype(np.float32)
    encode = jax.jit(clip.encode_images)
    a, b = encode(jnp.array(images)).pooled, encode(jnp.array(by_hand)).pooled
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", MINIS)
def test_bfloat16_compute_keeps_float32_parameters(name: str, images: np.ndarray) -> None:
    exact = CLIP(PRESETS[name], rngs=nnx.Rngs(0))
    half = CLIP(PRESETS[name], dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert {v.dtype for v in jax.tree.leaves(nnx.to_pure_dict(nnx.state(half)))} == {
        jnp.dtype("float32")
    }
    prompts = PromptTokens(jnp.array([7, -1]), jnp.array([[3, 4, 9], [5, 9, 0]]), jnp.array([2, 1]))
    context = jnp.ones((1, exact.config.text.width))

    def run(clip: CLIP) -> tuple[jax.Array, jax.Array]:
        image = jax.jit(clip.encode_images)(jnp.array(images)).pooled
        return image, jax.jit(clip.encode_prompts)(prompts, context)

    for a, b in zip(run(exact), run(half), strict=True):
        assert b.dtype == jnp.bfloat16
        assert 0 < np.abs(a - b.astype(np.float32)).max() < 0.1 * np.abs(a).max()


def test_batchnorm_statistics_move_only_when_training(images: np.ndarray) -> None:
    clip = CLIP(PRESETS["clip-mini-rn"], rngs=nnx.Rngs(0))
    x = np.asarray(clip.image.conv1(clip.normalize(jnp.array(images))))
    clip.encode_images(jnp.array(images))
    np.testing.assert_array_equal(clip.image.bn1.mean[...], 0)
    clip.encode_images(jnp.array(images), train_bn=True)
    flat = x.reshape(-1, x.shape[-1])
    np.testing.assert_allclose(clip.image.bn1.mean[...], 0.1 * flat.mean(0), atol=1e-5)
    expected = 0.9 + 0.1 * flat.var(0, ddof=1)
    np.testing.assert_allclose(clip.image.bn1.var[...], expected, rtol=1e-5)


@pytest.mark.parametrize("name", MINIS)
def test_rematerialisation_changes_nothing(name: str, images: np.ndarray) -> None:
    def run(remat: bool) -> tuple[jax.Array, dict, dict]:
        clip = CLIP(PRESETS[name], remat=remat, rngs=nnx.Rngs(0))
        graphdef, params, stats = nnx.split(clip, nnx.Param, nnx.BatchStat)

        @jax.jit
        @functools.partial(jax.value_and_grad, has_aux=True)
        def loss(params: dict) -> tuple[jax.Array, dict]:
            model = nnx.merge(graphdef, params, nnx.to_pure_dict(stats))
            resnet = name.endswith("rn")
            features = model.encode_images(jnp.array(images), tokens=True, train_bn=resnet)
            value = jnp.square(features.pooled).sum() + features.tokens.sum()
            return value, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

        (value, stats), grads = loss(nnx.to_pure_dict(params))
        return value, grads, stats

    for a, b in zip(jax.tree.leaves(run(False)), jax.tree.leaves(run(True)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1, np.abs(a).max()))


@pytest.mark.parametrize("name", MINIS)
def test_images_of_another_size_are_refused(name: str) -> None:
    clip = nnx.eval_shape(lambda: CLIP(PRESETS[name], rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"takes \[b 64 64 3\], not \[2, 32, 64, 3\]; preproc"):
        clip.encode_images(jnp.zeros((2, 32, 64, 3)))


def test_other_resolutions_must_suit_the_stride() -> None:
    assert PRESETS["ViT-B/16"].at(448).image.grid == 28
    assert PRESETS["RN101"].at(448).image.grid == 14
    with pytest.raises(UserError, match=r"image_size=450 is no multiple .* try 448"):
        PRESETS["ViT-B/16"].at(450)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_sizes(name: str) -> None:
    millions = {
        "RN50": 102.0, "RN101": 119.7, "RN50x4": 178.3, "RN50x16": 291.0, "RN50x64": 623.3,
        "ViT-B/32": 151.3, "ViT-B/16": 149.6, "ViT-L/14": 427.6, "ViT-L/14-336": 427.9,
    }  # fmt: skip
    model = nnx.eval_shape(lambda: CLIP(PRESETS[name], rngs=nnx.Rngs(0)))
    count = sum(x.size for x in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    if name in millions:
        assert round(count / 1e6, 1) == millions[name]
    else:
        assert 1e6 < count < 2.1e6


@pytest.mark.slow
def test_batchnorm_training_is_the_same_on_eight_devices(images: np.ndarray) -> None:
    """Loss, gradients and running statistics of a batch spread over eight devices."""
    tower = ResNetConfig(32, width=8, layers=(1, 1, 1, 1), heads=4)
    clip = CLIP(replace(PRESETS["clip-mini-rn"], image=tower), rngs=nnx.Rngs(0))
    graphdef, params, stats = nnx.split(clip, nnx.Param, nnx.BatchStat)
    batch = np.concatenate([images, 255 - images, images[::-1] // 2, images // 3])[:, ::2, ::2]
    weights = np.random.default_rng(1).normal(size=(16, 64)).astype(np.float32)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params: dict, images: jax.Array) -> tuple[jax.Array, dict]:
        model = nnx.merge(graphdef, params, nnx.to_pure_dict(stats))
        value = (model.encode_images(images, train_bn=True).pooled * weights).sum()
        return value, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    def run(devices: int) -> tuple:
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        everywhere, split = (NamedSharding(mesh, spec) for spec in (P(), P("data")))
        placed = jax.device_put(nnx.to_pure_dict(params), everywhere)
        (value, stats), grads = loss(placed, jax.device_put(batch, split))
        return value, stats, grads["image"]

    one, eight = run(1), run(8)
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-5)
    for part in (1, 2):
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(one[part]))
        for a, b in zip(jax.tree.leaves(one[part]), jax.tree.leaves(eight[part]), strict=True):
            bar = max(float(np.abs(a).max()), 1e-3 * largest)  # some gradients are exactly zero
            np.testing.assert_allclose(np.asarray(b), np.asarray(a), rtol=0, atol=2e-4 * bar)
