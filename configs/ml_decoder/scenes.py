"""ML-Decoder on Scenes, with a CLIP that ships in the package.

    python -m mlclip_jax.train --config=configs/ml_decoder/scenes.py --workdir=runs/ml-decoder

Arguments: queries=fixed|labels, groups=0 (fixed queries; 0: one for each class), view=full|
partial(0.1)|seen (with queries=labels)|..., backbone=clip-mini, seed=0.

Stands in for the ML-Decoder rows of ADDS's tables where no benchmark is at hand.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "_scenes.py"))


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = _SHARED["parse"](arg, queries="fixed", groups=0)
    method = {"name": "ml_decoder", "queries": arg.queries, "hidden": 256}
    if arg.groups:
        method["groups"] = arg.groups
    if arg.view == "seen":
        method["loss"] = "asymmetric(ignore_unobserved=True)"
    return _SHARED["scenes"](arg, method, rate=3e-3)
