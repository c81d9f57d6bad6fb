"""CLIP-FT on Scenes: the image tower fine-tuned on seen labels, with a CLIP that ships.

    python -m mlclip_jax.train --config=configs/clip_ft/scenes.py --workdir=runs/clip-ft-scenes

Arguments: backbone=clip-mini|clip-mini-rn,
view=seen|full|..., seed=0.

Stands in for the CLIP-FT rows of MKT's Table 1 where no benchmark is at hand: the unseen labels of
Scenes are no part of training.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "_scenes.py"))


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = _SHARED["parse"](arg, view="seen")
    return _SHARED["scenes"](arg, {"name": "clip_ft"}, rate=1e-4)
