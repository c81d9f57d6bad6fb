"""Losses: pure functions of logits and ternary targets, found by name.

Every loss takes `logits` [b c] and int8 `targets` [b c] (+1 positive, 0 unobserved, -1
negative), a boolean mask `where` that broadcasts to [b c] (False: padded row or class, as if it
were absent), and its own settings by keyword; it returns a float32 scalar (float64 for float64
logits). Some ask for more, by the keywords in `INPUTS`: how far training is, how many training
images show each class, how many there are.

Losses on features (`l1_distillation`, `class_specific_embedding`) are called directly.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jax import Array

from mlclip_jax.errors import UserError
from mlclip_jax.losses.binary import asymmetric, asymmetric_softmax, binary_cross_entropy, focal
from mlclip_jax.losses.common import Progress, Reduction
from mlclip_jax.losses.embedding import (
    class_specific_embedding,
    class_specific_embedding_released,
    embedding_distances,
    l1_distillation,
    token_distances,
)
from mlclip_jax.losses.longtail import (
    class_balanced,
    class_balanced_weights,
    distribution_balanced,
    inverse_frequency,
    rebalanced,
    rebalanced_focal,
    rebalancing_weights,
    tolerant_logits,
)
from mlclip_jax.losses.noisy import (
    entropy_maximization,
    expected_positives,
    hill,
    label_smoothing,
    large_loss,
    partial_binary_cross_entropy,
    splc,
    weak_assume_negative,
)
from mlclip_jax.losses.ranking import ranking
from mlclip_jax.spec import bind_call

LOSSES: dict[str, Callable[..., Array]] = {
    "binary_cross_entropy": binary_cross_entropy,
    "assume_negative": binary_cross_entropy,
    "multi_label_soft_margin": binary_cross_entropy,
    "weak_assume_negative": weak_assume_negative,
    "label_smoothing": label_smoothing,
    "entropy_maximization": entropy_maximization,
    "expected_positives": expected_positives,
    "partial_binary_cross_entropy": partial_binary_cross_entropy,
    "focal": focal,
    "asymmetric": asymmetric,
    "asymmetric_softmax": asymmetric_softmax,
    "hill": hill,
    "splc": splc,
    "large_loss": large_loss,
    "inverse_frequency": inverse_frequency,
    "class_balanced": class_balanced,
    "rebalanced": rebalanced,
    "rebalanced_focal": rebalanced_focal,
    "distribution_balanced": distribution_balanced,
    "ranking": ranking,
}

#: What a loss may ask its caller for, beyond logits, targets and mask.
INPUTS: Mapping[str, str] = {
    "progress": "how far training is",
    "class_counts": "the number of training images with each label",
    "num_images": "the number of training images",
}


@dataclass(frozen=True)
class Loss:
    """A loss with its settings.

    Attributes:
        name: in `LOSSES`.
        function: the loss, its settings bound.
        needs: the `INPUTS` that it asks for.
    """

    name: str
    function: Callable[..., Array]
    needs: frozenset[str]

    def __call__(
        self, logits: Array, targets: Array, *, where: Array | None = None, **inputs: Any
    ) -> Array:
        """The loss; of `inputs` (keywords in `INPUTS`, None: not known) it gets what it needs.

        Raises:
            UserError: it needs an input that is missing.
        """
        for key in sorted(self.needs):
            if inputs.get(key) is None:
                raise UserError(f"loss {self.name!r} needs {key}, {INPUTS[key]}: none was given")
        wanted = {key: inputs[key] for key in self.needs}
        return self.function(logits, targets, where=where, **wanted)


def get(spec: str) -> Loss:
    """The loss that `spec` names: `"asymmetric"`, or `"asymmetric(gamma_negative=2)"`.

    Raises:
        UserError: unknown loss, setting or choice, or a setting that has to be given and is not.
    """
    function = bind_call(spec, LOSSES, what="loss", reserved=("where", *INPUTS))
    name, given = spec.partition("(")[0].strip(), function.keywords
    parameters = inspect.signature(function.func).parameters
    hints = typing.get_type_hints(function.func)
    for key, parameter in parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY or key in INPUTS:
            continue
        if parameter.default is parameter.empty and key not in given:
            raise UserError(f"loss {name!r} needs a setting: write {name}({key}=...)")
        choices = typing.get_args(hints[key])
        if typing.get_origin(hints[key]) is typing.Literal and (
            given.get(key, parameter.default) not in choices
        ):
            raise UserError(f"loss {name!r}: {key} is one of {', '.join(map(repr, choices))}")
    return Loss(name, function, frozenset(INPUTS) & parameters.keys())


__all__ = [
    "INPUTS",
    "LOSSES",
    "Loss",
    "Progress",
    "Reduction",
    "asymmetric",
    "asymmetric_softmax",
    "binary_cross_entropy",
    "class_balanced",
    "class_balanced_weights",
    "class_specific_embedding",
    "class_specific_embedding_released",
    "distribution_balanced",
    "embedding_distances",
    "entropy_maximization",
    "expected_positives",
    "focal",
    "get",
    "hill",
    "inverse_frequency",
    "l1_distillation",
    "label_smoothing",
    "large_loss",
    "partial_binary_cross_entropy",
    "ranking",
    "rebalanced",
    "rebalanced_focal",
    "rebalancing_weights",
    "splc",
    "token_distances",
    "tolerant_logits",
    "weak_assume_negative",
]
