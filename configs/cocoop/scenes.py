"""CoCoOp on Scenes, with a CLIP that ships in the package.

    python -m mlclip_jax.train --config=configs/cocoop/scenes.py --workdir=runs/cocoop-scenes

Arguments: backbone=clip-mini|clip-mini-rn,
view=long_tail|full|..., seed=0.

Stands in for the CoCoOp rows of LMPT's Table 1 where no benchmark is at hand.
Results over five seeds are in benchmarks/results/prompt_learning.md.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "_scenes.py"))


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = _SHARED["parse"](arg, view="long_tail")
    method = {"name": "cocoop", "loss": "distribution_balanced"}
    config = _SHARED["scenes"](arg, method, rate=1e-3, num_train=3072)
    config.batch_size = 32
    return config
