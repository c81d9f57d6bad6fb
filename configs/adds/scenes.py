"""ADDS on Scenes, in its three tasks, with a CLIP that ships in the package.

    python -m mlclip_jax.train --config=configs/adds/scenes.py --workdir=runs/adds-scenes
    python -m mlclip_jax.train --workdir=runs/adds-zsl \
        --config=configs/adds/scenes.py:task=zero_shot
    python -m mlclip_jax.evaluate --workdir=runs/adds-zsl --protocol=nus_zsl

Arguments: task=conventional|zero_shot (six labels are held out of training)|single (training images
have one object and one label), decoder=dual_modal|ml_decoder|standard, layers=6 (Table 5),
image_size=64 (or larger: objects stay as many pixels, in larger images, seen as a pyramid of crops
of 64), levels= (of the pyramid, "0" or "2", Table 7; none: all), embedding=text|random (Table 6),
backbone=clip-mini, view=, seed=0.

Stands in for ADDS's Tables 1 to 8 where no benchmark is at hand. Two heads, and hidden
widths of four times the joint one; Adam with coupled decay in one cycle, as in the paper's recipe.
In zero_shot the unseen labels are unobserved in training, and not negative. Results over five seeds
are in benchmarks/results/adds.md.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from mlclip_jax.spec import unknown

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "_scenes.py"))
_VIEWS = {"conventional": "full", "zero_shot": "seen", "single": "single_positive"}


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = _SHARED["parse"](
        arg, view="", task="conventional", decoder="dual_modal", layers=6, image_size=64,
        levels="", embedding="text",
    )  # fmt: skip
    if arg.task not in _VIEWS:
        raise unknown("task", arg.task, _VIEWS)
    arg.view = arg.view or _VIEWS[arg.task]
    method = {
        "name": "adds",
        "decoder": arg.decoder,
        "layers": arg.layers,
        "heads": 2,
        "hidden": 256,
        "label_embedding": arg.embedding,
    }
    if arg.task == "zero_shot":
        method["loss"] = "asymmetric(ignore_unobserved=True)"
    if arg.image_size != 64 or arg.levels:
        method["image_size"] = arg.image_size
    if str(arg.levels):
        method["levels"] = tuple(int(level) for level in str(arg.levels).split("+"))
    config = _SHARED["scenes"](arg, method, rate=3e-3)
    config.batch_size = 32
    config.duration = "512 steps"
    config.optim.update(schedule="onecycle", warmup="0 steps", weight_decay=1e-4)
    if arg.task == "single":
        config.data.train_objects = 1
    if arg.image_size != 64:
        config.data.object_scale = 64 / arg.image_size
    return config
