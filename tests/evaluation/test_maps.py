"""Maps against plain float64 computations on the golden CLIPs, finite differences, the game."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
import exact

from mlclip_jax.clip import ImageFeatures
from mlclip_jax.data.scenes import Scenes
from mlclip_jax.errors import UserError
from mlclip_jax.evaluation.evaluator import predict_fn
from mlclip_jax.evaluation.maps import (
    contrast_maps,
    grad_cam,
    map_fn,
    patch_maps,
    pointing_game,
    upsample,
)
from mlclip_jax.serving.tagger import Tagger

METHODS = {
    "adds": ("clip_vit", {"name": "adds", "layers": 2, "hidden": 32}),
    "mkt": ("clip_vit", {"name": "mkt", "train_blocks": 1, "top_k": 3}),
    "mkt, whole student": ("clip_vit", {"name": "mkt", "train_blocks": "all", "top_k": 3}),
    "dual_coop": ("clip_rn", {"name": "dual_coop", "n_ctx": 2}),
    "tai_dpt": ("clip_vit", {"name": "tai_dpt", "n_ctx": 2}),
    "zero_shot": ("clip_vit", {"name": "zero_shot"}),
    "zero_shot, resnet": ("clip_rn", {"name": "zero_shot"}),
    "clip_ft": ("clip_vit", {"name": "clip_ft"}),
    "cocoop": ("clip_vit", {"name": "cocoop", "n_ctx": 2, "reduction": 4}),
}


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def clips():
    with jax.enable_x64(True):
        return {name: exact.load(name) for name in ("clip_vit", "clip_rn")}


def moved(method):
    """With image towers and contexts away from where they start, so that streams differ."""
    rng = np.random.default_rng(7)
    state = nnx.state(method, nnx.Param)
    state = jax.tree.map(lambda x: x * (1 + 0.1 * rng.normal(size=x.shape)), state)
    nnx.update(method, state)
    return method


@pytest.fixture(scope="module", params=METHODS)
def case(request, clips):
    """A method, its images, label features (None where they see the image), labels, its name."""
    with jax.enable_x64(True):
        name, spec = METHODS[request.param]
        clip, images = clips[name]
        method = moved(exact.make(spec, clip))
        labels = exact.inputs(method)
        features = None if method.labels_see_images else encoded(method, labels)
        return method, images[:2], features, labels, spec["name"]


def encoded(method, labels):
    return jax.jit(lambda: method.encode_labels(labels))()


def run(maps, *args):
    """Compiled, of a method and its inputs."""
    return jax.jit(lambda: maps(*args))()


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def plain_scores(method, images, features, labels, name):
    """[b c p], written out by method."""
    tower = method.image_tower
    if name in ("dual_coop", "tai_dpt", "mkt"):
        tokens = method.encode_images(images).tokens
    else:
        tokens = method.clip.encode_images(images, tokens=True).tokens
    if name in ("mkt", "clip_ft"):
        return jnp.einsum("bpd,cd->bcp", tokens, features)
    f = unit(tokens)
    if name == "dual_coop":
        return 100 * jnp.einsum("bpd,cd->bcp", f, unit(features[0]) - unit(features[1]))
    if name == "tai_dpt":
        return 4 * jnp.einsum("bpd,cd->bcp", f, unit(features[1]))
    scale = jnp.exp(method.clip.logit_scale[...])
    if name == "cocoop":
        t = unit(method.encode_labels(labels, image_features=method.encode_images(images)))
        return scale * jnp.einsum("bpd,bcd->bcp", f, t)
    assert tower is method.clip.image
    return scale * jnp.einsum("bpd,cd->bcp", f, unit(features))


@pytest.mark.parametrize("case", [name for name in METHODS if name != "adds"], indirect=True)
def test_patch_scores_are_those_of_a_plain_computation(case):
    method, images, features, labels, name = case
    chosen = jnp.array([[4, 0], [1, 1]])
    expected = run(plain_scores, method, images, features, labels, name)
    side = int(expected.shape[-1] ** 0.5)
    rows = expected[jnp.arange(2)[:, None], chosen]
    got = run(patch_maps, method, images, features, labels, chosen)
    exact.same(got, rows.reshape(2, 2, side, side))
    rows = rows - expected.mean(1)[:, None]
    got = run(contrast_maps, method, images, features, labels, chosen)
    exact.same(got, rows.reshape(2, 2, side, side), 1e-5)


def attention(block, h, x):
    """A block from its normed input h and its input x, softmax in float64: [b t w]."""
    w, heads = h.shape[-1], block.attention.heads
    q, k, v = jnp.split(h @ block.attention.qkv.kernel[...] + block.attention.qkv.bias[...], 3, -1)
    q, k, v = (y.reshape(*y.shape[:2], heads, w // heads) for y in (q, k, v))
    weights = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k) / (w // heads) ** 0.5, -1)
    y = jnp.einsum("bhqk,bkhe->bqhe", weights, v).reshape(h.shape)
    x = x + y @ block.attention.out.kernel[...] + block.attention.out.bias[...]
    h = norm(block.norm2, x) @ block.mlp.up.kernel[...] + block.mlp.up.bias[...]
    h = h / (1 + jnp.exp(-1.702 * h))
    return x + h @ block.mlp.down.kernel[...] + block.mlp.down.bias[...]


def norm(layer, x):
    y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + layer.eps)
    return y * layer.scale[...] + layer.bias[...]


def final(method, name, features, labels):
    """Gives of images the states of Grad-CAM [b n w], and logits [b c] as a function of them."""
    tower = method.image_tower

    def logits_of(found):
        if name == "cocoop":
            t = method.encode_labels(labels, image_features=found)
            return method.logits(found, t, labels)
        if name == "zero_shot":
            v = unit(found.pooled)
            return jnp.exp(method.clip.logit_scale[...]) * v @ unit(features).T
        if name == "mkt":
            products = jnp.einsum("bpd,cd->bcp", found.tokens, features)
            local = jnp.sort(products, -1)[..., -3:].mean(-1)
            return (unit(local) + unit(found.pooled @ features.T)) / 2
        return method.logits(found, features, labels)

    if hasattr(tower, "layer4"):

        def resnet(images):
            a = tower.cells(images)
            pool = tower.attention_pool

            def logits(a):
                if name == "dual_coop":
                    a = jnp.concatenate([a.mean(1, keepdims=True), a], 1)
                    a = pool.project_cells(a + pool.position_embedding[...])
                    return logits_of(ImageFeatures(a[:, 0], a[:, 1:]))
                return logits_of(ImageFeatures(pool(a), None))

            return a, logits

        return resnet

    def vit(images):
        x = images
        if name == "mkt" and len(tower.blocks) == 1:  # below it is the CLIP's
            x = method.clip.image.lower(x, len(method.clip.image.blocks) - 1)
        else:
            x = tower.lower(x, len(tower.blocks) - 1)
        last = tower.blocks[-1]

        def logits(h):
            y = norm(tower.norm_post, attention(last, h, x)) @ tower.projection[...]
            return logits_of(ImageFeatures(y[:, 0], y[:, 1:]))

        return norm(last.norm1, x), logits

    return vit


def plain_grad_cam(states, gradient):
    """Eqs. 1-2 on patches [b p w], without loops hidden in a library call."""
    weights = gradient.sum(1) / gradient.shape[1]
    total = sum(weights[:, None, k] * states[:, :, k] for k in range(states.shape[-1]))
    return np.maximum(total, 0)


def test_grad_cam_is_that_of_a_forward_written_out(case):
    method, images, features, labels, name = case
    chosen = jnp.array([[4, 0, 2], [1, 3, 3]])
    got = run(grad_cam, method, images, features, labels, chosen)
    forward = final(method, name, features, labels)
    first = 0 if hasattr(method.image_tower, "layer4") else 1

    def gradients():
        states, logits = forward(images)

        def of(k):
            return jax.grad(lambda a: logits(a)[jnp.arange(2), chosen[:, k]].sum())(states)

        return states[:, first:], [of(k)[:, first:] for k in range(3)]

    states, found = jax.device_get(jax.jit(gradients)())
    maps = [plain_grad_cam(states, gradient) for gradient in found]
    side = got.shape[-1]
    exact.same(got, np.stack(maps, 1).reshape(2, 3, side, side), 1e-5)


def test_grad_cam_against_finite_differences(clips):
    """Its map is <A, w>: moving all patches alike along w_k changes the logit by p w_k."""
    clip, images = clips["clip_vit"]
    method = moved(exact.make({"name": "zero_shot"}, clip))
    labels = exact.inputs(method)
    features = encoded(method, labels)
    states, logits = final(method, "zero_shot", features, labels)(images[:1])
    p, step = states.shape[1] - 1, 1e-4
    logits, slopes = jax.jit(logits), []
    for k in range(states.shape[-1]):
        change = jnp.zeros_like(states).at[:, 1:, k].set(step)
        slopes.append((logits(states + change) - logits(states - change))[0])
    weights = np.array(slopes) / (2 * step * p)  # [w c]
    expected = np.maximum(np.asarray(states)[0, 1:] @ weights, 0).T
    got = run(grad_cam, method, images[:1], features, labels, jnp.arange(5)[None])
    exact.same(got.reshape(expected.shape), expected, 1e-4)


def test_a_tower_that_recomputes_gives_the_same(clips):
    clip, images = clips["clip_vit"]
    found = []
    for remat in (False, True):
        method = exact.make({"name": "zero_shot"}, clip)
        method.clip.image.remat = remat
        labels = exact.inputs(method)
        args = images[:2], encoded(method, labels), labels, jnp.array([[0, 1, 2]] * 2)
        found.append(run(grad_cam, method, *args))
        assert method.clip.image.remat == remat  # the method itself has no tap
        assert not any("added" in path for path, _ in nnx.to_flat_state(nnx.state(method)))
    exact.same(*found, 1e-12)


def test_padded_labels_are_no_part_of_the_mean_and_kinds_are_known(clips):
    clip, images = clips["clip_vit"]
    method = exact.make({"name": "zero_shot"}, clip)
    graphdef, state = nnx.split(method)
    chosen, maps = jnp.array([[3, 1]]), []
    for multiple in (1, 8):
        labels = jax.device_put(exact.inputs(method, multiple_of=multiple))
        state = (nnx.to_pure_dict(nnx.state(method)),)
        features = predict_fn(graphdef).encode_labels(state, labels)
        run = map_fn(graphdef, "contrast")
        maps.append(run(state, images[:1], features, labels, chosen))
    exact.same(*maps, 1e-10)
    with pytest.raises(UserError, match=r"unknown kind of maps 'gradcam'.*grad_cam"):
        map_fn(graphdef, "gradcam")


def test_upsampling_is_linear_between_centres():
    found = upsample(np.array([[[0.0, 1.0], [2.0, 3.0]]]), 8)[0]
    along = np.array([0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1])
    np.testing.assert_allclose(found, along[None] + 2 * along[:, None], atol=1e-6)


def test_pointing_game_by_hand():
    maps = np.zeros((4, 4, 6))
    maps[0, 1, 4] = 1  # in the second of two boxes
    maps[1, 3, 3] = 1  # a pixel right of its box, whose ends are exclusive
    maps[2, 0, :2] = 5  # two highest points, one inside
    found = pointing_game(
        maps, [[(0, 0, 1, 1), (4, 0, 6, 2)], [(0, 3, 3, 4)], [(0, 0, 1, 4)], [(0, 0, 3, 4)]]
    )
    np.testing.assert_allclose(found.hits, [1, 0, 0.5, 0.5])  # a flat map is at chance
    np.testing.assert_allclose(found.chance, [5 / 24, 3 / 24, 4 / 24, 12 / 24])
    overlapping = pointing_game(maps[:1], [[(3, 0, 5, 2), (4, 1, 6, 2)]])
    np.testing.assert_allclose(overlapping.chance, [5 / 24])
    with pytest.raises(ValueError, match="shorter"):
        pointing_game(maps, [[(0, 0, 1, 1)]])


def test_the_packaged_clip_points_at_what_it_names():
    """Above chance by far, and not by the order of rows and columns: mirrored maps are worse."""
    scenes = Scenes("validation", 40)
    with jax.enable_x64(False):
        tagger = Tagger.from_clip("clip-mini", scenes.space)
        explained = tagger.explain([scenes.image(i) for i in range(40)], labels=scenes.space.names)
    hits = {"": [], "mirrored": [], "turned": []}
    chance = []
    whole = upsample(np.stack([of.maps for of in explained]), 64)
    for i, own in enumerate(whole):
        boxes = scenes.label_boxes(i)
        maps = own[list(boxes)]
        turned = {"": maps, "mirrored": maps[:, :, ::-1], "turned": maps.swapaxes(1, 2)}
        for how, some in turned.items():
            found = pointing_game(some, list(boxes.values()))
            hits[how].append(found.hits)
        chance.append(found.chance)
    share = {how: np.concatenate(of).mean() for how, of in hits.items()}
    assert share[""] > 0.5 and np.concatenate(chance).mean() < 0.12
    assert max(share["mirrored"], share["turned"]) < share[""] - 0.2
