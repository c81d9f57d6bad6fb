"""What MKT's configs share: the rows of its Tables 2 and 4, and its two stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mlclip_jax.errors import UserError
from mlclip_jax.spec import unknown

#: Rows of Tables 2 and 4: settings of the method, and whether the prompt is tuned afterwards.
ROWS: Mapping[str, tuple[Mapping[str, Any], bool]] = {
    "mkt": ({}, True),
    "distillation": ({}, False),
    "prompt": ({"distillation_weight": 0.0}, True),
    "neither": ({"distillation_weight": 0.0}, False),
    "local": ({"distillation_weight": 0.0, "streams": "local"}, False),
    "global": ({"distillation_weight": 0.0, "streams": "global"}, False),
}


def method(row: str, variant: str, vectors: str) -> dict[str, Any]:
    """`config.method` of a row, with the equations of a variant, and perhaps word vectors.

    Raises:
      UserError: there is no such row or variant, or the row takes no word vectors.
    """
    if row not in ROWS:
        raise unknown("row", row, ROWS)
    if variant not in ("released", "paper"):
        raise unknown("variant", variant, ("released", "paper"))
    if vectors and row != "neither":
        raise UserError(
            f"vectors= stands for CLIP's text, and row={row} is not of Table 3: add row=neither"
        )
    own = {"word_vectors": vectors} if vectors else {}
    return {"name": "mkt", "variant": variant, **ROWS[row][0], **own}


def add_stages(config: ConfigDict, row: str, prompt: Mapping[str, Any]) -> None:
    """The stage of the image tower, as the run says, and after it that of the prompt.

    Args:
      config: of the run; its own settings are those of the first stage.
      row: of `ROWS`.
      prompt: what the second stage has of its own; left out where the row has none.
    """
    stages = [{"name": "image", "method": {"tune": "image"}}]
    if ROWS[row][1]:
        stages.append({**prompt, "name": "prompt", "method": {"tune": "prompt"}})
    config.stages = tuple(stages)
