"""The evaluator: padding, order of batches, both sets of weights, sharding."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from mlclip_jax import methods
from mlclip_jax.clip import CLIP
from mlclip_jax.clip.config import CLIPConfig, TextConfig, ViTConfig
from mlclip_jax.evaluation import evaluator
from mlclip_jax.labels.space import LabelSpace, Taxonomy
from mlclip_jax.training.mesh import make_mesh, replicate, shard_labels

SPACE = LabelSpace(
    names=("cat", "dog", "car", "bus", "sky", "sea"),
    subsets={"seen": (0, 2, 4), "animals": (0, 1)},
    taxonomy=Taxonomy(("animal", "vehicle", "scenery"), (0, 0, 1, 1, 2, 2)),
    name="six",
)


class Letters:
    """An encoder for tests: one token a letter."""

    sot, eot, context_length = 30, 31, 16

    def encode(self, text):
        return [ord(letter) % 29 + 1 for letter in text if letter != " "]


@pytest.fixture(scope="module")
def method():
    config = CLIPConfig(
        embed_dim=16,
        image=ViTConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2, mlp_width=32),
        text=TextConfig(
            vocab_size=32, context_length=16, width=16, layers=1, heads=2, mlp_width=32
        ),
    )
    clip = CLIP(config, rngs=nnx.Rngs(0))
    spec = {"name": "coop", "n_ctx": 2}
    return methods.build(spec, clip, space=SPACE, encoder=Letters(), rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def split(method):
    graphdef, trainable, frozen = nnx.split(method, method.trainable, nnx.Param)
    return graphdef, tuple(map(nnx.to_pure_dict, (trainable, frozen)))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (21, 16, 16, 3), np.uint8)
    return images, rng.choice([-1, 1], (21, len(SPACE))).astype(np.int8)


def batches(data, size, order=None):
    images, targets = data
    order = np.arange(len(images)) if order is None else order
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        mask = np.arange(size) < len(rows)
        rows = np.concatenate([rows, np.zeros(size - len(rows), int)])
        yield {"images": images[rows], "targets": targets[rows], "index": rows, "mask": mask}


def run(method, split, data, size=8, mesh=None, order=None, multiple_of=1):
    graphdef, state = split
    labels = method.label_inputs(SPACE, Letters(), multiple_of=multiple_of)
    if mesh is not None:
        labels = shard_labels(labels, mesh)
    predictor = evaluator.predict_fn(graphdef, mesh)
    states, served = {"raw": state}, batches(data, size, order)
    return evaluator.evaluate(predictor, states, labels, served, SPACE, mesh=mesh)["raw"]


def test_scores_are_those_of_the_method(method, split, data):
    result = run(method, split, data)
    labels = method.label_inputs(SPACE, Letters())
    expected = method.logits(method.encode_images(data[0]), method.encode_labels(labels), labels)
    np.testing.assert_allclose(result.scores, expected, rtol=2e-5, atol=1e-5)
    np.testing.assert_array_equal(result.targets, data[1])
    np.testing.assert_array_equal(result.index, np.arange(21))


def test_batch_size_and_order_do_not_matter(method, split, data):
    result = run(method, split, data)
    order = np.random.default_rng(1).permutation(21)
    other = run(method, split, data, size=5, order=order)
    np.testing.assert_array_equal(other.index, result.index)
    np.testing.assert_allclose(other.scores, result.scores, rtol=2e-5, atol=1e-5)
    assert other.metrics == pytest.approx(result.metrics)


def test_eight_devices_equal_one(method, split, data):
    mesh = make_mesh()
    assert mesh.size == 8
    graphdef, state = split
    placed = replicate(state, mesh)
    result = run(method, split, data)
    sharded = run(method, (graphdef, placed), data, mesh=mesh, multiple_of=8)
    assert sharded.scores.shape == (21, len(SPACE))  # the two padded classes are gone
    np.testing.assert_allclose(sharded.scores, result.scores, rtol=2e-5, atol=1e-5)


def test_metrics_by_group_and_subset(method, split, data):
    result = run(method, split, data)
    # "animal" is the same selection as the subset "animals", and is not said twice.
    names = {"mAP", "mAP/seen", "mAP/animals", "mAP/vehicle", "mAP/scenery"}
    assert set(result.metrics) == names
    assert result.metrics["mAP/seen"] == pytest.approx(result.per_class_ap[[0, 2, 4]].mean())


def test_several_weights_are_scored_in_one_pass(method, split, data):
    graphdef, (trainable, frozen) = split
    other = jax.tree.map(lambda x: 30 * x[..., ::-1], trainable)
    predictor, labels = evaluator.predict_fn(graphdef), method.label_inputs(SPACE, Letters())
    states = {"raw": (trainable, frozen), "ema": (other, frozen)}
    both = evaluator.evaluate(predictor, states, labels, batches(data, 8), SPACE)
    assert list(both) == ["raw", "ema"] and predictor.task_logits._cache_size() == 1
    assert np.abs(both["ema"].scores - both["raw"].scores).max() > 1e-3
    for name, state in states.items():
        alone = run(method, (graphdef, state), data)
        np.testing.assert_array_equal(both[name].scores, alone.scores)
        assert both[name].metrics == alone.metrics


def test_an_empty_split_is_named(method, split, data):
    with pytest.raises(ValueError, match="no images"):
        run(method, split, (data[0][:0], data[1][:0]))
