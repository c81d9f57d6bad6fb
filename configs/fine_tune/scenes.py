"""The whole image tower fine-tuned on Scenes, with a CLIP that ships in the package.

    python -m mlclip_jax.train --config=configs/fine_tune/scenes.py --workdir=runs/fine-tune-scenes

Arguments: backbone=clip-mini|clip-mini-rn,
view=full|long_tail|partial(0.1)|..., seed=0.

Minutes on two CPU cores: images go through the tower in every step.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "_scenes.py"))


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = _SHARED["parse"](arg)
    config = _SHARED["scenes"](arg, {"name": "fine_tune"}, rate=1e-4)
    config.optim.groups = {"^(kernel|bias)$": 10.0}
    return config
