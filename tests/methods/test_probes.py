"""Linear probe, full fine-tuning and CLIP-FT: scores, starts, losses, what trains, other labels."""

from __future__ import annotations

import exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.training.step import take_apart

OTHER = LabelSpace(("sky", "bus", "hair dryer"), name="other")
TURNED = LabelSpace(exact.SPACE.names[::-1], name="turned")
PROBES = ("linear_probe", "fine_tune")


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def world():
    with jax.enable_x64(True):
        return exact.load("clip_vit")


def pooled(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(3, 64)))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def texts(clip, template, space=exact.SPACE):
    """Text features of each name in the template, [c d]."""
    words = exact.Words()
    ids = [[510, *words.encode(template.replace("{}", n)), 511] for n in space.names]
    rows = np.zeros((len(ids), max(map(len, ids))), np.int32)
    for row, own in zip(rows, ids, strict=True):
        row[: len(own)] = own
    return np.asarray(jax.jit(clip.encode_text)(jnp.asarray(rows)))


def trained(method):
    return set(take_apart(method).trainable)


@pytest.mark.parametrize("spec", [{"name": "fine_tune"}, {"name": "linear_probe", "start": "text"}])
def test_start_from_text_is_zero_shot(world, spec):
    clip, _ = world
    template = "art of the {}."
    scale = float(np.exp(clip.logit_scale[...]))
    method = exact.make({**spec, "template": template}, clip)
    expected = scale * unit(texts(clip, template))
    exact.same(method.kernel[...], expected)
    exact.same(method.bias[...], np.full(5, -0.2 * scale), 1e-12)
    fixed = exact.make({**spec, "template": template, "logit_scale": 30.0}, clip)
    exact.same(fixed.kernel[...], 30 * unit(expected))
    if method.config.normalize:
        zero = exact.make({"name": "zero_shot", "templates": (template,)}, clip)
        batch = exact.batch({"pooled": pooled()}, 3)
        logits = [exact.Runner(m, exact.inputs(m)).scores(batch) for m in (method, zero)]
        exact.same(logits[0], logits[1] - 0.2 * scale)


@pytest.mark.parametrize("normalize", [False, True])
def test_probe_loss_and_gradients_from_zero(world, normalize):
    method = exact.make({"name": "linear_probe", "normalize": normalize}, world[0])
    assert not method.kernel[...].any() and not method.bias[...].any()
    batch, labels = exact.batch({"pooled": pooled()}, 3), exact.inputs(method)
    run = exact.Runner(method, labels)
    rng = np.random.default_rng(1)
    kernel, bias = rng.normal(size=(5, 64)) / 8, rng.normal(size=5)
    got = run(batch, kernel=jnp.asarray(kernel), bias=jnp.asarray(bias))
    v = unit(np.asarray(pooled())) if normalize else np.asarray(pooled())
    logits = v @ kernel.T + bias
    positive = np.asarray(batch.targets) > 0
    p = 1 / (1 + np.exp(-logits))
    slope = (p - positive) / 15  # of the mean of -log p, -log(1 - p)
    exact.same(got.logits, logits, 1e-12)
    exact.same(got.loss, -np.log(np.where(positive, p, 1 - p)).mean(), 1e-12)
    exact.same_gradients(got.gradients, {"kernel": slope.T @ v, "bias": slope.sum(0)}, 1e-12)
    filled = nnx.clone(method)
    filled.kernel[...], filled.bias[...] = jnp.asarray(kernel), jnp.asarray(bias)
    exact.padding_changes_nothing(got, filled, batch)


@pytest.mark.parametrize("name", PROBES)
def test_probes_score_their_own_labels_only(world, name):
    method = exact.make({"name": name, "start": "zero"}, world[0])
    for space in (OTHER, TURNED):
        with pytest.raises(UserError, match="parameters of each class were made for 5 classes"):
            exact.inputs(method, space)
    assert exact.inputs(method).prompts == ()


def test_what_trains(world):
    clip, _ = world
    own = {"kernel", "bias"}
    tower = {path for path in take_apart(clip_of(clip)).frozen if path.startswith("clip/image/")}
    assert trained(exact.make({"name": "linear_probe"}, clip)) == own
    assert trained(exact.make({"name": "fine_tune", "start": "zero"}, clip)) == own | tower
    assert trained(exact.make({"name": "clip_ft", "train_blocks": "all"}, clip)) == tower
    last = {p for p in tower if p.split("/")[2] in ("norm_post", "projection")}
    assert trained(exact.make({"name": "clip_ft", "train_blocks": 0}, clip)) == last
    last |= {path for path in tower if path.startswith("clip/image/blocks/1/")}
    assert trained(exact.make({"name": "clip_ft", "train_blocks": 1}, clip)) == last
    last |= {path for path in tower if path.startswith("clip/image/blocks/0/")}
    assert trained(exact.make({"name": "clip_ft"}, clip)) == last
    assert not any("patch_embed" in path or "position" in path for path in last)


def clip_of(clip):
    """A method in which nothing trains, for the paths of the towers."""
    return exact.make({"name": "zero_shot"}, clip)


def test_train_blocks_are_those_of_the_tower(world):
    for blocks in (3, -1):
        with pytest.raises(UserError, match=f"train_blocks is {blocks} and .* has 2 blocks"):
            exact.make({"name": "clip_ft", "train_blocks": blocks}, world[0])
    resnet, _ = exact.load("clip_rn")
    with pytest.raises(UserError, match=r"has 0 blocks .* 'all' for the whole tower"):
        exact.make({"name": "clip_ft"}, resnet)
    whole = trained(exact.make({"name": "clip_ft", "train_blocks": "all"}, resnet))
    assert "clip/image/conv1/kernel" in whole and "clip/image/attention_pool/q/kernel" in whole


def ranking(logits, targets):
    """Violating pairs of an image averaged, their number a constant; mean of images with labels."""
    losses = []
    for x, t in zip(logits, np.asarray(targets), strict=True):
        if not (t > 0).any():
            continue
        pairs = [1 + x[n] - x[p] for p in np.flatnonzero(t > 0) for n in np.flatnonzero(t < 0)]
        violating = [pair for pair in pairs if pair > 0]
        losses.append(sum(violating) / max(len(violating), 1))
    return sum(losses) / len(losses)


def test_clip_ft_scores_loss_and_gradient(world):
    clip, images = world
    method = exact.make({"name": "clip_ft", "train_blocks": 0}, clip)
    labels = exact.inputs(method)
    features = texts(clip, "There is a {} in the scene")
    exact.same(labels.features, features)
    batch = exact.batch(images, 3)
    targets = batch.targets.at[1].set(jnp.asarray([-1, 0, -1, -1, 0], jnp.int8))
    batch = type(batch)(images, targets, batch.index, batch.mask)
    got = exact.Runner(method, labels)(batch)

    with np.load(exact.GOLDEN / "clip_vit.npz") as golden:
        hidden = np.asarray(golden["out/tokens_ln_post"][:, 0], np.float64)

    def expected(projection):
        scores = hidden @ projection @ features.T
        x = scores / jnp.sqrt(jnp.square(scores).sum(-1, keepdims=True))
        return ranking(x, targets), x

    projection = clip.image.projection[...]
    (loss, logits), gradient = jax.value_and_grad(expected, has_aux=True)(projection)
    exact.same(got.logits, logits)
    exact.same(got.loss, loss)
    exact.same(got.gradients["clip/image/projection"], gradient, 1e-5)
    np.testing.assert_allclose(np.linalg.norm(got.logits, axis=1), 1, rtol=1e-12)
    # Padded classes are no part of the length.
    exact.padding_changes_nothing(got, method, batch)


def test_clip_ft_scores_other_labels(world):
    clip, _ = world
    method = exact.make({"name": "clip_ft"}, clip)
    batch, scores = exact.batch({"pooled": pooled()}, 3), {}
    for space in (exact.SPACE, OTHER):
        run = exact.Runner(method, exact.inputs(method, space))
        scores[space.name] = np.asarray(run.scores(batch))
    # The same scores, of unit length over the three.
    places = [exact.SPACE.names.index(name) for name in OTHER.names]
    exact.same(scores["other"], unit(scores["five"][:, places]))
    # A tower that has trained does not move the label features.
    moved = nnx.clone(method)
    moved.clip.image.projection[...] *= 2
    exact.same(exact.inputs(moved).features, exact.inputs(method).features, 1e-12)
