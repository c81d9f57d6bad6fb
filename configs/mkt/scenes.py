"""MKT on Scenes: six labels are held out of training, with a CLIP that ships in the package.

    python -m mlclip_jax.train --config=configs/mkt/scenes.py --workdir=runs/mkt-scenes
    python -m mlclip_jax.evaluate --workdir=runs/mkt-scenes --protocol=nus_zsl

Arguments: row=mkt|distillation|prompt|neither (Table 2)|local|global (Table 4),
vectors=FILE (word vectors for labels, Table 3, with row=neither), variant=released|paper,
view=seen|full|..., seed=0.

Stands in for MKT's Tables 1, 2 and 4 where no benchmark is at hand. The names of the unseen labels
are among those whose scores have unit length in training, which on the benchmarks they are not.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "_scenes.py"))
_COMMON = runpy.run_path(str(Path(__file__).with_name("_common.py")))


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = _SHARED["parse"](arg, view="seen", row="mkt", variant="released", vectors="")
    method = _COMMON["method"](arg.row, arg.variant, arg.vectors)
    config = _SHARED["scenes"](arg, method, rate=1e-4)
    prompt = {"duration": "128 steps", "optim": {"learning_rate": 1e-3}}
    _COMMON["add_stages"](config, arg.row, prompt)
    return config
