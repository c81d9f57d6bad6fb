"""Binary losses against their authors' code, in float64, and at the edges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlclip_jax import losses
from mlclip_jax.errors import UserError

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "losses.npz")


def ternary(labels01: np.ndarray) -> jax.Array:
    return jnp.asarray(np.where(labels01 > 0, 1, -1), jnp.int8)


def check(loss: Callable, name: str, logits: np.ndarray, labels: np.ndarray) -> None:
    with jax.enable_x64(True):
        x = jnp.asarray(logits, jnp.float64)
        value, grad = jax.value_and_grad(lambda x: loss(x, ternary(labels)))(x)
    np.testing.assert_allclose(value, GOLDEN[f"out/{name}"], rtol=1e-6)
    expected = GOLDEN[f"grad/{name}"]
    np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


ASL_GOLDENS = sorted(
    key.removeprefix("out/") for key in GOLDEN.files if key.startswith("out/ASL_gn")
)


@pytest.mark.parametrize("name", ASL_GOLDENS)
def test_asymmetric_equals_release(name: str) -> None:
    _, negative, positive, clip, weight = name.split("_")
    spec = (
        f"asymmetric(gamma_negative={negative[2:]}, gamma_positive={positive[2:]}, "
        f"clip={clip[4:]}, focal_gradient={weight == 'wgrad'})"
    )
    check(losses.get(spec), name, GOLDEN["in/logits"], GOLDEN["in/labels"])


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("ASL_extreme_gn4_gp0_clip0.05_wconst", "asymmetric"),
        (
            "ASL_extreme_gn4_gp1_clip0.05_wgrad",
            "asymmetric(gamma_positive=1, focal_gradient=True)",
        ),
    ],
)
def test_asymmetric_equals_release_at_extreme_logits(name: str, spec: str) -> None:
    check(losses.get(spec), name, GOLDEN["in/logits_extreme"], GOLDEN["in/labels_extreme"])


def test_binary_cross_entropy_equals_torch() -> None:
    loss = losses.get("binary_cross_entropy(reduction='sum')")
    check(loss, "BCE_sum", GOLDEN["in/logits"], GOLDEN["in/labels"])


SPECS = (
    "binary_cross_entropy",
    "binary_cross_entropy(ignore_unobserved=True)",
    "asymmetric",
    "asymmetric(gamma_positive=1, focal_gradient=True)",
    "asymmetric(gamma_negative=0.5, focal_gradient=True)",
)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_finite_at_every_logit(spec: str, dtype: str, sign: int) -> None:
    x = jnp.asarray([[-1e4, -100, -1, 0, 1, 100, 1e4]], dtype)
    targets = jnp.full(x.shape, sign, jnp.int8)
    value, grad = jax.value_and_grad(lambda x: losses.get(spec)(x, targets))(x)
    assert value.dtype == jnp.float32
    assert np.isfinite(value)
    assert np.isfinite(np.asarray(grad, np.float32)).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "sum_classes_mean_images"])
@pytest.mark.parametrize("spec", ["binary_cross_entropy", "asymmetric"])
def test_masked_rows_and_classes_are_as_if_absent(spec: str, reduction: str) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(5, 7)), jnp.float32)
    targets = jnp.asarray(rng.integers(-1, 2, (5, 7)), jnp.int8)
    loss = losses.get(f"{spec}(reduction={reduction!r})")
    where = jnp.asarray(np.arange(5) < 3)[:, None] & jnp.asarray(np.arange(7) < 6)[None]
    value, grad = jax.value_and_grad(lambda x: loss(x, targets, where=where))(x)
    np.testing.assert_allclose(value, loss(x[:3, :6], targets[:3, :6]), rtol=1e-6)
    assert (np.asarray(grad)[~np.asarray(where)] == 0).all()
    assert loss(x, targets, where=jnp.zeros((5, 7), bool)) == 0


def test_unobserved_labels_are_negatives_unless_ignored() -> None:
    x = jnp.asarray([[1.0, -2.0, 0.5]])
    targets = jnp.asarray([[1, 0, -1]], jnp.int8)
    assumed = losses.binary_cross_entropy(x, targets)
    np.testing.assert_allclose(
        assumed, losses.binary_cross_entropy(x, jnp.asarray([[1, -1, -1]], jnp.int8))
    )
    ignored = losses.binary_cross_entropy(x, targets, ignore_unobserved=True)
    np.testing.assert_allclose(
        ignored, losses.binary_cross_entropy(x[:, ::2], targets[:, ::2]), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("asymetric", "unknown loss 'asymetric'; did you mean 'asymmetric'"),
        ("asymmetric(gamma=2)", "unknown argument of loss 'asymmetric': 'gamma'"),
        ("asymmetric(2)", "write arguments as key=value"),
        ("asymmetric(where=1)", "unknown argument of loss 'asymmetric': 'where'"),
        ("asymmetric(clip=open('x'))", "should read"),
    ],
)
def test_wrong_specs_are_named(spec: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        losses.get(spec)
    assert message in str(caught.value)
