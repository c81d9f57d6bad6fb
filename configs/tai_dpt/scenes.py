"""TaI-DPT on Scenes: prompts from captions, no image in training, with a CLIP that ships.

    python -m mlclip_jax.train --config=configs/tai_dpt/scenes.py --workdir=runs/tai-dpt-scenes

Arguments: only_global (TaI: no local prompts), backbone=clip-mini|clip-mini-rn,
view=full|long_tail|..., seed=0.

Stands in for the TaI-DPT rows of LMPT's Table 1 where no benchmark is at hand.
Results over five seeds are in benchmarks/results/prompt_learning.md.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "_scenes.py"))


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = _SHARED["parse"](arg, backbone="clip-mini-rn", only_global=False)
    method = {"name": "tai_dpt", "local": not arg.only_global}
    return _SHARED["scenes"](arg, method, rate=1e-3)
