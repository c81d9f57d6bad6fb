"""ADDS: the golden through the method, pyramids, labels of a step, what trains, settings."""

from __future__ import annotations

from dataclasses import replace

import exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references import decoders as reference

from mlclip_jax import methods
from mlclip_jax.clip import ImageFeatures
from mlclip_jax.errors import UserError
from mlclip_jax.evaluation.evaluator import predict_fn
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.losses import Progress
from mlclip_jax.methods.base import Batch, LabelInputs
from mlclip_jax.modules.prompts import template_features
from mlclip_jax.training.step import forward, take_apart

SMALL = {"name": "adds", "layers": 3, "hidden": 96, "dropout": 0.0}
TRAINING = Progress(step=0, epoch=0, key=None)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def golden():
    with np.load(exact.GOLDEN / "adds.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def clip():
    with jax.enable_x64(True):
        return exact.load("clip_vit")[0]


@pytest.fixture(scope="module")
def images(clip):
    with jax.enable_x64(True):
        return exact.load("clip_vit")[1]


def layers_of(method):
    """The decoder's values by the golden's names, for the reference."""
    found = []
    for layer in method.decoder.layers:
        norms = ("norm_q1", "norm_q3", "norm_q5", "norm_qout", "norm_v")
        own = {"ffn2": layer.up, "ffn1": layer.down}
        # The reference computes V' of the last layer too, which nothing reads.
        own |= dict(zip(norms, [*layer.norms, layer.norms[3]], strict=False))
        arrays = {}
        for name, part in own.items():
            kernel = part.scale if hasattr(part, "scale") else part.kernel
            arrays[f"{name}.weight"] = np.asarray(kernel[...]).T
            arrays[f"{name}.bias"] = np.asarray(part.bias[...])
        second = layer.attention2 or layer.attention
        for name, part in (("attn1", layer.attention), ("attn2", second)):
            arrays[f"{name}.in_proj_weight"] = np.asarray(part.packed.kernel[...]).T
            arrays[f"{name}.in_proj_bias"] = np.asarray(part.packed.bias[...])
            arrays[f"{name}.out_proj.weight"] = np.asarray(part.out.kernel[...]).T
            arrays[f"{name}.out_proj.bias"] = np.asarray(part.out.bias[...])
        found.append(arrays)
    return found


def logits_by_hand(method, tokens, queries, mask=None):
    w = np.asarray(method.projection.linear.kernel[...])[:, 0]
    b = np.asarray(method.projection.linear.bias[...])
    answers = [
        reference.dual_modal(queries, v, layers_of(method), method.config.heads, mask)
        for v in np.asarray(tokens)
    ]
    return np.stack(answers) @ w + b


def all_tokens(found: ImageFeatures) -> np.ndarray:
    return np.concatenate([np.asarray(found.pooled)[:, None], np.asarray(found.tokens)], axis=1)


def test_logits_are_the_equations_on_clips_tokens(clip, images):
    """From pixels and names to logits: both templates' mean, all tokens, Eq. 5, the projection."""
    method = exact.make(SMALL, clip)
    labels = exact.inputs(method)
    texts = []
    for template in method.config.templates:
        found = np.asarray(template_features(clip, exact.SPACE.names, exact.Words(), template))
        texts.append(found / np.linalg.norm(found, axis=1, keepdims=True))
    queries = (texts[0] + texts[1]) / 2
    exact.same(method.encode_labels(labels), queries)
    plain = clip.encode_images(images, tokens=True)
    found = jax.jit(method.encode_images)(images)
    exact.same(found.pooled, np.asarray(plain.pooled))
    exact.same(found.tokens, np.asarray(plain.tokens))
    expected = logits_by_hand(method, all_tokens(found), queries)
    exact.same(method.logits(found, labels.features, labels), expected)
    unit = exact.make(SMALL | {"normalize_inputs": True}, clip)
    tokens = all_tokens(found)
    tokens = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    queries = queries / np.linalg.norm(queries, axis=-1, keepdims=True)
    expected = logits_by_hand(unit, tokens, queries)
    exact.same(unit.logits(found, labels.features, labels), expected)


def test_tasks_are_scored_by_themselves(clip, images):
    """Tokens see what labels found, so that a task's labels must be alone; not in one layer."""
    method = exact.make(SMALL, clip)
    assert method.compares_labels and method.score_kind == "sigmoid"
    assert not exact.make(SMALL | {"layers": 1}, clip).compares_labels
    assert not exact.make(SMALL | {"decoder": "ml_decoder"}, clip).compares_labels
    labels, found = exact.inputs(method), method.encode_images(images)
    graphdef, state = nnx.split(method)
    masks = {"some": jnp.array([True, False, True, True, False])}
    run = predict_fn(graphdef).task_logits
    got = run((nnx.to_pure_dict(state),), images, labels.features, labels, masks)
    queries, some = np.asarray(labels.features), np.array([0, 2, 3])
    exact.same(got[""], logits_by_hand(method, all_tokens(found), queries))
    alone = logits_by_hand(method, all_tokens(found), queries[some])
    exact.same(got["some"][:, some], alone)
    assert np.abs(np.asarray(got[""])[:, some] - alone).max() > 1e-3


def test_padded_classes_change_nothing(clip, images):
    for fields in ({}, {"decoder": "standard"}, {"label_embedding": "random"}):
        method = exact.make(SMALL | fields, clip)
        batch = exact.batch(images[jnp.array([0, 1, 2, 0])], 4)
        plain = exact.Runner(method, exact.inputs(method))(batch)
        exact.padding_changes_nothing(plain, method, batch)


def test_decoder_and_projection_train(clip, images):
    method = exact.make(SMALL | {"label_embedding": "random"}, clip)
    got = exact.Runner(method, exact.inputs(method))(exact.batch(images, 3))
    assert {path.split("/")[0] for path in got.gradients} == {"decoder", "projection"}
    # Biases of keys move no softmax.
    assert all(np.abs(gradient).max() > 1e-12 for gradient in got.gradients.values())
    assert method.own_classes == exact.SPACE.names
    with pytest.raises(UserError, match="were made for 5 classes"):
        method.label_inputs(LabelSpace(("boat",), name="other"), exact.Words())


def test_a_pyramid_is_its_crops(clip):
    method = exact.make(SMALL | {"image_size": 64}, clip)
    assert method.image_size == 64
    assert methods.image_size(SMALL | {"image_size": 64}, clip.config) == 64
    assert methods.image_size(SMALL, clip.config) == 32
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)), jnp.uint8)
    found = jax.jit(method.encode_images)(images)
    assert found.tokens.shape == (2, 5 * 17 - 1, 64)
    crops = method.pyramid.cut(images)
    one = clip.encode_images(crops[1], tokens=True)  # the crops of the second image
    expected = np.concatenate([np.asarray(one.pooled)[:, None], one.tokens], axis=1)
    exact.same(all_tokens(found)[1], expected.reshape(-1, 64))
    labels = exact.inputs(method)
    exact.same(
        method.logits(found, labels.features, labels),
        logits_by_hand(method, all_tokens(found), np.asarray(labels.features)),
    )
    top = exact.make(SMALL | {"image_size": 64, "levels": (1,)}, clip)
    exact.same(all_tokens(top.encode_images(images)), all_tokens(found)[:, 17:])
    assert top.image_settings() != method.image_settings()
    with pytest.raises(ValueError, match=r"takes \[b 64 64 3\]"):
        method.encode_images(images[:, :48, :48])


def test_crops_of_a_step_are_its_own(clip):
    method = exact.make(SMALL | {"image_size": 64, "drop_crops": 0.5}, clip)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)), jnp.uint8)
    run = jax.jit(lambda key: method.encode_images(images, progress=Progress(0, 0, key)).tokens)
    one, again, other = (np.asarray(run(jax.random.key(i))) for i in (1, 1, 4))
    assert one.shape == (2, 3 * 17 - 1, 64)
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1
    np.testing.assert_array_equal(
        method.encode_images(images).tokens, method.encode_images(images).tokens
    )
    labels = exact.inputs(method)
    with pytest.raises(UserError, match=r"set method\.drop_crops=0"):
        method.patch_scores(method.encode_images(images), labels.features, labels)


def test_dropout_is_the_steps(clip, images):
    method = exact.make(SMALL | {"dropout": 0.5}, clip)
    labels, found = exact.inputs(method), method.encode_images(images)

    def run(progress: Progress | None) -> np.ndarray:
        return np.asarray(method.logits(found, labels.features, labels, progress=progress))

    plain, one = run(None), run(Progress(0, 0, jax.random.key(0)))
    assert np.abs(plain - one).max() > 1e-2
    np.testing.assert_array_equal(one, run(Progress(0, 0, jax.random.key(0))))
    assert np.abs(one - run(Progress(0, 0, jax.random.key(1)))).max() > 1e-2
    np.testing.assert_array_equal(plain, run(Progress(0, 0)))


def test_a_step_sees_the_labels_it_chose(clip, images):
    """Loss and gradients are those of a method that is given these labels and no others."""
    method = exact.make(SMALL | {"selected_labels": 4, "negative_ratio": 1.0}, clip)
    labels = exact.inputs(method, multiple_of=8)
    targets = -np.ones((3, 8), np.int8)
    targets[0, 3] = targets[2, 1] = 1
    targets[1, 5:] = 0
    mask = jnp.array([True, True, True])
    batch = Batch(images, jnp.asarray(targets), jnp.arange(3), mask)
    progress = Progress(0, 0, jax.random.key(7))
    few, chosen, logged = method.choose_labels(batch, labels, progress)
    assert (float(logged["labels"]), float(logged["positives_left_out"])) == (4, 0)
    rows = np.asarray(chosen.index)
    assert set(rows[:2]) == {1, 3} and len(set(rows)) == 4 and rows.max() < 5
    np.testing.assert_array_equal(few.targets, targets[:, rows])
    exact.same(chosen.features, np.asarray(labels.features)[rows])
    parts = take_apart(method)

    def loss(trainable: dict, batch: Batch, labels: LabelInputs) -> jax.Array:
        merged = parts.merge({**parts.frozen, **trainable})
        return forward(merged, batch, labels, progress)[0]

    got = jax.value_and_grad(loss)(parts.trainable, batch, labels)
    plain = exact.make(SMALL, clip)
    parts = take_apart(plain)
    expected = jax.value_and_grad(loss)(parts.trainable, few, chosen)
    exact.same(got[0], np.asarray(expected[0]))
    exact.same_gradients(got[1], expected[1])
    # An image that is padding has no positives.
    padded = replace(batch, mask=jnp.array([True, True, False]))
    _, chosen, logged = method.choose_labels(padded, labels, progress)
    assert (
        float(logged["labels"]) == 2
        and np.asarray(chosen.mask).tolist() == [True] * 2 + [False] * 2
    )
    # More places than labels: still no more than the ratio asks for.
    roomy = exact.make(SMALL | {"selected_labels": 9, "negative_ratio": 1.0}, clip)
    _, chosen, logged = roomy.choose_labels(batch, labels, progress)
    assert chosen.num_classes == 8 and float(logged["labels"]) == 4
    unpadded = replace(batch, targets=batch.targets[:, :5])
    _, again, _ = roomy.choose_labels(unpadded, exact.inputs(roomy), progress)
    np.testing.assert_array_equal(again.index[:4], chosen.index[:4])
    assert exact.make(SMALL, clip).choose_labels(batch, labels, progress) == (batch, labels, {})


def test_one_label_can_be_scored(clip, images):
    method = exact.make(SMALL, clip)
    labels = exact.inputs(method, LabelSpace(("boat",), name="one"), multiple_of=8)
    found = method.encode_images(images)
    got = method.logits(found, labels.features, labels)
    expected = logits_by_hand(method, all_tokens(found), np.asarray(labels.features)[:1])
    exact.same(got[:, :1], expected)


def test_maps_are_the_attention(clip, images):
    for fields, side in (({}, 4), ({"image_size": 64}, 8)):
        method = exact.make(SMALL | fields, clip)
        size = method.image_size
        pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, 3)).astype(np.uint8)
        labels, found = exact.inputs(method), method.encode_images(jnp.asarray(pixels))
        maps = np.asarray(method.patch_scores(found, labels.features, labels))
        assert maps.shape == (2, 5, side**2) and (maps > 0).all()
        attention: list = []
        tokens = jnp.asarray(all_tokens(found))
        method.decoder(labels.features[None], tokens, labels.mask, watch=attention)
        assert len(attention) == 3
        if not fields:
            exact.same(maps, np.mean(attention, axis=0)[..., 1:])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"templates": ()}, "needs at least one template"),
        ({"templates": ("a photo",)}, 'needs exactly one "{}"'),
        ({"logit_scale": 10.0}, "method.logit_scale has no effect"),
        ({"heads": 7}, "method.heads is 7 and does not divide the width 64"),
        ({"layers": 0}, "method.layers is 0"),
        ({"image_size": 16}, "method.image_size is 16 and the image tower takes 32"),
        ({"levels": (1,)}, "images of 32 pixels have the levels 0"),
        ({"selected_labels": 0}, "method.selected_labels is 0"),
        ({"selected_labels": 4, "negative_ratio": -1.0}, "method.negative_ratio is -1.0"),
        ({"drop_crops": 0.5}, "leaves out none of the 1 crops"),
        ({"decoder": "triple"}, "method.decoder"),
    ],
)
def test_wrong_settings_are_named(clip, fields, message):
    with pytest.raises(UserError) as caught:
        exact.inputs(exact.make(SMALL | fields, clip))
    assert message in str(caught.value)
