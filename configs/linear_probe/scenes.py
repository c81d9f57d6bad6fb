"""A linear layer on frozen image features of Scenes, with a CLIP that ships in the package.

    python -m mlclip_jax.train --config=configs/linear_probe/scenes.py --workdir=runs/probe

Arguments: backbone=clip-mini|clip-mini-rn,
view=long_tail|full|..., seed=0.

Stands in for LMPT's Figure 4 where no benchmark is at hand.
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
    loss = "distribution_balanced" if "long_tail" in arg.view else "binary_cross_entropy"
    method = {"name": "linear_probe", "loss": loss}
    return _SHARED["scenes"](arg, method, rate=3e-3, num_train=3072)
