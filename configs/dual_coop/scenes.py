"""DualCoOp on Scenes with partial labels, with a CLIP that ships in the package.

    python -m mlclip_jax.train --config=configs/dual_coop/scenes.py --workdir=runs/dual-coop-scenes

Arguments: row=dual_coop|coop (one prompt for each label, on the same known labels),
unified (one context, or pair of them, for all labels), backbone=clip-mini|clip-mini-rn,
view=partial(0.1)|single_positive|full|..., seed=0.

Stands in for the DualCoOp rows of HSPNet's Tables 1 and 7 and of LMPT's Table 1 where no benchmark
is at hand. Results over five seeds are in benchmarks/results/prompt_learning.md.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "_scenes.py"))


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = _SHARED["parse"](
        arg, backbone="clip-mini-rn", view="partial(0.1)", row="dual_coop", unified=False
    )
    known = "ignore_unobserved=True" if "partial" in arg.view else ""
    settings = ", ".join(filter(None, ("gamma_negative=2.0, gamma_positive=1.0", known)))
    method = {
        "name": arg.row,
        "n_ctx": 16,
        "class_specific": not arg.unified,
        "loss": f"asymmetric({settings}, reduction='mean')",
    }
    if arg.row == "coop":
        method["logit_bias"] = True
    return _SHARED["scenes"](arg, method, rate=1e-3)
