"""Losses: pure functions of logits and ternary targets, found by name.

Every loss takes `logits` [b c] and int8 `targets` [b c] (+1 positive, 0 unobserved, -1
negative), a boolean mask `where` that broadcasts to [b c] (False: padded row or class), and its
own settings by keyword; it returns a float32 scalar.
"""

from __future__ import annotations

from collections.abc import Callable

from jax import Array

from mlclip_jax.losses.binary import asymmetric, binary_cross_entropy
from mlclip_jax.spec import bind_call

LOSSES: dict[str, Callable[..., Array]] = {
    "asymmetric": asymmetric,
    "binary_cross_entropy": binary_cross_entropy,
}


def get(spec: str) -> Callable[..., Array]:
    """The loss that `spec` names: `"asymmetric"`, or `"asymmetric(gamma_negative=2)"`.

    Raises:
        UserError: unknown loss or setting.
    """
    return bind_call(spec, LOSSES, what="loss", reserved=("where",))


__all__ = ["LOSSES", "asymmetric", "binary_cross_entropy", "get"]
