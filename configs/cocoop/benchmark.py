"""CoCoOp on any published benchmark or on one's own images: a context that shifts with the image.

    python -m mlclip_jax.train --config=configs/cocoop/benchmark.py:data=voc_lt,data_dir=DIR \
        --workdir=runs/cocoop-voc-lt

Arguments: data=coco|voc_lt|...|custom (a benchmark of docs/data.md, or a folder of one's own),
data_dir= (folder of images and annotations), backbone=RN50 (or another CLIP), seed=0.

On COCO-LT and VOC-LT the run is LMPT's CoCoOp row (Table 1); for recipes see configs/_benchmark.py.
The release takes images one by one; batches here are of 8, as every image has prompts of its own.
The text tower takes 640 of them at a time, whatever the number of labels and images (where there is
memory for more: --config.backbone.class_chunk=2560 --config.batch_size=32).
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from mlclip_jax.data.benchmarks import resolve

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "_benchmark.py"))

#: LMPT, Table 1, by benchmark and backbone.
PAPER = {
    ("voc_lt", "RN50"): (78.63, 64.33, 80.51, 87.94),
    ("voc_lt", "ViT-B/16"): (84.47, 64.58, 87.82, 96.88),
    ("coco_lt", "RN50"): (46.02, 36.02, 50.57, 48.82),
    ("coco_lt", "ViT-B/16"): (61.49, 39.81, 64.63, 76.42),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = _SHARED["parse"](arg)
    method = {"name": "cocoop", **_SHARED["loss_of"](arg.data)}
    config = _SHARED["benchmark"](arg, method, PAPER)
    config.batch_size = 8
    config.backbone.class_chunk = 640
    labels = 1000 if arg.data == "custom" else len(resolve(arg.data).space())
    config.eval = {**config.get("eval", {}), "batch_size": min(100, max(1, 8000 // labels))}
    return config
