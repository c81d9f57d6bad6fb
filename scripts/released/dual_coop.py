"""DualCoOp's release: sunxm2357/DualCoOp, the whole model at the training's image size."""

from __future__ import annotations

from released.base import tower_rows
from released.coop import learner_release

RELEASE = learner_release(
    "dual_coop",
    {"_pos": "positive", "_neg": "negative"},
    prefix="prompt_learner.",
    settings={"logit_scale": None},
    frozen=(*tower_rows("image", "image_encoder."), *tower_rows("text", "text_encoder.")),
    unused=(
        "logit_scale",  # regions have fixed factors, 20 and 5
        "prompt_learner.tokenized_prompts",  # the suffixes are compared
    ),
    remark="the towers are the backbone's",
)
