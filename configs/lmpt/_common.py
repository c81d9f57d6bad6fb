"""What LMPT's configs share: the rows of its Tables 2 and 3, and its two recipes.

"paper" is the paper's text: contexts from "a photo of a", one for each class, SGD at 5e-4 (VOC-LT)
or 1e-4 (COCO-LT), cosine over 30 epochs; where it is silent the release's values: momentum 0.9,
decay 1e-4, batches of 64. "released" is what the authors' code runs: 16 random context vectors,
5e-4, lowered to a tenth where the mAP of the test images has stood still for five epochs, 50
epochs; ImageNet's pixel statistics; BatchNorm in training mode, so that the statistics of the
frozen RN50 drift; the focal weight of the loss one scalar for a batch. Both squash images to 224
pixels and mirror them. Neither has validation images: the release chooses the epoch by test mAP of
the softmax over the classes; "best" and the plateau go by that of the logits here, and the last
epoch stands beside it. An epoch here leaves out the images that fill no whole batch.
"""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mlclip_jax.errors import UserError
from mlclip_jax.spec import parse_arg, unknown

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "_benchmark.py"))
_FIGURES = _SHARED["FIGURES"]

#: Table 3: from all components to none but the prompts. The last is CoOp with a context a class.
ROWS: Mapping[str, Mapping[str, Any]] = {
    "lmpt": {},
    "margin": {"reweight": False},
    "embedding": {"reweight": False, "class_aware_margin": False},
    "coop": {"classification_weight": 1.0},
}
#: Table 2. The release's class-balanced loss has no focal weight, its asymmetric loss is a mean.
LOSSES: Mapping[str, str] = {
    "db": "distribution_balanced({})",
    "bce": "binary_cross_entropy",
    "mls": "multi_label_soft_margin",
    "focal": "focal",
    "cb": "class_balanced",
    "r_bce_focal": "rebalanced_focal({})",
    "asl": "asymmetric(reduction='mean')",
}
_VARIANTS = ("paper", "released")


def method(row: str, loss: str, variant: str, constants: str) -> dict[str, Any]:
    """`config.method` of a row of Table 3 with a loss of Table 2.

    Args:
      row: of `ROWS`.
      loss: of `LOSSES`.
      variant: "paper" or "released".
      constants: of the distribution-balanced loss, where they are not the defaults.

    Raises:
      UserError: there is no such row, loss or variant, or no such row of the released variant.
    """
    for what, name, known in (
        ("row", row, ROWS),
        ("loss", loss, LOSSES),
        ("variant", variant, _VARIANTS),
    ):
        if name not in known:
            raise unknown(what, name, known)
    if variant == "released" and row in ("margin", "embedding"):
        raise UserError(f"row={row} is of the paper: the released variant has all components")
    settings = constants
    if loss == "r_bce_focal":  # of the distribution-balanced loss only the smoothing map
        parts = [part for part in constants.split(", ") if part.startswith("mu=")]
        settings = ", ".join(parts + (["balance=0.5"] if variant == "released" else []))
    elif variant == "released":
        settings = ", ".join(filter(None, (constants, "variant='lmpt'")))
    found = {
        "name": "lmpt",
        "variant": variant,
        "loss": LOSSES[loss].format(settings).removesuffix("()"),
        **ROWS[row],
    }
    if variant == "released":
        found |= {"ctx_init": "", "n_ctx": 16, "batch_norm": "train"}
    return found


def benchmark(
    arg: str | None,
    data: str,
    paper: Mapping[str, Mapping[str, tuple[float, ...]]],
) -> ConfigDict:
    """The settings of a run on VOC-LT or COCO-LT.

    Args:
      arg: what follows the config file's name; the files' headers say what it may hold.
      data: "voc_lt" or "coco_lt".
      paper: published total, head, medium and tail mAP in per cent by backbone, then by row, or by
        loss where the row is "lmpt" and the loss is not "db".

    Raises:
      UserError: an argument that is unknown.
    """
    arg = parse_arg(
        arg,
        backbone="ViT-B/16",
        row="lmpt",
        loss="db",
        unified=False,
        position="end",
        variant="paper",
        seed=0,
        data_dir="",
    )
    arg.data = data
    constants = _SHARED["LONG_TAIL"][arg.data][1]
    settings = method(arg.row, arg.loss, arg.variant, constants)
    settings |= {"class_specific": not arg.unified, "class_position": arg.position}
    config = _SHARED["benchmark"](arg, settings)
    if arg.variant == "released":
        config.backbone.image_norm = "imagenet"
        config.duration = "50 epochs"
        config.optim = {
            "name": "sgd",
            "learning_rate": 5e-4,
            "weight_decay": 1e-4,
            "schedule": "plateau",
            "min_learning_rate": 1e-7,
        }
    published = paper.get(arg.backbone, {})
    key = arg.row if arg.loss == "db" else (arg.loss if arg.row == "lmpt" else "")
    alike = (arg.unified, arg.position, arg.variant) == (False, "end", "paper")
    if key in published and alike:
        config.paper = dict(zip(_FIGURES, published[key], strict=True))
    return config
