"""DualCoOp on any published benchmark or on one's own images: a positive and a negative prompt.

    python -m mlclip_jax.train --workdir=runs/dual-coop \
        --config="configs/dual_coop/benchmark.py:data=coco_partial(0.5),data_dir=DIR"
    python -m mlclip_jax.train --config=configs/dual_coop/benchmark.py:data=voc_lt,data_dir=DIR \
        --workdir=runs/dual-coop-voc-lt

Arguments: data=coco_partial(0.5)|voc_lt|...|custom (a benchmark of docs/data.md, or a folder of
one's own), data_dir= (folder of images and annotations), backbone=RN101 (or another CLIP),
image_size=448, unified (one pair of contexts for all labels), seed=0.

The release's recipe for partial labels: 448 pixels, squashed, Cutout and RandAugment, batches of
32, 50 epochs of SGD at 2e-3 on 0.03 times the loss, which is the rate here times 0.03 (and the
weight decay divided by it); 1e-3 on VOC. Where only positives are known (coco_spml_...: HSPNet's
DualCoOp* of Table 1, which trains at 224) what is unobserved counts as negative. On COCO-LT and
VOC-LT it is LMPT's row (Table 1, RN50 alone), of which its text names no settings: the same recipe
at 224 pixels, contexts from "a photo of a".
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "_benchmark.py"))

#: HSPNet, Table 7, by corpus: 10 to 90 % of the labels.
_SHARES = {
    "coco": (78.9, 81.1, 81.9, 82.7, 82.9, 83.2, 83.4, 83.7, 83.9),
    "vg200": (45.6, 47.6, 48.5, 49.1, 49.4, 49.3, 49.9, 50.1, 50.3),
}
#: LMPT, Table 1; HSPNet, Tables 1 and 7; by benchmark and backbone.
PAPER = {
    ("voc_lt", "RN50"): (81.03, 66.45, 80.53, 92.33),
    ("coco_lt", "RN50"): (53.11, 40.48, 55.20, 62.11),
    ("coco_spml_largeloss", "RN50"): (72.9,),
    ("voc_spml_largeloss", "RN50"): (87.8,),
    ("nus_spml_largeloss", "RN50"): (50.6,),
    ("cub_spml_largeloss", "RN50"): (21.0,),
    ("coco_spml_splc", "RN50"): (73.5,),
    ("voc_spml_splc", "RN50"): (89.5,),
    ("nus_spml_splc", "RN50"): (55.9,),
    ("cub_spml_splc", "RN50"): (21.9,),
    **{
        (f"{corpus}_partial(0.{tenths})", "RN101"): (mean,)
        for corpus, means in _SHARES.items()
        for tenths, mean in enumerate(means, 1)
    },
}
_LOSS = "asymmetric(gamma_negative=2.0, gamma_positive=1.0, ignore_unobserved={})"
_LOSS_WEIGHT = 0.03


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = _SHARED["parse"](arg, data="coco_partial(0.5)", backbone="", image_size=0, unified=False)
    long_tail = arg.data in _SHARED["LONG_TAIL"]
    single = "_spml_" in arg.data
    arg.backbone = arg.backbone or ("RN50" if long_tail or single else "RN101")
    method = {
        "name": "dual_coop",
        "class_specific": not arg.unified,
        "loss": _LOSS.format(not single),
    }
    if long_tail:
        method["ctx_init"] = "a photo of a"
    config = _SHARED["benchmark"](arg, method, PAPER)
    config.backbone.image_size = arg.image_size or (224 if long_tail or single else 448)
    config.data.update(resize="squash", augment="cutout_randaugment")
    config.batch_size = 32
    rate = 1e-3 if arg.data.startswith("voc") else 2e-3
    _SHARED["dassl"](config, rate * _LOSS_WEIGHT, 50)
    config.optim.weight_decay = 5e-4 / _LOSS_WEIGHT
    config.optim.warmup_rate = 1e-5 * _LOSS_WEIGHT
    return config
