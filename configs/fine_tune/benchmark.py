"""The whole image tower fine-tuned from zero-shot CLIP, on any benchmark or on one's own images.

    python -m mlclip_jax.train --config=configs/fine_tune/benchmark.py:data=coco,data_dir=DIR \
        --workdir=runs/fine-tune

Arguments: data=coco|voc_lt|...|custom (a benchmark of docs/data.md, or a folder of one's own),
data_dir= (folder of images and annotations), backbone=RN50 (or another CLIP), seed=0.

AdamW at 1e-5 for the tower and ten times that for the layer, decay 1e-4, cosine after a short
warm-up, moving average; BatchNorm's statistics stay CLIP's. No paper here has this row.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "_benchmark.py"))


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = _SHARED["parse"](arg)
    method = {"name": "fine_tune", "loss": _SHARED["loss_of"](arg.data)["loss"]}
    config = _SHARED["benchmark"](arg, method)
    config.duration = "20 epochs"
    config.optim = {
        "name": "adamw",
        "learning_rate": 1e-5,
        "weight_decay": 1e-4,
        "warmup": "1 epochs",
        "groups": {"^(kernel|bias)$": 10.0},
    }
    config.ema_decay = 0.9997
    return config
