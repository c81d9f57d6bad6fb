"""LMPT's release: richard-peng-xia/LMPT, the whole model's state dict.

The BatchNorm statistics are taken from the file: the release lets those of its frozen ResNet
follow the training images.
"""

from __future__ import annotations

from mlclip_jax.clip.layouts import SAME, Row
from mlclip_jax.training.checkpoint import BACKBONE_PREFIX
from released.base import tower_rows
from released.coop import SETTINGS, learner_release

IMAGE = tower_rows("image", "image_encoder.")
STATISTICS = tuple(row for row in IMAGE if row.path.endswith(("/mean", "/var")))

RELEASE = learner_release(
    "lmpt",
    {"": "context"},
    prefix="prompt_learner.",
    settings=SETTINGS,
    learned=STATISTICS,
    frozen=(
        *(row for row in IMAGE if row not in STATISTICS),
        *tower_rows("text", "text_encoder."),
        Row(("logit_scale",), f"{BACKBONE_PREFIX}logit_scale", SAME),
    ),
    remark="the release was trained on pixels normalised as ImageNet's: set "
    "backbone.image_norm='imagenet' where the config does not",
)
