"""What the configs of the prompt methods and baselines share: a recipe for each kind of benchmark.

On COCO-LT and VOC-LT CoOp and CoCoOp have LMPT's recipe, so that they are compared alike (its text
names no settings for the other rows of its Table 1): SGD, cosine over 30 epochs,
distribution-balanced loss, squashed images that are mirrored; published figures stand beside RN50
and ViT-B/16. The linear probe and fine-tuning take the loss, DualCoOp and TaI-DPT keep their own
loss and optimizer. LMPT's code normalises with ImageNet's statistics:
--config.backbone.image_norm=imagenet. Elsewhere Adam for 30 epochs, and the loss goes by what the
labels show: SPLC where they are incomplete, ranking where evaluation has labels that training has
not, cross-entropy over the classes where images have a single label, else binary cross-entropy.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from mlclip_jax.data.benchmarks import resolve
from mlclip_jax.spec import parse_arg

FIGURES = ("mAP", "mAP/head", "mAP/medium", "mAP/tail")
#: LMPT's rate, and what of the loss is not as for COCO-LT.
LONG_TAIL = {
    "voc_lt": (5e-4, "negative_scale=5.0, mu=0.3"),
    "coco_lt": (1e-4, ""),
}
#: Templates whose label features are averaged: the plain one and the seven that CLIP's authors
#: chose for ImageNet.
ENSEMBLE = (
    "a photo of a {}.",
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
#: Words in the names of benchmarks, and the loss for their labels.
_LOSSES = {
    "_spml_": {"loss": "splc", "logit_scale": 10.0},
    "_splc_": {"loss": "splc", "logit_scale": 10.0},
    "_partial": {"loss": "splc", "logit_scale": 10.0},
    "zsl": {"loss": "ranking"},
    "imagenet": {"loss": "asymmetric_softmax(gamma_negative=0.0, smoothing=0.0)"},
}


def parse(arg: str | None, **own: Any) -> SimpleNamespace:
    """The arguments that all of these configs know, with those of one (and its defaults)."""
    defaults = {"data": "coco", "data_dir": "", "backbone": "RN50", "seed": 0}
    return parse_arg(arg, **(defaults | own))


def loss_of(data: str) -> dict[str, Any]:
    """Loss and temperature for the labels of a benchmark."""
    if data in LONG_TAIL:
        return {"loss": distribution_balanced(data)}
    known = (found for word, found in _LOSSES.items() if word in data)
    return next(known, {"loss": "binary_cross_entropy"})


def distribution_balanced(data: str, *more: str) -> str:
    """The distribution-balanced loss with its authors' constants for COCO-LT or VOC-LT."""
    settings = ", ".join(filter(None, (LONG_TAIL[data][1], *more)))
    return f"distribution_balanced({settings})" if settings else "distribution_balanced"


def benchmark(
    arg: SimpleNamespace,
    method: Mapping[str, Any],
    paper: Mapping[tuple[str, str], tuple[float, ...]] | None = None,
) -> ConfigDict:
    """The settings of a run.

    Args:
      arg: from `parse`.
      method: `config.method`.
      paper: published `FIGURES`, or the first of them, in per cent by benchmark and backbone.
    """
    config = ConfigDict()
    config.seed = arg.seed
    config.backbone = {"name": arg.backbone}
    config.method = dict(method)
    config.data = {"name": arg.data, "data_dir": arg.data_dir, "augment": "flip_rrc"}
    config.batch_size = 64
    config.duration = "30 epochs"
    config.optim = {"name": "adam", "learning_rate": 2e-3}
    if arg.data in LONG_TAIL:
        config.data.update(resize="squash", interpolation="bilinear", augment="flip")
        config.optim = {
            "name": "sgd",
            "learning_rate": LONG_TAIL[arg.data][0],
            "weight_decay": 1e-4,
            "schedule_unit": "epoch",
        }
    if arg.data != "custom":
        config.eval = {"splits": tuple(resolve(arg.data).splits)}
    published = (paper or {}).get((arg.data, arg.backbone))
    if published is not None:
        config.paper = dict(zip(FIGURES, published, strict=False))
    return config


def ml_decoder(config: ConfigDict, rate: float) -> None:
    """The recipe of ML-Decoder's code, and after it of ADDS: Adam in one cycle, with an average."""
    config.data.update(resize="squash", augment="cutout_randaugment")
    config.batch_size = 56
    config.duration = "40 epochs"
    config.optim = {
        "name": "adam",
        "learning_rate": rate,
        "weight_decay": 1e-4,
        "schedule": "onecycle",
    }
    config.ema_decay = 0.9997


def dassl(config: ConfigDict, rate: float, epochs: int) -> None:
    """The optimizer of CoOp's code and of those built on it: SGD, cosine from epoch to epoch.

    The first epoch runs at 1e-5; the rate does not quite reach 0.
    """
    config.duration = f"{epochs} epochs"
    config.optim = {
        "name": "sgd",
        "learning_rate": rate,
        "weight_decay": 5e-4,
        "schedule_unit": "epoch",
        "schedule_duration": f"{epochs + 1} epochs",
        "warmup": "1 epochs",
        "warmup_rate": 1e-5,
    }
