"""DualCoOp against its equations in float64: regions, scores, loss, gradients, what trains."""

from __future__ import annotations

import exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references import prompt_methods as reference

from mlclip_jax import losses
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.dual_coop import DualCoOpConfig
from mlclip_jax.modules.heads import normalize, pool_regions
from mlclip_jax.training.step import take_apart

M = 4
PATHS = ("positive/vectors", "negative/vectors")


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", params=["class_specific", "unified"])
def world(request):
    """DualCoOp over the golden ViT, compiled, a batch of regions and what it gives."""
    with jax.enable_x64(True):
        clip, _ = exact.load("clip_vit")
        spec = {"name": "dual_coop", "n_ctx": M, "class_specific": request.param != "unified"}
        method = exact.make(spec, clip)
        run = exact.Runner(method, exact.inputs(method))
        regions = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7, 64)))
        batch = exact.batch({"pooled": regions[:, 0], "tokens": regions[:, 1:]}, 3)
        # Contexts well apart: at their start, N(0, 0.02), both say nearly the same.
        rng = np.random.default_rng(1)
        values = [jnp.asarray(0.05 * rng.normal(size=run.start[path].shape)) for path in PATHS]
        changed = dict(zip(("positive__vectors", "negative__vectors"), values, strict=True))
        return clip, method, run, regions, batch, values, run(batch, **changed)


def test_label_features_logits_loss_and_gradients(world):
    clip, method, _, regions, batch, values, got = world
    around, encode = exact.surroundings(clip, M), exact.encoder(clip)
    start, suffix, eot = around

    @jax.jit
    def expected(values):
        texts = jnp.stack([reference.class_texts(start, v, suffix, eot, encode) for v in values])
        plus, minus = reference.dual_coop_scores(regions, *texts)
        loss = reference.dual_coop_loss(plus - minus, np.asarray(batch.targets))
        return loss, (plus - minus, texts)

    (loss, (logits, texts)), gradients = jax.value_and_grad(expected, has_aux=True)(values)
    assert {-1, 0, 1} == set(np.unique(batch.targets))
    assert 0.1 < np.abs(logits).max() < 13  # no floor of the logarithms is reached
    exact.same(got.label_features, texts)
    exact.same(got.logits, logits)
    exact.same(got.loss, loss)
    exact.same_gradients(got.gradients, dict(zip(PATHS, gradients, strict=True)))
    lead = (5,) if method.config.class_specific else ()
    assert gradients[0].shape == (*lead, M, 64)


@pytest.mark.parametrize("world", ["class_specific"], indirect=True)
def test_padded_classes_change_nothing(world):
    _, method, _, _, batch, values, plain = world
    method = nnx.clone(method)
    method.positive.vectors[...], method.negative.vectors[...] = values
    exact.padding_changes_nothing(plain, method, batch)


def test_contexts_of_classes_score_no_other_labels(world):
    method, other = world[1], LabelSpace(("one", "two"), name="other")
    turned = LabelSpace(exact.SPACE.names[::-1], name="turned")
    if method.config.class_specific:
        for space in (other, turned):
            with pytest.raises(UserError, match="parameters of each class were made for 5"):
                exact.inputs(method, space)
    else:
        labels = exact.inputs(method, other)
        assert jax.eval_shape(method.encode_labels, labels).shape == (2, 2, 64)


@pytest.fixture(scope="module")
def resnet():
    with jax.enable_x64(True):
        return exact.load("clip_rn")


def test_regions_of_a_resnet(resnet):
    clip, images = resnet
    method = exact.make({"name": "dual_coop"}, clip)
    cells = jax.jit(clip.image.cells)(images)
    pool = clip.image.attention_pool
    expected = reference.region_features_released(
        cells,
        pool.position_embedding[...],
        pool.v.kernel[...],
        pool.v.bias[...],
        pool.out.kernel[...],
        pool.out.bias[...],
    )
    pooled, tokens, mask, _ = jax.jit(method.encode_images)(images)
    exact.same(jnp.concatenate([pooled[:, None], tokens], axis=1), expected)
    assert mask is None and tokens.shape[1] == clip.config.image.grid**2


def test_regions_of_a_vit_are_class_token_and_patches():
    clip, images = exact.load("clip_vit")
    method = exact.make({"name": "dual_coop"}, clip)
    got = jax.jit(method.encode_images)(images)
    with np.load(exact.GOLDEN / "clip_vit.npz") as golden:
        expected = golden["out/tokens_proj"]
    for ours, theirs in ((got.pooled, expected[:, 0]), (got.tokens, expected[:, 1:])):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


def test_what_trains(resnet):
    def trained(**fields):
        return set(take_apart(exact.make({"name": "dual_coop", **fields}, resnet[0])).trainable)

    assert trained() == set(PATHS)
    tower = trained(train_image_encoder=True) - set(PATHS)
    assert all(path.startswith("clip/image/") for path in tower)
    pool = {path.split("/")[3] for path in tower if "attention_pool" in path}
    assert pool == {"position_embedding", "v", "out"}  # nobody reads queries and keys
    assert "clip/image/conv1/kernel" in tower


def test_start_and_settings(resnet):
    clip, _ = resnet
    method = exact.make({"name": "dual_coop"}, clip)
    positive, negative = method.positive.vectors[...], method.negative.vectors[...]
    assert positive.shape == negative.shape == (5, 16, clip.config.text.width)
    assert 0.018 < positive.std() < 0.022 and np.abs(positive - negative).max() > 0.02
    assert method.scale() == 100  # the CLIP's own temperature is another
    assert exact.make({"name": "dual_coop", "logit_scale": 20.0}, clip).scale() == 20
    words = exact.make({"name": "dual_coop", "ctx_init": "a photo of a"}, clip)
    table = clip.text.token_embedding[...][np.array(exact.Words().encode("a photo of a"))]
    for context in (words.positive, words.negative):
        np.testing.assert_array_equal(context.vectors[...], np.repeat(table[None], 5, axis=0))


REGIONS = np.array([[1, 0], [0.6, 0.8], [0, 1], [-1, 0.5]])
POSITIVE, NEGATIVE = np.array([[0.8, 0.6], [0.6, 0.8]]), np.array([[0.79, 0.62], [0.66, 0.75]])


def test_pooling_of_regions_by_hand():
    # Worked out once by hand: weights [.039 .960 .001 0] and [.000 .982 .018 0].
    plus, minus = normalize(jnp.asarray(POSITIVE)), normalize(jnp.asarray(NEGATIVE))

    def pool(read, regions=REGIONS):
        regions = jnp.asarray(regions)[None]
        return 100 * pool_regions(regions, jnp.asarray(plus), read, sharpness=20)[0]

    np.testing.assert_allclose(pool(plus), [95.347992, 99.627221], atol=1e-6)
    np.testing.assert_allclose(pool(minus), [95.863874, 99.240943], atol=1e-6)
    np.testing.assert_allclose(pool(plus - minus), [-0.515882, 0.386278], atol=1e-6)
    np.testing.assert_allclose(pool(plus - plus), 0, atol=1e-12)
    np.testing.assert_allclose(pool(plus, np.tile(REGIONS, (2, 1))), pool(plus), rtol=1e-12)


def test_loss_by_hand():
    x = jnp.array([[1.2, -0.7, 0.3], [-2, 0.4, 1]])
    targets = jnp.array([[1, -1, 0], [-1, 1, 0]], jnp.int8)
    loss = losses.get(DualCoOpConfig.loss)
    np.testing.assert_allclose(loss(x, targets), 0.293455, atol=1e-6)
    alone = [
        loss(x[i : i + 1, j : j + 1], targets[i : i + 1, j : j + 1]) for i, j in np.ndindex(2, 3)
    ]
    expected = [0.060943, 0.026289, 0, 0.000343, 0.205879, 0]
    np.testing.assert_allclose(alone, expected, atol=1e-6)
