"""MKT: the golden in full, the paper's form in float64, tasks scored by themselves, settings."""

from __future__ import annotations

from dataclasses import replace

import exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references.plain_vit import states, timm_state

from mlclip_jax.clip import ImageFeatures, PromptTokens
from mlclip_jax.errors import UserError
from mlclip_jax.evaluation.evaluator import predict_fn
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.base import Batch, LabelInputs, image_features
from mlclip_jax.modules.prompts import template_prompts, tuned_prompts
from mlclip_jax.training.step import take_apart

TEMPLATE = "There is a {} in the scene"
SIX = "one two six {} in a day"  # three tokens on either side, as the golden has


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def golden():
    with np.load(exact.GOLDEN / "mkt.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def clip():
    with jax.enable_x64(True):
        return exact.load("clip_vit")[0]


@pytest.fixture(scope="module")
def images(golden):
    with jax.enable_x64(True):
        return jnp.asarray(golden["in/images"].transpose(0, 2, 3, 1), jnp.float64)


def make(clip, golden, **fields):
    """MKT with the golden's k, of the last block of two."""
    k = int(golden["cfg/topk"])
    return exact.make({"name": "mkt", "train_blocks": 1, "top_k": k, **fields}, clip)


def labels_of(features, mask=None):
    """Label inputs with these text features."""
    n = len(features)
    mask = jnp.ones(n, bool) if mask is None else jnp.asarray(mask)
    return LabelInputs((), jnp.arange(n), mask, features=jnp.asarray(features))


def batch_of(images, golden):
    targets = jnp.asarray(golden["in/labels_seen"], jnp.int8)
    return Batch(images, targets, jnp.arange(4), jnp.ones(4, bool))


def test_image_features_and_scores_equal_golden(clip, golden, images):
    method = make(clip, golden)
    found = jax.jit(lambda x: method.encode_images(x, progress=exact.START))(images)
    exact.same(found.pooled, golden["out/cls_feat"])
    exact.same(found.tokens, golden["out/patch_feat"].astype(np.float64))
    exact.same(found.teacher, golden["out/cls_feat"])  # at the start student and teacher agree
    assert method.encode_images(images).teacher is None
    everything = jnp.asarray(golden["out/label_emb_all"])
    streams = method.scores(found, everything)
    exact.same(streams["local"], golden["out/local_raw_all"])
    exact.same(streams["global"], golden["out/global_raw_all"])
    for part, rows in (("all", slice(None)), ("seen", slice(12)), ("unseen", slice(12, None))):
        z = everything[rows]
        exact.same(method.logits(found, z, labels_of(z)), golden[f"out/score_{part}"])
        # As a task of labels that are encoded together: the others are masked.
        mask = np.zeros(17, bool)
        mask[rows] = True
        task = method.logits(found, everything, labels_of(everything, mask))
        exact.same(task[:, rows], golden[f"out/score_{part}"])


def test_other_heads_equal_golden(clip, golden, images):
    seen = jnp.asarray(golden["out/label_emb_seen"])
    mlp = make(clip, golden, local_head="mlp")
    for layer, name in ((mlp.local_head.linear1, "fc1"), (mlp.local_head.linear2, "fc2")):
        layer.kernel[...] = jnp.asarray(golden[f"w/projection.{name}.weight"].T, jnp.float64)
        layer.bias[...] = jnp.asarray(golden[f"w/projection.{name}.bias"], jnp.float64)
    got = mlp.logits(mlp.encode_images(images), seen, labels_of(seen))
    exact.same(got, golden["variant/score_seen_mlp_local_head"])
    for fields, expected in (
        ({"score": "sum"}, 2 * golden["out/score_seen_nonorm"]),
        ({"streams": "global"}, golden["out/score_seen_global_only"]),
    ):
        method = make(clip, golden, **fields)
        got = method.logits(method.encode_images(images), seen, labels_of(seen))
        exact.same(got, expected)


def test_loss_of_the_image_stage_and_its_gradients_equal_golden(clip, golden, images):
    method = make(clip, golden)
    run = exact.Runner(method, labels_of(golden["out/label_emb_seen"]))
    batch = batch_of(images, golden)

    # The golden's teacher is a stand-in, which features in place of pixels can have.
    def loss(trainable):
        parts = take_apart(method)
        m = parts.merge({**parts.frozen, **trainable})
        found = m.encode_images(images, progress=exact.START)
        found = found._replace(teacher=jnp.asarray(golden["in/teacher_feat"], jnp.float64))
        logits = m.logits(found, run.labels.features, run.labels)
        return m.loss(logits, batch, run.labels, exact.START, image_features=found)

    (value, parts), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(run.start)
    exact.same(parts["ranking_loss"], golden["out/stage1_rank"])
    exact.same(parts["distillation_loss"], golden["out/stage1_dist_mean_l1"])
    exact.same(value, golden["out/stage1_loss"])
    for path, name, rows in (
        ("projection", "projection_dist[:8]", slice(8)),
        ("norm_post/scale", "ln_post.weight", slice(None)),
        ("norm_post/bias", "ln_post.bias", slice(None)),
        ("blocks/0/attention/qkv/bias", "transformer.resblocks.1.attn.in_proj_bias", slice(None)),
        ("blocks/0/norm2/scale", "transformer.resblocks.1.ln_2.weight", slice(None)),
        ("blocks/0/mlp/up/bias", "transformer.resblocks.1.mlp.c_fc.bias", slice(None)),
    ):
        expected = golden[f"grad1/{name}"].astype(np.float64)
        exact.same(gradients[f"student/{path}"][rows], expected, 1e-5)
    # The last block and what follows it train, and nothing below.
    assert all(path.startswith("student/") for path in gradients)
    assert not any("embed" in path or "blocks/1" in path for path in gradients)
    summed = make(clip, golden, distillation="sum")
    found = ImageFeatures(
        jnp.asarray(golden["out/cls_feat"]), teacher=jnp.asarray(golden["in/teacher_feat"])
    )
    _, parts = summed.loss(
        jnp.asarray(golden["out/score_seen"]), batch, run.labels, exact.START, image_features=found
    )
    exact.same(parts["distillation_loss"], golden["paper/dist_sum_l1_mean_over_batch"])


def test_the_whole_tower_trains_with_the_golden_gradients(clip, golden, images):
    method = make(clip, golden, train_blocks="all")
    batch, labels = batch_of(images, golden), labels_of(golden["out/label_emb_seen"])
    parts = take_apart(method)

    def loss(trainable):
        m = parts.merge({**parts.frozen, **trainable})
        found = m.encode_images(images, progress=exact.START)
        found = found._replace(teacher=jnp.asarray(golden["in/teacher_feat"], jnp.float64))
        logits = m.logits(found, labels.features, labels)
        return m.loss(logits, batch, labels, exact.START, image_features=found)[0]

    gradients = jax.jit(jax.grad(loss))(parts.trainable)
    for path, name in (
        ("blocks/0/norm1/scale", "transformer.resblocks.0.ln_1.weight"),
        ("class_embedding", "class_embedding"),
    ):
        expected = golden[f"grad1/{name}"].astype(np.float64)
        exact.same(gradients[f"student/{path}"], expected, 1e-5)


@pytest.fixture(scope="module")
def imagenet(clip, tmp_path_factory):
    """A ViT of ImageNet of the golden's sizes, and its file."""
    state = timm_state(clip.config.image)
    with jax.enable_x64(True):
        double = {name: jnp.asarray(array, jnp.float64) for name, array in state.items()}
    path = tmp_path_factory.mktemp("imagenet") / "vit.npz"
    np.savez(path, **state)
    return double, str(path)


def started(method):
    """The method with the values that its training starts from, in float64."""
    parts = take_apart(method)
    start = method.starting_leaves(())
    assert start.keys() == {
        path for path in parts.paths if path.startswith("student/") and "projection" not in path
    }
    return exact.double(parts.merge({**parts.trainable, **parts.frozen, **start}))


@pytest.mark.parametrize("fields", [{}, {"local_head": "mlp"}])
def test_student_from_imagenet(clip, golden, images, imagenet, fields):
    """Features of both streams are its own, to be distilled from CLIP's."""
    state, path = imagenet
    method = started(make(clip, golden, student=path, **fields))
    found = jax.jit(lambda x: method.encode_images(x, progress=exact.START))(images)
    hidden = states(state, images, clip.config.image)
    projection = np.asarray(method.student.projection[...])
    exact.same(found.pooled, hidden[:, 0] @ projection)
    expected = hidden[:, 1:] @ projection
    if fields:
        expected = method.local_head(hidden[:, 1:])
    exact.same(found.tokens, expected)
    exact.same(found.teacher, golden["out/cls_feat"])
    batch, labels = batch_of(images, golden), labels_of(golden["out/label_emb_seen"])
    logits = method.logits(found, labels.features, labels)
    _, parts = method.loss(logits, batch, labels, exact.START, image_features=found)
    distance = np.abs(golden["out/cls_feat"] - np.asarray(found.pooled)).mean()
    exact.same(parts["distillation_loss"], distance)


@pytest.mark.parametrize(("train_blocks", "first"), [(1, 1), (2, 0), ("all", 0)])
def test_what_trains_of_a_student_from_imagenet(
    clip, golden, images, imagenet, train_blocks, first
):
    method = started(make(clip, golden, student=imagenet[1], train_blocks=train_blocks))
    run = exact.Runner(method, labels_of(golden["out/label_emb_seen"]))
    got = run(batch_of(images, golden))
    heads = {path.split("/")[1] for path in got.gradients}
    expected = {"blocks", "norm_post", "projection"}
    if train_blocks == "all":
        expected |= {"patch_embed", "class_embedding", "position_embedding"}
    assert heads == expected
    numbers = {int(path.split("/")[2]) for path in got.gradients if "/blocks/" in path}
    assert numbers == set(range(first, 2))
    assert all(np.abs(gradient).max() > 0 for gradient in got.gradients.values())


def test_the_students_file_is_read_where_training_starts(clip, golden, tmp_path):
    method = make(clip, golden, student=str(tmp_path / "gone.npz"))
    with pytest.raises(UserError, match=r"there is no file .*gone\.npz of a ViT's weights"):
        method.starting_leaves(())
    assert method.starting_leaves({"student/class_embedding"}) == {}
    assert make(clip, golden).starting_leaves(()) == {}


def prompts_of(golden, *, ends):
    """The golden's token ids with the template's places in them."""
    tokens, lengths = golden["in/label_tokens"], golden["in/name_lens"]
    own = np.zeros((17, 8), np.int32)
    for row, ids, n in zip(own, tokens, lengths, strict=True):
        row[: n + 4] = [*ids[4 : 4 + n], -4, -5, -6, -8 if ends else 511]
    prefix = np.array([-7 if ends else 510, -1, -2, -3], np.int32)
    return PromptTokens(prefix, own, (lengths + 3).astype(np.int32))


def set_context(method, golden, table):
    """The template's words of the golden, from a table of embeddings."""
    words = golden["in/label_tokens"][0]
    method.context.vectors[...] = jnp.asarray(table[[*words[1:4], *words[5:8]]])
    if method.config.tune_ends:
        method.ends[...] = jnp.asarray(table[[510, 511]])


def test_label_features_equal_golden(clip, golden):
    table = np.asarray(clip.text.token_embedding[...])
    moved = table.copy()
    moved[golden["in/token_embedding_delta_rows"]] += golden["in/token_embedding_delta"]
    method = make(clip, golden, tune="prompt", tune_ends=True, template=SIX)
    labels = replace(labels_of(np.zeros((17, 64))), prompts=(prompts_of(golden, ends=True),))
    for values, name in ((table, "all"), (moved, "all_after_context_update")):
        set_context(method, golden, values)
        exact.same(method.encode_labels(labels), golden[f"out/label_emb_{name}"])
    plain = make(clip, golden, tune="prompt", template=SIX)
    set_context(plain, golden, table)
    labels = replace(labels, prompts=(prompts_of(golden, ends=False),))
    exact.same(plain.encode_labels(labels), golden["out/label_emb_all"])


def test_loss_of_the_prompt_stage_and_its_gradients_equal_golden(clip, golden, images):
    method = make(clip, golden, tune="prompt", tune_ends=True, template=SIX)
    set_context(method, golden, np.asarray(clip.text.token_embedding[...]))
    prompts = prompts_of(golden, ends=True)
    seen = PromptTokens(prompts.prefix, prompts.own[:12], prompts.eot[:12])
    labels = replace(labels_of(np.zeros((12, 64))), prompts=(seen,))
    got = exact.Runner(method, labels)(batch_of(images, golden))
    exact.same(got.loss, golden["out/stage2_loss"])
    assert got.gradients.keys() == {"context/vectors", "ends"} and not got.parts
    gradient = np.concatenate([got.gradients["context/vectors"], got.gradients["ends"]])
    words = golden["in/label_tokens"][0]
    rows = [*words[1:4], *words[5:8], 510, 511]
    order = np.argsort(rows)
    np.testing.assert_array_equal(
        np.array(rows)[order], golden["grad2/token_embedding_nonzero_rows"]
    )
    exact.same(gradient[order], golden["grad2/token_embedding_rows"].astype(np.float64), 1e-5)


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


def test_both_stages_start_from_the_same_label_features(clip, golden):
    first, second = (make(clip, golden, tune=tune) for tune in ("image", "prompt"))
    expected = first.encode_labels(exact.inputs(first))
    got = second.encode_labels(exact.inputs(second))
    exact.same(got, np.asarray(expected, np.float64))


def test_paper_variant_is_its_equations(clip, golden, images):
    method = make(clip, golden, variant="paper", distillation_weight=0.5)
    batch, labels = batch_of(images, golden), labels_of(golden["out/label_emb_seen"])
    found = image_features(method, images, progress=exact.START)
    z = np.asarray(labels.features)
    states = np.asarray(method.student.hidden_states(method.clip.image.lower(images, 1), 0))
    w, b = (
        [np.asarray(layer[...]) for layer in pair]
        for pair in (
            (method.local_head.linear1.kernel, method.local_head.linear2.kernel),
            (method.local_head.linear1.bias, method.local_head.linear2.bias),
        )
    )
    patches = np.tanh(states[:, 1:] @ w[0] + b[0]) @ w[1] + b[1]
    e_cls = states[:, 0] @ np.asarray(method.student.projection[...])
    k, expected = int(golden["cfg/topk"]), np.zeros((4, 12))
    for i in range(4):
        for c in range(12):
            expected[i, c] = z[c] @ e_cls[i] + np.sort(patches[i] @ z[c])[-k:].mean()
    logits = method.logits(found, labels.features, labels)
    exact.same(logits, expected)
    value, parts = method.loss(logits, batch, labels, exact.START, image_features=found)
    targets, pairs = golden["in/labels_seen"], 0.0
    for row, y in zip(expected, targets, strict=True):
        pairs += sum(
            max(1 + row[m] - row[p], 0)
            for p in np.flatnonzero(y > 0)
            for m in np.flatnonzero(y < 0)
        )
    exact.same(parts["ranking_loss"], np.float64(pairs))
    teacher = np.asarray(found.teacher)
    distance = np.abs(teacher - e_cls).sum(-1).mean()
    assert distance < 1e-5  # the student starts as its teacher, but for a float32 softmax
    exact.same(value, np.float64(pairs + 0.5 * distance))


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


def test_tasks_are_scored_by_themselves(clip, golden, images):
    method = make(clip, golden)
    graphdef, state = nnx.split(method)
    predictor, labels = predict_fn(graphdef), labels_of(golden["out/label_emb_all"])
    state = (nnx.to_pure_dict(state),)
    masks = {"unseen": jnp.arange(17) >= 12}
    found = predictor.task_logits(state, images, labels.features, labels, masks)
    exact.same(found[""], golden["out/score_all"])
    exact.same(found["unseen"][:, 12:], golden["out/score_unseen"])


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
        ({"distillation_weight": -1.0}, "the lambda of MKT, is not below 0"),
        ({"logit_scale": 10.0}, "method.logit_scale has no effect on mkt"),
        ({"train_image_encoder": True}, "method.train_image_encoder has no effect on mkt"),
        ({"template": "a scene"}, 'needs exactly one "{}"'),
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


def test_any_labels_can_be_scored(clip, golden, images):
    method = make(clip, golden, tune="prompt")
    others = LabelSpace(("a red boat", "sunset"), name="others")
    labels = method.label_inputs(others, exact.Words(), multiple_of=1)
    logits = method.logits(method.encode_images(images), method.encode_labels(labels), labels)
    assert logits.shape == (4, 2)
    np.testing.assert_allclose(jnp.abs(logits).max() <= 1, True)
