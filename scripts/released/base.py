"""What a release is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlclip_jax.clip.layouts import LAYOUTS, Row
from mlclip_jax.clip.tokenizer import Tokenizer
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.training.checkpoint import BACKBONE_PREFIX


@dataclass(frozen=True)
class Release:
    """How a release names its arrays; a further method is a module with one of these.

    Attributes:
        method: module in `mlclip_jax.methods`.
        settings: of our method that make it the release's function.
        learned: the arrays that are taken, by our path; all must be there.
        frozen: those that must equal the backbone's where the file holds them.
        unused: names that are known and not needed.
        prompts: (method, labels, tokenizer) -> the embedded prompts that the file may hold, by
            name: the label or group of each row, and the array.
        remark: what the user has to know of the result.
    """

    method: str
    settings: Mapping[str, Any]
    learned: tuple[Row, ...]
    frozen: tuple[Row, ...]
    unused: tuple[str, ...]
    prompts: Callable[[Any, LabelSpace, Tokenizer], dict[str, tuple[Sequence[str], np.ndarray]]]
    remark: str


def tower_rows(tower: str, prefix: str) -> tuple[Row, ...]:
    """OpenAI's names of our "image" or "text" tower behind another prefix."""
    return tuple(
        Row(
            tuple(prefix + name.removeprefix("visual.") for name in row.names),
            BACKBONE_PREFIX + row.path,
            row.transform,
        )
        for row in LAYOUTS["openai"]
        if row.path.startswith(f"{tower}/")
    )
