"""A linear layer on CLIP's frozen image features, on any benchmark or on one's own images.

    python -m mlclip_jax.train --config=configs/linear_probe/benchmark.py:data=voc_lt,data_dir=DIR \
        --workdir=runs/probe --config.cache.folder=cache

Arguments: data=coco|voc_lt|...|custom (a benchmark of docs/data.md, or a folder of one's own),
data_dir= (folder of images and annotations), backbone=RN50 (or another CLIP), seed=0.

AdamW at 1e-3 for 50 epochs, decay 1e-4. On COCO-LT and VOC-LT it is the FC layer of LMPT's Figure 4
(RN50), whose code takes AdamW at 1e-4 with decay 1e-4, distribution-balanced loss and a rate that
falls where the test mAP stands still; the figure's numbers are not in the text.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "_benchmark.py"))


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = _SHARED["parse"](arg)
    long_tail = arg.data in _SHARED["LONG_TAIL"]
    method = {"name": "linear_probe", "loss": _SHARED["loss_of"](arg.data)["loss"]}
    config = _SHARED["benchmark"](arg, method)
    config.optim = {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 1e-4}
    config.duration = "50 epochs"
    if long_tail:
        config.optim.update(learning_rate=1e-4, schedule="plateau", min_learning_rate=1e-7)
        config.duration = "30 epochs"
    return config
