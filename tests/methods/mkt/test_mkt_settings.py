"""MKT's settings, its labels and prompts."""

from __future__ import annotations

from dataclasses import replace

import exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mkt_cases import batch_of, labels_of, make

from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.modules.prompts import template_features, template_prompts, tuned_prompts

TEMPLATE = "There is a {} in the scene"


def test_prompts_are_those_of_the_template_with_places_for_its_words():
    names, encoder = exact.SPACE.names, exact.Words()
    for ends in (False, True):
        tuned = tuned_prompts(TEMPLATE, names, encoder, ends=ends)
        plain = template_prompts(TEMPLATE, names, encoder)
        words = [*encoder.encode("There is a "), *encoder.encode(" in the scene")]
        table = {-(j + 1): word for j, word in enumerate(words)}
        table |= {-(len(words) + 1): encoder.sot, -(len(words) + 2): encoder.eot}
        learned = np.concatenate([tuned.prefix, tuned.own.ravel()])
        assert (learned < 0).any() and (tuned.prefix[0] < 0) == ends
        for got, expected in ((tuned.prefix, plain.prefix), (tuned.own, plain.own)):
            filled = np.array([table.get(i, i) for i in got.ravel().tolist()]).reshape(got.shape)
            np.testing.assert_array_equal(filled, expected)
        np.testing.assert_array_equal(tuned.eot, plain.eot)


def test_a_variants_settings_can_be_replaced_one_by_one(clip, golden):
    """The loss of Eq. 4 and the released one, on the golden's scores."""
    scores = jnp.asarray(golden["in/rank_logits"])
    labels = labels_of(np.zeros((12, 64)))
    for fields, expected in (
        ({}, golden["out/rank_loss"]),
        ({"variant": "paper"}, golden["paper/rank_loss_eq4_sum"]),
        (
            {"loss": make(clip, golden, variant="paper").loss_name},
            golden["paper/rank_loss_eq4_sum"],
        ),
        ({"variant": "paper", "loss": make(clip, golden).loss_name}, golden["out/rank_loss"]),
    ):
        method = make(clip, golden, distillation_weight=0.0, **fields)
        value, _ = method.loss(scores, batch_of(None, golden), labels, exact.START)
        exact.same(value, expected)
        assert not method.needs_counts()
    counting = make(clip, golden, variant="paper", loss="distribution_balanced")
    assert counting.needs_counts()
    for wrong in ("", "rankin"):
        with pytest.raises(UserError, match="loss"):
            make(clip, golden, loss=wrong)


def test_images_without_a_positive_add_nothing(clip, golden, images):
    method = make(clip, golden)
    run = exact.Runner(method, labels_of(golden["out/label_emb_seen"]))
    batch = batch_of(images, golden)
    without = replace(batch, targets=batch.targets.at[1].set(-1))
    moved = {path: value + 0.01 for path, value in run.start.items()}
    run.start = moved
    got = run(without)
    kept = jnp.array([0, 2, 3])
    expected = run(jax.tree.map(lambda x: x[kept], batch))
    exact.same(got.loss, expected.loss)
    exact.same_gradients(got.gradients, expected.gradients)


def test_padded_classes_change_nothing(clip, golden, images):
    for tune in ("image", "prompt"):
        method = make(clip, golden, tune=tune)
        batch = exact.batch(images, 4)
        plain = exact.Runner(method, exact.inputs(method))(batch)
        exact.padding_changes_nothing(plain, method, batch)


def test_word_vectors_stand_for_labels(tmp_path, clip, golden, images):
    words = sorted({word for name in exact.SPACE.names for word in name.split()})
    vectors = np.random.default_rng(0).normal(size=(len(words), 5)).round(3)
    lines = [" ".join([w, *map(str, row)]) for w, row in zip(words, vectors, strict=True)]
    path = tmp_path / "glove.txt"
    path.write_text("\n".join(lines) + "\n")
    method = make(clip, golden, word_vectors=str(path), distillation_weight=0.0)
    labels = exact.inputs(method)
    at = [[words.index(word) for word in name.split()] for name in exact.SPACE.names]
    z = np.stack([vectors[rows].mean(0) for rows in at])
    np.testing.assert_allclose(labels.features, z, rtol=1e-6)
    assert method.student.projection.shape == (64, 5)
    run = exact.Runner(method, labels)
    got = run(exact.batch(images, 4))
    states = method.student.hidden_states(method.clip.image.lower(images, 1), 0)
    e = np.asarray(states) @ np.asarray(method.student.projection[...])
    raw = e[:, 0] @ z.T
    local = np.sort(np.einsum("bpd,cd->bcp", e[:, 1:], z), -1)[..., -int(golden["cfg/topk"]) :]
    streams = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (raw, local.mean(-1))]
    np.testing.assert_allclose(got.logits, sum(streams) / 2, atol=1e-6)
    assert np.asarray(got.gradients["student/projection"]).any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"word_vectors": "glove.txt"}, "method.word_vectors has no teacher and no prompt"),
        ({"train_blocks": 0}, "method.train_blocks is 0 and the image tower has 2 blocks"),
        ({"train_blocks": 3}, "between 1 and those, or 'all'"),
        ({"top_k": 17}, "method.top_k is 17 and images have 16 patches"),
        ({"distillation_weight": -1.0}, "the lambda of MKT, must be 0 or more, not -1"),
        ({"distillation_weight": float("nan")}, "must be 0 or more, not nan"),
        ({"streams": "global", "top_k": 4}, "method.top_k has no effect where streams='global'"),
        ({"streams": "global", "local_head": "mlp"}, "method.local_head has no effect where"),
        ({"logit_scale": 10.0}, "method.logit_scale has no effect on mkt"),
        ({"train_image_encoder": True}, "method.train_image_encoder has no effect on mkt"),
        ({"template": "a scene"}, 'needs exactly one "{}"'),
        ({"template": "{}"}, "method.template is '{}': it needs words beside the label"),
        ({"template": "a lot of {}s"}, "method.template is 'a lot of {}s': it needs a blank"),
        ({"template": "super{} scene"}, "it needs a blank between the label and each word"),
        ({"tune": "text"}, "method.tune"),
    ],
)
def test_wrong_settings_are_named(clip, golden, fields, message):
    with pytest.raises(UserError) as caught:
        make(clip, golden, **fields)
    assert message in str(caught.value)


def test_a_resnet_has_no_patches():
    with pytest.raises(UserError, match="needs a ViT"):
        exact.make({"name": "mkt"}, exact.load("clip_rn")[0])


OTHERS = LabelSpace(("a red boat", "sunset"), name="others")


@pytest.mark.parametrize("tune", ["image", "prompt"])
def test_any_labels_can_be_scored(clip, golden, images, tune):
    """As labels of training are: by the features of their own prompts, without training."""
    method = make(clip, golden, tune=tune)
    labels = exact.inputs(method, OTHERS)
    z = np.asarray(template_features(clip, OTHERS.names, exact.Words(), TEMPLATE))
    exact.same(method.encode_labels(labels), z)
    found = method.encode_images(images)
    raw = np.asarray(found.pooled) @ z.T
    products = np.sort(np.asarray(found.tokens) @ z.T, axis=1)
    local = products[:, -int(golden["cfg/topk"]) :].mean(1)
    streams = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (raw, local)]
    exact.same(method.logits(found, method.encode_labels(labels), labels), sum(streams) / 2)


ONE = LabelSpace(("sunset",), name="one")


@pytest.mark.parametrize("spec", [{"name": "mkt", "top_k": 4}, {"name": "clip_ft"}])
def test_a_single_label_has_nothing_to_compare_with(clip, spec):
    method = exact.make({**spec, "train_blocks": 1}, clip)
    assert method.compares_labels and method.score_kind == "relative"
    with pytest.raises(UserError, match="compares labels and there is one: give two or more"):
        exact.inputs(method, ONE)


def test_plain_sums_are_of_each_label_by_itself(clip, golden, images):
    for fields in ({"score": "sum"}, {"variant": "paper"}):
        method = make(clip, golden, **fields)
        assert not method.compares_labels and method.score_kind == "raw"
        assert type(method).compares_labels is False
        found = method.encode_images(images)
        one, all_five = exact.inputs(method, ONE), exact.inputs(method)
        assert method.logits(found, method.encode_labels(one), one).shape == (4, 1)
        z = method.encode_labels(all_five)
        whole = method.logits(found, z, all_five)
        exact.same(method.logits(found, z[1:3], labels_of(z[1:3])), np.asarray(whole[:, 1:3]))
    normalized = make(clip, golden, variant="paper", score="normalized")
    assert normalized.compares_labels and normalized.score_kind == "relative"


def test_the_global_stream_alone_is_clip_ft(clip, golden, images):
    """Loss, scores and gradients; and no more of the tower is run than it needs."""
    batch = exact.batch(images, 4)
    stream = make(clip, golden, streams="global", distillation_weight=0.0)
    tuned = exact.make({"name": "clip_ft", "train_blocks": 1}, clip)
    got, expected = (exact.Runner(m, exact.inputs(m))(batch) for m in (stream, tuned))
    exact.same(got.loss, expected.loss)
    exact.same(got.logits, expected.logits)
    ours = {path.removeprefix("student/"): value for path, value in got.gradients.items()}
    theirs = {
        path.removeprefix("clip/image/").replace("blocks/1/", "blocks/0/"): value
        for path, value in expected.gradients.items()
    }
    exact.same_gradients(ours, theirs)
    assert stream.encode_images(images, progress=exact.START).tokens is None
    assert stream.encode_images(images).tokens.shape == (4, 16, 64)  # maps read them
    paper = make(clip, golden, streams="global", variant="paper")
    assert not hasattr(paper, "local_head")
