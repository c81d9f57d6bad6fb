"""TaI-DPT on a benchmark with captions, or on one's own: no image is seen in training.

    python -m mlclip_jax.train --config=configs/tai_dpt/benchmark.py:data=coco,data_dir=DIR \
        --workdir=runs/tai-dpt
    python -m mlclip_jax.train --config=configs/tai_dpt/benchmark.py:data=voc_lt,data_dir=DIR \
        --workdir=runs/tai-dpt-voc-lt

Arguments: data=coco|voc_lt|coco_lt|...|custom (docs/data.md; its training part needs captions),
data_dir= (folder of images and annotations), backbone=RN50 (or another CLIP), only_global
(TaI: without local prompts), seed=0.

The release's recipe: batches of 512, 20 epochs of SGD at 1e-4 (1e-3 on NUS-WIDE), captions with a
noun of a label and sentences made of every label: eight templates here, where the release has the
eighty of ImageNet (--config.method.templates="(...)" takes others). On COCO-LT and VOC-LT it is
LMPT's TaI-DPT row (Table 1, RN50 alone), whose captions and settings the paper does not give:
batches of 64 and contexts from "a photo of a", as its other rows, and a rate of 2e-3, for with
1e-4 a few hundred steps of so few captions hardly move a prompt.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "_benchmark.py"))

#: LMPT, Table 1, by benchmark and backbone.
PAPER = {
    ("voc_lt", "RN50"): (83.75, 66.27, 85.17, 94.57),
    ("coco_lt", "RN50"): (56.23, 40.52, 58.40, 66.09),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = _SHARED["parse"](arg, only_global=False)
    long_tail = arg.data in _SHARED["LONG_TAIL"]
    method = {"name": "tai_dpt", "local": not arg.only_global, "templates": _SHARED["ENSEMBLE"]}
    if arg.data.startswith("nus"):
        method["image_sharpness"] = 4.0
    if long_tail:
        method["ctx_init"] = "a photo of a"
    config = _SHARED["benchmark"](arg, method, None if arg.only_global else PAPER)
    del config.data.augment  # no image is seen in training
    rate = 1e-3 if arg.data.startswith("nus") else 1e-4
    _SHARED["dassl"](config, 2e-3 if long_tail else rate, 20)
    config.batch_size = 64 if long_tail else 512
    return config
