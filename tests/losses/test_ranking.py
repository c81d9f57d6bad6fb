"""The ranking loss against MKT's release and the direct form over all pairs, and its memory."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from loss_cases import GOLDEN, close, value_and_grad

from mlclip_jax import losses
from mlclip_jax.training.mesh import make_mesh

MKT = GOLDEN["mkt"]


def direct(x, targets, *, margin, pairs, ignore_unobserved):
    """Mean over images from the [b c c] array of pairs."""
    positive = jnp.asarray(targets > 0)
    negative = jnp.asarray(targets < 0) if ignore_unobserved else ~positive
    pair = positive[:, :, None] & negative[:, None, :]
    term = jax.nn.relu(jnp.where(pair, margin + x[:, None, :] - x[:, :, None], 0))
    total = term.sum((1, 2))
    if pairs == "mean_violating":
        total = total / jnp.maximum((term > 0).sum((1, 2)), 1)
    return total.mean()


@pytest.mark.parametrize("pairs", ["mean_violating", "sum"])
@pytest.mark.parametrize("ignore_unobserved", [True, False])
def test_equals_direct_form(pairs, ignore_unobserved):
    settings = {"pairs": pairs, "ignore_unobserved": ignore_unobserved}
    with jax.enable_x64(True):
        got, expected = (
            jax.jit(jax.value_and_grad(lambda x, t, m, f=f: f(x, t, margin=m, **settings)))
            for f in (losses.ranking, direct)
        )
        for seed in range(40):
            rng = np.random.default_rng(seed)
            x = rng.normal(size=(4, 17)) * 2
            if seed % 2:  # many ties, and pairs that lie exactly at the margin
                x = np.round(x)
            targets = rng.choice(np.array([-1, 0, 1], np.int8), (4, 17), p=rng.dirichlet([1] * 3))
            targets[0] = -abs(targets[0])
            margin = float(rng.integers(0, 3))
            value, grad = got(x, targets, margin)
            expected_value, expected_grad = expected(x, targets, margin)
            close(value, expected_value, 1e-12)
            close(grad, expected_grad, 1e-12)


def test_one_class_has_no_pairs():
    value, grad = value_and_grad(lambda x: losses.ranking(x, np.ones((2, 1), np.int8)), [[1], [2]])
    assert value == 0 and not grad.any()


@pytest.mark.parametrize("suffix", ["", "_small", "_degenerate"])
def test_equals_release(suffix):
    labels = "in/labels_degenerate" if suffix == "_degenerate" else "in/labels_seen"
    targets = MKT[labels].astype(np.int8)
    value, grad = value_and_grad(
        lambda x: losses.ranking(x, targets), MKT[f"in/rank_logits{suffix}"]
    )
    close(value, MKT[f"out/rank_loss{suffix}"])
    close(grad, MKT[f"grad/rank_logits{suffix}"])


def test_sum_and_losses_of_stage_one():
    targets = MKT["in/labels_seen"].astype(np.int8)
    loss = losses.get("ranking(pairs='sum', reduction='sum')")
    value, _ = value_and_grad(lambda x: loss(x, targets), MKT["in/rank_logits"])
    close(value, MKT["paper/rank_loss_eq4_sum"])
    rank, _ = value_and_grad(lambda x: losses.ranking(x, targets), MKT["out/score_seen"])
    close(rank, MKT["out/stage1_rank"])
    close(rank, MKT["out/stage2_loss"])
    teacher = MKT["in/teacher_feat"].astype(np.float64)
    student = MKT["out/cls_feat"]
    mean, grad = value_and_grad(lambda s: losses.l1_distillation(s, teacher), student)
    close(mean, MKT["out/stage1_dist_mean_l1"])
    close(grad, np.sign(student - teacher) / student.size)
    close(rank + mean, MKT["out/stage1_loss"])
    total, _ = value_and_grad(lambda s: losses.l1_distillation(s, teacher, features="sum"), student)
    close(total, MKT["paper/dist_sum_l1_mean_over_batch"])


def test_rankings_of_tai_dpt():
    x = np.array([[1, 0.4, -0.2, 0.3], [0.1, 0.9, 0.8, -0.5]])
    targets = np.array([[1, 0, 0, 1], [0, 1, 0, 0]], np.int8)
    loss = losses.get("ranking(pairs='sum', ignore_unobserved=False)")
    np.testing.assert_allclose(value_and_grad(lambda x: loss(x, targets), x)[0], 1.55, atol=1e-9)
    for k, expected in enumerate((2.0, 1.1)):
        row = slice(k, k + 1)
        got, _ = value_and_grad(lambda x, row=row: loss(x, targets[row]), x[row])
        np.testing.assert_allclose(got, expected, atol=1e-9)


def test_images_without_positives_count_unless_skipped():
    x = jnp.asarray([[0.0, 0.5], [1.0, 2.0]])
    targets = jnp.asarray([[1, -1], [-1, -1]], jnp.int8)
    assert losses.ranking(x, targets) == 0.75
    assert losses.ranking(x, targets, skip_without_positives=True) == 1.5
    assert losses.ranking(x, targets * 0) == 0


@pytest.mark.parametrize("shift", [100, 10_000])
def test_float32_is_exact_far_from_zero(shift):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 500)).astype(np.float32) + np.float32(shift)
    targets = np.where(rng.random((4, 500)) < 0.02, 1, -1).astype(np.int8)
    expected, _ = value_and_grad(lambda x: losses.ranking(x, targets), x)
    close(losses.ranking(jnp.asarray(x), targets), expected, 1e-5)


def test_memory_is_linear_in_the_classes():
    b, c = 8, 7186
    x = jax.ShapeDtypeStruct((b, c), jnp.float32)
    targets = jax.ShapeDtypeStruct((b, c), jnp.int8)
    function = jax.jit(jax.value_and_grad(losses.ranking)).lower(x, targets).compile()
    assert function.memory_analysis().temp_size_in_bytes < 40 * 4 * b * c  # [b c c]: 7186
    rng = np.random.default_rng(0)
    targets = np.where(rng.random((b, c)) < 0.002, 1, -1).astype(np.int8)
    logits = rng.normal(size=(b, c)).astype(np.float32)
    value, grad = function(logits, targets)
    expected, expected_grad = 0, []
    for row, labels in zip(logits.astype(np.float64), targets, strict=True):
        term = np.maximum(1 + row[labels < 0][None] - row[labels > 0][:, None], 0)
        count = max((term > 0).sum(), 1)
        expected += term.sum() / count / b
        slope = np.zeros(c)
        slope[labels < 0] = (term > 0).sum(0) / count / b
        slope[labels > 0] = -(term > 0).sum(1) / count / b
        expected_grad.append(slope)
    close(value, expected, 1e-5)
    close(grad, np.stack(expected_grad), 1e-5)


def test_devices_share_the_images():
    mesh = make_mesh()
    placed = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((16, 24), jnp.float32, sharding=placed)
    targets = jax.ShapeDtypeStruct((16, 24), jnp.int8, sharding=placed)
    text = jax.jit(jax.value_and_grad(losses.ranking)).lower(x, targets).compile().as_text()
    found = set(re.findall(r"= \S+ (all-gather|all-to-all|all-reduce)\(", text))
    assert found == {"all-reduce"}  # of the sums alone
