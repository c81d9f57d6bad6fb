"""CLIP-FT: the image tower fine-tuned on seen labels with a ranking loss (MKT, Table 1).

    python -m mlclip_jax.train --config=configs/clip_ft/benchmark.py:data=nus_zsl,data_dir=DIR \
        --workdir=runs/clip-ft-nus
    python -m mlclip_jax.train --workdir=runs/clip-ft-openimages \
        --config=configs/clip_ft/benchmark.py:data=openimages_zsl,data_dir=DIR

Arguments: data=nus_zsl|openimages_zsl|...|custom (docs/data.md), data_dir= (folder of images and
annotations), backbone=ViT-B/16 (or another ViT), whole (train the whole tower), seed=0.

The paper gives no settings for this row: they are those of MKT's first stage, AdamW at 1e-3 with
decay 0.005, its layer-wise rates for the last two blocks, cosine after two epochs of warm-up,
batches of 128, 20 epochs (4 on Open Images), random crops with RandAugment, tests on the inner 224
of 256 pixels. Its code normalises with ImageNet's statistics
(--config.backbone.image_norm=imagenet). Another CLIP than a ViT preset trains as a whole
(backbone=RN50,whole), at 1e-5. Where only positives are known the other labels count as negative.
ZSL scores the unseen labels by themselves, as MKT does.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from mlclip_jax.errors import UserError

_FOLDER = Path(__file__).parents[1]
_SHARED = runpy.run_path(str(_FOLDER / "_benchmark.py"))
_LAST = runpy.run_path(str(_FOLDER / "_last_blocks.py"))

#: MKT, Table 1, by corpus: figures of the protocol.
PAPER = {
    "nus": {
        "ZSL/mAP": 30.5,
        "ZSL/F1@3": 23.5,
        "ZSL/F1@5": 21.7,
        "GZSL/mAP": 16.8,
        "GZSL/F1@3": 20.3,
        "GZSL/F1@5": 23.2,
    },
    "openimages": {
        "ZSL/mAP": 66.2,
        "ZSL/WmAP": 88.2,
        "ZSL/F1@10": 19.1,
        "ZSL/F1@20": 11.1,
        "GZSL/mAP": 77.5,
        "GZSL/WmAP": 85.9,
        "GZSL/F1@10": 40.2,
        "GZSL/F1@20": 35.4,
    },
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = _SHARED["parse"](arg, data="nus_zsl", backbone="ViT-B/16", whole=False)
    method, layers = {"name": "clip_ft"}, _LAST["layers"](arg.backbone)
    if arg.whole:
        method["train_blocks"] = "all"
    elif layers is None:
        raise UserError(
            f"backbone={arg.backbone} has no last blocks that are known here: add whole, or take a "
            "ViT by its preset's name"
        )
    if "_spml_" in arg.data:
        method["loss"] = "ranking(skip_without_positives=True, ignore_unobserved=False)"
    config = _SHARED["benchmark"](arg, method)
    _LAST["recipe"](config)
    if arg.whole:
        config.optim.learning_rate = 1e-5
    else:
        config.optim.groups = _LAST["groups"](layers - 2, layers)
    corpus = arg.data.partition("_")[0]
    if corpus in PAPER and not arg.whole and arg.data.endswith("zsl"):
        config.paper = PAPER[corpus]
    return config
