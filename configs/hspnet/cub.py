"""HSPNet on the 312 attributes of CUB-200-2011: one positive label an image, in two setups.

    python -m mlclip_jax.train --config=configs/hspnet/cub.py:data_dir=DIR --workdir=runs/cub
    python -m mlclip_jax.train --config=configs/hspnet/cub.py:setup=largeloss,data_dir=DIR \
        --workdir=runs/cub-largeloss

Arguments: setup=splc|largeloss, few_shot=1.0 (share of the training images),
row=hspnet|hcp|no_group_graph|no_label_graph|spl|spl_gcn|splc_star|largeloss_star,
prompt=group|concat|add|shared, taxonomy=own|cluster|random|renamed|FILE.yaml,
variant=released|paper, seed=0, data_dir= (folder of images and annotations).

Published mAP: 24.3 (Table 1, SPLC setup), 23.4 (LargeLoss setup). As released, the SPLC
setup has no validation part: its figure is the best epoch on the test images, which this config's
"best" is too, and the last epoch stands beside it. "largeloss" chooses by validation mAP. The
published log (SPLC) has 24.34 for the averaged weights and 18.94 for the raw ones in epoch 11,
counted from 0; the raw ones collapse to 10.2 in epoch 15, the averaged ones in epoch 16, and it
ends in epoch 23. The release's rates are ten times those it has for COCO; variant=paper has 1e-4.

Needs CUB-200-2011 with its attributes (`mlclip prepare cub`, or the download itself), and for the
SPLC setup cub_train.txt beside them.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_COMMON = runpy.run_path(str(Path(__file__).with_name("_common.py")))

#: Table 1.
PAPER = {
    "splc": {"hspnet": 24.3, "splc_star": 21.4, "largeloss_star": 22.7},
    "largeloss": {"hspnet": 23.4, "splc_star": 20.1, "largeloss_star": 22.4},
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    return _COMMON["benchmark"](arg, "cub", PAPER, learning_rate=1e-3)
