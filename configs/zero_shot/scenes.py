"""Zero-shot CLIP on Scenes: nothing trains, the run is one evaluation.

    python -m mlclip_jax.train --config=configs/zero_shot/scenes.py --workdir=runs/zero-shot

Arguments: backbone=clip-mini|clip-mini-rn, ensemble (eight templates, as in CoOp's comparison).

Test mAP over five seeds (benchmarks/results/scenes.md): clip-mini 61.1 %, clip-mini-rn 70.7 %.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from mlclip_jax.spec import parse_arg

_ENSEMBLE = runpy.run_path(str(Path(__file__).parents[1] / "_benchmark.py"))["ENSEMBLE"]


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = parse_arg(arg, backbone="clip-mini", ensemble=False)
    config = ConfigDict()
    config.backbone = {"name": arg.backbone}
    config.method = {
        "name": "zero_shot",
        "templates": _ENSEMBLE if arg.ensemble else _ENSEMBLE[:1],
    }
    config.data = {"name": "scenes"}
    config.duration = "0 steps"
    return config
