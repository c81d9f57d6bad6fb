"""LMPT on COCO-LT: 1,909 training images of COCO 2017, tested on its 5,000 validation images.

    python -m mlclip_jax.train --config=configs/lmpt/coco_lt.py:data_dir=DIR \
        --workdir=runs/lmpt-coco-lt --config.cache.folder=cache
    python -m mlclip_jax.evaluate --workdir=runs/lmpt-coco-lt --checkpoint=best

Arguments: backbone=ViT-B/16|RN50 (or another CLIP), row=lmpt|margin|embedding|coop (Table 3),
loss=db|bce|mls|focal|cb|r_bce_focal|asl (Table 2), unified (one context for all labels),
position=end|middle|front (of the class name), variant=paper|released, seed=0, data_dir= (folder of
images and annotations). Class-aware re-sampling: --config.sampling=class_aware. Without the cache:
variant=released,backbone=RN50, whose BatchNorm moves.

Published: mAP 66.19 with ViT-B/16 and 58.97 with RN50 (Table 1); rows and losses stand beside their
own numbers, which are of ViT-B/16. mAP there is of a softmax over the classes, as `evaluate`
reports it for this benchmark. BCE and MLS are the same function, so the difference between their
published numbers is no effect of the loss.

Needs COCO 2017's images and instance annotations, captions_train2017.json, of which the five
captions of an image are read as one text, and coco_lt_train.txt beside them (docs/data.md).
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_COMMON = runpy.run_path(str(Path(__file__).with_name("_common.py")))

#: Total, head, medium and tail by backbone; rows of Tables 1 and 3, losses of Table 2.
PAPER = {
    "RN50": {"lmpt": (58.97, 41.87, 61.60, 69.60)},
    "ViT-B/16": {
        "lmpt": (66.19, 44.89, 69.80, 79.08),
        "margin": (65.81, 44.90, 69.71, 78.76),
        "embedding": (65.34, 44.27, 69.39, 77.96),
        "coop": (60.68, 41.97, 63.18, 73.85),
        "bce": (58.04, 41.79, 58.86, 73.90),
        "mls": (61.26, 41.71, 64.11, 74.58),
        "focal": (54.40, 37.60, 59.36, 62.33),
        "cb": (56.45, 34.61, 58.77, 74.52),
        "r_bce_focal": (60.13, 38.11, 64.87, 72.79),
        "asl": (64.89, 43.18, 68.22, 78.43),
    },
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    return _COMMON["benchmark"](arg, "coco_lt", PAPER)
