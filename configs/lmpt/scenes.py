"""LMPT and its ablations on long-tailed Scenes, with a CLIP that ships in the package.

    python -m mlclip_jax.train --config=configs/lmpt/scenes.py --workdir=runs/lmpt-scenes
    python -m mlclip_jax.evaluate --workdir=runs/lmpt-scenes --protocol=long_tail

Arguments: row=lmpt|coop|embedding|margin (Table 3, from all components to none but prompts),
loss=db|bce|mls|focal|cb|r_bce_focal|asl (Table 2), unified (one context for all labels),
mean (the embedding loss is a mean over the classes, not their sum),
sampling=uniform|class_aware, variant=paper|released, view=long_tail,
backbone=clip-mini|clip-mini-rn, seed=0.

Stands in for LMPT's Tables 1-3 where no benchmark is at hand; results over five seeds are in
benchmarks/results/prompt_learning.md. Under a minute on two CPU cores.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "_scenes.py"))
_COMMON = runpy.run_path(str(Path(__file__).with_name("_common.py")))


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = _SHARED["parse"](
        arg,
        row="lmpt",
        loss="db",
        unified=False,
        mean=False,
        sampling="uniform",
        variant="paper",
        view="long_tail",
    )
    method = _COMMON["method"](arg.row, arg.loss, arg.variant, constants="")
    method["class_specific"] = not arg.unified
    if arg.mean:
        method["reduction"] = "mean"
    if arg.variant == "released":
        method["batch_norm"] = "frozen"  # as for all rows, so that features are computed once
    config = _SHARED["scenes"](arg, method, rate=1e-3, num_train=3072)
    config.sampling = arg.sampling
    return config
