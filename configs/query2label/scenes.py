"""Query2Label on Scenes, with a CLIP that ships in the package.

    python -m mlclip_jax.train --config=configs/query2label/scenes.py --workdir=runs/query2label

Arguments: view=full|partial(0.1)|..., backbone=clip-mini, seed=0.

Stands in for the Query2Label row of ADDS's Table 1 where no benchmark is at hand.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "_scenes.py"))


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = _SHARED["parse"](arg)
    return _SHARED["scenes"](arg, {"name": "query2label"}, rate=3e-3)
