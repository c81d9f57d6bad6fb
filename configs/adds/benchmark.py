"""ADDS on COCO, NUS-WIDE, from ImageNet to either, or on one's own images: its three tasks.

    python -m mlclip_jax.train --config=configs/adds/benchmark.py:data=coco,data_dir=DIR \
        --workdir=runs/adds-coco
    python -m mlclip_jax.train --workdir=runs/adds-coco-1344 \
        --config=configs/adds/benchmark.py:data=coco,data_dir=DIR,image_size=1344
    python -m mlclip_jax.train --workdir=runs/adds-nus \
        --config=configs/adds/benchmark.py:data=nus_zsl_mldecoder,data_dir=DIR,backbone=ViT-B/32
    python -m mlclip_jax.train --workdir=runs/adds-imagenet-coco \
        --config="configs/adds/benchmark.py:data=imagenet_to_coco(drop_from='eval'),data_dir=DIR"

Arguments: data=coco|nus_zsl_mldecoder|imagenet_to_coco|imagenet_to_nus|imagenet21k_to_nus|...|
custom (docs/data.md), data_dir= (folder of images and annotations), backbone=ViT-L/14-336 (or
ViT-L/14, ViT-B/32, another CLIP), image_size= (none: the tower's own; 640 or 1344 is seen as a
pyramid of crops), levels= (of the pyramid, "2" or "0+1", Table 7; none: all),
decoder=dual_modal|ml_decoder|standard and layers=6 (Table 5), embedding=text|random (Table 6),
cache= (a folder: image features are computed once and kept there in int8, about 0.45 MB an image at
336 pixels, and nothing is augmented), seed=0.

The paper's recipe: Adam at 3e-4 (1e-4 above 336 pixels) with coupled decay 1e-4, batches of 56, 40
epochs; where it is silent, ML-Decoder's: one cycle, average of the weights at 0.9997, squashed
images with Cutout and RandAugment. On ImageNet-21k a step sees its positive labels and three times
as many others of the 15,000 (`selected_labels`); elsewhere all. Figures of Tables 1 to 8 stand
beside their rows. F1 in Tables 3, 4 and 8 is the same at 3 and 5, as where only scores above 0.5
count: the report has F1 with and without that.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from mlclip_jax.clip import PRESETS

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "_benchmark.py"))

_L, _L336, _B = "ViT-L/14", "ViT-L/14-336", "ViT-B/32"
#: Tables 1 to 8: mAP, F1@3 and F1@5, by benchmark, backbone and other arguments.
PAPER = {
    ("coco", _L, ""): (89.82,),
    ("coco", _L336, ""): (91.76,),
    ("coco", _L336, "image_size=640"): (93.41,),
    ("coco", _L336, "image_size=1344"): (93.54,),
    ("coco", _L336, "image_size=1344,levels=2"): (91.79,),
    ("coco", _L, "decoder=ml_decoder,layers=1"): (89.42,),
    ("coco", _L, "decoder=ml_decoder,layers=1,embedding=random"): (87.57,),
    ("nus_zsl_mldecoder", _B, ""): (36.56, 34.22, 36.65),
    ("nus_zsl_mldecoder", _L336, ""): (39.01, 36.96, 39.28),
    ("nus_zsl_mldecoder", _L336, "layers=3"): (38.68, 34.46, 37.50),
    ("nus_zsl_mldecoder", _L336, "layers=1"): (36.88, 32.95, 35.48),
    ("nus_zsl_mldecoder", _L336, "decoder=ml_decoder"): (36.34, 29.83, 33.56),
    ("nus_zsl_mldecoder", _L336, "decoder=ml_decoder,layers=3"): (36.35, 31.33, 34.89),
    ("nus_zsl_mldecoder", _L336, "decoder=ml_decoder,layers=1"): (36.15, 32.45, 35.50),
    ("imagenet_to_coco", _B, ""): (59.27, 45.88, 45.88),
    ("imagenet_to_coco", _L336, ""): (67.10, 50.86, 50.86),
    ("imagenet_to_coco(drop_from='eval')", _B, ""): (64.32, 30.90, 30.90),
    ("imagenet_to_coco(drop_from='eval')", _L336, ""): (69.60, 33.16, 33.16),
    ("imagenet_to_nus", _B, ""): (27.34, 20.39, 20.39),
    ("imagenet_to_nus", _L336, ""): (31.07, 24.69, 24.69),
    ("imagenet_to_nus(drop_from='eval')", _B, ""): (26.96, 16.07, 16.07),
    ("imagenet_to_nus(drop_from='eval')", _L336, ""): (30.66, 19.18, 19.18),
    ("imagenet_to_nus(drop_from='train')", _L336, ""): (31.02, 24.98, 24.98),
    ("imagenet21k_to_nus", _L336, ""): (37.92, 39.82, 40.39),
}
_DEFAULTS = {
    "image_size": 0, "levels": "", "decoder": "dual_modal", "layers": 6, "embedding": "text",
}  # fmt: skip


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = _SHARED["parse"](arg, backbone=_L336, cache="", **_DEFAULTS)
    arg.levels = str(arg.levels)
    method = {
        "name": "adds",
        "decoder": arg.decoder,
        "layers": arg.layers,
        "label_embedding": arg.embedding,
    }
    own = PRESETS[arg.backbone].image.image_size if arg.backbone in PRESETS else 0
    if arg.image_size:
        method["image_size"] = arg.image_size
    if arg.levels:
        method["levels"] = tuple(int(level) for level in arg.levels.split("+"))
    config = _SHARED["benchmark"](arg, method)
    _SHARED["ml_decoder"](config, 1e-4 if max(arg.image_size, own) > 336 else 3e-4)
    if arg.cache:
        config.data.augment = "none"
        config.cache = {"folder": arg.cache, "dtype": "int8"}
    if arg.data.startswith("imagenet21k"):
        config.method.selected_labels = 4 * config.batch_size
        config.backbone.class_chunk = 2000
    changed = (f"{k}={getattr(arg, k)}" for k, own in _DEFAULTS.items() if getattr(arg, k) != own)
    figures = PAPER.get((arg.data, arg.backbone, ",".join(changed)))
    if figures is not None:
        task = "ZSL/" if "zsl" in arg.data else ""
        named = zip(("mAP", "F1@3", "F1@5"), figures, strict=False)
        config.paper = {task + name: value for name, value in named}
    return config
