"""TaI-DPT against its equations in float64: captions, images, loss, gradients, examples."""

from __future__ import annotations

import exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import prompt_methods as reference

from mlclip_jax import losses
from mlclip_jax.clip import ImageFeatures
from mlclip_jax.data.scenes import Scenes
from mlclip_jax.errors import UserError
from mlclip_jax.labels import catalog
from mlclip_jax.methods.tai_dpt import TaIDPTConfig
from mlclip_jax.modules.heads import normalize, pool_regions
from mlclip_jax.training.captions import encode_captions
from mlclip_jax.training.step import take_apart

M = 4
PATHS = ("global_context/vectors", "local_context/vectors")
MASK = np.arange(9) < np.array([[9], [4], [6]])


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def clip():
    with jax.enable_x64(True):
        return exact.load("clip_vit")[0]


@pytest.fixture(scope="module")
def world(clip):
    """TaI-DPT, compiled, a batch of three captions' features and what it gives."""
    with jax.enable_x64(True):
        method = exact.make({"name": "tai_dpt", "n_ctx": M}, clip)
        run = exact.Runner(method, exact.inputs(method))
        rng = np.random.default_rng(0)
        pooled, tokens = (jnp.asarray(rng.normal(size=(3, *more, 64))) for more in ((), (9,)))
        features = {"pooled": pooled, "tokens": tokens, "mask": jnp.asarray(MASK)}
        batch = exact.batch(features, 3)
        return method, run, batch, run(batch)


def test_label_features_logits_loss_and_gradients(clip, world):
    _, run, batch, got = world
    (start, suffix, eot), encode = exact.surroundings(clip, M), exact.encoder(clip)
    targets = np.where(np.asarray(batch.targets) > 0, 1, -1)  # unobserved counts as negative
    pooled, tokens = batch.images["pooled"], batch.images["tokens"]

    @jax.jit
    def expected(contexts):
        texts = [reference.class_texts(start, v, suffix, eot, encode) for v in contexts]
        streams = reference.tai_scores(pooled, tokens, MASK, *texts, kappa=50)
        merged = reference.tai_merged(*streams)
        return reference.tai_loss(*streams, targets), (merged, jnp.stack(texts))

    (loss, (logits, texts)), gradients = jax.value_and_grad(expected, has_aux=True)(
        [run.start[path] for path in PATHS]
    )
    exact.same(got.label_features, texts)
    exact.same(got.logits, logits)
    exact.same(got.loss, loss)
    exact.same_gradients(got.gradients, dict(zip(PATHS, gradients, strict=True)))


def test_padding_of_captions_is_not_there(world):
    _, run, batch, plain = world
    rng = np.random.default_rng(1)
    noise = jnp.asarray(np.where(MASK[..., None], 0, 100 * rng.normal(size=(3, 9, 64))))
    tokens = batch.images["tokens"]
    noisy = run(exact.batch(batch.images | {"tokens": tokens + noise}, 3))
    np.testing.assert_array_equal(noisy.logits, plain.logits)
    jax.tree.map(np.testing.assert_array_equal, noisy.gradients, plain.gradients)
    tokens = tokens + 0.1 * jnp.asarray(MASK)[..., None]
    moved = run(exact.batch(batch.images | {"tokens": tokens}, 3))
    assert np.abs(moved.logits - plain.logits).max() > 1e-3


def test_padded_classes_change_nothing(world):
    method, _, batch, plain = world
    exact.padding_changes_nothing(plain, method, batch)


def test_streams_of_images(clip, world):
    method, _, batch, captions = world
    texts, images = captions.label_features, ImageFeatures(*list(batch.images.values())[:2])
    expected = reference.tai_scores(*images[:2], np.ones((3, 9), bool), *texts, kappa=40)
    streams = method.streams(images, texts, None)
    assert list(streams) == ["global", "local"]
    for got, stream in zip(streams.values(), expected, strict=True):
        exact.same(got, stream)
    exact.same(method.logits(images, texts, None), reference.tai_merged(*expected))
    nus = exact.make({"name": "tai_dpt", "n_ctx": M, "image_sharpness": 4.0}, clip)
    expected = reference.tai_scores(*images[:2], np.ones((3, 9), bool), *texts, kappa=4)
    exact.same(nus.streams(images, texts, None)["local"], expected[1])


def test_features_of_captions(clip):
    rng = np.random.default_rng(0)
    ids, ends = np.zeros((3, 9), np.int32), MASK.sum(1) - 1
    for row, end in zip(ids, ends, strict=True):
        row[: end + 1] = [510, *rng.integers(0, 510, end - 1), 511]  # 0 is a word as well
    found = encode_captions(clip, ids, ("pooled", "tokens", "mask"))
    np.testing.assert_array_equal(found["mask"], MASK)
    full = clip.text.token_embedding[...][np.pad(ids, ((0, 0), (0, 77 - 9)))]
    encode = jax.jit(exact.encoder(clip))
    exact.same(found["pooled"], encode(full, jnp.asarray(ends)))
    for position in range(9):
        there = MASK[:, position]
        expected = encode(full, jnp.full(3, position))
        exact.same(found["tokens"][there, position], expected[there])


def test_a_resnet_has_no_positions():
    clip, images = exact.load("clip_rn")
    method, pool = exact.make({"name": "tai_dpt"}, clip), clip.image.attention_pool
    cells = jax.jit(clip.image.cells)(images)
    maps = [
        m[...] for layer in (pool.q, pool.k, pool.v, pool.out) for m in (layer.kernel, layer.bias)
    ]
    pooled, tokens, mask, _ = jax.jit(method.encode_images)(images)
    exact.same(pooled, reference.attention_pool(cells, None, *maps, clip.config.image.heads))
    exact.same(tokens, reference.cell_features(cells, *maps[4:]))
    assert mask is None


def test_without_local_prompts(clip, world):
    _, _, batch, both = world
    method = exact.make({"name": "tai_dpt", "n_ctx": M, "local": False}, clip)
    assert set(take_apart(method).trainable) == {PATHS[0]}
    images, texts = ImageFeatures(*batch.images.values()), both.label_features[:1]
    expected = reference.cosine_logits(batch.images["pooled"], texts[0], 4)
    exact.same(method.logits(images, texts, None), expected)


@pytest.mark.parametrize("labels", ["nouns", "images"])
@pytest.mark.parametrize("templates", [(), ("a photo of a {}.", "art of the {}.")])
def test_examples_of_scenes(clip, labels, templates):
    source, space = Scenes("train", 12, seed=0), catalog.scenes()
    spec = {"name": "tai_dpt", "caption_labels": labels, "templates": templates}
    method = exact.make(spec, clip, space)
    targets = np.stack([source.annotations(i)["targets"] for i in range(12)])
    # Several captions for one image, none for another, and one in which nothing is named.
    captions = [*source.captions]
    captions[0], captions[1] = (captions[0][0], "nothing to be seen"), ()
    got = method.caption_examples(captions, targets, space)
    expected = [(captions[0][0], targets[0])]
    if labels == "images":
        expected.append((captions[0][1], targets[0]))
    expected += [(captions[i][0], targets[i]) for i in range(2, 12)]
    count = len(expected)
    assert list(got.texts[:count]) == [text for text, _ in expected]
    np.testing.assert_array_equal(got.targets[:count] > 0, [t > 0 for _, t in expected])
    assert got.targets.shape == (len(got.texts), 22) and got.report
    sentences = list(zip(got.texts[count:], got.targets[count:], strict=True))
    assert len(sentences) == (220 + 22 if templates else 0)  # nine times and once; once
    for i, name in enumerate(space.names) if templates else ():
        of_label = [text for text, row in sentences if row[i] > 0]
        readable = name.replace("_", " ")
        expected = [f"art of the {readable}."] + 10 * [f"a photo of a {readable}."]
        assert sorted(of_label) == sorted(expected)
    assert all((row > 0).sum() == 1 for _, row in sentences)


def test_settings(clip):
    method = exact.make({"name": "tai_dpt"}, clip)
    assert (method.scale(), method.captions().read) == (4, "images")
    assert method.global_context.vectors.shape == method.local_context.vectors.shape == (16, 64)
    with pytest.raises(UserError, match="train_image_encoder has no effect"):
        exact.make({"name": "tai_dpt", "train_image_encoder": True}, clip)


def test_pooling_and_ranking_by_hand():
    tokens = jnp.array([[[1, 0], [0.6, 0.8], [0, 1], [-1, 0.5]]])
    prompts = normalize(jnp.array([[0.8, 0.6], [0.6, 0.8]]))
    mask = jnp.array([[True, True, True, False]])
    got = 4 * pool_regions(tokens, prompts, prompts, sharpness=50, mask=mask)
    np.testing.assert_allclose(got, [[3.839785, 3.999964]], atol=1e-6)
    loss = losses.get(TaIDPTConfig.loss)
    x = jnp.array([[1, 0.4, -0.2, 0.3], [0.1, 0.9, 0.8, -0.5]])
    targets = jnp.array([[1, 0, -1, 1], [-1, 1, 0, -1]], jnp.int8)
    np.testing.assert_allclose(loss(x, targets), 1.55, atol=1e-12)
