"""ML-Decoder on any published benchmark or on one's own images.

    python -m mlclip_jax.train --config=configs/ml_decoder/benchmark.py:data=coco,data_dir=DIR \
        --workdir=runs/ml-decoder-coco
    python -m mlclip_jax.train --workdir=runs/ml-decoder-nus \
        --config=configs/ml_decoder/benchmark.py:data=nus_zsl_mldecoder,data_dir=DIR

Arguments: data=coco|nus_zsl_mldecoder|...|custom (docs/data.md), data_dir= (folder of images and
annotations), backbone=ViT-L/14 (or another CLIP), whole (train the image tower too), groups=0
(fixed queries; 0: one for each class up to 100), seed=0.

The release's recipe: Adam with coupled decay 1e-4, one cycle up to 3e-4 (1e-4 with the tower), 40
epochs in batches of 56, average of the weights at 0.9997, squashed images with Cutout and
RandAugment. Where evaluation has labels that training has not (nus_zsl_..., imagenet_to_...) the
queries are the labels'. Its figures are of TResNet, which is not here.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "_benchmark.py"))


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = _SHARED["parse"](arg, backbone="ViT-L/14", whole=False, groups=0)
    method = {"name": "ml_decoder", "train_image_encoder": arg.whole}
    if "zsl" in arg.data or "_to_" in arg.data:
        method["queries"] = "labels"
    if arg.groups:
        method["groups"] = arg.groups
    config = _SHARED["benchmark"](arg, method)
    _SHARED["ml_decoder"](config, 1e-4 if arg.whole else 3e-4)
    return config
