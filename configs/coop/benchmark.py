"""CoOp on any published benchmark or on one's own images: one context, frozen towers.

    python -m mlclip_jax.train --config=configs/coop/benchmark.py:data=voc_lt,data_dir=DIR \
        --workdir=runs/coop-voc-lt
    python -m mlclip_jax.train --config=configs/coop/benchmark.py:data=custom,data_dir=photos \
        --workdir=runs/photos

Arguments: data=coco|voc_lt|...|custom (a benchmark of docs/data.md, or a folder of one's own),
data_dir= (folder of images and annotations), backbone=RN50 (or another CLIP), class_specific,
seed=0.

The context starts from "a photo of a". On COCO-LT and VOC-LT the run is LMPT's CoOp row (Table 1);
for recipes see configs/_benchmark.py. HSPNet's CoOp rows train the image tower too:
configs/hspnet, row=spl|splc_star|largeloss_star.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "_benchmark.py"))

#: LMPT, Table 1, by benchmark and backbone.
PAPER = {
    ("voc_lt", "RN50"): (81.34, 65.10, 81.54, 93.37),
    ("voc_lt", "ViT-B/16"): (86.02, 67.71, 88.79, 97.67),
    ("coco_lt", "RN50"): (54.94, 38.06, 56.67, 67.51),
    ("coco_lt", "ViT-B/16"): (60.68, 41.97, 63.18, 73.85),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = _SHARED["parse"](arg, class_specific=False)
    loss = _SHARED["loss_of"](arg.data)
    method = {
        "name": "coop",
        "ctx_init": "a photo of a",
        "class_specific": arg.class_specific,
        "logit_bias": loss == {"loss": "binary_cross_entropy"},
        **loss,
    }
    return _SHARED["benchmark"](arg, method, None if arg.class_specific else PAPER)
