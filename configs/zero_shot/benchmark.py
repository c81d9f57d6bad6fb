"""Zero-shot CLIP on any published benchmark or on one's own images: one evaluation, no training.

    python -m mlclip_jax.train --config=configs/zero_shot/benchmark.py:data=voc_lt,data_dir=DIR \
        --workdir=runs/zero-shot-voc-lt
    python -m mlclip_jax.evaluate --workdir=runs/zero-shot-voc-lt

Arguments: data=coco|voc_lt|...|custom (a benchmark of docs/data.md, or a folder of one's own),
data_dir= (folder of images and annotations), backbone=RN50 (or another CLIP), ensemble (eight
templates, as in CoOp's comparison).

Published figures (LMPT, Table 1) stand beside those of COCO-LT and VOC-LT with RN50 and ViT-B/16;
they are of its code's prompt, 80 templates joined into one text and cut, so equality is not to be
expected.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from mlclip_jax.data.benchmarks import resolve
from mlclip_jax.spec import parse_arg

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "_benchmark.py"))

#: LMPT, Table 1: mAP in per cent of all, head, medium and tail classes, by benchmark and backbone.
PAPER = {
    ("voc_lt", "RN50"): (84.30, 63.60, 88.03, 97.03),
    ("voc_lt", "ViT-B/16"): (85.77, 66.52, 88.93, 97.83),
    ("coco_lt", "RN50"): (56.19, 35.73, 60.52, 68.45),
    ("coco_lt", "ViT-B/16"): (60.17, 38.52, 65.06, 72.28),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = parse_arg(arg, data="coco", data_dir="", backbone="RN50", ensemble=False)
    config = ConfigDict()
    config.backbone = {"name": arg.backbone}
    templates = _SHARED["ENSEMBLE"]
    config.method = {"name": "zero_shot", "templates": templates if arg.ensemble else templates[:1]}
    config.data = {"name": arg.data, "data_dir": arg.data_dir}
    config.duration = "0 steps"
    if arg.data != "custom":
        config.eval = {"splits": tuple(resolve(arg.data).splits)}
    published = PAPER.get((arg.data, arg.backbone))
    if published is not None:
        config.paper = dict(zip(_SHARED["FIGURES"], published, strict=True))
    return config
