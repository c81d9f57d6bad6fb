"""CoOp on any published benchmark or on one's own images: one context, frozen towers.

    python -m mlclip_jax.train --config=configs/coop/benchmark.py:data=voc_lt,data_dir=DIR \
        --workdir=runs/coop-voc-lt
    python -m mlclip_jax.train --config=configs/coop/benchmark.py:data=custom,data_dir=photos \
        --workdir=runs/photos

Arguments: data=coco|voc_lt|...|custom (a benchmark of docs/data.md, or a folder of one's own),
data_dir= (folder of images and annotations), backbone=RN50 (or another CLIP), class_specific,
seed=0.

The context starts from "a photo of a". On COCO-LT and VOC-LT the run is LMPT's CoOp row: its
optimizer, preprocessing and distribution-balanced loss, which its text does not name for this row;
published figures (Table 1) stand beside those of RN50 and ViT-B/16. Its code normalises with
ImageNet's statistics: --config.backbone.image_norm=imagenet. Elsewhere the loss goes by what the
labels show: SPLC where they are incomplete, ranking where evaluation has labels that training has
not, cross-entropy over the classes where images have a single label, else binary cross-entropy.
HSPNet's CoOp rows train the image tower too: configs/hspnet, row=spl|splc_star|largeloss_star.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from mlclip_jax.data.benchmarks import resolve
from mlclip_jax.spec import parse_arg

#: LMPT, Table 1: mAP in per cent of all, head, medium and tail classes, by benchmark and backbone.
PAPER = {
    ("voc_lt", "RN50"): (81.34, 65.10, 81.54, 93.37),
    ("voc_lt", "ViT-B/16"): (86.02, 67.71, 88.79, 97.67),
    ("coco_lt", "RN50"): (54.94, 38.06, 56.67, 67.51),
    ("coco_lt", "ViT-B/16"): (60.68, 41.97, 63.18, 73.85),
}
FIGURES = ("mAP", "mAP/head", "mAP/medium", "mAP/tail")

#: LMPT's rate, and what of the loss is not as for COCO-LT.
_LONG_TAIL = {
    "voc_lt": (5e-4, "distribution_balanced(negative_scale=5.0, mu=0.3)"),
    "coco_lt": (1e-4, "distribution_balanced"),
}
#: Words in the names of benchmarks, and settings of the method for their labels.
_METHODS = {
    "_spml_": {"loss": "splc", "logit_scale": 10.0},
    "_splc_": {"loss": "splc", "logit_scale": 10.0},
    "_partial": {"loss": "splc", "logit_scale": 10.0},
    "zsl": {"loss": "ranking"},
    "imagenet": {"loss": "asymmetric_softmax(gamma_negative=0.0, smoothing=0.0)"},
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = parse_arg(arg, data="coco", data_dir="", backbone="RN50", class_specific=False, seed=0)
    config = ConfigDict()
    config.seed = arg.seed
    config.backbone = {"name": arg.backbone}
    method = {"loss": "binary_cross_entropy", "logit_bias": True}
    method = next((found for word, found in _METHODS.items() if word in arg.data), method)
    config.method = {
        "name": "coop",
        "ctx_init": "a photo of a",
        "class_specific": arg.class_specific,
        **method,
    }
    config.data = {"name": arg.data, "data_dir": arg.data_dir, "augment": "flip_rrc"}
    config.batch_size = 64
    config.duration = "30 epochs"
    config.optim = {"name": "adam", "learning_rate": 2e-3}
    if arg.data in _LONG_TAIL:
        rate, loss = _LONG_TAIL[arg.data]
        config.method = {**config.method, "loss": loss, "logit_bias": False}
        config.data.update(resize="squash", interpolation="bilinear", augment="flip")
        config.optim = {"name": "sgd", "learning_rate": rate, "weight_decay": 1e-4}
    if arg.data != "custom":
        config.eval = {"splits": tuple(resolve(arg.data).splits)}
    published = PAPER.get((arg.data, arg.backbone))
    if published is not None and not arg.class_specific:
        config.paper = dict(zip(FIGURES, published, strict=True))
    return config
