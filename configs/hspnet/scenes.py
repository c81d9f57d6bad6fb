"""HSPNet and its ablations on Scenes with single positive labels, with a CLIP that ships.

    python -m mlclip_jax.train --config=configs/hspnet/scenes.py --workdir=runs/hspnet-scenes

Arguments: row=hspnet|hcp|no_group_graph|no_label_graph|spl|spl_gcn, prompt=group|concat|add|shared,
taxonomy=own|cluster|random|renamed|FILE.yaml, view=single_positive|partial(0.3)|...,
variant=released|paper, backbone=clip-mini-rn|clip-mini, seed=0.

Test mAP over five seeds (benchmarks/results/hspnet_scenes.md): HSPNet 84.2 %, SPL + GCN 84.0, HCP
79.9, SPL 79.0, zero-shot 70.7. Under a minute on two CPU cores.

Stands in for HSPNet's Tables 1-8 where no benchmark is at hand. Learning-rate group, weight decay,
schedule and loss are the release's for COCO; rate, length and averaging are shorter, as the run is.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from mlclip_jax.spec import parse_arg

_COMMON = runpy.run_path(str(Path(__file__).with_name("_common.py")))


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = parse_arg(
        arg,
        row="hspnet",
        prompt="group",
        taxonomy="own",
        view="single_positive",
        variant="released",
        backbone="clip-mini-rn",
        seed=0,
    )
    method = _COMMON["method"](arg)
    config = ConfigDict()
    config.seed = arg.seed
    config.backbone = {"name": arg.backbone}
    config.method = method
    config.data = {
        "name": "scenes",
        "train_view": arg.view,
        "taxonomy": arg.taxonomy,
        "num_train": 2048,
    }
    config.batch_size = 64
    config.duration = "256 steps"  # whatever share of the images a few-shot view leaves
    config.optim = {
        "name": "adam",
        "learning_rate": 3e-4,
        "weight_decay": 1e-4,
        "schedule": "onecycle",
    }
    if arg.variant == "released" and _COMMON["has_gcn"](method):
        config.optim.groups = {"gcn": 5.0}
    config.ema_decay = 0.98
    config.eval = {"every": "64 steps"}
    config.checkpoint = {"every": "64 steps"}
    return config
