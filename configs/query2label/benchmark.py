"""Query2Label on any published benchmark or on one's own images.

    python -m mlclip_jax.train --config=configs/query2label/benchmark.py:data=coco,data_dir=DIR \
        --workdir=runs/query2label-coco

Arguments: data=coco|...|custom (a benchmark of docs/data.md whose training has the labels of its
evaluation), data_dir= (folder of images and annotations), backbone=ViT-L/14 (or another CLIP),
frozen (train the Transformer alone), seed=0.

The release's recipe: AdamW with decay 1e-2 (here of matrices alone), one cycle up to 1e-4 over 80
epochs in batches of 64, average of the weights at 0.9997, Cutout and RandAugment. Its figures are
of TResNet-L at 448 pixels, which is not here.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "_benchmark.py"))


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = _SHARED["parse"](arg, backbone="ViT-L/14", frozen=False)
    method = {"name": "query2label", "train_image_encoder": not arg.frozen}
    config = _SHARED["benchmark"](arg, method)
    _SHARED["ml_decoder"](config, 1e-4)
    config.batch_size, config.duration = 64, "80 epochs"
    config.optim.update(name="adamw", weight_decay=1e-2)
    return config
