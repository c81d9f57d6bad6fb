"""What the tests of losses share: goldens, comparison in float64, every loss with its inputs."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mlclip_jax import losses

GOLDEN = {
    name: np.load(Path(__file__).parents[1] / "golden" / f"{name}.npz")
    for name in ("losses", "lmpt", "mkt", "hspnet")
}

# Every loss of the library, and further settings that take another path.
SPECS = (
    *(name for name in losses.LOSSES if name != "expected_positives"),
    "expected_positives(expected=1.5)",
    "binary_cross_entropy(ignore_unobserved=True)",
    "focal(gamma=0.5, alpha=0.25, ignore_unobserved=True)",
    "asymmetric(gamma_positive=1, focal_gradient=True, reduction='mean')",
    "asymmetric(gamma_negative=0.5, focal_gradient=True)",
    "asymmetric_softmax(gamma_positive=0.5)",
    "label_smoothing(unobserved_only=True)",
    "partial_binary_cross_entropy(alpha=1, beta=0, gamma=-1)",
    "splc(change_epoch=9, gamma=0.5)",
    "large_loss(mode='correct', rate_per_epoch=0.1)",
    "large_loss(rate_per_epoch=0.1, reduction='sum_classes_mean_images')",
    "inverse_frequency(power=1, gamma=2)",
    "class_balanced(mode='by_class', beta=0.9999, gamma=0.5)",
    "class_balanced(mode='average_n')",
    "class_balanced(mode='min_n')",
    "distribution_balanced(variant='lmpt')",
    "distribution_balanced(variant='lmpt', gamma=0.5)",
    "distribution_balanced(variant='paper', reduction='sum')",
    "ranking(pairs='sum', ignore_unobserved=False)",
    "ranking(reduction='sum', skip_without_positives=True)",
)


def counts(classes):
    """Class counts of a long tail."""
    return np.maximum(400 * 0.9 ** np.arange(classes), 1).astype(np.float32)


def inputs(classes, epoch=3):
    """Everything a loss may ask for."""
    return {
        "progress": losses.Progress(step=jnp.asarray(0), epoch=jnp.asarray(epoch)),
        "class_counts": counts(classes),
        "num_images": 1000,
    }


def ternary(labels01, absent=-1):
    """0/1 labels as int8 targets."""
    return np.where(np.asarray(labels01) > 0, 1, absent).astype(np.int8)


def value_and_grad(function, x):
    """In float64."""
    with jax.enable_x64(True):
        x = jnp.asarray(x, jnp.float64)
        value, grad = jax.jit(jax.value_and_grad(function))(x)
        assert value.dtype == grad.dtype == jnp.float64
        return np.asarray(value), np.asarray(grad)


def close(got, expected, bar=1e-6):
    """max |a - b| / max |b| at most `bar`."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= bar * np.abs(expected).max()


def check(function, file, name, x):
    """Value and gradient of function(x) against a golden of this name."""
    value, grad = value_and_grad(function, x)
    close(value, GOLDEN[file][f"out/{name}"])
    close(grad, GOLDEN[file][f"grad/{name}"])
