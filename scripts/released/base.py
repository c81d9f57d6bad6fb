"""What a release is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlclip_jax.clip.arrays import NamedArrays
from mlclip_jax.clip.layouts import LAYOUTS, Row
from mlclip_jax.clip.tokenizer import Tokenizer
from mlclip_jax.errors import UserError
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.base import Method
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
        contexts: names of learned contexts `[k w]` or `[c k w]`, and our method's modules for them.
        starts: names of the embedded start of text `[c 1 w]`, which must be the backbone's.
        mend: what to do where frozen arrays are not the backbone's.
    """

    method: str
    settings: Mapping[str, Any]
    learned: tuple[Row, ...]
    frozen: tuple[Row, ...]
    unused: tuple[str, ...]
    prompts: Callable[[Any, LabelSpace, Tokenizer], dict[str, tuple[Sequence[str], np.ndarray]]]
    remark: str
    contexts: Mapping[str, str] = field(default_factory=dict)
    starts: tuple[str, ...] = ()
    mend: str = "set config.backbone to the CLIP it was trained from"

    def join(self, files: Sequence[NamedArrays]) -> NamedArrays:
        """The arrays of all files of a release.

        Raises:
            UserError: there are more than it has.
        """
        if len(files) > 1:
            raise UserError(f"{len(files)} files are given and {self.method}'s release is one")
        return files[0]

    def rows(
        self, method: Any, tokenizer: Tokenizer, paths: Collection[str]
    ) -> tuple[Sequence[Row], Sequence[Row]]:
        """`learned` and `frozen` of a method whose leaves are at these paths."""
        return self.learned, self.frozen

    def starts_as_built(self, names: Sequence[str], held: Collection[str]) -> bool:
        """Whether arrays that are learned may be left out all together, where others are held."""
        return False

    def wrong_settings(
        self, shapes: Mapping[str, tuple[int, ...]], method: Method
    ) -> dict[str, Any]:
        """The settings in which a method is not the release's of these arrays, as they should be.

        Raises:
            UserError: the file's contexts differ in what our method has one setting for.
        """
        config: Any = method.config
        wrong = {
            key: value for key, value in self.settings.items() if getattr(config, key) != value
        }
        held = {name: shapes[name] for name in self.contexts if len(shapes.get(name, ())) in (2, 3)}
        forms = {(shape[-2], len(shape) == 3) for shape in held.values()}
        if len(forms) > 1:
            sizes = ", ".join(f"{name} {list(shape)}" for name, shape in held.items())
            raise UserError(
                f"the file's contexts differ in length or form, and {self.method} has one setting "
                f"for all: {sizes}"
            )
        for name, shape in held.items():
            if (len(shape) == 3) != config.class_specific:
                wrong["class_specific"] = not config.class_specific
            if shape[-2] != getattr(method, self.contexts[name]).vectors.shape[-2]:
                wrong["n_ctx"] = shape[-2]
                if config.ctx_init:  # its words are counted, not n_ctx
                    wrong["ctx_init"] = ""
        return wrong


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
