"""The training step: one device equals eight, statistics, averages, flips, the finite flag."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import nnx

from mlclip_jax.errors import UserError
from mlclip_jax.training.config import OptimConfig
from mlclip_jax.training.mesh import (
    check_batch_size,
    device_batches,
    make_mesh,
    replicate,
    shard_batch,
    shard_labels,
)
from mlclip_jax.training.optim import make_optimizer
from mlclip_jax.training.step import (
    all_leaves,
    find_moving,
    init_state,
    make_train_step,
    nest,
    take_apart,
)

SGD = OptimConfig(name="sgd", momentum=0.0, learning_rate=0.1, schedule="constant")


def run(devices=1, name="tower", *, steps=1, batch=None, optim=SGD, fields=None, **options):
    """Final state, frozen leaves and last metrics of a few steps on so many devices."""
    built, labels = toys.method(name, **(fields or {}))
    batch = batch or toys.batch()
    mesh = make_mesh(jax.devices()[:devices])
    parts = find_moving(take_apart(built), batch, labels)
    optimizer, schedule = make_optimizer(optim, parts.trainable, total_steps=10)
    decay = options.get("ema_decay")
    options = {"ema_decay": None, "steps_per_epoch": 1, **options}
    step = make_train_step(parts, optimizer, schedule, mesh=mesh, **options)
    state = replicate(init_state(parts, optimizer, seed=0, ema=decay is not None), mesh)
    frozen = replicate(parts.frozen, mesh)
    labels, batch = shard_labels(labels, mesh), shard_batch(batch, mesh)
    for _ in range(steps):
        state, metrics = step(state, frozen, batch, labels)
        jax.block_until_ready(metrics)
    return jax.device_get(state), jax.device_get(parts.frozen), jax.device_get(metrics)


def relative(a, b):
    return np.max(np.abs(a - b)) / (np.max(np.abs(b)) + 1e-12)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("tower", {}),
        ("tower", {"train_bn": True}),
        ("coop", {"n_ctx": 2}),
        ("coop", {"n_ctx": 2, "label_graph": True}),
        ("hspnet", {}),
        ("hspnet", {"variant": "paper", "prompt": "add"}),
    ],
    ids=["plain", "batch_norm", "coop", "coop_graph", "hspnet", "hspnet_paper"],
)
def test_eight_devices_equal_one(name, fields):
    # With plain SGD at rate 0.1 the updated parameters carry the gradients as they are.
    built, labels = toys.method(name, **fields)
    start = jax.device_get(take_apart(built).trainable)
    one, _, metrics_one = run(1, name, fields=fields)
    eight, _, metrics_eight = run(8, name, fields=fields)
    assert labels.mask.tolist() == [True] * 6 + [False] * 2
    np.testing.assert_allclose(metrics_eight["loss"], metrics_one["loss"], rtol=2e-6)
    np.testing.assert_allclose(metrics_eight["grad_norm"], metrics_one["grad_norm"], rtol=2e-5)
    assert metrics_one["grad_norm"] > 1e-3
    scale = max(np.max(np.abs(one["trainable"][p] - start[p])) for p in start)
    for path in start:
        gap = np.max(np.abs(one["trainable"][path] - eight["trainable"][path]))
        assert gap < 1e-4 * scale, path
    assert bool(one["batch_stats"]) == fields.get("train_bn", False)
    for path, value in one["batch_stats"].items():
        assert relative(eight["batch_stats"][path], value) < 1e-5, path


def test_only_what_trains_changes():
    built, _ = toys.method()
    start = jax.device_get(take_apart(built))
    state, _, _ = run(steps=2)
    assert set(state["trainable"]) == set(start.trainable)
    assert all(path.startswith(("clip/image/", "bias")) for path in state["trainable"])
    changed = {p for p, v in state["trainable"].items() if np.any(v != start.trainable[p])}
    assert changed == set(start.trainable)
    assert not set(start.frozen) & changed and "clip/text/projection" in start.frozen


def test_statistics_move_only_where_the_method_trains_them():
    for moves in (False, True):
        built, labels = toys.method(train_bn=moves)
        parts = find_moving(take_apart(built), toys.batch(), labels)
        statistics = {p for p in parts.paths if p.endswith(("/mean", "/var"))}
        assert set(parts.moving) == (statistics if moves else set())
        assert statistics <= set(parts.moving) | set(parts.frozen)
        assert len(statistics) == 2


def test_average_follows_weights_and_statistics():
    built, _ = toys.method(train_bn=True)
    start = jax.device_get(take_apart(built))
    state, frozen, _ = run(fields={"train_bn": True}, ema_decay=0.75)
    assert set(state["ema"]) == set(state["trainable"]) | set(state["batch_stats"])
    for path in ("clip/image/conv/kernel", "clip/image/bn/mean"):
        before = {**start.trainable, **start.frozen}[path]
        after = {**state["trainable"], **state["batch_stats"]}[path]
        np.testing.assert_allclose(state["ema"][path], 0.75 * before + 0.25 * after, rtol=1e-6)
    assert set(all_leaves(state, frozen, ema=True)) == set(start.paths)


def flipped(batch, **options):
    """Which images arrive mirrored in the last step, by their index."""
    images = batch.images

    class Seen(toys.Tower):
        """Reports which images arrived mirrored."""

        def encode_images(self, images, *, progress=None):
            self.seen = nnx.data(images)
            return super().encode_images(images, progress=progress)

        def loss(self, logits, batch, labels, progress, **features):
            loss, _ = super().loss(logits, batch, labels, progress)
            same = jnp.all(self.seen == images, (1, 2, 3))
            mirrored = jnp.all(self.seen == images[:, :, ::-1], (1, 2, 3))
            return loss, {"same": same, "mirrored": mirrored}

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(toys.METHODS, "seen", Seen)
        metrics = run(1, "seen", batch=batch, **options)[2]
    np.testing.assert_array_equal(metrics["same"], ~metrics["mirrored"])
    return dict(zip(batch.index.tolist(), metrics["mirrored"].tolist(), strict=True))


def test_flip_mirrors_about_half_of_the_images():
    batch = toys.batch(64)
    assert not any(flipped(batch).values())
    first = flipped(batch, augment_flip=True)
    assert 16 < sum(first.values()) < 48
    assert first == flipped(batch, augment_flip=True)
    assert first != flipped(batch, augment_flip=True, steps=2)


def test_an_image_is_flipped_alike_wherever_it_stands_in_the_batch():
    batch = toys.batch(64)
    turned = jax.tree.map(lambda x: x[::-1], batch)
    assert flipped(batch, augment_flip=True) == flipped(turned, augment_flip=True)


def test_progress_counts_from_the_start_of_the_stage():
    class Clock(toys.Tower):
        """Reports the progress that the loss sees."""

        def loss(self, logits, batch, labels, progress, **features):
            loss, _ = super().loss(logits, batch, labels, progress)
            return loss, {"at": progress.step, "epoch": progress.epoch}

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(toys.METHODS, "clock", Clock)
        metrics = run(1, "clock", steps=6, steps_per_epoch=2, first_step=0)[2]
        assert (metrics["at"], metrics["epoch"]) == (5, 2)
        metrics = run(1, "clock", steps=6, steps_per_epoch=2, first_step=3)[2]
        assert (metrics["at"], metrics["epoch"]) == (2, 1)


def test_finite_flag():
    assert run()[2]["finite"]
    # Finite loss and gradient, but an update that overflows.
    assert not run(optim=replace(SGD, learning_rate=1e38, momentum=0.9))[2]["finite"]
    assert not run(fields={"logit_scale": float("inf")})[2]["finite"]


@pytest.mark.parametrize("devices", [1, 8])
def test_finite_flag_sees_moving_statistics(devices, monkeypatch):
    # Neither the loss nor a gradient of training reads them.
    class Lost(toys.Tower):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.clip.image.bn.var[...] = jnp.full(8, jnp.inf)

    monkeypatch.setitem(toys.METHODS, "lost", Lost)
    metrics = run(devices, "lost", fields={"train_bn": True})[2]
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert not metrics["finite"]


def test_padding_of_batch_and_classes_does_not_count():
    batch = toys.batch(8)
    masked = replace(batch, mask=np.arange(8) < 4)
    noisy = replace(
        masked, targets=np.where(masked.mask[:, None], batch.targets, 1).astype(np.int8)
    )
    assert run(batch=masked)[2]["loss"] == (run(batch=noisy)[2]["loss"])


def test_nest_restores_the_paths_of_nnx():
    built, _ = toys.method()
    parts = take_apart(built)
    leaves = {**parts.trainable, **parts.frozen}
    again = nnx.merge(parts.graphdef, nest(leaves, parts.paths))
    kernel = again.clip.text.blocks[0].mlp.up.kernel[...]
    np.testing.assert_array_equal(kernel, leaves["clip/text/blocks/0/mlp/up/kernel"])


def test_other_variables_are_refused():
    built, _ = toys.method()
    built.extra = nnx.Variable(jnp.zeros(2))
    with pytest.raises(ValueError, match="extra is a Variable"):
        take_apart(built)


def test_batch_that_does_not_divide_is_refused():
    mesh = make_mesh()
    check_batch_size(16, mesh)
    with pytest.raises(UserError, match="20 does not divide over 8 devices: use 16 or 24"):
        check_batch_size(20, mesh)


def test_device_batches_keeps_order():
    mesh = make_mesh(jax.devices()[:2])
    host = [{"index": np.full(2, i, np.int32)} for i in range(5)]
    assert [int(batch["index"][0]) for batch in device_batches(host, mesh)] == list(range(5))
    assert list(device_batches([], mesh)) == []
