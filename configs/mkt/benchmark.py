"""MKT on NUS-WIDE, Open Images, or any data with unseen labels: both stages in one run.

    python -m mlclip_jax.train --config=configs/mkt/benchmark.py:data=nus_zsl,data_dir=DIR \
        --workdir=runs/mkt-nus
    python -m mlclip_jax.train --config=configs/mkt/benchmark.py:data=openimages_zsl,data_dir=DIR \
        --workdir=runs/mkt-openimages
    python -m mlclip_jax.evaluate --workdir=runs/mkt-nus

Arguments: data=nus_zsl|openimages_zsl|...|custom (docs/data.md), data_dir= (folder of images and
annotations), row=mkt|distillation|prompt|neither (Table 2)|local|global (Table 4),
backbone=ViT-B/16 (or another ViT's preset), recipe=paper|released, variant=released|paper
(equations), student= (file or folder with a ViT-B/16 of ImageNet-1k, as timm or Hugging Face name
its arrays: the student then starts from it and trains as a whole), vectors= (file of word vectors,
such as GloVe's, in place of CLIP's text: Table 3, with row=neither), seed=0. Figure 5:
--config.method.distillation_weight=0.5, --config.method.top_k=10.

The recipe "paper": AdamW at 1e-3 with decay 0.005 for 20 epochs (4 on Open Images) in batches of
128, then the prompt at 3e-5 for 10 epochs (2) in batches of 16; where the text is silent, the
release's: layer-wise rates for the last two blocks, cosine after two epochs of warm-up, random
crops with RandAugment. "released" is what the code runs: decay 0.05, batches of 64, k 16 and
ImageNet's pixel statistics; then start and end of text with the prompt, 1e-3 for 4 epochs in
batches of 512. Both test on the inner 224 of 256 pixels, and start from CLIP; the paper says
ImageNet-1k for the student (student=).

ZSL scores the unseen labels by themselves, GZSL all; the figures of Tables 1 to 4 stand beside
their rows.
"""

from __future__ import annotations

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from mlclip_jax.clip import PRESETS, ViTConfig
from mlclip_jax.errors import UserError
from mlclip_jax.spec import unknown

_HERE = Path(__file__)
_SHARED = runpy.run_path(str(_HERE.parents[1] / "_benchmark.py"))
_COMMON = runpy.run_path(str(_HERE.with_name("_common.py")))

_FIGURES = {"nus": ("mAP", "F1@3", "F1@5"), "openimages": ("F1@10", "F1@20", "mAP", "WmAP")}
#: Tables 1 to 4: these figures of ZSL and of GZSL, by corpus and row.
PAPER = {
    ("nus", "mkt"): ((37.6, 34.1, 31.1), (18.3, 22.0, 25.4)),
    ("nus", "distillation"): ((37.3, 32.5, 29.5), (18.2, 21.7, 24.9)),
    ("nus", "prompt"): ((32.5, 29.5, 26.4), (16.8, 21.1, 24.1)),
    ("nus", "neither"): ((32.4, 29.4, 26.5), (16.8, 21.0, 24.0)),
    ("nus", "local"): ((29.1, 29.9, 27.2), (15.7, 20.8, 23.8)),
    ("nus", "glove"): ((27.1, 22.8, 21.4), (16.1, 20.6, 23.4)),
    ("nus", "global"): ((30.3, 23.3, 21.4), (15.5, 19.4, 22.1)),
    ("openimages", "mkt"): ((19.7, 11.4, 68.1, 89.2), (40.5, 35.4, 81.4, 89.8)),
}
_DECAY = 0.65  # of the rate from layer to layer, from the top down


def _groups(blocks: int, *, whole: bool = False) -> dict[str, float]:
    """Factors of the rate for a student's blocks, and in a whole tower for what is before them."""
    before = {"student/(patch|class|position)_embed": _DECAY ** (blocks + 1)} if whole else {}
    return before | {f"student/blocks/{i}/": _DECAY ** (blocks - i) for i in range(blocks)}


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = _SHARED["parse"](
        arg, data="nus_zsl", backbone="ViT-B/16", row="mkt", recipe="paper", variant="released",
        student="", vectors="",
    )  # fmt: skip
    sizes = getattr(PRESETS.get(arg.backbone), "image", None)
    if not isinstance(sizes, ViTConfig):
        raise UserError(f"backbone={arg.backbone}: mkt takes a ViT by its preset's name")
    if arg.recipe not in ("paper", "released"):
        raise unknown("recipe", arg.recipe, ("paper", "released"))
    released, large = arg.recipe == "released", arg.data.startswith("openimages")
    config = _SHARED["benchmark"](arg, _COMMON["method"](arg.row, arg.variant))
    config.data.update(resize="resize256", augment="randaugment")
    config.batch_size = 64 if released else 128
    config.duration = "4 epochs" if large else "20 epochs"
    config.optim = {
        "name": "adamw",
        "learning_rate": 1e-3,
        "min_learning_rate": 1e-6,
        "weight_decay": 0.05 if released else 0.005,
        "warmup": "2 epochs",
        "groups": _groups(sizes.layers, whole=True) if arg.student else _groups(2),
    }
    if arg.student:
        config.method.update(student=arg.student, train_blocks="all")
    rate = {"learning_rate": 3e-5, "min_learning_rate": 0.0}
    length = {"batch_size": 16, "duration": "2 epochs" if large else "10 epochs"}
    if released:
        config.backbone.image_norm = "imagenet"
        config.method.update(top_k=16, tune_ends=True)
        rate = {"learning_rate": 1e-3, "min_learning_rate": 1e-8}
        length = {"batch_size": 512, "duration": "4 epochs"}
    optim = {**rate, "warmup": "0 steps", "groups": {}}
    _COMMON["add_stages"](config, arg.row, {**length, "optim": optim})
    corpus = arg.data.partition("_")[0]
    if arg.vectors:
        config.method.word_vectors = arg.vectors
    published = PAPER.get((corpus, "glove" if arg.vectors else arg.row))
    meant = (arg.backbone, arg.recipe, arg.variant) == ("ViT-B/16", "paper", "released")
    if published is not None and meant and arg.data.endswith("zsl"):
        config.paper = {
            f"{task}/{name}": value
            for task, values in zip(("ZSL", "GZSL"), published, strict=True)
            for name, value in zip(_FIGURES[corpus], values, strict=True)
        }
    return config
