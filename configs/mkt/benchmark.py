"""MKT on NUS-WIDE, Open Images, or any data with unseen labels: both stages in one run.

    python -m mlclip_jax.train --config=configs/mkt/benchmark.py:data=nus_zsl,data_dir=DIR \
        --workdir=runs/mkt-nus
    python -m mlclip_jax.train --config=configs/mkt/benchmark.py:data=openimages_zsl,data_dir=DIR \
        --workdir=runs/mkt-openimages
    python -m mlclip_jax.evaluate --workdir=runs/mkt-nus

Arguments: data=nus_zsl|openimages_zsl|...|custom (docs/data.md), data_dir= (folder of images and
annotations), row=mkt|distillation|prompt|neither (Table 2)|local|global (Table 4),
backbone=ViT-B/16 (or another ViT's preset), recipe=paper|released, variant=released|paper
(equations), blocks=2 (last blocks that train, each at a rate of its own, or all), student= (file or
folder with a ViT-B/16 of ImageNet-1k, as timm or Hugging Face name its arrays: the student then
starts from it and trains as a whole, unless blocks= says otherwise), vectors= (file of word
vectors, such as GloVe's, in place of CLIP's text: Table 3, with row=neither), seed=0. Figure 5:
--config.method.distillation_weight=0.5, --config.method.top_k=10.

The recipe "paper": AdamW at 1e-3 with decay 0.005 for 20 epochs (4 on Open Images) in batches of
128, then the prompt at 3e-5 for 10 epochs (2) in batches of 16; where the text is silent, the
release's: layer-wise rates for the last two blocks, cosine after two epochs of warm-up, random
crops with RandAugment. "released" is what the code runs: decay 0.05, batches of 64, k 16 and
ImageNet's pixel statistics; then start and end of text with the prompt, 1e-3 for 4 epochs in
batches of 512. Both test on the inner 224 of 256 pixels, and start from CLIP; the paper says
ImageNet-1k for the student (student=). Where only positives are known the other labels count as
negative.

ZSL scores the unseen labels by themselves, GZSL all; the figures of Tables 1 to 4 stand beside
their rows.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

from ml_collections import ConfigDict

from mlclip_jax.errors import UserError
from mlclip_jax.methods.mkt import VARIANTS
from mlclip_jax.spec import unknown

_HERE = Path(__file__)
_SHARED = runpy.run_path(str(_HERE.parents[1] / "_benchmark.py"))
_LAST = runpy.run_path(str(_HERE.parents[1] / "_last_blocks.py"))
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


def _blocks(arg: SimpleNamespace) -> tuple[int | str, dict[str, float]]:
    """How many of the last blocks train, and the factors of their rates.

    Raises:
      UserError: the backbone is no ViT, or has fewer blocks.
    """
    layers = _LAST["layers"](arg.backbone)
    if layers is None:
        raise UserError(f"backbone={arg.backbone}: mkt takes a ViT by its preset's name")
    chosen = arg.blocks or ("all" if arg.student else "2")
    if chosen == "all":
        return chosen, _LAST["groups"](0, layers, within="student/", before=True)
    if not chosen.isdecimal() or not 1 <= int(chosen) <= layers:
        raise UserError(
            f"blocks={chosen}: {arg.backbone} has {layers} blocks, give 1 to those or all"
        )
    # A student from CLIP has the blocks that train and no others.
    end = layers if arg.student else int(chosen)
    return int(chosen), _LAST["groups"](end - int(chosen), end, within="student/")


def get_config(arg: str | None = None) -> ConfigDict:
    """The settings of a run."""
    arg = _SHARED["parse"](
        arg, data="nus_zsl", backbone="ViT-B/16", row="mkt", recipe="paper", variant="released",
        blocks="", student="", vectors="",
    )  # fmt: skip
    blocks, groups = _blocks(arg)
    if arg.recipe not in ("paper", "released"):
        raise unknown("recipe", arg.recipe, ("paper", "released"))
    method = _COMMON["method"](arg.row, arg.variant, arg.vectors)
    config = _SHARED["benchmark"](arg, method | {"train_blocks": blocks})
    _LAST["recipe"](config)
    config.optim.groups = groups
    if arg.student:
        config.method.student = arg.student
    if "_spml_" in arg.data:
        loss = VARIANTS[arg.variant]["loss"].removesuffix(")")
        config.method.loss = f"{loss}, ignore_unobserved=False)"
    corpus, rate = arg.data.partition("_")[0], 3e-5
    length = {"batch_size": 16, "duration": "2 epochs" if corpus == "openimages" else "10 epochs"}
    if arg.recipe == "released":
        config.batch_size = 64
        config.optim.weight_decay = 0.05
        config.backbone.image_norm = "imagenet"
        config.method.tune_ends = True
        if arg.row != "global":
            config.method.top_k = 16
        rate, length = 1e-3, {"batch_size": 512, "duration": "4 epochs"}
    optim = {"learning_rate": rate, "min_learning_rate": 1e-8, "warmup": "0 steps", "groups": {}}
    _COMMON["add_stages"](config, arg.row, {**length, "optim": optim})
    published = PAPER.get((corpus, "glove" if arg.vectors else arg.row))
    meant = (arg.backbone, arg.recipe, arg.variant, arg.blocks)
    own = meant == ("ViT-B/16", "paper", "released", "") and arg.data.endswith("zsl")
    if published is not None and own:
        config.paper = {
            f"{task}/{name}": value
            for task, values in zip(("ZSL", "GZSL"), published, strict=True)
            for name, value in zip(_FIGURES[corpus], values, strict=True)
        }
    return config
