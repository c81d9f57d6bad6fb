"""ML-Decoder and Query2Label as methods: from pixels to logits, what trains, groups, settings."""

from __future__ import annotations

import exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import decoders as reference
from test_adds import all_tokens

from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.losses import Progress
from mlclip_jax.modules.prompts import template_features

ML = {"name": "ml_decoder", "hidden": 96}
Q2L = {"name": "query2label"}


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def clip():
    with jax.enable_x64(True):
        return exact.load("clip_vit")[0]


@pytest.fixture(scope="module")
def images(clip):
    with jax.enable_x64(True):
        return exact.load("clip_vit")[1]


def values(layer, names):
    """A layer's values by torch's names."""
    arrays = {}
    for name, part in names.items():
        if hasattr(part, "packed"):
            arrays[f"{name}.in_proj_weight"] = np.asarray(part.packed.kernel[...]).T
            arrays[f"{name}.in_proj_bias"] = np.asarray(part.packed.bias[...])
            part, name = part.out, f"{name}.out_proj"
        kernel = part.scale if hasattr(part, "scale") else part.kernel
        arrays[f"{name}.weight"] = np.asarray(kernel[...]).T
        arrays[f"{name}.bias"] = np.asarray(part.bias[...])
    return arrays


def ml_layers(method):
    return [
        values(layer, {
            "norm1": layer.norms[0], "norm2": layer.norms[1], "norm3": layer.norms[2],
            "linear1": layer.up, "linear2": layer.down, "multihead_attn": layer.attention,
        })
        for layer in method.decoder.layers
    ]  # fmt: skip


def relu_linear(layer, x):
    return np.maximum(x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...]), 0)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("groups", [None, 2, 9])
def test_ml_decoder_with_fixed_queries(clip, images, groups, layers):
    method = exact.make(ML | {"groups": groups, "layers": layers}, clip)
    k = 5 if groups is None else min(groups, 5)
    assert method.queries.shape == (k, 64)
    labels, found = exact.inputs(method, multiple_of=8), method.encode_images(images)
    u = relu_linear(method.embed, all_tokens(found))
    projection = method.projection
    weight, bias = np.asarray(projection.kernel[...]), np.asarray(projection.bias[...])
    expected = [
        reference.group_logits(
            reference.ml_decoder_layers(np.asarray(method.queries[...]), v, ml_layers(method), 8),
            weight, bias, 5,
        )
        for v in u
    ]  # fmt: skip
    got = method.logits(found, method.encode_labels(labels), labels)
    exact.same(got[:, :5], np.stack(expected))
    np.testing.assert_array_equal(got[:, 5:], np.repeat(got[:, :1], 3, axis=1))
    maps = np.asarray(method.patch_scores(found, method.encode_labels(labels), labels))
    share = -(-5 // k)
    assert maps.shape == (3, 8, 16)
    np.testing.assert_array_equal(maps[:, 0] == maps[:, 1], share > 1)


def test_ml_decoder_with_queries_of_labels(clip, images):
    method = exact.make(ML | {"queries": "labels"}, clip)
    others = LabelSpace(("a red boat", "sunset"), name="others")
    found = method.encode_images(images)
    for space in (exact.SPACE, others):
        labels = exact.inputs(method, space)
        texts = np.asarray(template_features(clip, space.names, exact.Words()))
        q, u = (
            relu_linear(method.embed_labels, texts),
            relu_linear(method.embed, all_tokens(found)),
        )
        linear = method.projection.linear
        answers = [reference.ml_decoder_layers(q, v, ml_layers(method), 8) for v in u]
        expected = np.stack(answers) @ np.asarray(linear.kernel[...])[:, 0]
        got = method.logits(found, method.encode_labels(labels), labels)
        exact.same(got, expected + np.asarray(linear.bias[...]))


def test_query2label_is_the_reference_on_clips_patches(clip, images):
    method = exact.make(Q2L, clip)
    labels, found = exact.inputs(method, multiple_of=8), method.encode_images(images)
    encoder = {
        "self_attn": method.encoder.attention, "linear1": method.encoder.up,
        "linear2": method.encoder.down, "norm1": method.encoder.norms[0],
        "norm2": method.encoder.norms[1],
    }  # fmt: skip
    layers = [
        values(layer, {
            "multihead_attn": layer.attention, "linear1": layer.up, "linear2": layer.down,
            "norm2": layer.norms[0], "norm3": layer.norms[1],
        })
        for layer in method.decoder.layers
    ]  # fmt: skip
    last = {k.removeprefix("n."): v for k, v in values(None, {"n": method.decoder.norm}).items()}
    expected = [
        reference.query2label(
            tokens, reference.sine_positions(4, 4, 64), np.asarray(method.queries[...]),
            [values(None, encoder)], layers, last,
            np.asarray(method.projection.kernel[...])[..., 0],
            np.asarray(method.projection.bias[...]), 1,
        )
        for tokens in np.asarray(found.tokens)
    ]  # fmt: skip
    got = method.logits(found, method.encode_labels(labels), labels)
    exact.same(got[:, :5], np.stack(expected))
    assert method.patch_scores(found, method.encode_labels(labels), labels).shape == (3, 8, 16)


@pytest.mark.parametrize("spec", [ML, ML | {"queries": "labels"}, Q2L])
def test_what_trains_and_padding(clip, images, spec):
    method = exact.make(spec | {"dropout": 0.0}, clip)
    batch = exact.batch(images, 3)
    plain = exact.Runner(method, exact.inputs(method))(batch)
    trained = {
        "ml_decoder": {"embed", "decoder", "projection"},
        "query2label": {"encoder", "decoder", "projection", "queries"},
    }[spec["name"]]
    trained = trained | ({"embed_labels"} if spec.get("queries") == "labels" else set())
    assert {path.split("/")[0] for path in plain.gradients} == trained
    exact.padding_changes_nothing(plain, method, batch)


@pytest.mark.parametrize("spec", [ML, Q2L])
def test_dropout_is_the_steps(clip, images, spec):
    method = exact.make(spec, clip)
    labels, found = exact.inputs(method), method.encode_images(images)

    def run(progress: Progress | None) -> np.ndarray:
        return np.asarray(
            method.logits(found, method.encode_labels(labels), labels, progress=progress)
        )

    one = run(Progress(0, 0, jax.random.key(0)))
    np.testing.assert_array_equal(one, run(Progress(0, 0, jax.random.key(0))))
    np.testing.assert_array_equal(run(None), run(Progress(0, 0)))
    assert np.abs(one - run(None)).max() > 1e-3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ML | {"groups": 0}, "method.groups is 0"),
        (ML | {"queries": "labels", "groups": 3}, "method.groups has no effect"),
        (ML | {"logit_scale": 1.0}, "ml_decoder has no cosine"),
        (Q2L | {"logit_scale": 1.0}, "query2label has no cosine"),
        (Q2L | {"heads": 5}, "method.heads is 5 and does not divide the width 64"),
    ],
)
def test_wrong_settings_are_named(clip, spec, message):
    with pytest.raises(UserError) as caught:
        exact.make(spec, clip)
    assert message in str(caught.value)


@pytest.mark.parametrize("spec", [ML, Q2L])
def test_other_classes_are_refused(clip, spec):
    method = exact.make(spec, clip)
    assert jnp.isfinite(method.encode_labels(exact.inputs(method))).all()
    with pytest.raises(UserError, match="were made for 5 classes"):
        method.label_inputs(LabelSpace(("boat",), name="other"), exact.Words())
