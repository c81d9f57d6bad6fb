"""CoOp's release: KaiyangZhou/CoOp, the prompt learner alone, as Dassl saves it.

LMPT's and DualCoOp's prompt learners are its descendants and go by the same names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlclip_jax.clip.layouts import SAME, Row
from mlclip_jax.clip.tokenizer import Tokenizer
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.base import Method
from mlclip_jax.modules.prompts import readable
from released.base import Release

#: Of our CoOp, and of LMPT as a CoOp.
SETTINGS = {
    "class_position": "end",
    "logit_scale": None,
    "logit_bias": False,
    "label_graph": False,
}


def learner_release(
    name: str,
    modules: Mapping[str, str],
    *,
    prefix: str,
    settings: Mapping[str, Any],
    remark: str,
    learned: tuple[Row, ...] = (),
    frozen: tuple[Row, ...] = (),
    unused: tuple[str, ...] = (),
) -> Release:
    """A release with CoOp's prompt learner.

    Args:
        name: module in `mlclip_jax.methods`.
        modules: our method's `Context`s, by what the names of their arrays end with.
        prefix: of the learner's names.
        settings: as in `Release`.
        remark: as in `Release`.
        learned: beside the contexts.
        frozen: as in `Release`.
        unused: as in `Release`.
    """

    def prompts(
        method: Method, space: LabelSpace, tokenizer: Tokenizer
    ) -> dict[str, tuple[Sequence[str], np.ndarray]]:
        """What follows each context: the name, a period, the end of text and padding."""
        table = np.asarray(method.clip.text.token_embedding[...])
        ids = tokenizer([f"{readable(label)}." for label in space.prompt_names])
        found = {}
        for end, module in modules.items():
            n_ctx = getattr(method, module).vectors.shape[-2]
            rows = table[ids[:, 1 : tokenizer.context_length - n_ctx]]
            found[f"{prefix}token_suffix{end}"] = (space.names, rows)
        return found

    contexts = {f"{prefix}ctx{end}": module for end, module in modules.items()}
    rows = (Row((theirs,), f"{ours}/vectors", SAME) for theirs, ours in contexts.items())
    return Release(
        method=name,
        settings=settings,
        learned=(*rows, *learned),
        frozen=frozen,
        unused=unused,
        prompts=prompts,
        remark=remark,
        contexts=contexts,
        starts=tuple(f"{prefix}token_prefix{end}" for end in modules),
    )


RELEASE = learner_release(
    "coop",
    {"": "context"},
    prefix="",
    settings=SETTINGS,
    remark="the towers are the backbone's: the file has the prompts only",
)
