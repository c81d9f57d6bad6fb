"""MKT with a student from ImageNet: its features, what trains, and its file."""

from __future__ import annotations

import exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mkt_cases import batch_of, labels_of, make
from references.plain_vit import states, timm_state

from mlclip_jax.errors import UserError
from mlclip_jax.training.step import take_apart


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
