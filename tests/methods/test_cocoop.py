"""CoCoOp against its equations in float64: features, logits, gradients, evaluation, settings."""

from __future__ import annotations

import exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references import prompt_methods as reference

from mlclip_jax.errors import UserError
from mlclip_jax.evaluation.evaluator import evaluate, predict_fn
from mlclip_jax.training.mesh import make_mesh, shard_labels

WORDS = exact.Words().encode("a photo of a")
M = len(WORDS)
PATHS = (
    "context/vectors",
    *(f"meta/{layer}/{part}" for layer in ("linear1", "linear2") for part in ("kernel", "bias")),
)
POOLED = np.random.default_rng(0).normal(size=(3, 64))


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def world():
    """The golden CLIP, CoCoOp over it, compiled, a batch of three and what it gives."""
    with jax.enable_x64(True):
        clip, _ = exact.load("clip_vit")
        method = exact.make({"name": "cocoop"}, clip)
        run = exact.Runner(method, exact.inputs(method))
        batch = exact.batch({"pooled": jnp.asarray(POOLED)}, 3)
        return clip, method, run, batch, run(batch)


def test_label_features_logits_and_gradients(world):
    clip, _, run, batch, got = world
    start, suffix, eot = exact.surroundings(clip, M)
    encode, scale = exact.encoder(clip), jnp.exp(clip.logit_scale[...])
    positive = batch.targets > 0

    @jax.jit
    def expected(parameters, pooled):
        v, *meta = parameters
        logits = reference.cocoop_logits(pooled, *parameters, start, suffix, eot, scale, encode)
        first = v + reference.meta_net(pooled[0], *meta)
        texts = reference.class_texts(start, first, suffix, eot, encode)
        p = 1 / (1 + jnp.exp(-logits))
        return -jnp.mean(jnp.log(jnp.where(positive, p, 1 - p))), (logits, texts)

    parameters = [run.start[path] for path in PATHS]
    (loss, (logits, texts)), gradients = jax.value_and_grad(expected, has_aux=True)(
        parameters, batch.images["pooled"]
    )
    assert [x.shape for x in parameters] == [(M, 64), (64, 4), (4,), (4, 64), (64,)]
    exact.same(got.label_features[0], texts)
    exact.same(got.logits, logits)
    exact.same(got.loss, loss)
    exact.same_gradients(got.gradients, dict(zip(PATHS, gradients, strict=True)))


def test_start_of_the_context(world):
    clip, _, run, *_ = world
    expected = clip.text.token_embedding[...][np.array(WORDS)]
    np.testing.assert_array_equal(run.start["context/vectors"], expected)
    for layer, inputs in (("linear1", 64), ("linear2", 4)):
        for part in ("kernel", "bias"):
            value = np.abs(run.start[f"meta/{layer}/{part}"])
            assert 0.5 * inputs**-0.5 < value.max() < inputs**-0.5


def test_without_a_shift_it_is_coop(world):
    clip, _, run, batch, shifted = world
    zero = {f"meta__linear2__{x}": 0 * run.start[f"meta/linear2/{x}"] for x in ("kernel", "bias")}
    coop = exact.make({"name": "coop", "ctx_init": "a photo of a"}, clip)
    expected = exact.Runner(coop, exact.inputs(coop))(batch)
    got = run(batch, **zero)
    exact.same(got.logits, expected.logits)
    gradient = expected.gradients["context/vectors"]
    exact.same(got.gradients["context/vectors"], gradient)
    assert np.abs(shifted.logits - expected.logits).max() > 0.01


def test_images_do_not_see_each_other(world):
    _, _, run, batch, whole = world
    order = jnp.array([2, 0, 0])
    # Nor does the length of their features matter.
    images = {"pooled": batch.images["pooled"][order] * jnp.array([[1.0], [1.0], [3.0]])}
    got = run(exact.batch(images, 3))
    exact.same(got.logits, whole.logits[order], 1e-12)


def test_evaluation_encodes_labels_with_each_batch(world):
    _, method, _, batch, whole = world
    mesh = make_mesh(jax.devices()[:2])
    labels = shard_labels(exact.inputs(method, multiple_of=2), mesh)
    graphdef, state = nnx.split(method)
    batches = [
        {
            "images": {"pooled": POOLED[rows]},
            "targets": np.asarray(batch.targets)[rows],
            "index": np.array(rows),
            "mask": np.array(mask),
        }
        for rows, mask in (([0, 1], [True, True]), ([2, 2], [True, False]))
    ]
    states = {"raw": (nnx.to_pure_dict(state),)}
    predictor = predict_fn(graphdef, mesh)
    found = evaluate(predictor, states, labels, batches, exact.SPACE, mesh=mesh)["raw"]
    np.testing.assert_allclose(found.scores, whole.logits, rtol=1e-6)
    assert found.label_features is None


def test_chunks_of_prompts_change_nothing(world):
    clip, method, _, batch, whole = world
    chunked = nnx.clone(method)
    chunked.clip.text.class_chunk = 4  # of 15 prompts: the last chunk is one of padding in part
    got = exact.Runner(chunked, exact.inputs(chunked))(batch)
    assert clip.text.class_chunk is None
    exact.same(got.logits, whole.logits)
    exact.same_gradients(got.gradients, whole.gradients)


def test_padded_classes_change_nothing(world):
    _, method, _, batch, plain = world
    exact.padding_changes_nothing(plain, method, batch)


@pytest.mark.parametrize("reduction", [0, 65])
def test_wrong_reduction_is_named(world, reduction):
    with pytest.raises(UserError, match=r"method\.reduction lies between 1 and 64"):
        exact.make({"name": "cocoop", "reduction": reduction}, world[0])
