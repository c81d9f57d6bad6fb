"""The towers against OpenAI's own code: features, gradients, BatchNorm (tests/golden/clip_*)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlclip_jax.clip.config import ResNetConfig
from mlclip_jax.clip.config_files import infer_config
from mlclip_jax.clip.model import CLIP
from mlclip_jax.clip.weights import from_state_dict, to_state_dict

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("clip_vit", "clip_vit_mh", "clip_rn")
FORWARD, GRADIENT = 2e-5, 2e-4


def error(a, b) -> float:
    """max |a - b| / max |b|."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.abs(a - b).max() / np.abs(b).max()


def load(name: str) -> tuple[dict[str, np.ndarray], CLIP]:
    """A golden file's arrays, and our CLIP with its weights."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        golden = {key: file[key] for key in file}
    state = {key[3:]: value for key, value in golden.items() if key.startswith("sd/")}
    config = infer_config({key: value.shape for key, value in state.items()})
    return golden, from_state_dict(state, config)


def inputs(golden: dict[str, np.ndarray]) -> tuple[jax.Array, jax.Array]:
    """Images [b h w 3], already normalised, and ids [c t]."""
    images = golden["in/images"].transpose(0, 2, 3, 1)
    return jnp.asarray(images), jnp.asarray(golden["in/tokens"])


@pytest.fixture(scope="module", params=NAMES)
def case(request) -> tuple[dict[str, np.ndarray], CLIP]:
    return load(request.param)


def test_sizes_are_read_off_the_weights(case):
    golden, clip = case
    config = clip.config
    assert config.embed_dim == golden["cfg/embed_dim"]
    assert config.image.image_size == golden["cfg/image_resolution"]
    assert config.image.width == golden["cfg/vision_width"]
    assert config.image.heads == golden["cfg/vision_heads"]
    np.testing.assert_array_equal(np.ravel(config.image.layers), golden["cfg/vision_layers"])
    for ours, theirs in (
        (config.text.vocab_size, "vocab_size"),
        (config.text.context_length, "context_length"),
        (config.text.width, "transformer_width"),
        (config.text.heads, "transformer_heads"),
        (config.text.layers, "transformer_layers"),
    ):
        assert ours == golden[f"cfg/{theirs}"]


def test_features_and_hidden_states(case):
    golden, clip = case

    @jax.jit
    def run(images, ids):
        return {
            "image": clip.encode_images(images),
            "image with tokens": clip.encode_images(images, tokens=True),
            "text": clip.encode_text(ids),
            "hidden": clip.text.hidden_states(clip.text.embed(ids)),
        }

    images, ids = inputs(golden)
    out = run(images, ids)
    assert error(out["image"].pooled, golden["out/image_features"]) <= FORWARD
    assert out["image"].tokens is None
    assert error(out["image with tokens"].pooled, golden["out/image_features"]) <= FORWARD
    assert error(out["text"], golden["out/text_features"]) <= FORWARD
    hidden, rows = out["hidden"], np.arange(len(ids))
    at_end = hidden[rows, ids.argmax(-1)]
    assert error(at_end, golden["out/text_hidden_ln_final_eot"]) <= FORWARD
    assert error(hidden[:, 3], golden["out/text_hidden_ln_final_pos3"]) <= FORWARD
    if "out/tokens_proj" in golden:
        tokens = out["image with tokens"].tokens
        assert error(tokens, golden["out/tokens_proj"][:, 1:]) <= FORWARD


def _logits(clip: CLIP, images, ids) -> jax.Array:
    image, text = clip.encode_images(images).pooled, clip.encode_text(ids)
    image = image / jnp.linalg.norm(image, axis=-1, keepdims=True)
    text = text / jnp.linalg.norm(text, axis=-1, keepdims=True)
    return jnp.exp(clip.logit_scale[...]) * image @ text.T


def test_logits_and_gradients(case):
    golden, clip = case
    graph, params, stats = nnx.split(clip, nnx.Param, nnx.BatchStat)
    params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient(params, images, ids, weights):
        logits = _logits(nnx.merge(graph, params, stats), images, ids)
        return (logits * weights).sum(), logits

    grads, logits = gradient(params, *inputs(golden), jnp.asarray(golden["in/grad_out_logits"]))
    assert error(logits, golden["out/logits_per_image"]) <= FORWARD
    assert error(logits.T, golden["out/logits_per_text"]) <= FORWARD

    # The gradient has the model's own structure, so the name table translates it too.
    grads = to_state_dict(nnx.merge(graph, grads, stats), "openai")
    checked = [key for key in golden if key.startswith("grad/")]
    assert len(checked) >= 11
    for key in checked:
        name, rows = key.removeprefix("grad/").removesuffix("[:8]"), slice(None)
        if key.endswith("[:8]"):
            rows = slice(8)
        value = grads[name][rows] if grads[name].ndim else grads[name]
        assert error(value, golden[key]) <= GRADIENT, key


@pytest.mark.parametrize("name", ["clip_vit", "clip_vit_mh"])
def test_vit_intermediates(name):
    golden, clip = load(name)

    @jax.jit
    def run(images):
        embedded = clip.image.embed(images)
        x = clip.image.norm_pre(embedded)
        for block in clip.image.blocks:
            x = block(x)
        return embedded, clip.image.norm_post(x)

    embedded, tokens = run(inputs(golden)[0])
    assert error(embedded, golden["mid/embed"]) <= FORWARD
    assert error(tokens, golden["out/tokens_ln_post"]) <= FORWARD


def test_resnet_stages():
    golden, clip = load("clip_rn")
    image = clip.image
    assert isinstance(clip.config.image, ResNetConfig)

    @jax.jit
    def run(x):
        means = {}
        for conv, bn in (
            (image.conv1, image.bn1),
            (image.conv2, image.bn2),
            (image.conv3, image.bn3),
        ):
            x = jax.nn.relu(bn(conv(x), train=False))
        b, h, w, i = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, i).mean((2, 4))
        means["stem"] = x.mean((1, 2))
        for number in range(1, 5):
            for block in getattr(image, f"layer{number}"):
                x = block(x, train=False)
            means[f"layer{number}"] = x.mean((1, 2))
        return means

    for stage, mean in run(inputs(golden)[0]).items():
        assert error(mean, golden[f"mid/{stage}_mean_hw"]) <= FORWARD, stage


def test_batch_norm_in_training():
    golden, clip = load("clip_rn")
    graph, params, stats = nnx.split(clip, nnx.Param, nnx.BatchStat)
    before = to_state_dict(clip, "openai")

    @jax.jit
    def step(images):
        model = nnx.merge(graph, params, stats, copy=True)
        features = model.encode_images(images, train_bn=True).pooled
        return features, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    features, new = step(inputs(golden)[0])
    assert error(features, golden["out/image_features_bn_train"]) <= FORWARD
    after = to_state_dict(nnx.merge(graph, params, new), "openai")
    prefix = "out/after_train_step/"
    checked = [key for key in golden if key.startswith(prefix)]
    assert len(checked) == 4
    for key in checked:
        name = key.removeprefix(prefix)
        assert error(after[name], golden[key]) <= FORWARD, key
        assert error(before[name], golden[key]) > 1e-2
    for name in before:  # the parameters stay, every statistic moves
        same = np.array_equal(before[name], after[name])
        assert same == ("running" not in name), name
